"""The benchmark scripts of what makes the built-in models faster run from end to end at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_scripts import run, table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidaccel import demo


@pytest.mark.slow
def test_presets_of_the_built_in_models(tmp_path):
    """Each shipped preset of them, beside both models as they are; a second call goes on."""
    run("preset_demo.py", "--small", "--prompts", "1", "--out", str(tmp_path))
    [first] = (tmp_path / "preset_demo.jsonl").read_text().splitlines()
    rows = json.loads(first)["rows"]
    assert list(rows)[:2] == ["demo", "demo-dc"] and "demo-dc-fast" in rows
    assert rows["demo-dc-four-steps"]["of"] == 4 and str(Path(demo.path()).parents[1]) not in first
    assert rows["demo-dc-fast"]["of"] == 6 and rows["demo-cache"]["passes"] < rows["demo-cache"]["of"] == 40
    made = table(tmp_path / "preset_demo.csv")
    assert [row["preset"] for row in made] == ["demo, as it is", "demo-dc, as it is", *list(rows)[2:]]
    assert made[0]["times as fast as demo"] == "1.00" and all(row["right"].endswith("of 1") for row in made)
    run("preset_demo.py", "--small", "--prompts", "1", "--out", str(tmp_path))
    assert (tmp_path / "preset_demo.jsonl").read_text().splitlines() == [first]
    assert "| demo-dc-fast |" in (tmp_path / "preset_demo.md").read_text()


@pytest.mark.slow
def test_the_guidance_cache(tmp_path):
    """One prompt with each setting; a second call goes on."""
    run("guidance_cache_demo.py", "--prompts", "1", "--out", str(tmp_path))
    [first] = (tmp_path / "guidance_cache_demo.jsonl").read_text().splitlines()
    rows = {row["setting"]: row for row in table(tmp_path / "guidance_cache_demo.csv")}
    assert rows["both passes in all steps"]["passes"] == "40 of 40"
    assert rows["every 3 (default)"]["passes"] == "29 of 40" and float(rows["every 3 (default)"]["of both passes"]) < 1
    run("guidance_cache_demo.py", "--prompts", "1", "--out", str(tmp_path))
    assert (tmp_path / "guidance_cache_demo.jsonl").read_text().splitlines() == [first]


@pytest.mark.slow
def test_the_forecast_cache(tmp_path):
    """One prompt with each setting, and the plot."""
    run("forecast_cache_demo.py", "--prompts", "1", "--out", str(tmp_path))
    rows = {row["setting"]: row for row in table(tmp_path / "forecast_cache_demo.csv")}
    assert rows["all passes"]["passes"] == "40 of 40" and rows["50 steps: all passes"]["passes"] == "100 of 100"
    strict, loose = (float(rows[f"forecast {limit}"]["PSNR to all passes, dB"]) for limit in ("0.05", "0.3"))
    assert strict > loose > 30
    assert (tmp_path / "forecast_cache_demo.png").stat().st_size > 10_000


@pytest.mark.slow
def test_few_steps_go_on_where_they_stopped(tmp_path):
    """One prompt in each way; what was made is not made again, and the accuracies are those of the table."""
    guidance = demo.path(demo.DC) / "transformer" / "guidance_free.safetensors"
    few = tmp_path / "few.safetensors"
    tensors, header = load_file(guidance), safe_open(guidance, "pt").metadata()
    facts = json.loads(header["vidaccel"])
    facts |= {"recipe": "consistency", "few_steps": {"sigmas": [1.0, 0.75]}}
    facts["guidance_free"] = {"min_scale": 2.0, "max_scale": 2.0, "gated": False}
    save_file(tensors, few, {**header, "vidaccel": json.dumps(facts)})
    accuracy = tmp_path / "accuracy.json"
    work = ["--few-steps", str(few), "--prompts", "1", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    work += ["--accuracy", str(accuracy)]
    run("few_steps_demo.py", *work, "--only", "demo-dc two")
    raw = tmp_path / "few_steps_demo.jsonl"
    [first] = raw.read_text().splitlines()
    run("few_steps_demo.py", *work)
    assert raw.read_text().startswith(first)
    rows = table(tmp_path / "few_steps_demo.csv")
    ways = [(row["guidance"], row["steps"], row["sampler"]) for row in rows]
    one = "one pass"
    own = [(one, steps, "own") for steps in ("20", "6", "4", "2")]
    assert ways == [("two passes", "20", "own"), *own, (one, "4", "euler"), (one, "2", "distilled")]
    assert rows[0]["PSNR, dB"] == "" and all(float(row["PSNR, dB"]) > 10 for row in rows[1:])
    told = json.loads(accuracy.read_text())["rows"]
    assert [(row["model"], row["steps"], row["prompts"]) for row in told[:2]] == [("demo", 20, 64), ("demo-dc", 20, 1)]
    assert len(told) == 1 + len(rows) - 1  # that of the plain model, and none of Euler's untrained steps


@pytest.mark.slow
def test_the_tiny_decoder_of_the_built_in_model(tmp_path):
    accuracy = tmp_path / "accuracy.json"
    run("tiny_decoder_demo.py", "--prompts", "1", "--out", str(tmp_path), "--accuracy", str(accuracy))
    [row] = json.loads((tmp_path / "tiny_decoder_demo.json").read_text())["rows"]
    assert row["tiny"]["psnr"] > 15 and row["tiny"]["video"] < row["autoencoder"]["video"]
    [told] = json.loads(accuracy.read_text())["rows"]
    assert (told["model"], told["steps"], told["prompts"]) == ("demo-dc", 4, 1) and told["decoder"]
    assert "| tiny | " in (tmp_path / "tiny_decoder_demo.md").read_text()


@pytest.mark.slow
def test_tiny_decoders_beside_published_autoencoders(tmp_path):
    size = ["--frames", "9", "--height", "64", "--width", "64"]
    run("decoders.py", "--only", "LTX", *size, "--out", str(tmp_path))
    [row] = json.loads((tmp_path / "decoders.json").read_text())["rows"]
    assert row["latents of"] == "LTX-2" and row["video"] == "9 x 64 x 64" and row["tiny decoder, s"] > 0
