"""What `vidaccel demo` measures and shows: its chain, the accuracies that it quotes, the long step, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vidaccel import Preset, demo
from vidaccel.cli import app
from vidaccel.generation.errors import BadInput
from vidaccel.generation.showcase import measured as module
from vidaccel.generation.showcase.measured import (
    Accuracy,
    Showcase,
    fastest_demo,
    long_steps,
    measured,
    quoted,
    showcase,
)
from vidaccel.generation.showcase.page import write_showcase
from vidaccel.generation.showcase.step_times import StepTimes
from vidaccel.generation.waterfall.account import Row, Waterfall
from vidaccel.generation.waterfall.stages import Stage, stages

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def row(name: str, seconds: float, preset: Preset, steps: int = 20, frames: int = 32) -> Row:
    generator = np.random.default_rng(0)
    sample = generator.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
    model = "demo" if name == "base" else "demo-dc"
    times = ((seconds,), (1.1 * seconds,))
    return Row(Stage(name, name, model, preset), steps, 2.0, times, (30.0,), (True,), (steps, 0), sample)


@pytest.fixture
def made() -> Showcase:
    plain, free = Preset(name="a"), Preset(name="a", guidance_free=("own",))
    rows = (
        row("base", 6.0, plain, frames=33),
        row("model", 2.0, plain),
        row("guidance_free", 1.5, free),
        row("steps", 1.0, free, steps=4),
    )
    accuracy = (Accuracy(62, 64), Accuracy(62, 64), None, Accuracy(60, 64))
    steps = {
        "dense": StepTimes(3.0, 2.4, 0.0, 1.0, "dense"),
        "radial": StepTimes(1.5, 0.8, 0.1, 0.2, "flex", 0.05),
    }
    return Showcase(Waterfall(free, rows, ("a red <circle>",), (0,), {}, {}), accuracy, 8448, steps)


def test_the_gain_in_one_sentence(made):
    assert made.in_words() == (
        "6.0 times as fast as the plain model, from prompt to frames: 1.1 s a video instead of 6.3 s, and 60 of 64 "
        "prompts are shown right instead of 62."
    )
    unknown = Showcase(made.waterfall, (None,) * 4, 0, {})
    assert unknown.in_words().endswith("1.1 s a video instead of 6.3 s.")


def test_the_page(made, tmp_path):
    """Whole in one file, with the sentence first, numbers beside it, and no accuracy of what was not measured."""
    page = write_showcase(made, tmp_path / "demo.html", "vidaccel demo --out caf\udce9.html")
    text = page.read_text(encoding="utf-8")
    assert f"<h1>{made.in_words()}</h1>" in text and "red &lt;circle&gt;" in text
    assert text.count("<video ") == 4 and not re.search(r'(src|href)="http', text)
    assert "60 of 64 prompts right" in text and text.count("accuracy not measured for these settings") == 1
    assert "one step at 8,448 tokens" in text and "2.00\u00d7" in text
    assert "prefers-color-scheme: dark" in text and "max-width: 560px" in text
    told = json.loads((tmp_path / "demo.json").read_text())
    assert told["long_video"]["steps"]["radial"]["density"] == 0.2
    assert [r["accuracy_measured_before"] for r in told["waterfall"]["rows"]][2:] == [
        None,
        {"right": 60, "prompts": 64},
    ]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_an_encoder_that_cannot_is_known_before_all_is_measured(tmp_path, monkeypatch):
    from vidaccel.generation.media import video

    monkeypatch.setattr(module, "showcase", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    video.check_encoder.cache_clear()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d.html")])
    video.check_encoder.cache_clear()
    assert result.exit_code == 1 and "Error: videos cannot be written here" in result.stderr, result.output


def test_a_page_that_cannot_be_written_does_not_take_the_table_with_it(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "showcase", lambda *_, **__: made)
    monkeypatch.setattr("vidaccel.generation.showcase.page.write_showcase", full)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d.html")])
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert made.in_words() in " ".join(result.stdout.split())


def test_only_a_measurement_of_the_same_counts():
    digest = module.file_digest(demo.path(demo.DC) / "transformer" / "guidance_free.safetensors")
    free = row("guidance_free", 1.0, Preset(name="a", guidance_free=("own",)))
    entry = {
        "model": "demo-dc",
        "steps": 20,
        "guidance_scale": 2.0,
        "adapter": digest,
        "decoder": "",
        "right": 61,
        "prompts": 64,
    }
    assert quoted(free, [entry]) == Accuracy(61, 64)
    for other in ({"steps": 6}, {"adapter": "0"}, {"model": "demo"}, {"guidance_scale": 3.0}):
        assert quoted(free, [{**entry, **other}]) is None


def test_the_quoted_accuracies_are_those_of_the_tables():
    """Of the files that are there: whoever changes an adapter measures it again."""
    import csv

    told = {(r["model"], r["steps"], r["adapter"]): r for r in measured() if not r["decoder"]}
    with (RESULTS / "few_steps_demo.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["sampler"] != "euler"]
    assert len(told) == len(rows) + 1
    for found in rows:
        right, prompts = map(int, found["all"].split(" of "))
        same = [r for r in told.values() if r["model"] == found["model"] and r["steps"] == int(found["steps"])]
        assert any((r["right"], r["prompts"]) == (right, prompts) for r in same), found
    plain = next(r for r in told.values() if r["model"] == "demo")
    stated = json.loads((RESULTS / "dc_demo.json").read_text())["accuracy"][0]
    assert stated["model"] == "demo" and plain["right"] == round(64 * int(stated["all"].rstrip("%").strip()) / 100)
    tiny = json.loads((RESULTS / "tiny_decoder_demo.json").read_text())
    [entry] = [r for r in measured() if r["decoder"]]
    assert entry["right"] == sum(r["tiny"]["right"] for r in tiny["rows"]) and entry["prompts"] == len(tiny["rows"])
    assert entry["decoder"] == tiny["decoder"] == module.own_decoder()
    preset = fastest_demo()
    for stage in stages(preset):
        steps = preset.num_inference_steps if stage.name in ("steps", "decoder") else 20
        assert quoted(row(stage.name, 1.0, stage.preset, steps)) is not None, stage.name


def test_the_chain_keeps_the_accuracy(monkeypatch):
    """Few steps that lose more than 5 of 100 prompts are not shown; 6 steps of the model's own sampler then are."""
    rows = [r for r in stages(fastest_demo())]
    assert [r.name for r in rows] == ["base", "model", "guidance_free", "steps", "decoder"]
    assert fastest_demo().num_inference_steps < 6
    blurred = [r | ({"right": 50} if r["decoder"] else {}) for r in measured()]
    with monkeypatch.context() as patched:
        patched.setattr(module, "measured", lambda: blurred)
        assert fastest_demo().num_inference_steps < 6 and fastest_demo().decoder is None
    worse = [r | ({"right": 50} if r["steps"] < 6 else {}) for r in measured()]
    monkeypatch.setattr(module, "measured", lambda: worse)
    assert fastest_demo().num_inference_steps == 6 and fastest_demo().guidance_free == ("own",)


def test_a_step_of_a_long_video():
    """At a length that a test can afford: the same names, and what each of them computed."""
    torch.set_num_threads(1)
    found, tokens = long_steps((33, 128))
    assert tokens == 576 and list(found) == ["dense", "radial", "svg2", "tangent"]
    assert found["dense"].density == 1 and found["dense"].error is None
    assert all(0.1 < t.density < 0.3 and 0 < t.error < 1 and t.seconds > 0 for n, t in found.items() if n != "dense")


@pytest.mark.slow  # `make demo` is this command, and a part of `.ci/run`
def test_the_command(tmp_path):
    """One round without the long step: the plain model, and each lever with its passes."""
    out = tmp_path / "demo.html"
    arguments = ["demo", "a red circle moves left on a grey background", "--out", str(out), "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--no-long-step"])
    assert done.exit_code == 0, done.output
    assert "times as fast as the plain model" in done.output and "guidance in one pass" in done.output
    rows = json.loads(out.with_suffix(".json").read_text())["waterfall"]["rows"]
    assert [r["lever"] for r in rows] == ["base", "model", "guidance_free", "steps", "decoder"]
    few = fastest_demo().num_inference_steps
    assert [r["forwards_computed"] for r in rows] == [40, 40, 20, few, few]
    assert "one step at" not in out.read_text(encoding="utf-8")


def test_what_cannot_be(tmp_path):
    with pytest.raises(BadInput, match="prompt is empty"):
        showcase(" ", long_step=False)
    for options, words in (
        (["--out", str(tmp_path / "a.txt")], ".html"),
        (["--threads", "0"], "must be at least 1"),
        (["--rounds", "0"], "must be a whole number of at least 1"),
    ):
        done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "a.html"), *options])
        assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output
