"""The benchmark scripts of what was trained run from end to end at the smallest size."""

from __future__ import annotations

import json

import pytest
from benchmark_scripts import run
from diffusers import WanTransformer3DModel
from gft_adapters import write_adapter

from vidaccel import demo


@pytest.mark.slow
def test_dc_demo(tmp_path):
    work = ["--clips", "2", "--bits", "16", "--bits", "4", "--rounds", "1", "--prompts", "1"]
    work += ["--steps", "4", "--size", "64"]
    run("dc_demo.py", *work, "--out", str(tmp_path))
    result = json.loads((tmp_path / "dc_demo.json").read_text())
    assert [row["tokens"] for row in result["speed"]] == [144, 32]
    assert [row["model"] for row in result["accuracy"]] == ["demo", "demo-dc"]
    assert len(result["reconstruction"]) == 4
    assert (tmp_path / "dc_demo.jpg").stat().st_size > 5000 and "| demo-dc |" in (tmp_path / "dc_demo.md").read_text()


@pytest.mark.slow
def test_lora_demo(tmp_path):
    """One step teaches nothing, and does not make the rule's colours."""
    arguments = ["--steps", "1", "--clips", "20", "--prompts", "1", "--denoising-steps", "4"]
    arguments += ["--size", "64", "--batch-size", "1"]
    run("lora_demo.py", *arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path))
    made = json.loads((tmp_path / "lora_demo.json").read_text())
    base, trained = made["videos"]
    assert base["colour of the rule"] == 0 and base["all by the rule"] == 0
    assert trained["LoRA"] == "weight 1" and made["bytes"] > 100_000
    assert [row["step"] for row in made["errors"]] == [1]
    assert (tmp_path / "lora_demo.md").read_text().count("\n| --- |") == 2


@pytest.mark.slow
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


@pytest.mark.slow
def test_longer_videos_go_on_where_they_stopped(tmp_path):
    work = ["--only", "dense", "--frames", "17", "--denoising-steps", "2", "--out", str(tmp_path)]
    run("length_demo.py", *work, "--prompts", "1")
    first = (tmp_path / "length_demo_17.jsonl").read_text()
    run("length_demo.py", *work, "--prompts", "1")
    assert (tmp_path / "length_demo_17.jsonl").read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["way"] for row in rows] == ["dense"]
    assert all(row["cpu_seconds"] > 0 and isinstance(row["right"]["all"], bool) for row in rows)
    assert "| dense | 1 |" in (tmp_path / "length_demo_17.md").read_text()


@pytest.mark.slow
def test_sparse_linear_attention_of_a_trained_model(tmp_path):
    """Beside dense attention and what needs no training."""
    from sla_models import write_model

    from vidaccel import SLA

    write_model(tmp_path / "run" / "pipeline", demo.path(), method=SLA(topk=0.0556, block=(32, 32)))
    work = ["--arm", f"all={tmp_path / 'run'}", "--prompts", "1", "--denoising-steps", "3"]
    run("sla_demo.py", *work, "--out", str(tmp_path))
    rows = json.loads((tmp_path / "sla_demo.json").read_text())["1 of 18"]["videos"]
    assert rows[0]["attention"] == "dense" and rows[-1]["attention"].endswith("trained")
    assert rows[0]["all right"].endswith("of 1") and float(rows[-1]["PSNR to dense, dB"]) > 0
