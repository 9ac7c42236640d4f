"""The benchmark scripts of quality run from end to end at the smallest size."""

from __future__ import annotations

import pytest
from benchmark_scripts import run, table


@pytest.mark.slow
def test_quality(tmp_path):
    arguments = ["--prompts", "2", "--steps", "3", "--size", "96", "--densities", "0.5", "--processes", "1"]
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


@pytest.mark.slow
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
