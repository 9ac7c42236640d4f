"""Guidance-Free with ComfyUI's own Wan in this process, against diffusers' Wan with the same weights.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging

import pytest
import torch
from gft_adapters import write_native
from native_comfyui import MODELS, build, defaults, patched, sample, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidaccel.nodes.native.guidance import guide
from vidaccel.nodes.report.wording import InputError


def passes(model) -> list[int]:
    """The batch of each forward pass of a MODEL from now on, in a clone's wrapper."""
    from comfy.patcher_extension import WrappersMP

    seen: list[int] = []

    def wrapper(executor, x, *args, **kwargs):
        seen.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", wrapper)
    return seen


def test_one_pass_a_step_at_the_node_s_guidance(tmp_path, caplog):
    """Whatever cfg the sampler has; the MODEL that came in is as it was."""
    description, model, unpatched = tiny("wan_t2v")
    two = model.clone()
    seen = passes(two)
    sample(two, description)
    assert sum(seen) == 8 and description.cfg > 1
    file = write_native(tmp_path)
    clone = guide(model, file, 4.0)
    seen = passes(clone)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance"):
        four = sample(clone, description)
    assert seen == [1, 1, 1, 1]
    assert f"cfg {description.cfg:g} of the sampler is not used; the node's guidance is 4" in caplog.text
    weaker = sample(guide(model, file, 2.0), description)
    assert not torch.allclose(four, weaker, atol=1e-3) and not torch.allclose(four, unpatched, atol=1e-3)
    assert sample(model, description).equal(unpatched)


def test_a_pass_that_somebody_else_needs_is_made_and_told(tmp_path, caplog):
    """Another node, whichever of the two comes first, or a sampler; not where there is no negative prompt."""
    import comfy.samplers

    description, model, _ = tiny("wan_t2v")
    file, words = write_native(tmp_path), "each step makes two passes"
    before = model.clone()
    before.disable_model_cfg1_optimization()
    behind = guide(model, file, 4.0)
    behind.disable_model_cfg1_optimization()
    for clone in (guide(before, file, 4.0), behind):
        for _ in range(2):
            caplog.clear()
            seen = passes(clone)
            sample(clone, description)
            assert sum(seen) == 8 and caplog.text.count(words) == 1
    alone = guide(model, file, 4.0)
    text = [[torch.zeros(1, 7, 32), {}]]
    latent = torch.zeros(1, 16, *description.latent)
    for name, negative, count in (("euler", text, 2), ("euler_cfg_pp", text, 4), ("euler_cfg_pp", None, 2)):
        caplog.clear()
        guider, seen = comfy.samplers.CFGGuider(alone), passes(alone)
        guider.set_conds(text, negative) if negative else guider.inner_set_conds({"positive": text})
        guider.sample(latent, latent, comfy.samplers.sampler_object(name), torch.tensor([1.0, 0.5, 0.0]), seed=0)
        assert sum(seen) == count and caplog.text.count(words) == (count == 4)


def test_without_guidance_a_gated_adapter_is_the_model(tmp_path):
    description, model, _ = tiny("wan_t2v")
    plain = guide(model, write_native(tmp_path), 1.0)
    (tmp_path / "other").mkdir()
    silent = write_native(tmp_path / "other")
    save_file({n: 0 * t for n, t in load_file(silent).items()}, silent, safe_open(silent, "pt").metadata())
    assert torch.equal(sample(plain, description), sample(guide(model, silent, 4.0), description))


@pytest.mark.parametrize("gated", [True, False])
def test_the_weights_are_those_of_guidance_free(tmp_path, gated):
    """W + gate * up @ down, and the bias with the embedding of beta that `guidance_free` adds."""
    from vidaccel.pipelines.guidance_free import read_adapter

    model = build(MODELS["wan_t2v"])  # with no patches of other tests in its weights
    file = write_native(tmp_path, gated=gated)
    clone = guide(model, file, 3.0)
    gate = (3 - 1) / (6 - 1) if gated else 1.0
    lora, embedder = read_adapter(file).weights()
    with torch.no_grad():
        added = gate * embedder(torch.tensor([1 / 3]))[0]
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    clone.patch_model()
    try:
        after = {name: value.clone() for name, value in clone.model.state_dict().items()}
    finally:
        clone.unpatch_model()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    layers = [f"diffusion_model.blocks.{n}.self_attn.q" for n in range(3)]
    assert changed == {"diffusion_model.time_embedding.2.bias", *(f"{layer}.weight" for layer in layers)}
    bias = "diffusion_model.time_embedding.2.bias"
    torch.testing.assert_close(after[bias] - before[bias], added, atol=1e-5, rtol=1e-4)
    for layer in layers:
        update = gate * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        name = f"{layer}.weight"
        torch.testing.assert_close(after[name] - before[name], update, atol=1e-5, rtol=1e-4)


def test_all_weights_trained(tmp_path):
    """Then there is the embedding alone."""
    description, model, _ = tiny("wan_t2v")
    stated = {"loss": "white_box", "max_scale": 6.0, "gated": False, "train": "full"}
    file = write_native(tmp_path, blocks=0, guidance_free=stated)
    assert not torch.equal(*(sample(guide(model, file, scale), description) for scale in (2.0, 5.0)))


@pytest.mark.parametrize("first", ["sparse", "guidance"])
def test_with_sparse_attention_in_either_order(tmp_path, first):
    description, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path)
    if first == "sparse":
        clone, session = patched(model)
        clone = guide(clone, file, 4.0)
    else:
        clone, session = patched(guide(model, file, 4.0))
    assert sample(clone, description).isfinite().all()
    assert {record.branch for record in session.report().records} == {"cond"}


def test_the_node(tmp_path):
    from vidaccel.nodes.guidance_nodes import NODES, VidaccelGuidanceFree

    description, model, _ = tiny("wan_t2v")
    values = defaults(VidaccelGuidanceFree) | {"path": str(write_native(tmp_path)), "guidance": 4.0}
    [clone] = VidaccelGuidanceFree.execute(model, **values).result
    assert torch.equal(
        sample(clone, description), sample(guide(model, tmp_path / "adapter.safetensors", 4), description)
    )
    for node in NODES:
        schema = node.GET_SCHEMA()
        assert schema.description and all(i.tooltip and i.tooltip.endswith(".") for i in schema.inputs)
        assert node.GET_NODE_INFO_V1()["input"]["required"]


FEW = {
    "recipe": "consistency",
    "guidance_free": {"min_scale": 4.0, "max_scale": 4.0, "gated": False},
    "few_steps": {"sigmas": [1.0, 0.9, 0.75, 0.5]},
}


def timesteps(model) -> list[float]:
    """What each forward pass of a MODEL is told of its noise, from now on."""
    from comfy.patcher_extension import WrappersMP

    seen: list[float] = []

    def wrapper(executor, x, t, *args, **kwargs):
        seen.append(float(t[0]))
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "times", wrapper)
    return seen


def test_few_steps_are_at_the_levels_of_the_adapter(tmp_path, caplog):
    """Whatever the scheduler is."""
    description, model, _ = tiny("wan_t2v")
    clone = guide(model, write_native(tmp_path, **FEW), 4.0)
    seen = timesteps(clone)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance"):
        sample(clone, description)
    assert seen == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert "the noise levels of the scheduler are not used" in caplog.text


def test_few_steps_that_cannot_be(tmp_path):
    import comfy.samplers

    description, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path, **FEW)
    with pytest.raises(InputError, match="guidance is 2: adapter.safetensors was trained for 4 alone. Give that"):
        guide(model, file, 2.0)
    guider = comfy.samplers.CFGGuider(guide(model, file, 4.0))
    guider.set_conds([], [])
    latent = torch.zeros(1, 16, *description.latent)
    for name, sigmas, words in (
        ("euler", [1.0, 0.5, 0.0], "steps: .* distilled to 4, .* and the sampler makes 2: set the steps to 4"),
        ("euler", [1.0, 0.9, 0.7, 0.5, 0.3], "distilled to 4, all of them in one sampling: set"),
        ("euler", [0.6, 0.5, 0.4, 0.3, 0.0], "denoise: .* these begin at 0.6: set denoise to 1"),
        ("uni_pc", [1.0, 0.9, 0.7, 0.5, 0.0], "sampler is .*, and adapter.safetensors was distilled for euler"),
    ):
        with pytest.raises(InputError, match=words):
            guider.sample(latent, latent, comfy.samplers.sampler_object(name), torch.tensor(sigmas), seed=0)


def test_other_guiders_are_refused(tmp_path):
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    description, model, _ = tiny("wan_t2v")
    guider = Guider(guide(model, write_native(tmp_path), 4.0))
    guider.set_conds([], [])
    latent = torch.zeros(1, 16, *description.latent)
    sampler = comfy.samplers.sampler_object("euler")
    with pytest.raises(InputError, match="guided by a Guider, which makes passes of its own"):
        guider.sample(latent, latent, sampler, torch.tensor([1.0, 0.0]), seed=0)


def test_what_does_not_fit(tmp_path):
    _, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path)
    for other, scale, words in (
        (tmp_path / "gone", 4.0, "adapter: .*gone is no adapter that can be read"),
        (file, 7.0, "guidance is 7: adapter.safetensors was trained for 1 to 6"),
        (file, 0.5, "guidance is 0.5"),
    ):
        with pytest.raises(InputError, match=words):
            guide(model, other, scale)
    with pytest.raises(InputError, match="guidance-free already"):
        guide(guide(model, file, 2.0), file, 2.0)
    with pytest.raises(InputError, match="model is empty"):
        guide(None, file, 2.0)
    for changes, words in (
        ({"blocks": 4}, "width 48 with 4 blocks, and this MODEL has 48 and 3"),
        ({"width": 64}, "width 64 with 3 blocks"),
        ({"recipe": "lora"}, "of the recipe lora: give one that the recipe gft or consistency made"),
    ):
        (folder := tmp_path / "-".join(changes)).mkdir()
        with pytest.raises(InputError, match=words):
            guide(model, write_native(folder, **changes), 2.0)
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {n.replace(name, "diffusion_model.blocks.0.other.q"): t for n, t in load_file(file).items()}
    (tmp_path / "odd").mkdir()
    odd = tmp_path / "odd" / "adapter.safetensors"
    save_file(tensors, odd, safe_open(file, "pt").metadata())
    with pytest.raises(InputError, match="has 3 layers, of which this MODEL has 2"):
        guide(model, odd, 2.0)
    _, vace, _ = tiny("wan_vace")
    with pytest.raises(InputError, match="model is a VaceWanModel, and guidance-free adapters are for WanModel"):
        guide(vace, file, 2.0)
