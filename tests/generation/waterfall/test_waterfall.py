"""The waterfall of a preset: its rows, what they say, and its page."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig, WanPipeline
from families import ltx

import vidaccel
from vidaccel import SLA, SVG2, DenseSchedule, Preset, demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.report.page import format_psnr
from vidaccel.generation.waterfall.account import Row, Waterfall
from vidaccel.generation.waterfall.page import write_waterfall
from vidaccel.generation.waterfall.stages import Stage, stages
from vidaccel.pipelines.presets import Cache, LoraFile, Quantize, SchedulerChoice, load_preset
from vidaccel.pipelines.presets.compiling import graphs_made

SMALL = {"frames": 9, "height": 64, "width": 64, "progress": False, "steps": 4}
PROMPTS = demo.HELD_OUT_PROMPTS[:2]
FULL = Preset(
    name="full",
    summary="All of it.",
    model="demo-dc",
    base="demo",
    family="Wan 2.1 / 2.2",
    method=SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=1)),
    guidance_free=("own",),
    cache=Cache("first_block", 1e3),
    num_inference_steps=3,
    guidance_scale=2.5,
)


SCHEDULED = load_preset("demo-dc-four-steps").replace(scheduler=SchedulerChoice("DDIMScheduler"))


@pytest.fixture(scope="module")
def made() -> Waterfall:
    return vidaccel.waterfall(None, FULL, PROMPTS, 5, rounds=2, device="cpu", **SMALL)


def test_videos_of_another_size_are_not_called_identical():
    row = Row(Stage("a", "a", "", Preset()), 4, 2.0, ((1.0,),), (30.0, math.nan), None, (1, 0), np.zeros((1, 2, 2, 3)))
    assert math.isnan(row.mean_psnr) and format_psnr(row.mean_psnr) == "–"


def test_the_rows_of_a_preset():
    preset = FULL.replace(
        quantize=Quantize("int8"),
        compile=True,
        loras=(LoraFile("a.safetensors"),),
        scheduler=SchedulerChoice("UniPCMultistepScheduler"),
    )
    rows = stages(preset)
    names = ["base", "model", "guidance_free", "steps", "quantize", "compile", "method", "cache"]
    assert [row.name for row in rows] == names
    assert [row.model for row in rows] == ["demo"] + ["demo-dc"] * 7
    # Each has the levers of those above it; the last is the preset.
    for before, row in itertools.pairwise(rows):
        assert set(before.preset.levers()) <= set(row.preset.levers())
    last = rows[-1].preset
    assert last == preset.replace(summary="", model="", base="")
    assert [row.preset.guidance_scale for row in rows[:4]] == [None, None, 2.5, 2.5]
    assert [row.preset.num_inference_steps for row in rows[:4]] == [None, None, None, 3]
    # Of a model that is the base itself, there is no row for it.
    assert [row.name for row in stages(Preset(name="a", model="demo", cache=FULL.cache))] == ["base", "cache"]
    assert stages(Preset(name="a", model="demo", cache=FULL.cache), "other")[1].model == "other"


def test_prompts_that_are_cut_off_are_told_once(tmp_path):
    made = vidaccel.waterfall(
        "demo", Preset(name="a", cache=Cache("first_block", 1e3)), ["circle " * 600], rounds=1, device="cpu", **SMALL
    )
    page = write_waterfall(made, tmp_path / "w.html").read_text()
    assert page.count("</strong>: prompt has 600 tokens, and the text encoder reads the first 511") == 1


def test_all_is_measured_against_the_plain_base(made):
    assert [row.stage.name for row in made.rows] == ["base", "model", "guidance_free", "steps", "method", "cache"]
    assert [row.forwards for row in made.rows] == [(8, 0), (8, 0), (4, 0), (3, 0), (3, 0), (1, 2)]
    assert [row.steps for row in made.rows] == [4, 4, 4, 3, 3, 3]
    assert made.seeds == (5, 6) and all(np.shape(row.seconds) == (2, 2) for row in made.rows)
    first = made.rows[0]
    assert first.psnr == (math.inf, math.inf) and made.gain(first) == 1
    assert all(math.isfinite(value) for row in made.rows[1:] for value in row.psnr)
    assert [row.identical_frames for row in made.rows] == [18] + [0] * 5
    # The base is what `generate` makes without anything.
    plain = vidaccel.generate("demo", PROMPTS[0], seed=5, device="cpu", **SMALL)
    assert np.array_equal(plain.frames, first.sample)
    assert all(row.right is not None and len(row.right) == 2 for row in made.rows)


def test_passes_are_the_mean_over_the_prompts():
    """The built-in forecast cache leaves out other steps of another prompt."""
    preset = Preset(name="a", cache=Cache("forecast", 0.25))
    size = {**SMALL, "steps": 10}
    both, *alone = (
        vidaccel.waterfall("demo", preset, prompts, np.int64(seed), rounds=np.int64(1), device="cpu", **size)
        .rows[1]
        .forwards
        for prompts, seed in ((PROMPTS, 5), (PROMPTS[:1], 5), (PROMPTS[1:], 6))
    )
    assert both == tuple(np.mean(alone, 0)) and both[1] > 0


def test_a_loaded_pipeline_a_function_and_a_checker_of_ones_own():
    loaded = WanPipeline.from_pretrained(demo.path())
    preset = Preset(name="a", cache=Cache("first_block", 1e3))
    seen = []

    def checker(frames, prompt):
        seen.append((frames.shape, frames.dtype, prompt))
        return len(seen) % 2 == 0

    runs = [
        vidaccel.waterfall(model, preset, PROMPTS[0], rounds=1, checker=checker, **SMALL)
        for model in (loaded, lambda: loaded)
    ]
    assert [row.accuracy for row in runs[0].rows] == [0, 1]
    assert seen[0] == ((9, 64, 64, 3), np.uint8, PROMPTS[0])
    assert runs[0].rows[1].psnr == runs[1].rows[1].psnr
    assert not loaded.transformer.is_cache_enabled


def row(name: str, seconds, psnr=(30.0,), right=(True,)) -> Row:
    return Row(
        Stage(name, name, "demo", FULL),
        4,
        2.0,
        seconds,
        psnr,
        right,
        (8, 0),
        np.zeros((3, 32, 32, 3), np.uint8),
        ("n",),
    )


def test_the_noise_of_the_rounds_is_told():
    first, last = row("base", ((4.0, 4.2), (6.0, 6.2)), (math.inf,)), row("cache", ((2.0, 2.2), (2.0, 2.2)), (25.0,))
    made = Waterfall(FULL, (first, last), ("a",), (0,))
    assert first.spread == (4.1, 6.1) and first.median == pytest.approx(5.1)
    assert made.gain(last) == pytest.approx(5.1 / 2.1)
    assert made.gain_range(last) == pytest.approx((4.1 / 2.1, 6.1 / 2.1))
    assert made.in_words() == (
        "full: 2.43 times as fast as the plain base (2.10 s instead of 5.10 s a video), and 1 instead of 1 of 1 "
        "videos show what their prompt says."
    )
    unchecked = Waterfall(FULL, (row("base", ((4.0,),), right=None), row("cache", ((2.0,),), right=None)), ("a",), (0,))
    assert unchecked.in_words().endswith("at a PSNR of 30.0 dB to it.")


@pytest.mark.parametrize(
    ("base", "levers", "words"),
    [
        # Each was the faster one in some round.
        (
            ((4.0,), (4.2,)),
            ((3.9,), (4.22,)),
            "no gain that can be told from noise (4.06 s a video with it and 4.10 s ",
        ),
        # In both rounds a little faster, by less than the rounds of one of them differ.
        (((4.0,), (4.2,)), ((3.92,), (4.12,)), "rounds of the same differ by up to 5%), at a PSNR of 30.0 dB to it."),
        (((4.0,), (4.01,)), ((3.9,), (3.91,)), "1.03 times as fast as the plain base (3.91 s instead of 4.00 s a "),
        (
            ((4.0,),),
            ((3.9,),),
            "(3.90 s instead of 4.00 s a video; a difference as small needs more rounds to be told ",
        ),
        # The machine became slower, for both alike.
        (((4.0,), (6.0,)), ((3.0,), (4.5,)), "1.33 times as fast as the plain base"),
        (((4.0,), (4.01,)), ((8.0,), (8.01,)), "0.50 times as fast as the plain base"),
    ],
    ids=["in turns", "by little", "measured", "one round", "drift", "slower"],
)
def test_a_gain_that_the_rounds_cannot_tell_is_none(base, levers, words, tmp_path):
    rows = row("base", base, (math.inf,), None), row("cache", levers, right=None)
    made = Waterfall(FULL, rows, ("a",), (0,), {"size": "small", "videos": "one"})
    assert words in made.in_words()
    differs = "no gain" not in made.in_words()
    assert made.differs(rows[1]) is differs is made.to_dict()["rows"][1]["differs_from_base"]
    chart = write_waterfall(made, tmp_path / "w.html").read_text().split("<table>")[0]
    assert ("no difference" in chart) is not differs


def test_a_psnr_that_leaves_frames_out_says_so(tmp_path, capsys, monkeypatch):
    from vidaccel.cli.presets import _print_table

    monkeypatch.setenv("COLUMNS", "400")
    rows = (row("base", ((4.0,),), (math.inf,), None), replace(row("cache", ((2.0,),), right=None), identical_frames=7))
    made = Waterfall(FULL, rows, ("a",), (0,), {"size": "small", "videos": "one"})
    assert made.in_words().endswith("at a PSNR of 30.0 dB to it over the frames that differ (7 identical).")
    assert made.to_dict()["rows"][1]["identical_frames"] == 7
    page = write_waterfall(made, tmp_path / "w.html").read_text()
    assert "<td>30.0 dB (7 identical)</td>" in page and "of the frames that differ" in page
    _print_table(made)
    told = capsys.readouterr().out
    assert "30.0 dB (7 identical)" in told and "PSNR is the mean over the frames that differ" in told


def test_levers_that_did_nothing_gain_nothing():
    """Same videos from as many passes: times that differ are the machine's."""
    for rounds in (1, 2):
        base, same = (
            row(name, ((seconds,),) * rounds, (math.inf,)) for name, seconds in (("base", 4.0), ("method", 3.9))
        )
        made = Waterfall(FULL, (base, same), ("a",), (0,))
        assert made.in_words() == (
            "full: nothing gained, since no lever did anything: the same videos as the plain base makes, from as many "
            "passes (3.90 s and 4.00 s a video)."
        )
        assert not made.differs(same)


def test_a_cache_that_skipped_nothing_gains_nothing_however_far_the_times_are_apart():
    """It acts through passes that it leaves out alone; what is compiled may be faster with the same videos."""
    for levers, faster in (({"cache": "forecast"}, False), ({"compile": True}, True)):
        preset = Preset(name="a", guidance_cache=3, **levers) if "cache" in levers else Preset(name="a", **levers)
        base, same = row("base", ((4.0,),), (math.inf,), None), row("last", ((2.0,),), (math.inf,), None)
        same = replace(same, stage=Stage("last", "last", "demo", preset))
        made = Waterfall(preset, (base, same), ("a",), (0,))
        assert made.differs(same) is faster
        assert ("2.00 times as fast" in made.in_words()) is faster
        assert ("nothing gained, since no lever did anything" in made.in_words()) is not faster
        assert ("the same, and more rounds tell whether the time is another)" in made.in_words()) is faster
        twice = tuple(replace(each, seconds=each.seconds * 2) for each in (base, same))
        assert "more rounds" not in Waterfall(preset, twice, ("a",), (0,)).in_words()


def test_the_page_and_its_numbers(made, tmp_path):
    page = write_waterfall(made, tmp_path / "w.html", "vidaccel waterfall <x> caf\udce9")
    text = page.read_text()
    numbers = json.loads((tmp_path / "w.json").read_text())
    assert [r["lever"] for r in numbers["rows"]] == [r.stage.name for r in made.rows]
    assert numbers["rows"][0]["psnr_mean"] is None and numbers["gain"] == made.in_words()
    assert Preset.from_dict(numbers["preset"]) == FULL
    assert made.in_words() in text and "vidaccel waterfall &lt;x&gt;" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "<svg" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "it loads nothing"
    for name in ("+ guidance_free", "+ cache", "first_block, threshold 1000"):
        assert name in text
    # A note that all rows below have too stands there once.
    assert text.count("merged into the weights") == 1


@pytest.mark.parametrize(
    ("model", "preset", "more", "message"),
    [
        (None, Preset(name="a", cache=FULL.cache), {}, "model is not known: the preset names none"),
        ("demo", Preset(name="a"), {}, "preset has nothing to measure: a leaves the pipeline as it is"),
        ("demo", "nowhere.yaml", {}, "there is no preset nowhere.yaml"),
        ("demo", FULL, {"rounds": 0}, "rounds is 0: it must be a whole number of at least 1"),
        ("demo", FULL, {"rounds": 1.5}, "rounds is 1.5: it must be a whole number of at least 1"),
        ("demo", None, {}, "preset is needed"),
        ("demo", FULL, {"prompts": None}, "prompts is None: they must be texts, one or several in a list"),
        ("demo", FULL, {"seeds": [1]}, "seeds there are 1, for 2 prompts"),
        ("demo", FULL, {"seeds": [1, -1]}, "seeds is -1: it must be between 0 and"),
        ("demo", FULL, {"seeds": 0.5}, "seeds is 0.5: it must be a whole number"),
        ("demo", FULL, {"prompts": []}, "prompts there are none"),
        ("demo", FULL, {"prompts": ["a", " "]}, "prompts one of them is empty"),
        ("demo", FULL, {"prompts": ["a", "\udce9"]}, r"prompts is '\\udce9': it holds bytes that are no text in UTF-8"),
        ("demo", Preset(decoder="gone.safetensors"), {}, "preset cannot be used: decoder: .*gone.safetensors"),
        ("demo", FULL, {"frames": 10}, "frames is 10"),
        ("demo-dc", FULL, {"height": 8}, "height is 8: frames to compare have at least 11x11 pixels, .* Give a larger"),
        ("demo", FULL.replace(family="Mochi 1"), {}, "is for Mochi 1"),
        (
            "demo",
            Preset(loras="gone.safetensors"),
            {},
            "^preset cannot be used: loras is gone.safetensors: there is no such file or folder",
        ),
        ("demo", Preset(guidance_free="gone.safetensors"), {}, "preset cannot be used: .*gone.safetensors"),
        (
            "demo",
            Preset(method=SLA(), sla="gone.safetensors"),
            {},
            "preset cannot be used: attention.adapters: .*gone.safetensors",
        ),
        ("demo", Preset(scheduler="Unipc"), {}, "scheduler is Unipc: diffusers has no scheduler of that name"),
        (
            "demo",
            Preset(method=SVG2(), backend="triton"),
            {},
            "preset cannot be used: attention.backend is triton: it cannot",
        ),
        ("demo", Preset(method=SVG2(), precision="int8"), {}, "preset cannot be used: attention.precision is int8"),
        ("demo-dc", SCHEDULED, {}, "scheduler is DDIMScheduler: few_steps_4.safetensors was distilled to noise levels"),
    ],
)
def test_refused_before_anything_is_loaded(model, preset, more, message, monkeypatch):
    monkeypatch.setattr("vidaccel.generation.waterfall.models.load", lambda *_, **__: pytest.fail("weights were read"))
    given = {"prompts": PROMPTS, **SMALL, **more}
    with pytest.raises(BadInput, match=message):
        vidaccel.waterfall(model, preset, given.pop("prompts"), given.pop("seeds", 0), device="cpu", **given)


def test_what_the_loaded_model_refuses_is_told_before_the_first_video(monkeypatch):
    """Also of levers whose rows come late, and of the second of two models."""
    from vidaccel.generation.waterfall import api as module

    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("a video was made"))
    ddim = Preset(name="a", scheduler=SchedulerChoice("DDIMScheduler"), cache=FULL.cache)
    cached = WanPipeline.from_pretrained(demo.path())
    cached.transformer.enable_cache(FirstBlockCacheConfig())
    for model, preset, message in (
        ("demo", ddim, "of flow matching, and DDIMScheduler is not made for that"),
        (None, ddim.replace(base="demo", model="demo-dc"), "of flow matching, and DDIMScheduler is not made for that"),
        (cached, Preset(name="a", method=SVG2(), cache=FULL.cache), "the transformer has .* already"),
    ):
        placing = {} if model is cached else {"device": "cpu"}
        with pytest.raises(BadInput, match=message):
            vidaccel.waterfall(model, preset, PROMPTS, **placing, **SMALL)


def test_guidance_without_a_lever_that_it_comes_with_is_that_of_all_rows():
    preset = Preset(name="a", model="demo", method=SVG2(), cache=FULL.cache, guidance_scale=3.0)
    assert [(row.name, row.preset.guidance_scale) for row in stages(preset)] == [
        ("base", 3.0),
        ("method", 3.0),
        ("cache", 3.0),
    ]


def test_halves_of_a_batch_that_are_left_out_are_told(tmp_path):
    preset = Preset(name="p", guidance_cache=2, guidance_scale=3.0)
    made = vidaccel.waterfall(ltx.ltx(), preset, ["a dot moves"], rounds=1, **{**SMALL, "steps": 6})
    assert [(row.forwards, row.halved) for row in made.rows] == [((6, 0), 0), ((6, 0), 2)]
    assert [row["forwards_halved"] for row in made.to_dict()["rows"]] == [0, 2]
    page = write_waterfall(made, tmp_path / "w.html").read_text()
    assert "halved</th>" in page and "<td>6</td><td>2</td><td>0</td>" in page and "one branch of guidance in" in page


@pytest.mark.compiler
def test_compilation_is_in_no_row(monkeypatch):
    """A guidance cache halves the batch in some steps, for which blocks are compiled anew in the middle of a run."""
    from vidaccel.generation.waterfall import api as module

    of_runs: dict[float, int] = {}

    def run(*args, **kwargs):
        before = graphs_made()
        made = plain(*args, **kwargs)
        of_runs[made.seconds] = graphs_made() - before
        return made

    plain = module.run
    monkeypatch.setattr(module, "run", run)
    preset = Preset(name="p", compile=True, guidance_cache=2, guidance_scale=3.0)
    made = vidaccel.waterfall(ltx.ltx(), preset, ["a dot moves"], rounds=1, **{**SMALL, "steps": 6})
    assert sum(of_runs.values()) > 0 and len(made.rows) == 3
    for row in made.rows:
        assert [of_runs[seconds] for seconds in row.seconds[0]] == [0]
        assert not any("compiled" in note for note in row.notes)
    assert "made 4 of 6 second passes" in made.rows[-1].notes[0]  # those of the run that counts alone
