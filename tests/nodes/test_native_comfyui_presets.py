"""Apply Preset (native) with ComfyUI's own Wan in this process, against the nodes that do the same one by one.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from gft_adapters import write_native
from native_comfyui import comfy, models, sample, tiny

from vidaccel import SLA, SVG2, VSA, DenseSchedule, GuidanceCache, Preset, Radial
from vidaccel.attention import StepInfo
from vidaccel.nodes.native.forecast import cache_steps
from vidaccel.nodes.native.guidance import guide
from vidaccel.nodes.native.guidance_cache import cache_guidance
from vidaccel.nodes.native.models import find_geometry
from vidaccel.nodes.native.patch import sparsify
from vidaccel.nodes.pipeline import pipelines
from vidaccel.nodes.preset_nodes import apply_native
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.forecast.settings import ForecastSettings
from vidaccel.pipelines.presets import Cache

SPARSE = SVG2(density=0.5, q_clusters=4, k_clusters=8, schedule=DenseSchedule(first_steps=1, first_layers=1))


def test_the_method_and_what_stays_dense():
    description, model, unpatched = tiny("wan_t2v")
    preset = Preset(name="a", family="Wan 2.1 / 2.2", method=SPARSE, backend="reference", num_inference_steps=4)
    with pytest.raises(
        InputError, match="num_inference_steps 4: the sampler's steps. Set it there and switch skip_oth"
    ):
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
    assert "not taken num_inference_steps 4: the sampler's steps" in report_text(session.news())
    assert sample(model, description).equal(unpatched)


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform", "beta", "kl_optimal", "ddim_uniform"])
@pytest.mark.parametrize("steps", [20, 30])
def test_as_many_steps_stay_dense_as_the_preset_says(scheduler, steps):
    description, model, _ = tiny("wan_t2v")
    schedule = DenseSchedule(first_steps=0.2, last_steps=1)
    preset = Preset(name="a", method=replace(SPARSE, schedule=schedule), num_inference_steps=30)
    clone, session = apply_native(model, preset, skip_others=True)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, scheduler, steps)
    count = len(sigmas) - 1  # which some schedulers round
    sample(clone, description, steps=count, sigmas=sigmas)
    dense = {record.step: record.reason for record in session.report().records if record.reason}
    first = sum(bool(schedule.step_reason(StepInfo(0, step, count))) for step in range(count - 1))
    assert dense == dict.fromkeys(range(first), "first_steps") | {count - 1: "last_steps"}
    assert "first_steps 0.2, last_steps 1" in report_text(session.news())


def test_guidance_in_one_pass_and_what_is_left_to_other_nodes(tmp_path, caplog):
    description, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path)
    preset = Preset(name="a", guidance_free=str(file), guidance_scale=4.0, cache=Cache("first_block"))
    with pytest.raises(InputError, match=r"cache first_block=0.05: Forecast Cache, EasyCache or .*\. Set it there"):
        apply_native(model, preset)
    with caplog.at_level(logging.WARNING, "vidaccel.nodes.preset_nodes"):
        clone, session = apply_native(model, preset, skip_others=True)
    assert "preset a: not taken from it: cache first_block=0.05: Forecast Cache" in caplog.text
    text = report_text(session.news())
    assert (
        text.startswith("Guidance takes one pass. The preset a has no method")
        and "cache first_block=0.05: Forecast Cache" in text
    )
    assert sample(clone, description).equal(sample(guide(model, file, 4.0), description))


def test_levers_that_a_model_cannot_carry_are_left_out_one_by_one(tmp_path):
    description, model, _ = tiny("wan_t2v")
    file = write_native(tmp_path)
    only_guidance = Preset(name="a", method=SLA(), sla="b.safetensors", guidance_free=str(file), guidance_scale=4.0)
    gated = Preset(name="a", method=VSA(), guidance_free=str(file), guidance_scale=4.0)
    only_method = Preset(name="a", method=SPARSE, guidance_free="own", guidance_scale=4.0, num_inference_steps=4)
    for preset, message in (
        (only_guidance, "method sla, whose weights a MODEL gets from Apply SLA. Set it there"),
        (gated, "method vsa, whose gates a MODEL gets from Apply VSA. Set it there"),
        (only_method, "guidance_free, the adapter of a folder of diffusers: Guidance-Free takes"),
    ):
        with pytest.raises(InputError, match=message):
            apply_native(model, preset)
    clone, report = apply_native(model, only_guidance, skip_others=True)
    assert sample(clone, description).equal(sample(guide(model, file, 4.0), description))
    assert "method sla, whose weights a MODEL gets from Apply SLA." in report_text(report.news())
    clone, session = apply_native(model, only_method, skip_others=True)
    sample(clone, description)
    assert "not taken guidance_free, the adapter of a folder of diffusers" in report_text(session.news())


@pytest.mark.parametrize("method", [None, SPARSE], ids=["dense", "sparse"])
def test_the_caches_of_this_package(method):
    description, model, _ = tiny("wan_t2v")
    steps = {"num_inference_steps": 8}
    cache = Cache("forecast", 1e6, {"cache_end_steps": 0, "max_consecutive_cached": 2})
    every = GuidanceCache(2, first_steps=1)

    def beside(model):
        return model if method is None else apply_native(model, Preset(name="b", method=method, **steps), True)[0]

    for lever, by_hand in (
        ({"cache": cache}, beside(cache_steps(model, ForecastSettings(1e6, last_steps=0, most=2)))),
        ({"guidance_cache": every}, beside(cache_guidance(model, every))),
    ):
        clone, report = apply_native(model, Preset(name="a", method=method, **lever, **steps), skip_others=True)
        assert sample(clone, description, steps=8).equal(sample(by_hand, description, steps=8))
        assert not sample(clone, description, steps=8).equal(sample(beside(model), description, steps=8))
        text = report_text(report.news())
        told, setting = {
            "cache": ("Forecast Cache: 4 of 8 steps were left out", "cache forecast=1e+06"),
            "guidance_cache": ("Guidance Cache: 5 of 8 passes of the neg", "guidance_cache one second pass in 2"),
        }[next(iter(lever))]
        assert f"Note: {told}" in text and (setting in text) == (method is not None)
        assert "top_p" not in text and "min_ratio" not in text  # which the density is instead of
    with pytest.raises(InputError, match="can have one of the two"):
        apply_native(model, Preset(name="a", cache=cache, guidance_cache=every), skip_others=True)


def test_a_report_of_a_second_sampling_has_the_cache_of_that_one_alone():
    """Of two samplers with one MODEL in an entry of the queue, each with a report behind it."""
    from comfy_execution.utils import CurrentNodeContext

    description, model, _ = tiny("wan_t2v")
    cache = Cache("forecast", 1e6, {"cache_end_steps": 0, "max_consecutive_cached": 2})
    clone, session = apply_native(model, Preset(name="a", method=SPARSE, cache=cache, num_inference_steps=8), True)

    def told() -> list[str]:
        return [note for note in session.news("entry").report.notes if "Forecast Cache" in note]

    with CurrentNodeContext("entry", "1"):
        sample(clone, description, steps=8)
        (first,) = told()
        sample(clone, description, steps=12)
        (second,) = told()
    assert " of 8 steps" in first and " of 12 steps" in second
    both = told()  # of a report node beside, as of the sparse calls
    assert [" of 8 " in both[0], " of 12 " in both[1]] == [True, True]


def test_short_videos_and_errors_of_the_method_of_a_preset():
    description, model, unpatched = tiny("wan_t2v")
    preset = Preset(name="a", method=Radial(decay=0.05, block_size=8))
    clone, session = apply_native(model, preset, min_tokens=10_000)
    assert sample(clone, description).equal(unpatched)
    assert "min_tokens 10000, above the video's" in report_text(session.news())
    clone, session = apply_native(model, preset, measure_error=8)
    sample(clone, description)
    assert "Measured error of the output" in report_text(session.news())


def test_the_precision_of_a_preset_is_not_lost():
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(ValueError, match="precision is int8: "):
        apply_native(model, Preset(name="a", method=Radial(), precision="int8", backend="gather"))


SERVED = (
    "wan_t2v",
    "wan_vace",
    "wan_camera",
    "wan_s2v",
    "wan_animate",
    "hunyuan",
    "hunyuan15",
    "mochi",
    "ltxv",
    "ltxav",
)
SERVED += ("ltxav", "cosmos1", "cosmos_predict2", "kandinsky5", "cogvideox", "minimax")


@pytest.mark.parametrize("name", models(*SERVED))
def test_a_preset_of_this_very_model(name):
    """Its layers are those of diffusers' main blocks."""
    description, model, _ = tiny(name)
    own = model.model.diffusion_model
    geometry = find_geometry(own)
    heads, channels = geometry.heads(own)
    settings = {"num_layers": len(getattr(own, geometry.blocks[0][0])), "num_attention_heads": heads}
    settings |= {"attention_head_dim": channels}
    method = SVG2(density=0.75, q_clusters=4, k_clusters=6, schedule=DenseSchedule(first_layers=1))
    assert geometry.presets
    for family in geometry.presets:
        clone, session = apply_native(model, Preset(name="a", family=family, transformer=settings, method=method))
    sample(clone, description, steps=1)
    dense = {record.layer for record in session.report().records if record.reason == "dense_layers"}
    assert dense == set(geometry.with_extra(own, [0]))


def test_an_adapter_of_a_preset_needs_packages(tmp_path, monkeypatch):
    _, model, _ = tiny("wan_t2v")
    (tmp_path / "needs.txt").write_text("no_such_package>=1\n")
    monkeypatch.setattr(pipelines, "REQUIREMENTS", tmp_path / "needs.txt")
    apply_native(model, Preset(name="a", method=Radial()))
    preset = Preset(name="a", guidance_free=str(write_native(tmp_path)), guidance_scale=4.0)
    with pytest.raises(InputError, match="preset a has an adapter for guidance in one pass, which needs no_such"):
        apply_native(model, preset)


def test_a_preset_of_another_model():
    _, model, _ = tiny("wan_t2v")
    for preset, message in (
        (Preset(name="a", family="HunyuanVideo", method=SPARSE), "a is for HunyuanVideo, and this MODEL is Wan"),
        (Preset(name="a", transformer={"num_layers": 30}, method=SPARSE), "num_layers 30 there, 3 here"),
        (Preset(name="a", transformer={"num_attention_heads": 40}, method=SPARSE), "num_attention_heads 40 there, "),
        (Preset(name="a", family="Wan Animate", method=SPARSE), "a is for Wan Animate, and this MODEL is Wan: take"),
    ):
        with pytest.raises(InputError, match=message):
            apply_native(model, preset)
    with pytest.raises(InputError, match="model is empty"):
        apply_native(None, Preset(method=SPARSE))
