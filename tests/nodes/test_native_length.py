"""*Radial Length* on ComfyUI's own Wan, in this process: the LoRA and its mask.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from length_adapters import METHOD
from native_comfyui import defaults, sample, tiny
from safetensors.torch import load_file, save_file

from vidaccel import Riflex
from vidaccel.nodes.length_nodes import VidaccelRadialLength
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.length import TrainedLength, facts_of_length


def write(folder: Path, frames: int = 9, method=METHOD, riflex=None, width: int = 48, blocks: int = 3) -> Path:
    """A LoRA of ComfyUI's tiny Wan, as the recipe `length` writes them."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number in range(blocks):
        for letter, shape in (("A", (2, width)), ("B", (width, 2))):
            name = f"diffusion_model.blocks.{number}.self_attn.q.lora_{letter}.weight"
            tensors[name] = 0.5 * torch.randn(shape, generator=generator)
    header = {"recipe": "length", "base": "tiny", "base_hash": "none", "part": "transformer", "rank": 2}
    header["length"] = facts_of_length(TrainedLength(method, 0.3, 2, frames, riflex))
    file = folder / "length.safetensors"
    save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps(header)})
    return file


def run(model, **values):
    return VidaccelRadialLength.execute(model, **(defaults(VidaccelRadialLength) | values)).result


def test_it_is_among_the_nodes_and_every_input_is_explained():
    import asyncio

    from vidaccel.nodes import comfy_entrypoint

    found = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    assert VidaccelRadialLength in found and len(found) == len({node.define_schema().node_id for node in found})
    assert all(item.tooltip.endswith(".") for item in VidaccelRadialLength.define_schema().inputs)


def test_the_lora_and_its_mask(tmp_path):
    description, model, unpatched = tiny("wan_t2v")
    file = write(tmp_path)
    made, session = run(model, path=str(file))
    out = sample(made, description, latent=(9, 16, 16))
    report = session.report()
    assert {r.reason for r in report.records if not r.reason} == {""} and report.config["lora"] == file.name
    assert {r.layer for r in report.records if r.reason} == {0}
    assert out.isfinite().all() and sample(model, description).equal(unpatched)
    without, _ = run(model, path=str(file), weight=0.0)
    assert not sample(without, description, latent=(9, 16, 16)).equal(out)


def test_another_lora_on_the_same_layers_may_be_there(tmp_path):
    from comfy.sd import load_lora_for_models

    description, model, _ = tiny("wan_t2v")
    file = write(tmp_path)
    other, _ = load_lora_for_models(model, None, load_file(file), -1.0, 0.0)
    made, _ = run(other, path=str(file))
    plain, _ = run(model, path=str(file), weight=0.0)
    out, expected = (sample(each, description, latent=(9, 16, 16)) for each in (made, plain))
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)  # one takes the other away


def test_a_lora_of_another_size_is_refused_and_not_left_out(tmp_path):
    """ComfyUI itself logs each layer that does not fit, and samples without the LoRA."""
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(InputError, match=r"blocks.0.self_attn.q makes 64 channels of 64, and this MODEL's makes 48 of"):
        run(model, path=str(write(tmp_path, width=64)))
    with pytest.raises(InputError, match="lora: length.safetensors has 4 layers, of which this MODEL has 3"):
        run(model, path=str(write(tmp_path, blocks=4)))


def test_what_cannot_be_is_refused(tmp_path):
    description, model, unpatched = tiny("wan_t2v")
    made, _ = run(model, path=str(write(tmp_path, frames=2)))
    with pytest.raises(ValueError, match="length.safetensors was trained up to 2"):
        sample(made, description, latent=(9, 16, 16))
    for settings, words in (
        ({"method": None}, "was trained with dense attention"),
        ({"riflex": Riflex(2)}, "was trained with RIFLEx"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, path=str(write(tmp_path, **settings)))
    with pytest.raises(ValueError, match="choose a file of models/loras"):
        run(model)
    with pytest.raises(ValueError, match="no LoRA that can be read"):
        run(model, path=str(tmp_path / "gone.safetensors"))
    assert sample(model, description).equal(unpatched)
