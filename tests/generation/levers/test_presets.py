"""Presets, caches and layers in 8 bits in `vidaccel.generate`, on the built-in models."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel import SLA, SVG2, DenseSchedule, Preset, Radial, Sparge, Tangent, demo
from vidaccel.generation.api import carry_out
from vidaccel.generation.errors import BadInput
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.levers.presets import other_model_note
from vidaccel.generation.machine import environment
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.report.page import write_report
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.run import run, warm_up
from vidaccel.pipelines.presets import Cache, PresetError, SchedulerChoice, load_preset, save_preset

PROMPT = "a red circle moves left on a grey background"
SMALL = {"frames": 9, "height": 64, "width": 64, "device": "cpu", "progress": False}
EAGER = Cache("first_block", 1e3)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **more):
    return vidaccel.generate(pipe, PROMPT, **{**SMALL, "device": "auto", **more})


def test_a_preset_is_what_the_options_are(pipe, tmp_path):
    method = SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=1))
    preset = Preset(
        name="a",
        family="Wan 2.1 / 2.2",
        method=method,
        cache=EAGER,
        scheduler=SchedulerChoice("UniPCMultistepScheduler", {"flow_shift": 5.0}),
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    made = generate(pipe, preset=save_preset(preset, tmp_path / "a.yaml"))
    assert made.name == "svg2" and made.report.method == "svg2"
    assert made.account.steps[0].attention == "dense" and made.account.counts()["skipped"] == 6
    asked = Settings(PROMPT, steps=4, guidance_scale=3.0, **{k: SMALL[k] for k in ("frames", "height", "width")})
    with vidaccel.apply(pipe, preset):
        again = run(pipe, asked.checked(inspect_model(demo.path())))
    assert np.array_equal((again.frames * 255).round().astype(np.uint8), made.frames)
    other = generate(pipe, method=method, cache=EAGER, steps=4, guidance_scale=3.0)
    assert other.account.counts() == made.account.counts()
    assert not np.array_equal(other.frames, made.frames)  # another scheduler


def test_a_step_that_is_not_counted_compiles_what_sparse_steps_need(pipe):
    """Though the schedule keeps more steps dense than it has."""
    preset = Preset(method=SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=2)))
    asked = Settings(PROMPT, steps=4, **{k: SMALL[k] for k in ("frames", "height", "width")})
    asked = asked.checked(inspect_model(demo.path()))
    with vidaccel.apply(pipe, preset) as applied:
        warm_up(pipe, asked, None, applied)
        assert {r.reason for r in applied.report().last().attention.records} == {""}
        applied.reset()
        run(pipe, asked)
        reasons = [r.reason for r in applied.report().last().attention.records]
        assert reasons.count("") == reasons.count("first steps")


def test_what_is_given_goes_before_the_preset(pipe):
    preset = Preset(name="a", method=Radial(), cache=EAGER, num_inference_steps=4, guidance_scale=3.0)
    made = generate(pipe, preset=preset, method="dense", cache="none", steps=2, guidance_scale=1.0)
    assert made.name == "dense" and made.account is None
    plain = generate(pipe, steps=2, guidance_scale=1.0)
    assert np.array_equal(made.frames, plain.frames)
    assert generate(pipe, preset=preset, cache="first_block=0", steps=2).account.counts()["skipped"] == 0


def test_settings_that_are_given_go_before_those_of_the_method_of_a_preset(pipe):
    schedule = DenseSchedule(first_steps=0.3, last_steps=1)
    preset = Preset(name="a", method=SVG2(top_p=0.8, min_ratio=0.2, compensate=True, schedule=schedule))

    def method(preset=preset, **given):
        (found,) = prepare(pipe, Settings(PROMPT), Sparse(**given), preset=preset).methods.values()
        return found

    assert method(backend="gather") == preset.method
    more = replace(schedule, first_steps=2, first_layers=1)
    assert method(dense_steps=2, dense_layers=1) == replace(preset.method, schedule=more)
    made = method(density=0.4, overrides={"svg2": {"q_clusters": 4}})
    assert made == SVG2(density=0.4, q_clusters=4, compensate=True, schedule=schedule)
    assert method(overrides={"svg2": {"top_p": 0.5}}) == replace(preset.method, top_p=0.5)
    of_share = preset.replace(method=Sparge(cdf=0.9, block=(16, 16)))
    assert method(of_share, overrides={"sparge": {"topk": 0.5}}) == Sparge(topk=0.5, block=(16, 16))
    of_density = preset.replace(method=Tangent(density=0.5, k_clusters=4))
    assert method(of_density, density=0.3) == Tangent(density=0.3, k_clusters=4)
    assert method(of_density, overrides={"tangent": {"tolerance": 0.1}}) == Tangent(tolerance=0.1, k_clusters=4)
    radial = preset.replace(method=Radial(decay=3.0, sink=False))
    made = prepare(pipe, Settings(PROMPT), Sparse(density=0.6), preset=radial)
    assert made.methods["radial"].sink is False
    assert made.methods["radial"].expected_density(made.layout) == pytest.approx(0.6, abs=0.05)
    with pytest.raises(BadInput, match=r"^settings is radial\.sink: this method is not among those to run \(svg2\)"):
        method(overrides={"radial": {"sink": 1}})
    with pytest.raises(BadInput, match=r"^settings is svg2\.top_p: density 0\.4 decides it"):
        method(density=0.4, overrides={"svg2": {"top_p": 0.5}})
    with pytest.raises(BadInput, match=r"^density is for a method's name, and SLA came with its settings"):
        method(Preset(name="a", method=SLA()), density=0.4)


def test_what_is_of_the_method_of_a_preset_goes_with_it(pipe, tmp_path):
    """Another method has neither its backend nor its precision, and no adapters of SLA."""
    learned = Preset(name="a", method=SLA(), sla=(str(tmp_path / "gone"),), backend="reference", precision="int8")
    made = generate(pipe, preset=learned.replace(num_inference_steps=2), method="dense")
    assert made.name == "dense" and made.report is None
    job = prepare(pipe, Settings(PROMPT, frames=9), Sparse(methods=("radial",)), preset=learned)
    assert (list(job.methods), job.backend, job.precision, job.sla) == (["radial"], "auto", None, ())
    with pytest.raises(BadInput, match="preset cannot be used: attention.adapters: .*gone"):  # they are of this one
        prepare(pipe, Settings(PROMPT, frames=9), Sparse(methods=("sla",)), preset=learned)


def test_what_is_another_than_a_preset_was_measured_with_is_told(pipe):
    """All of it in one note; of the same, and of what a file does not tell, nothing."""
    here = environment(torch.device("cpu"))
    same = {"size": "9 frames of 64x64, 48 tokens", "dtype": "float32", "machine": here["CPU"], "torch": here["torch"]}
    measured = {"times_as_fast": 2.0, **same, "guidance_scale": 2.0}
    sizes = {"height": 64, "width": 64}

    def notes(preset: Preset, frames: int = 9, **more) -> tuple[str, ...]:
        return prepare(pipe, Settings(PROMPT, frames=frames, **sizes, **more), Sparse(), preset=preset).notes

    preset = Preset(name="a", cache=EAGER, num_inference_steps=4, measured=measured)
    assert not notes(preset) and not notes(preset.replace(measured={"size": "small"}), 13)
    (note,) = notes(preset, 13)
    assert note.startswith("The preset a was measured with videos of 9 frames of 64x64 (here 13 frames of 64x64): its ")
    (note,) = notes(preset, steps=7, guidance_scale=4.0, negative_prompt="grey")
    assert "with negative prompt none (here grey), steps 4 (here 7), guidance scale 2 (here 4): its gain and" in note
    elsewhere = {**measured, "machine": "NVIDIA H200, 141 GiB, CUDA 12.8", "torch": "1.0", "dtype": "bfloat16"}
    (note,) = notes(preset.replace(measured=elsewhere))
    assert "with dtype bfloat16 (here float32), machine NVIDIA H200, 141 GiB, CUDA 12.8 (here " in note
    assert f"torch 1.0 (here {here['torch']}): " in note


def test_a_preset_that_was_measured_with_another_model_is_told(pipe, tmp_path):
    small = Settings(PROMPT, frames=9, height=64, width=64)

    def notes(runs, **fields):
        job = prepare(runs, small, Sparse(), preset=Preset(name="a", **fields))
        return [note for note in job.notes if note.startswith("The preset a ")]

    found = {"measured": {"times_as_fast": 2.0}, "cache": EAGER}
    ratios = {"cache": Cache("magcache", settings={"mag_ratios": [1.0] * 4})}
    copy = tmp_path / "copy"
    copy.symlink_to(demo.path(), target_is_directory=True)
    kept = tmp_path / "hub" / "models--owner--a-name" / "snapshots" / "0f"
    shutil.copytree(demo.path(), kept)
    for asked, named in (("owner/a-name", kept), (kept, "owner/a-name")):
        assert not other_model_note(
            Preset(model=str(asked), **found), replace(inspect_model(str(kept)), name=str(named))
        )
    assert notes(str(kept), model="owner/another", **found)
    for model in ("demo", pipe, str(demo.path()), str(copy)):
        assert not notes(model, model="demo", **found) and not notes(model, model=str(copy), **ratios)
    for model, name in (("demo-dc", "demo-dc"), (pipe, "demo")):
        (note,) = notes(model, model="owner/name", **found)
        assert note.startswith(f"The preset a was measured with owner/name; with {name}, its gain and its distance ")
    assert notes("demo", model="demo-dc", **ratios)[0].startswith("The preset a has ratios for MagCache that were meas")
    assert not notes("demo", model="owner/name", cache=EAGER) and not notes("demo", **found)


def test_a_preset_without_a_method_is_dense_and_a_cache_alone_changes_no_method(pipe, monkeypatch):
    monkeypatch.setattr("vidaccel.pipelines.default_method.MIN_SPARSE_TOKENS", 1)
    assert generate(pipe, preset=Preset(name="a", cache=EAGER), steps=2).name == "dense"
    assert generate(pipe, cache=EAGER, steps=2, settings={"tangent": {"k_clusters": 4}}).name == "tangent"


def test_the_reference_of_a_comparison_has_no_cache(pipe, tmp_path):
    made = generate(pipe, method=["radial", "svg2"], compare=True, cache=EAGER, steps=4, warm_up=False)
    plain, *others = made.videos
    assert plain.name == "dense" and plain.account is None
    assert np.array_equal(plain.frames, generate(pipe, steps=4).frames)
    assert all(video.account.counts()["skipped"] for video in others)
    assert made.settings["cache"] == "first_block, threshold 1000"
    page = write_report(made, tmp_path / "page.html").files[0].with_name("page.html").read_text()
    assert "and what the settings name beside it differs" in page and "8 forwards, 2 computed and 6 skipped" in page
    numbers = json.loads((tmp_path / "page.json").read_text())["videos"]
    assert "account" not in numbers[0] and numbers[1]["account"]["skipped"] == 6


def test_what_a_preset_has_beside_dense_is_compared_with_it(pipe, tmp_path):
    made = generate(pipe, preset=Preset(name="a", cache=EAGER), compare=True, steps=4, report=tmp_path / "page.html")
    plain, cached = made.videos
    assert [video.name for video in made.videos] == ["dense", "dense-cache"]
    assert plain.account is None and cached.account.counts()["skipped"] == 6
    assert np.array_equal(plain.frames, generate(pipe, steps=4).frames)
    assert "dense-cache" in (tmp_path / "page.html").read_text() and (tmp_path / "page.dense-cache.mp4").is_file()
    both = prepare(pipe, Settings(PROMPT), Sparse(["dense"]), compare=True, preset=Preset(cache=EAGER, compile=True))
    assert both.methods == {"dense": None, "dense-cache-compile": None} and both.first == "dense-cache-compile"
    with pytest.raises(BadInput, match=r"^compare needs a method other than dense.*vidaccel waterfall"):
        prepare(pipe, Settings(PROMPT), Sparse(), compare=True, preset=Preset(name="a", num_inference_steps=4))


@pytest.mark.compiler
def test_compiled_blocks_are_compiled_before_the_run_that_is_timed(pipe):
    torch._dynamo.reset()
    made = generate(pipe, method="dense", compile=True, compare=True, steps=2, warm_up=True)
    assert made.videos[1].name == "dense-compile" and not any("compiled on the way" in note for note in made.notes)


def test_a_comparison_warms_up_in_as_many_steps_as_the_scheduler_of_a_preset_makes(pipe):
    levels = SchedulerChoice("GridScheduler", {"sigmas": [1.0, 0.5]})
    preset = Preset(name="a", method=Radial(), scheduler=levels, num_inference_steps=2)
    made = generate(pipe, preset=preset, compare=True)
    assert [video.name for video in made.videos] == ["dense", "radial"]


def test_the_adapter_that_a_model_has_of_its_own():
    preset = Preset(name="a", model="demo-dc", guidance_free=("own",), num_inference_steps=2)
    made = vidaccel.generate("demo-dc", PROMPT, preset=preset, cache=EAGER, **SMALL)
    assert [step.forwards for step in made.account.steps] == [1, 1]


def test_the_adapters_of_a_preset_in_a_loaded_pipeline():
    """What `tune` found on a pipeline, and what comes with the package, for `generate` with that pipeline."""
    pipe = vidaccel.DCVideoGenPipeline.from_pretrained(demo.path("demo-dc"))
    pipe.set_progress_bar_config(disable=True)
    scheduler, passes = pipe.scheduler, []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    loaded = vidaccel.generate(pipe, PROMPT, preset="demo-dc-four-steps", frames=9, height=64, width=64, progress=False)
    assert len(passes) == 4 and pipe.scheduler is scheduler
    named = vidaccel.generate("demo-dc", PROMPT, preset="demo-dc-four-steps", **SMALL)
    assert np.array_equal(loaded.frames, named.frames)
    passes.clear()
    own = Preset(name="a", guidance_free=("own",), num_inference_steps=2, guidance_scale=2.0)
    vidaccel.generate(pipe, PROMPT, preset=own, frames=9, height=64, width=64, progress=False)
    hook.remove()
    assert len(passes) == 2
    with pytest.raises(BadInput, match="guidance_free is for a model that is loaded here"):
        vidaccel.generate(pipe, PROMPT, guidance_free=True, frames=9, height=64, width=64, progress=False)


def test_a_scheduler_beside_an_adapter_that_brings_one_is_refused_in_all_ways(loads_nothing):
    """One of the two would be left out, by each way another."""
    few = load_preset("demo-dc-four-steps").replace(scheduler=SchedulerChoice("UniPCMultistepScheduler"))
    told = "scheduler is UniPCMultistepScheduler: few_steps_4.safetensors was distilled to noise levels of its own"
    pipe = vidaccel.DCVideoGenPipeline.from_pretrained(demo.path("demo-dc"))
    with pytest.raises(PresetError, match=told):
        vidaccel.apply(pipe, few)
    for given in ({"preset": few}, {"preset": few.replace(guidance_free=()), "guidance_free": few.guidance_free}):
        with pytest.raises(BadInput, match=f"preset cannot be used: {told}"):
            vidaccel.generate("demo-dc", PROMPT, **given, **SMALL)
    other = load_preset("demo-dc-four-steps").replace(num_inference_steps=6)
    with pytest.raises(PresetError, match="num_inference_steps is 6: few_steps_4.safetensors was distilled to 4 steps"):
        vidaccel.apply(pipe, other)
    with pytest.raises(BadInput, match="steps is 6: few_steps_4.safetensors was distilled to 4 steps"):
        vidaccel.generate("demo-dc", PROMPT, preset=other, **SMALL)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_layers_in_8_bits(pipe):
    plain = generate(pipe, steps=2)
    made = generate(pipe, steps=2, quantize="int8")
    difference = np.abs(made.frames.astype(int) - plain.frames).mean()
    assert 0 < difference < 8
    assert np.array_equal(generate(pipe, steps=2).frames, plain.frames)


@pytest.mark.compiler
def test_compiled_blocks(pipe):
    plain = generate(pipe, steps=3)
    made = generate(pipe, steps=3, compile=True)
    assert np.abs(made.frames.astype(int) - plain.frames).max() <= 1
    assert np.array_equal(generate(pipe, steps=3).frames, plain.frames)
    assert made.account.levers == {"compile": "the blocks"}


@pytest.mark.compiler
def test_that_a_video_has_a_compilation_in_it_is_told(pipe):
    torch._dynamo.reset()
    notes = [generate(pipe, steps=2, compile=True).notes for _ in range(2)]
    assert re.fullmatch(r"dense: a graph was compiled on the way, which its [\d.]+ s include\.", notes[0][-1])
    assert not [note for note in notes[1] if "compiled on the way" in note]


@pytest.mark.parametrize("more", [{}, {"compare": True}, {"offload": True}])
def test_a_model_is_in_8_bits_before_it_is_on_its_device(more, monkeypatch):
    """Not for a comparison, whose reference needs the whole weights there, nor where parts come one after the other."""
    monkeypatch.setattr("vidaccel.pipelines.presets.packages.check_packages", lambda preset: None)
    asked = Settings(PROMPT, **{name: SMALL[name] for name in ("frames", "height", "width")})
    sparse = Sparse(methods=("radial",)) if "compare" in more else Sparse()
    options = {"compare": "compare" in more, "preset": Preset(quantize="int8")}
    job = replace(prepare("demo", asked, sparse, **options), device=torch.device("meta"), offload="offload" in more)
    done = []
    made = SimpleNamespace()
    monkeypatch.setattr("vidaccel.generation.api.load", lambda facts, dtype, device, **_: done.append(device) or made)
    monkeypatch.setattr("vidaccel.generation.api.attach", lambda pipe, loras: [])
    monkeypatch.setattr(
        "vidaccel.pipelines.presets.applied.quantise_for_good", lambda pipe, preset, device, base: done.append(device)
    )
    monkeypatch.setattr("vidaccel.generation.api.make_videos", lambda job, pipe, **_: iter(()))
    monkeypatch.setattr("vidaccel.pipelines.presets.checks.check_preset", lambda pipe, preset, base: None)
    assert carry_out(job) == []
    assert done == ([job.device] if more else ["cpu", job.device])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "first_blok"}, "cache cannot be used: first_blok: there is none of that name; did you mean first_b"),
        ({"cache": "first_block=much"}, "cache is first_block=much: what follows = must be its threshold, a number"),
        ({"cache": "first_block=-1"}, "cache cannot be used: -1.0: it must be at least 0"),
        ({"cache": "magcache"}, "cache cannot be used: magcache needs mag_ratios"),
        ({"quantize": "int4"}, "quantize cannot be used: int4: it must be one of int8, fp8"),
        ({"compile": "fast"}, "compile cannot be used: fast: its mode must be one of default, max-autotune-no-cudag"),
        ({"preset": "none.yaml"}, "preset cannot be used: there is no preset none.yaml"),
        (
            {"preset": Preset(name="a", family="Mochi 1")},
            "preset cannot be used: a is for Mochi 1, and demo is of Wan 2.1 / 2.2. Give another model",
        ),
        ({"preset": Preset(name="a", transformer={"num_layers": 30})}, "num_layers 30 there, .* here"),
        ({"decoder": "gone.safetensors"}, "decoder cannot be used: gone.safetensors: there is no such file or folder"),
        ({"preset": Preset(name="a", scheduler="NoSuch")}, "NoSuch: diffusers has no scheduler of that name"),
        (
            {"preset": Preset(name="a", guidance_free=("own",)), "guidance_scale": 1},
            "guidance_scale is 1: the preset puts guidance into one pass",
        ),
    ],
)
def test_refused_before_weights_are_read(given, message, loads_nothing):
    model = "demo-dc" if "guidance_scale" in given else "demo"
    with pytest.raises(BadInput, match=message):
        vidaccel.generate(model, PROMPT, **given, **SMALL)


def test_what_the_loaded_model_refuses_is_told_before_the_dense_video(monkeypatch):
    monkeypatch.setattr("vidaccel.generation.api.make_videos", lambda *_, **__: pytest.fail("a video was made"))
    preset = Preset(name="a", scheduler=SchedulerChoice("DDIMScheduler"))
    asked = {**SMALL, "method": "radial", "compare": True, "preset": preset}
    with pytest.raises(BadInput, match="of flow matching, and DDIMScheduler is not made for that"):
        vidaccel.generate("demo", PROMPT, **asked)


def test_precision_beside_a_cache(pipe):
    settings = Settings(PROMPT, frames=9, height=64, width=64).checked(inspect_model("demo"))
    with pytest.raises(BadInput, match="precision .*int8"):  # which no CPU computes: so it was asked for
        run(pipe, settings, SVG2(density=0.5, q_clusters=4), precision="int8", beside=Preset(cache=EAGER))


def test_layers_in_8_bits_are_not_offloaded_by_blocks():
    from vidaccel.generation.levers.presets import check_beside, with_levers
    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.requests.settings import Settings

    preset, facts = with_levers(None, quantize="int8"), inspect_model("demo")
    with pytest.raises(BadInput, match="offload cannot be had with quantize block by block: .* Offload whole parts"):
        check_beside(preset, facts, Settings(PROMPT), "blocks")
    with pytest.raises(BadInput, match="compile cannot be used: offloading by blocks puts hooks .* Leave compile out"):
        check_beside(with_levers(None, compile=True), facts, Settings(PROMPT), "blocks")


@pytest.mark.parametrize(
    ("given", "package"), [({"cache": "cache_dit"}, "cache-dit"), ({"quantize": "fp8"}, "torchao")]
)
def test_the_line_that_installs_what_is_missing(given, package, loads_nothing, monkeypatch):
    find = importlib.util.find_spec
    gone = ("cache_dit", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more))
    with pytest.raises(BadInput, match=f"is not installed. Install it: pip install {package}"):
        vidaccel.generate("demo", PROMPT, **given, **SMALL)


def test_what_only_the_loaded_pipeline_tells_is_bad_input_too(pipe):
    pipe.transformer.enable_cache(vidaccel_cache := first_block())
    try:
        with pytest.raises(BadInput, match=f"the transformer has {type(vidaccel_cache).__name__} already"):
            generate(pipe, cache="first_block", steps=2)
    finally:
        pipe.transformer.disable_cache()


def first_block():
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig()
