"""Training through a sparse MODEL, as ComfyUI's Train LoRA node does: with gradients, and blocks that run twice.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import pytest
import torch
from native_comfyui import MODELS, build, management, models, patched
from torch.utils.checkpoint import checkpoint

from vidaccel import SVG2


def gradients(name: str, checkpointed: bool) -> tuple[list[torch.Tensor], set[int]]:
    """The gradients of the first projections of all blocks, and the layers that were sparse."""
    description = MODELS[name]
    clone, session = patched(build(description), SVG2(density=0.4), dense_start_percent=0.0, dense_layers="0")
    blocks = clone.model.diffusion_model.blocks
    clone.model.diffusion_model.requires_grad_(True)
    for block in blocks if checkpointed else ():
        block.forward = _twice(block.forward)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, description.channels, *description.latent, generator=generator)
    text = torch.randn(1, description.text, description.text_dim, generator=generator)
    options = {"wrappers": {kind: dict(of) for kind, of in clone.wrappers.items()}}
    out = clone.model.apply_model(x, torch.tensor([0.5]), c_crossattn=text, transformer_options=options)
    out.square().mean().backward()
    assert not session._notes
    return [block.self_attn.q.weight.grad for block in blocks], {
        record.layer for record in session.report().records if not record.reason
    }


def _twice(forward):
    """As Train LoRA wraps a block."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("name", models("wan_t2v_odd"))
def test_gradient_checkpointing_changes_no_gradient(name, monkeypatch):
    monkeypatch.setattr(management, "in_training", True, raising=False)  # its own kernels have no backward pass
    expected, sparse = gradients(name, checkpointed=False)
    found, again = gradients(name, checkpointed=True)
    assert sparse == again == {1, 2}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
