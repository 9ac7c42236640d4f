"""Frozen weights that stay on the CPU: the same training, and the copies of one block at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from lora_runs import recipe, write
from safetensors.torch import load_file
from torch import nn

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.footprint.memory import blocks_of
from vidaccel.lora.footprint.offload import Offloaded, offload, offloaded_numbers

CHECKPOINTED = {"gradient_checkpointing": True}


def losses(made, checkpointed: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor], nn.Module]:
    """The loss of one batch of a recipe, and the gradients of its LoRA."""
    torch.manual_seed(0)
    made.ready(made.flowing)
    phase = made.phases()[0]
    model = phase.setup({})
    if not checkpointed:
        model.disable_gradient_checkpointing()
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = {"latents": torch.randn(1, 8, 2, 4, 6), "caption": ["a red circle"]}
    loss, _ = phase.loss(model.train(), batch, Generators([Place(0, 0, 1, 0)]))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model


def test_gradients_flow_through_what_is_copied(tmp_path, text_base):
    file = write(tmp_path, text_base, loop=CHECKPOINTED)
    plain, wanted, _ = losses(recipe(file))
    loss, found, model = losses(recipe(file, ["model.offload_blocks=2"]))
    layers = [module for module in model.modules() if isinstance(module, Offloaded)]
    assert len(layers) == 2 * 10
    assert torch.equal(loss, plain) and found.keys() == wanted.keys() and len(wanted) == 2 * 10 * 2
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not [name for name, _ in model.named_parameters() if "base_layer" in name and name.startswith("blocks.")]


def test_copies_are_of_one_block_at_a_time(tmp_path, text_base, monkeypatch):
    """In the forward pass of one layer, and in the backward pass of one block."""
    alive, most = [], []
    copied = Offloaded.copied

    def watched(self, value, device):
        made = copied(self, value, device)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(made)]
        most.append(len(alive))
        return made

    monkeypatch.setattr(Offloaded, "copied", watched)
    made = recipe(write(tmp_path, text_base, loop=CHECKPOINTED), ["model.offload_blocks=2"])
    losses(made)
    one_block = max(most)
    assert not [each for each in alive if each() is not None]
    most.clear()
    losses(made, checkpointed=False)
    assert one_block <= max(most) / 2 + 2  # of two blocks; the last copies of one and the first of the other


def test_a_run_is_the_same(tmp_path, text_base):
    trained = []
    for name, change in (("whole", 0), ("offloaded", 2)):
        file = write(tmp_path / name, text_base, loop=CHECKPOINTED, validation={"clips": 1, "prompts": []})
        result = run("lora", file, [f"model.offload_blocks={change}"])
        trained.append(load_file(Path(result["lora"])))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_what_it_takes_of_a_gpu_is_less(tmp_path, text_base):
    made = recipe(write(tmp_path, text_base, loop=CHECKPOINTED))
    skeleton = made.backbone.skeleton()
    away, at_work = offloaded_numbers(skeleton, 2)
    assert away == 2 * at_work == sum(m.weight.numel() + m.bias.numel() for m in linears(skeleton))
    layouts = [made.backbone.layout(5, 32, 48)]
    whole = made.memory(skeleton, layouts).frozen
    less = recipe(write(tmp_path, text_base, loop=CHECKPOINTED), ["model.offload_blocks=2"])
    assert less.memory(skeleton, layouts).frozen == whole - 4 * (away - at_work)


def linears(skeleton: nn.Module) -> list[nn.Linear]:
    return [m for block in blocks_of(skeleton) for m in block.modules() if type(m) is nn.Linear]


def test_what_is_trained_stays(text_base):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))])
    assert offload(model, 1) == 1 and [type(m) for m in model.blocks[0]] == [nn.Linear, Offloaded]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.offload_blocks=3"], "model.offload_blocks is 3, and the transformer has 2 blocks: give fewer"),
        (["model.offload_blocks=1", "loop.gradient_checkpointing=false"], "set loop.gradient_checkpointing"),
        (["model.offload_blocks=1", "model.quantise=int8"], "model.offload_blocks is 1 and model.quantise int8"),
        (["model.offload_blocks=1", "train.low_bit_linears=int8"], "is 1 and train.low_bit_linears int8"),
    ],
)
def test_what_cannot_be(tmp_path, text_base, overrides, words):
    with pytest.raises(ConfigError, match=words):
        recipe(write(tmp_path, text_base, loop=CHECKPOINTED), overrides)
