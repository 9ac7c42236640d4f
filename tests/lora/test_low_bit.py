"""Weights, optimiser states and products in low bits: the error where a package is missing, runs where it is there."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from lora_runs import recipe, write
from safetensors.torch import load_file
from torch import nn

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.latents import Latents
from vidaccel.lora.footprint.low_bit import check_linears, in_low_bits, linears_of_blocks
from vidaccel.lora.phase_checks import check_phase
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
        ("torchao", "train.optimizer=adamw_4bit_torchao", "phase train: .*, which needs torchao: pip"),
        ("bitsandbytes", "train.optimizer=adamw_8bit_bitsandbytes", "phase train: .*, which needs bitsandbytes: pip"),
        ("prodigyopt", "train.optimizer=prodigy", "phase train: .*, which needs prodigyopt: pip"),
        ("torchao", "train.low_bit_linears=int8", "phase train: low_bit_linears is int8, which needs torchao: pip"),
        (
            "torchao",
            "train.low_bit_linears=fp8_rowwise",
            "phase train: low_bit_linears is fp8_rowwise, which needs tor",
        ),
    ],
)
def test_a_missing_package_is_told_before_anything_is_done(tmp_path, text_base, monkeypatch, package, override, words):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=words):
        run("lora", write(tmp_path, text_base, train={"learning_rate": 1.0}), [override])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "override", ["model.quantise=int8", "train.optimizer=adamw_8bit_torchao", "train.optimizer=adamw_4bit_torchao"]
)
def test_what_fsdp_would_split_is_refused_under_it(tmp_path, text_base, monkeypatch, override):
    from vidaccel.lora.recipes.lora import FlowLora

    monkeypatch.setattr("vidaccel.lora.recipes.lora.quantisation", lambda kind: None)
    monkeypatch.setattr("vidaccel.lora.phase_checks.of_package", lambda *_: None)
    phase = FlowLora(recipe(write(tmp_path, text_base), [override]))
    check_phase(phase, torch.device("cpu"), False)
    with pytest.raises(ConfigError, match="FSDP"):
        check_phase(phase, torch.device("cpu"), True)


def test_no_layer_for_low_bits_is_told_before_anything_is_encoded(tmp_path, text_base, monkeypatch):
    """The layers of the tiny model are no multiples of 16. It was told when the phase began, behind the encoding."""
    monkeypatch.setattr("vidaccel.lora.phase_checks.check_linears", lambda *_: None)
    monkeypatch.setattr(Latents, "fill", lambda *_: pytest.fail("clips were encoded"))
    with pytest.raises(ConfigError, match="phase train: low_bit_linears is int8, but what it trains has no linear"):
        run("lora", write(tmp_path, text_base), ["train.low_bit_linears=int8"])
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("name", ["8bit_torchao", "fp8_torchao", "4bit_torchao", "8bit_bitsandbytes"])
def test_an_adamw_of_low_bits_goes_on_from_a_checkpoint(tmp_path, text_base, stop_after, name):
    """Its state is kept in low bits there too, and the learning rate follows its schedule."""
    kind, package = name.split("_")
    pytest.importorskip(package)
    sections = {
        "train": {"optimizer": f"adamw_{name}", "lr_scheduler": "cosine", "steps": 3},
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
        assert type(kept["exp_avg"]).__name__ == f"OptimState{kind.capitalize()}"
    else:
        entries = [*kept.values(), *(v for value in kept.values() if isinstance(value, dict) for v in value.values())]
        assert torch.uint8 in {entry.dtype for entry in entries if isinstance(entry, torch.Tensor)}
    run("lora", tmp_path / "a.yaml", resume="latest")
    straight, resumed = (load_file(tmp_path / n / "phases" / "train.safetensors") for n in ("straight", "run"))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


# -- linear layers that compute in low bits ----------------------------------------------------------------------------

KINDS = ("int8", "fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_with_gw_hp")


def blocks() -> nn.Module:
    """Two blocks of a feed-forward and a norm, with an embedding before and a head behind."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.ModuleDict({"linear": nn.Linear(32, 32)})
            self.up, self.down, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # A gradient with gaps, as transposed heads give it.
            return x + self.down(self.up(x).transpose(1, 2).relu().transpose(1, 2))

    return nn.ModuleDict(
        {"embed": nn.Linear(32, 32), "blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(32, 32)}
    )


def outcome(model: nn.Module, half: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What it makes of 33 tokens, and the gradients."""
    given = torch.randn(2, 33, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        made = model["embed"](given)
        for block in model["blocks"]:
            made = block(made)
        made = model["head"](made)
    made.float().square().mean().backward()
    return made, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_matrices_of_blocks_compute_in_low_bits():
    """Not the first and last layers, those of norms, odd ones, or a LoRA."""
    from peft import LoraConfig, inject_adapter_in_model

    model = blocks()
    wanted = [f"blocks.{number}.{name}" for number in (0, 1) for name in ("up", "down")]
    assert linears_of_blocks(model) == wanted
    inject_adapter_in_model(LoraConfig(r=16, target_modules=["up"]), model)
    assert linears_of_blocks(model) == [name.replace("up", "up.base_layer") for name in wanted]


@has_torchao
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_in_low_bits_are_near_those_in_full(kind, half):
    """Forward and backward, with 66 rows, of which no kernel takes tiles; parameters keep their names and types."""
    plain, low = blocks(), blocks()
    names = [name for name, _ in low.named_parameters()]
    assert in_low_bits(low, kind, "train") == 4
    assert [name for name, _ in low.named_parameters()] == names
    (made, gradients), (wanted, expected) = outcome(low, half), outcome(plain, half)
    assert made.dtype == wanted.dtype and not torch.equal(made, wanted)
    # 8 bits of fp8 are a mantissa of 3 or 2.
    share = {"int8": 0.03}.get(kind, 0.08)
    assert (made.float() - wanted.float()).norm() < share * wanted.float().norm()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 2 * share * expected[name].norm(), name


@has_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_trains_on_products_in_low_bits(tmp_path, text_base, stop_after, kind):
    """It stops and goes on to the bit, its file is that of any LoRA, and a video is made on the way."""
    from diffusers import WanPipeline

    sections = {
        "model": {"dtype": "bfloat16"},
        "train": {"low_bit_linears": kind, "steps": 3},
        "lora": {"targets": ["to_q", "ffn.net.0.proj"]},
        "loop": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    }
    # The tiny model is 24 wide, of which no layer would do.
    base = wide(text_base, tmp_path / "wide")
    straight = run("lora", write(tmp_path, base, **sections), [f"out={tmp_path / 'straight'}"])
    assert list((tmp_path / "straight" / "validation").glob("*.mp4"))
    stop_after(2)
    with pytest.raises(Stopped):
        run("lora", tmp_path / "a.yaml")
    result = run("lora", tmp_path / "a.yaml", resume="latest")
    weights, resumed = load_file(straight["lora"]), load_file(result["lora"])
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    plain = run("lora", write(tmp_path, base, **sections), [f"out={tmp_path / 'plain'}", "train.low_bit_linears=none"])
    assert any(not torch.equal(weights[name], value) for name, value in load_file(plain["lora"]).items())
    pipe = WanPipeline.from_pretrained(base)
    pipe.load_lora_weights(straight["lora"])


def wide(base, folder):
    """A base with an untrained transformer of 32."""
    from diffusers import WanPipeline, WanTransformer3DModel

    config = WanTransformer3DModel.load_config(base, subfolder="transformer")
    torch.manual_seed(6)
    transformer = WanTransformer3DModel.from_config({**config, "attention_head_dim": 16})
    WanPipeline.from_pretrained(base, transformer=transformer).save_pretrained(folder)
    return folder


@has_torchao
def test_a_model_without_such_layers_is_refused(tmp_path, text_base):
    with pytest.raises(ConfigError, match="phase train: low_bit_linears is int8, but .* no linear layers in blocks"):
        run("lora", write(tmp_path, text_base), ["train.low_bit_linears=int8"])


def test_weights_that_are_quantised_have_no_such_products(tmp_path, text_base):
    overrides = ["model.quantise=int8", "train.low_bit_linears=int8"]
    with pytest.raises(ConfigError, match="train.low_bit_linears is int8 and model.quantise int8"):
        run("lora", write(tmp_path, text_base), overrides)


@has_torchao
def test_a_machine_without_such_products_is_told_so(monkeypatch):
    """In the words of torch, which refuses them on older GPUs."""

    def refuses(*args, **kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    check_linears("fp8_tensorwise", "train", torch.device("cpu"))
    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(ConfigError, match="cannot compute on cpu: torch._scaled_mm is only .* Set it to none"):
        check_linears("fp8_tensorwise", "train", torch.device("cpu"))
