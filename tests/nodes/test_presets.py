"""Presets as the nodes use them, without a ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vidaccel
from vidaccel import SLA, SVG2, VSA, DenseSchedule, Preset, Radial
from vidaccel.generation.request import Settings
from vidaccel.nodes.acceleration import Acceleration
from vidaccel.nodes.pipelines import generate, load
from vidaccel.nodes.presets import chosen_preset, find_presets, native_part, shipped_names, with_preset
from vidaccel.nodes.residency import Residency
from vidaccel.nodes.tables import report_text
from vidaccel.nodes.wording import InputError
from vidaccel.pipelines.presets import Cache, LoraFile, Quantize, SchedulerChoice, save_preset, shipped_presets

EAGER = Cache("first_block", 1e3)
SPARSE = SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=1))


@pytest.fixture(scope="module")
def pipeline():
    return load("demo", "auto", Residency(torch.device("cpu"), lambda part, memory: None))


def settings(**changes):
    given = {"frames": 9, "height": 64, "width": 64, "seed": 1}
    return Settings("a red circle moves left on a grey background", **{**given, **changes})


def made(pipeline, **changes):
    with torch.inference_mode():  # as ComfyUI runs nodes
        return generate(pipeline, settings(**changes), on_step=lambda *_: None)


def test_the_menu(tmp_path):
    assert shipped_names() == list(shipped_presets())
    (tmp_path / "below").mkdir()
    save_preset(Preset(name="mine", cache=EAGER), tmp_path / "below" / "mine.yaml")
    (tmp_path / "notes.txt").write_text("no preset")
    found = find_presets([str(tmp_path), str(tmp_path / "gone")])
    assert list(found) == [*shipped_names(), "below/mine.yaml"]
    assert chosen_preset("below/mine.yaml", "", [str(tmp_path)]).name == "mine"
    assert chosen_preset("demo-cache", "", []).name == "demo-cache"
    assert chosen_preset("demo-cache", f" {tmp_path}/below/mine.yaml ", []).name == "mine"
    with pytest.raises(InputError, match="preset is below/mine.yaml: it is no longer there; there are demo-cache"):
        chosen_preset("below/mine.yaml", "", [])
    with pytest.raises(InputError, match=r"preset cannot be used: there is no preset .*gone.yaml"):
        chosen_preset("demo-cache", str(tmp_path / "gone.yaml"), [])


def test_a_pipeline_with_a_preset_makes_what_generate_makes(pipeline):
    preset = Preset(
        name="a",
        method=SPARSE,
        cache=EAGER,
        scheduler=SchedulerChoice("UniPCMultistepScheduler", {"flow_shift": 5.0}),
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    plain = made(pipeline, steps=4, guidance_scale=3.0)
    fast = made(with_preset(pipeline, preset))
    wanted = vidaccel.generate(
        "demo", settings().prompt, frames=9, height=64, width=64, seed=1, preset=preset, device="cpu", progress=False
    )
    assert torch.equal((fast.frames * 255).round().byte(), torch.from_numpy(wanted.frames))
    text = report_text(fast.report.news())
    assert "preset a: 4 steps: 8 forwards, 2 computed and 6 skipped" in text and "guidance 3" in text
    assert "Nothing was accelerated" not in text
    # What Generate Video says itself goes before it, and the pipeline that came in is as it was.
    assert "2 steps, guidance 1," in report_text(
        made(with_preset(pipeline, preset), steps=2, guidance_scale=1.0).report.news()
    )
    assert torch.equal(made(pipeline, steps=4, guidance_scale=3.0).frames, plain.frames)


def test_a_cache_beside_accelerate_pipeline(pipeline):
    both = with_preset(pipeline, Preset(name="a", cache=EAGER)).accelerated(Acceleration(density=0.5))
    text = report_text(made(both, steps=4).report.news())
    assert text.startswith("tangent: density 0.5") and "6 skipped" in text


def test_what_two_nodes_set_is_refused(pipeline):
    with_method, fast = Preset(name="a", method=Radial()), pipeline.accelerated(Acceleration())
    for attempt, message in (
        (lambda: with_preset(fast, with_method), "preset a and Accelerate Pipeline both set it"),
        (lambda: with_preset(pipeline, with_method).accelerated(Acceleration()), "the preset a has a method"),
        (lambda: with_preset(with_preset(pipeline, with_method), with_method), "the preset a is there already"),
        (lambda: with_preset(pipeline, Preset(name="a", quantize="int8")), "layers in 8 bits, and ComfyUI moves"),
        (lambda: with_preset(pipeline, Preset(name="a", family="Mochi 1")), "a is for Mochi 1, and demo is of Wan"),
        (lambda: with_preset(pipeline, Preset(name="a", transformer={"num_layers": 9})), "num_layers 9 there, 6 here"),
    ):
        with pytest.raises(InputError, match=message):
            attempt()


def test_what_a_native_model_gets():
    schedule = DenseSchedule(first_steps=2, last_steps=0.1, first_layers=1, last_layers=2)
    preset = Preset(
        name="a",
        family="Wan 2.1 / 2.2",
        transformer={"num_layers": 30},
        method=Radial(schedule=schedule),
        guidance_free="gft.safetensors",
        guidance_scale=4.0,
        num_inference_steps=20,
        cache=EAGER,
        loras=(LoraFile(Path("a.safetensors")),),
    )
    part = native_part(preset, 30, "Wan")
    assert (part.dense_start_percent, part.dense_end_percent, part.dense_layers) == (0.1, 0.1, "0, 28, 29")
    assert part.adapter == Path("gft.safetensors") and part.guidance == 4.0
    assert part.left == (
        "cache first_block=1000: Forecast Cache, EasyCache or another node for caches",
        "loras a.safetensors (1): LoraLoaderModelOnly",
        "num_inference_steps 20: the sampler's steps",
    )
    assert native_part(Preset(name="a", method=SPARSE, num_inference_steps=10), 6, "Wan").dense_start_percent == 0.1
    both = Preset(name="a", method=Radial(), guidance_free=("a.safetensors", "b.safetensors"), guidance_scale=2.0)
    assert native_part(both, 30, "Wan").left == (
        "guidance_free, one for each transformer: Guidance-Free before each sampler takes one, with a guidance of 2",
    )


def test_what_is_left_to_other_nodes_has_the_values_to_set_there():
    shifted = SchedulerChoice("UniPCMultistepScheduler", {"flow_shift": 3.0})
    lora = LoraFile(Path("below/four.safetensors"), 0.8)
    preset = Preset(
        name="a",
        method=Radial(),
        scheduler=shifted,
        loras=(lora,),
        quantize=Quantize("fp8"),
        guidance_scale=1.0,
        compile=True,
    )
    assert native_part(preset, 30, "Wan").left == (
        "loras four.safetensors (0.8): LoraLoaderModelOnly",
        "scheduler UniPCMultistepScheduler (flow_shift 3.0): the sampler's scheduler, and ModelSamplingSD3 for a shift",
        "guidance_scale 1: the sampler's cfg",
        "quantize fp8: weight_dtype of Load Diffusion Model",
        "compile the blocks: TorchCompileModel, behind this node",
    )


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (Preset(name="a", family="Mochi 1", method=Radial()), "a is for Mochi 1, and this MODEL is Wan"),
        (Preset(name="a", transformer={"num_layers": 40}, method=Radial()), "of 40 layers, and this MODEL has 30"),
        (Preset(name="a", cache=EAGER, quantize=Quantize("fp8")), "no method, no adapter.*EasyCache"),
        (Preset(name="a", method=SPARSE), "keeps 1 steps dense, and ComfyUI counts in shares"),
        (Preset(name="a", method=Radial(schedule=DenseSchedule(sigma_above=0.9))), "by noise levels of diffusers"),
        (
            Preset(name="a", guidance_free="own", guidance_scale=2.0),
            "nothing else .* guidance_free, the adapter",
        ),
        (Preset(name="a", method=SLA(), sla="b.safetensors"), "nothing else of a preset: method sla, whose weights"),
        (Preset(name="a", method=VSA()), "method vsa, whose gates a MODEL gets from Apply VSA"),
        (Preset(name="a"), "nothing else of a preset: it is empty"),
        (Preset(name="a", guidance_free="x"), "has guidance_free and no guidance_scale"),
    ],
)
def test_what_a_native_model_cannot_have(preset, message):
    with pytest.raises(InputError, match=message):
        native_part(preset, 30, "Wan")


def test_a_file_that_was_changed_is_another(tmp_path):
    from vidaccel.nodes.presets import state_of_preset as state_of

    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\n")
    before = state_of("mine.yaml", "", [str(tmp_path)])
    assert before == state_of("", str(file), []) != state_of("demo-cache", "", [])
    file.write_text("version: 1\nname: other\n")
    assert state_of("mine.yaml", "", [str(tmp_path)]) != before
    assert state_of("demo-cache", "", [str(tmp_path)]) is None is state_of("gone.yaml", "", [str(tmp_path)])
    assert state_of("demo-cache", None, []) is None is state_of(None, "", [str(tmp_path)])  # inputs with links
