"""Frozen weights and optimiser states in 8 bits: the error where a package is missing, and runs where it is there."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from lora_runs import recipe, write
from safetensors.torch import load_file

from vidaccel.lora import phase_run, run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.trainer import Stopped

has_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.mark.parametrize(
    ("package", "override", "words"),
    [
        ("torchao", "model.quantise=int8", "model.quantise is int8, which needs torchao: pip install torchao"),
        ("torchao", "model.quantise=fp8", "model.quantise is fp8, which needs torchao: pip install torchao"),
        (
            "torchao",
            "train.optimizer=adamw_8bit_torchao",
            "phase train: optimizer is .*, which needs torchao: pip",
        ),
        ("bitsandbytes", "train.optimizer=adamw_8bit_bitsandbytes", "phase train: .*, which needs bitsandbytes: pip"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_done(tmp_path, text_base, monkeypatch, package, override, words):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=words):
        run("lora", write(tmp_path, text_base), [override])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("override", ["model.quantise=int8", "train.optimizer=adamw_8bit_torchao"])
def test_what_fsdp_would_split_is_refused_under_it(tmp_path, text_base, monkeypatch, override):
    from vidaccel.lora.recipes.lora import FlowLora

    monkeypatch.setattr("vidaccel.lora.recipes.lora.quantisation", lambda kind: None)
    made = recipe(write(tmp_path, text_base), [override])
    phase = FlowLora(made)
    state = SimpleNamespace(fsdp_plugin=None)
    accelerator = SimpleNamespace(state=state)
    unbuilt = SimpleNamespace(accelerator=accelerator, settings=phase.settings, phase=phase)
    phase_run.PhaseRun._check_fsdp(unbuilt)  # without FSDP it may be
    state.fsdp_plugin = object()
    with pytest.raises(ConfigError, match="FSDP"):
        phase_run.PhaseRun._check_fsdp(unbuilt)


@has_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_frozen_weights_are_quantised_and_the_lora_learns(tmp_path, text_base, kind):
    """Its file is that of any LoRA, and loads onto the base in full precision."""
    from diffusers import WanPipeline
    from torchao.utils import TorchAOBaseTensor

    file = write(tmp_path, text_base, loop={"mixed_precision": "bf16"}, lora={"targets": ["to_q", "proj_out"]})
    overrides = [f"model.quantise={kind}", "model.dtype=bfloat16"]
    made = recipe(file, overrides)
    transformer = made.transformer()
    assert isinstance(transformer.blocks[0].attn1.to_q.base_layer.weight, TorchAOBaseTensor)
    assert isinstance(transformer.blocks[0].attn1.to_k.weight, TorchAOBaseTensor)
    result = run("lora", file, overrides)
    weights = load_file(result["lora"])
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    pipe = WanPipeline.from_pretrained(text_base)
    pipe.load_lora_weights(result["lora"])
    assert "default_0" in pipe.transformer.peft_config


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_an_8_bit_adamw_goes_on_from_a_checkpoint(tmp_path, text_base, stop_after, package):
    """Its state is kept in 8 bits there too, and the learning rate follows its schedule."""
    pytest.importorskip(package)
    sections = {
        "train": {"optimizer": f"adamw_8bit_{package}", "lr_scheduler": "cosine", "steps": 3},
        "lora": {"rank": 256, "targets": ["to_q"]},  # below 4096 numbers it keeps 32 bits
        "validation": {"prompts": []},
    }
    run("lora", write(tmp_path, text_base, **sections), [f"out={tmp_path / 'straight'}"])
    stop_after(2)
    with pytest.raises(Stopped):
        run("lora", tmp_path / "a.yaml")
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_00000002" / "state.pt", weights_only=True)
    kept = state["state"]["optimizer"]["state"][0]
    if package == "torchao":
        assert type(kept["exp_avg"]).__name__ == "OptimState8bit"
    else:
        entries = [*kept.values(), *(v for value in kept.values() if isinstance(value, dict) for v in value.values())]
        assert torch.uint8 in {entry.dtype for entry in entries if isinstance(entry, torch.Tensor)}
    run("lora", tmp_path / "a.yaml", resume="latest")
    straight, resumed = (load_file(tmp_path / n / "phases" / "train.safetensors") for n in ("straight", "run"))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, msg=name)
