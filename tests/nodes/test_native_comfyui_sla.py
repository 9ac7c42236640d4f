"""*Apply SLA* on ComfyUI's own Wan model in this process.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import json

import pytest
import torch
from native_comfyui import defaults, nodes, patched, sample, tiny
from safetensors.torch import save_file

from vidaccel import SLA
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.acceleration.sla_weights import TrainedSLA, names_in

METHOD = SLA(topk=0.2, block=(32, 32))


@pytest.fixture
def adapter(tmp_path):
    """For the tiny model of 3 layers, 2 heads of 24 channels; its LoRA adds to the queries of every layer."""

    def write(scale: float, dim: int = 24, width: int = 48, method: SLA = METHOD, **changes):
        generator = torch.Generator().manual_seed(3)
        tensors = {
            name: scale * torch.randn((dim, dim) if name.endswith("weight") else (dim,), generator=generator)
            for name in names_in(f"blocks.{number}.attn1" for number in range(3))
        }
        for number in range(3):
            layer = f"diffusion_model.blocks.{number}.self_attn.q"
            tensors[f"{layer}.lora_A.weight"] = scale * torch.randn(2, width, generator=generator)
            tensors[f"{layer}.lora_B.weight"] = scale * torch.randn(width, 2, generator=generator)
        trained = TrainedSLA.of(method, (), "tiny", "0123").facts()
        header = {"recipe": "sla", "part": "transformer", "sla": trained, **changes}
        file = tmp_path / "adapter.safetensors"
        save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps(header)})
        return file

    return write


def applied(model, file):
    node = nodes()["VidaccelApplySLA"]
    return node.execute(model, **(defaults(node) | {"path": str(file), "min_tokens": 0})).result


def test_projections_that_are_zero_leave_block_sparse_attention(adapter):
    description, model, unpatched = tiny("wan_t2v")
    clone, session = applied(model, adapter(0.0))
    none = SLA(topk=0.2, block=(32, 32), linear_scope="none")
    sparse, _ = patched(model, none, dense_start_percent=0.0)
    out = sample(clone, description)
    assert out.equal(sample(sparse, description)) and not torch.allclose(out, unpatched, atol=1e-3)
    assert sample(model, description).equal(unpatched)
    report = session.report()
    assert report.config["topk"] == 0.2 and not any(record.reason for record in report.records)
    assert report.mean_density() == pytest.approx(0.2)  # 2 of 10 key blocks


def test_what_was_learned_is_applied(adapter):
    description, model, unpatched = tiny("wan_t2v")
    none, _ = applied(model, adapter(0.0))
    clone, _ = applied(model, adapter(0.5))
    out = sample(clone, description)
    assert out.isfinite().all() and not torch.allclose(out, sample(none, description), atol=1e-3)
    assert sample(model, description).equal(unpatched)


def test_projections_are_loaded_with_the_model_and_cast_as_they_are_needed(adapter):
    description, model, _ = tiny("wan_t2v")
    clone, _ = applied(model, adapter(0.5))
    expected = sample(clone, description)
    (patcher,) = clone.get_nested_additional_models()
    assert (patcher.load_device, patcher.offload_device) == (model.load_device, model.offload_device)
    assert {tuple(x.shape) for x in patcher.model.state_dict().values()} == {(24, 24), (24,)}
    patcher.model.to(torch.float64)  # where nothing casts, it would not multiply with float32
    assert sample(clone, description).equal(expected)
    assert not model.get_nested_additional_models()


def test_what_does_not_fit(adapter):
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(InputError, match="sla: choose a file of models/loras, or give the path of one"):
        applied(model, "")
    with pytest.raises(InputError, match="has 3 layers of 16 channels a head, and this model 3 of 24"):
        applied(model, adapter(0.5, dim=16))
    # As heads of 128 channels are in Wan 2.1 1.3B and in Wan 2.2 5B, both of 30 layers.
    for method in (METHOD, SLA(topk=0.2, block=(32, 32), linear_scope="none")):
        with pytest.raises(
            InputError, match=r"sla: adapter.safetensors is for a model whose .*self_attn.q makes 96 ch"
        ):
            applied(model, adapter(0.5, width=96, method=method))
    with pytest.raises(InputError, match="of the recipe lora: give one that the recipe sla made"):
        applied(model, adapter(0.5, recipe="lora"))
    _, camera, _ = tiny("wan_camera")
    with pytest.raises(InputError, match="model is a CameraWanModel: .* is for Wan 2.1 or 2.2"):
        applied(camera, adapter(0.5))
