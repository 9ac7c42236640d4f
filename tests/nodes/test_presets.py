"""Presets as the nodes use them, without a ComfyUI."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vidaccel
from vidaccel import SLA, SVG2, VSA, DenseSchedule, Preset, Radial, Tangent, demo
from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.native.models import GEOMETRIES
from vidaccel.nodes.pipeline import pipelines
from vidaccel.nodes.pipeline.acceleration import Acceleration
from vidaccel.nodes.pipeline.generating import generate
from vidaccel.nodes.pipeline.pipelines import load
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.presets import (
    chosen_preset,
    find_presets,
    native_part,
    shipped_names,
    state_of_preset,
    with_preset,
)
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.acceleration import FAMILIES
from vidaccel.pipelines.presets import Cache, LoraFile, Quantize, SchedulerChoice, save_preset, shipped_presets

EAGER = Cache("first_block", 1e3)
SPARSE = SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=1))


@pytest.fixture(scope="module")
def pipeline():
    return load("demo", "auto", Residency(torch.device("cpu"), lambda part, memory: None))


def native(preset, layers: int = 30, kind: str = "WanModel", **attributes):
    """`native_part` of a model with 12 heads of 128 channels."""
    model = SimpleNamespace(**{"blocks": [None] * layers, "num_heads": 12, "dim": 1536} | attributes)
    return native_part(preset, GEOMETRIES[kind], model)


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


ONE_PASS = Preset(name="a", guidance_free=("own",))


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (ONE_PASS, {"negative_prompt": "ugly"}, "^negative_prompt is of no use with a guidance-free adapter"),
        (ONE_PASS, {"guidance_scale": 1.0}, "^guidance is 1: the preset puts guidance into one pass, and 1 is none"),
        (ONE_PASS, {"guidance_scale": 30.0}, "^guidance is 30.0: guidance_free.safetensors was trained up to 4"),
        (
            ONE_PASS.replace(guidance_scale=30.0),
            {},
            "^preset cannot be used: guidance_scale is 30.0: guidance_free.safetensors was trained up to 4",
        ),
        (Preset(name="a", guidance_cache=2), {"guidance_scale": 1.0}, "^preset cannot be used: guidance_cache: .*is w"),
        (Preset(name="a", guidance_cache=2), {"steps": 2}, "^preset cannot be used: guidance_cache: .* all 2 steps"),
        (
            Preset(name="a", method=Tangent(density=0.01)),
            {},
            "^preset cannot be used: attention.method is tangent: Tangent density is 0.01, but .*: raise density to",
        ),
    ],
)
def test_what_a_preset_cannot_do_with_a_video_is_refused_before_it_runs(pipeline, preset, changes, message):
    with pytest.raises(InputError, match=message), torch.inference_mode():
        generate(with_preset(pipeline, preset), settings(**changes), on_step=lambda *_: pytest.fail("a step was made"))


def test_what_the_node_says_itself_is_not_held_against_the_preset(pipeline):
    beyond = ONE_PASS.replace(guidance_scale=30.0)
    assert "guidance 3 in one pass" in report_text(
        made(with_preset(pipeline, beyond), guidance_scale=3.0).report.news()
    )
    short = with_preset(pipeline, Preset(name="a", cache=Cache("forecast"), num_inference_steps=4))
    both = short.accelerated(Acceleration(density=0.5, dense_start_percent=0.3, dense_end_percent=0.3))
    assert "8 steps" in report_text(made(both, steps=8).report.news())


def test_an_adapter_for_few_steps_in_a_preset_brings_its_steps():
    pipeline = load("demo-dc", "auto", Residency(torch.device("cpu"), lambda part, memory: None))
    few = Preset(name="few", guidance_free=(Path(demo.path(demo.DC), "transformer", "few_steps_4.safetensors"),))
    own = {"frames": None, "height": None, "width": None}
    text = report_text(made(with_preset(pipeline, few), **own).report.news())
    assert "4 steps, guidance 2 in one pass" in text
    for preset, changes, message in (
        (few, {"steps": 6}, "^steps is 6: few_steps_4.safetensors was distilled to 4 steps"),
        (few.replace(num_inference_steps=6), {}, "^preset cannot be used: num_inference_steps is 6: few_steps_4"),
        (
            few.replace(scheduler=SchedulerChoice("UniPCMultistepScheduler")),
            {},
            "^preset cannot be used: scheduler is UniPCMultistepScheduler: few_steps_4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            made(with_preset(pipeline, preset), **own, **changes)


def test_the_report_of_a_preset_speaks_of_presets(pipeline):
    """In the words of its fields, and with what `generate` says of it."""
    preset = Preset(name="a", method=SPARSE, num_inference_steps=4, measured={"guidance_scale": 5.0}, model="other/one")
    text = report_text(made(with_preset(pipeline, preset), steps=3).report.news())
    assert text.startswith("svg2: first_steps 1, q_clusters 4, ") and "DenseSchedule" not in text
    assert "handle" not in text
    assert "Note: The preset a was measured with steps 4 (here 3), guidance scale 5 (here 2)" in text
    assert "Note: The preset a was measured with other/one; with demo, " in text


def test_what_a_preset_has_beside_its_method_comes_with_it(pipeline):
    fast = Preset(name="a", method=SPARSE, backend="gather")
    text = report_text(made(with_preset(pipeline, fast), steps=2).report.news())
    assert "backend gather" in text
    fraction = fast.replace(method=Tangent(density=0.5))
    text = report_text(made(with_preset(pipeline, fraction), steps=2).report.news())
    assert "half of it or more: whole numbers, in the place of fractions, say" in text
    with pytest.raises(InputError, match="^preset cannot be used: precision is int8: nothing can run this call"):
        made(with_preset(pipeline, fast.replace(precision="int8", backend="auto")))


def test_what_two_nodes_set_is_refused(pipeline):
    with_method, fast = Preset(name="a", method=Radial()), pipeline.accelerated(Acceleration())
    for attempt, message in (
        (lambda: with_preset(fast, with_method), "preset a and Accelerate Pipeline both set it"),
        (lambda: with_preset(pipeline, with_method).accelerated(Acceleration()), "the preset a has a method"),
        (lambda: fast.accelerated(Acceleration()), "has sparse attention already: connect the pipeline from before"),
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
    part = native(preset)
    assert (part.dense_start_percent, part.dense_end_percent, part.dense_layers) == (0.1, 0.1, "0, 28, 29")
    assert part.dense_steps == DenseSchedule(first_steps=2, last_steps=0.1)  # where a sampler does all of them
    assert part.adapter == Path("gft.safetensors") and part.guidance == 4.0
    assert part.left == (
        "cache first_block=1000: Forecast Cache, EasyCache or another node for caches",
        "loras a.safetensors (1): LoraLoaderModelOnly",
        "num_inference_steps 20: the sampler's steps",
    )
    assert native(Preset(name="a", method=SPARSE, num_inference_steps=10), 6).dense_start_percent == 0.1
    both = Preset(name="a", method=Radial(), guidance_free=("a.safetensors", "b.safetensors"), guidance_scale=2.0)
    assert native(both).left == (
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
    assert native(preset).left == (
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
        (
            Preset(name="a", transformer={"num_layers": 40}, method=Radial()),
            "another model: num_layers 40 there, 30 here",
        ),
        (Preset(name="a", transformer={"num_attention_heads": 40}, method=Radial()), "heads 40 there, 12 here"),
        (
            Preset(name="a", family="Wan Animate", method=Radial()),
            "for Wan Animate, and this MODEL is Wan: take one for",
        ),
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
        native(preset)


def test_the_families_of_pipelines_that_a_native_model_is():
    known = {family.name for family in FAMILIES}
    assert {name for geometry in GEOMETRIES.values() for name in geometry.presets} <= known
    dense = Radial(schedule=DenseSchedule(first_layers=1, last_layers=2))
    vace = {"vace_blocks": [None] * 5, "vace_layers_mapping": {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}}
    for family in ("Wan VACE", "Wan 2.1 / 2.2"):
        preset = Preset(name="a", family=family, transformer={"num_layers": 10}, method=dense)
        assert (
            native(preset, 10, "VaceWanModel", **vace).dense_layers == "0, 8, 9, 10, 14"
        )  # and what runs beside 0 and 8
    of_wan = Preset(name="a", family="Wan 2.1 / 2.2", method=dense)
    assert all(native(of_wan, 3, kind).dense_layers == "0, 1, 2" for kind in ("CameraWanModel", "WanModel_S2V"))
    with pytest.raises(InputError, match="this MODEL is HuMo: take one that names no family"):
        native(of_wan, 3, "HumoWanModel")
    attention = SimpleNamespace(heads=8, head_dim=64)
    heads = {"num_attention_heads": 8, "attention_head_dim": 64}
    minimax = Preset(name="a", family="MiniMax-H3", transformer=heads, method=Radial())
    native(minimax, kind="MiniMaxH3Model", blocks=[SimpleNamespace(attn=attention)])
    cosmos = Preset(name="a", family="Cosmos 1 / Predict2 / 2.5", transformer=heads, method=Radial())
    for kind in ("GeneralDIT", "MiniTrainDIT"):
        native(cosmos, kind=kind, num_heads=8, model_channels=512)
    # Of two kinds of blocks, a preset of `tune` names the first alone.
    two = {"double_blocks": [None] * 20, "single_blocks": [None] * 40, "hidden_size": 3072}
    for layers, fits in (({"num_layers": 20}, True), ({"num_layers": 20, "num_single_layers": 39}, False)):
        preset = Preset(name="a", family="HunyuanVideo", transformer=layers, method=Radial())
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match="num_single_layers 39 there, 40"):
            native(preset, kind="HunyuanVideo", **two)


def test_what_presets_need_of_packages(pipeline, tmp_path, monkeypatch):
    """Reading one needs none of them: a native MODEL has use for most of it without."""
    (tmp_path / "needs.txt").write_text("no_such_package>=1\n")
    monkeypatch.setattr(pipelines, "REQUIREMENTS", tmp_path / "needs.txt")
    preset = chosen_preset("demo-cache", "", [])
    with pytest.raises(InputError, match="presets for pipelines need no_such_package"):
        with_preset(pipeline, preset)


def test_a_file_that_a_preset_names_was_changed(tmp_path):
    file = tmp_path / "mine.yaml"
    (tmp_path / "gft.safetensors").write_bytes(b"1")
    (tmp_path / "lora.safetensors").write_bytes(b"1")
    file.write_text("version: 1\nguidance_free: gft.safetensors\nguidance_scale: 2.0\nloras: [lora.safetensors]\n")
    seen = [state_of_preset("mine.yaml", "", [str(tmp_path)])]
    for name in ("gft", "lora"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"another")
        seen.append(state_of_preset("mine.yaml", "", [str(tmp_path)]))
    assert len({*seen}) == 3
    file.write_text("version: 99\n")
    assert len(state_of_preset("mine.yaml", "", [str(tmp_path)])) == 1  # what is wrong is told by what runs


def test_a_file_that_was_changed_is_another(tmp_path):
    state_of = state_of_preset
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\n")
    before = state_of("mine.yaml", "", [str(tmp_path)])
    assert before == state_of("", str(file), []) != state_of("demo-cache", "", [])
    file.write_text("version: 1\nname: other\n")
    assert state_of("mine.yaml", "", [str(tmp_path)]) != before
    assert state_of("demo-cache", "", [str(tmp_path)]) is None is state_of("gone.yaml", "", [str(tmp_path)])
    assert state_of("demo-cache", None, []) is None is state_of(None, "", [str(tmp_path)])  # inputs with links
