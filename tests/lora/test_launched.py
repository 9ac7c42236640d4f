"""What `accelerate launch` asks for: a model that it compiles is trained as any other, and what is not done is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from lora_runs import write
from safetensors.torch import load_file

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.launched import check_accelerator
from vidaccel.lora.trainer import make_accelerator


@pytest.fixture
def afresh() -> Iterator[None]:
    """accelerate keeps what it was told once in a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch._dynamo.reset()


def test_a_compiled_model_has_the_names_of_a_plain_one(tiny_settings, run_tiny, monkeypatch, afresh, stop_after):
    """They began with `_orig_mod.`: the second phase knew nothing of the first, and the result had no weight of it."""
    plain = run_tiny(tiny_settings("plain"))
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = run_tiny(tiny_settings("compiled"))
    assert make_accelerator(tiny_settings()).state.dynamo_plugin.backend == "EAGER"
    assert compiled.trained.keys() == plain.trained.keys()
    for name, value in plain.trained.items():
        torch.testing.assert_close(compiled.trained[name], value)


def test_the_lora_of_a_compiled_model_can_be_read(tmp_path, text_base, monkeypatch, afresh):
    from diffusers import WanPipeline

    file = write(tmp_path, text_base, lora={"targets": ["to_q"]}, validation={"clips": 0, "prompts": []})
    plain = load_file(run("lora", file)["lora"])
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    result = run("lora", file, [f"out={tmp_path / 'compiled'}"])["lora"]
    compiled = load_file(result)
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
    pipe = WanPipeline.from_pretrained(text_base)
    pipe.load_lora_weights(Path(result).parent)
    assert "default_0" in pipe.transformer.peft_config


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed .*, not supported: .*--use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"},
            "regional compilation, .* set dynamo_use_regional_compilation to false",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_words(tiny_settings, run_tiny, monkeypatch, afresh, variables, words):
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(ConfigError, match=words):
            make_accelerator(tiny_settings())
    assert len(run_tiny(tiny_settings()).seen) == 6


@pytest.mark.parametrize(
    ("kind", "parallel", "backend", "words"),
    [
        ("DEEPSPEED", None, "NO", "asks for DEEPSPEED, not supported"),
        ("XLA", None, "NO", "asks for XLA, not supported"),
        ("FSDP", SimpleNamespace(cp_enabled=True), "NO", "asks for context parallelism, not supported"),
        ("FSDP", None, "INDUCTOR", "dynamo backend inductor under FSDP"),
    ],
)
def test_other_ways_to_use_devices_are_refused(kind, parallel, backend, words):
    dynamo = SimpleNamespace(backend=backend, use_regional_compilation=False)
    plugin = object() if kind == "FSDP" else None
    state = SimpleNamespace(dynamo_plugin=dynamo, parallelism_config=parallel, fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=kind, state=state)
    with pytest.raises(ConfigError, match=words):
        check_accelerator(accelerator)
    dynamo.backend, state.parallelism_config, accelerator.distributed_type = "NO", None, "MULTI_GPU"
    check_accelerator(accelerator)
