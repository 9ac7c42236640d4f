"""The benchmark scripts of quality run from end to end at the smallest size."""

from __future__ import annotations

import json

import pytest
from benchmark_scripts import run, table
from diffusers import WanTransformer3DModel
from gft_adapters import write_adapter

from vidaccel import demo


def test_quality(tmp_path):
    arguments = ["--prompts", "2", "--steps", "3", "--densities", "0.5", "--processes", "1"]
    only = [r"(tangent(, probed)?|svg2, compensated|radial), density 0\.5", r"tangent, density 0\.2, \d dense"]
    only += [r"tangent, probed, (tolerance 0\.05|density 0\.106)"]
    arguments += ["--only", f"^({'|'.join(only)})"]
    run("quality.py", *arguments, "--out", str(tmp_path))
    rows = table(tmp_path / "quality.csv")
    fixed = [r for r in rows if r["dense"] == "20%" and r["wanted"] == "0.5"]
    assert {r["method"] for r in fixed} == {"tangent", "tangent, probed", "svg2, compensated", "radial"}
    assert all(0.4 < float(r["density of sparse calls"]) < 0.6 for r in fixed)
    assert all("±" in r["psnr - rival"] for r in fixed if r["method"] != "svg2, compensated")
    assert all(float(r["psnr mean"]) > 0 for r in rows[1:]) and rows[0]["psnr mean"] == ""
    assert {r["dense"] for r in rows[1:]} == {"0", "1", "2", "20%"}
    assert {r["wanted"] for r in rows} >= {"tolerance 0.05", "0.106"}
    assert (tmp_path / "quality.png").stat().st_size > 5000 and "| dense |" in (tmp_path / "quality.md").read_text()
    stamp = (tmp_path / "quality.jsonl").read_text()
    run("quality.py", *arguments, "--out", str(tmp_path))  # nothing left to do
    assert (tmp_path / "quality.jsonl").read_text() == stamp


def test_dc_videogen(tmp_path):
    run("dc_videogen.py", "--model", "tiny", "--sizes", "tiny", "--device", "cpu", "--out", str(tmp_path))
    deep, base = table(tmp_path / "dc_videogen-tiny-cpu.csv")
    assert deep["latents"].startswith("DC-AE-V") and base["latents"] == "Wan"
    assert (int(deep["tokens"]), int(base["tokens"])) == (2 * 2 * 2, 3 * 4 * 4)
    assert float(deep["step_ms"]) > 0 and float(deep["video_ratio"]) > 0 and base["video_ratio"] == ""


@pytest.mark.slow
def test_tangent_defaults(tmp_path):
    run("tangent_defaults.py", "--no-long", "--out", str(tmp_path))
    text = (tmp_path / "tangent_defaults.md").read_text()
    assert all(f"| {calls} 576 | {x} | 0." in text for calls in ("demo", "imitated") for x in (0.1, 0.2, 0.35))
    assert text.count("\n| --- |") == 4 and "nan" not in text


@pytest.mark.slow
def test_dc_demo(tmp_path):
    work = ["--clips", "2", "--bits", "16", "--bits", "4", "--rounds", "1", "--prompts", "1"]
    run("dc_demo.py", *work, "--out", str(tmp_path))
    result = json.loads((tmp_path / "dc_demo.json").read_text())
    assert [row["tokens"] for row in result["speed"]] == [576, 128]
    assert [row["model"] for row in result["accuracy"]] == ["demo", "demo-dc"]
    assert len(result["reconstruction"]) == 4
    assert (tmp_path / "dc_demo.jpg").stat().st_size > 5000 and "| demo-dc |" in (tmp_path / "dc_demo.md").read_text()


@pytest.mark.slow
def test_lora_demo(tmp_path):
    """One step teaches nothing, and does not make the rule's colours."""
    arguments = ["--steps", "1", "--clips", "20", "--prompts", "1", "--denoising-steps", "4"]
    run("lora_demo.py", *arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path))
    made = json.loads((tmp_path / "lora_demo.json").read_text())
    base, trained = made["videos"]
    assert base["colour of the rule"] == 0 and base["all by the rule"] == 0
    assert trained["LoRA"] == "weight 1" and made["bytes"] > 100_000
    assert [row["step"] for row in made["errors"]] == [1]
    assert (tmp_path / "lora_demo.md").read_text().count("\n| --- |") == 2


def test_guidance_in_one_pass_goes_on_where_it_stopped(tmp_path):
    """Of a given adapter alone; another adapter's videos are made anew."""
    base = demo.path()
    adapter = write_adapter(tmp_path, base, WanTransformer3DModel.from_pretrained(base, subfolder="transformer"))
    work = ["--adapter", f"demo={adapter}", "--steps", "3", "--clips", "0", "--out", str(tmp_path)]
    run("gft_demo.py", *work, "--prompts", "1")
    raw = tmp_path / "gft_demo.jsonl"
    [first] = raw.read_text().splitlines()
    run("gft_demo.py", *work, "--prompts", "2")
    assert raw.read_text().startswith(first) and len(raw.read_text().splitlines()) == 2
    rows = json.loads((tmp_path / "gft_demo.json").read_text())["videos"]
    assert [row["guidance"] for row in rows] == ["two passes", "none", "one pass, adapter"]
    assert all(row["right"].endswith("of 2") and float(row["CPU-s a step"]) > 0 for row in rows)
    assert rows[0]["of two passes"] == "1.00" and float(rows[1]["PSNR to two passes, dB"]) > 10
    assert "| demo | 3 | 2 | one pass, adapter |" in (tmp_path / "gft_demo.md").read_text()
