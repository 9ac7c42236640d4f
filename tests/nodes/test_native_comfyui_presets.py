"""Apply Preset (native) with ComfyUI's own Wan in this process, against the nodes that do the same one by one.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging

import pytest
from gft_adapters import write_native
from native_comfyui import sample, tiny

from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.nodes.native_guidance import guide
from vidaccel.nodes.patch import sparsify
from vidaccel.nodes.preset_nodes import apply_native
from vidaccel.nodes.wording import InputError
from vidaccel.pipelines.presets import Cache

SPARSE = SVG2(density=0.5, q_clusters=4, k_clusters=8, schedule=DenseSchedule(first_steps=1, first_layers=1))


def test_the_method_and_what_stays_dense():
    description, model, unpatched = tiny("wan_t2v")
    preset = Preset(name="a", family="Wan 2.1 / 2.2", method=SPARSE, backend="reference", num_inference_steps=4)
    with pytest.raises(InputError, match="num_inference_steps: the sampler's steps. Set it there and switch skip_oth"):
        apply_native(model, preset)
    clone, session = apply_native(model, preset, skip_others=True)
    made = sample(clone, description)
    one_by_one, _ = sparsify(
        model, lambda layout: SPARSE, name="svg2", settings={}, dense_start_percent=0.25, dense_layers="0",
        backend="reference",
    )  # fmt: skip
    assert made.equal(sample(one_by_one, description)) and not made.equal(unpatched)
    report = session.report()
    assert report.config["preset"] == "a" and report.config["density"] == 0.5
    assert sample(model, description).equal(unpatched)


def test_guidance_in_one_pass_and_what_is_left_to_other_nodes(tmp_path, caplog):
    description, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path)
    preset = Preset(name="a", guidance_free=str(file), guidance_scale=4.0, cache=Cache("first_block"))
    with pytest.raises(InputError, match="cache: EasyCache or another node for caches. Set it there"):
        apply_native(model, preset)
    with caplog.at_level(logging.WARNING, "vidaccel.nodes.preset_nodes"):
        clone, session = apply_native(model, preset, skip_others=True)
    assert "preset a: not taken from it: cache: EasyCache" in caplog.text and session is None
    assert sample(clone, description).equal(sample(guide(model, file, 4.0), description))


def test_a_preset_of_another_model():
    _, model, _ = tiny("wan_t2v")
    for preset, message in (
        (Preset(name="a", family="HunyuanVideo", method=SPARSE), "a is for HunyuanVideo, and this MODEL is Wan"),
        (Preset(name="a", transformer={"num_layers": 30}, method=SPARSE), "a model of 30 layers, and this MODEL has 3"),
    ):
        with pytest.raises(InputError, match=message):
            apply_native(model, preset)
    with pytest.raises(InputError, match="model is empty"):
        apply_native(None, Preset(method=SPARSE))
