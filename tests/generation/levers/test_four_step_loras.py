"""LoRAs that distil Wan to four steps (lightx2v's): their schedule in a stock scheduler, and a whole run with one.

`docs/few-steps.md` gives the scheduler's settings.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from families import wan_kin
from safetensors.torch import save_file
from typer.testing import CliRunner

import vidaccel
from vidaccel.cli import app
from vidaccel.generation.media.video_reader import read_video
from vidaccel.pipelines.presets import LoraFile, SchedulerChoice

EULER = {"flow_shift": 5.0, "solver_order": 1, "disable_corrector": [0, 1, 2]}
TIMES = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
"""1, .75, .5 and .25, shifted by 5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    pipe = wan_kin.wan()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **EULER)
    place = tmp_path_factory.mktemp("models") / "wan"
    pipe.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """In the layout of lightx2v's files: original names, matrices, and differences of biases and norms."""
    width, rank, made = 32, 4, {}
    for block in range(2):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0"):
            stem = f"diffusion_model.blocks.{block}.{layer}"
            made[f"{stem}.lora_down.weight"] = torch.randn(rank, width)
            made[f"{stem}.lora_up.weight"] = torch.randn(width, rank)
            made[f"{stem}.diff_b"] = torch.randn(width)
        made[f"diffusion_model.blocks.{block}.norm3.diff"] = torch.randn(width)
    path = tmp_path_factory.mktemp("loras") / "lightx2v_rank4.safetensors"
    save_file(made, path)
    return path


def test_the_stock_scheduler_is_euler_at_the_four_times(folder):
    """Each step is x - (t - t') v, at 1000, 937.5, 833.3 and 625 but for rounding to whole timesteps."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen, told = [], []

    def step(output, timestep, sample, **more):
        made = type(pipe.scheduler).step(pipe.scheduler, output, timestep, sample, **more)
        seen.append((output, sample, made[0]))
        told.append(float(timestep))
        return made

    pipe.scheduler.step = step
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    pipe("a dot", **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert told == pytest.approx([1000 * time for time in TIMES[:-1]], abs=1)
    for (velocity, sample, made), now, then in zip(seen, TIMES[:-1], TIMES[1:], strict=True):
        wanted = sample.double() - (now - then) * velocity.double()
        assert (made - wanted).abs().max() < 2e-3 * velocity.abs().max()


def test_the_euler_scheduler_of_flows_is_not():
    """Why the page does not name it: with four steps of its own it goes down to its lowest noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 909.7, 717.3, 24.4], abs=0.1)


def test_a_run_with_such_a_lora(folder, lora, tmp_path):
    made = {}
    for name, more in (("without", ()), ("with", ("--lora", lora))):
        out = tmp_path / f"{name}.mp4"
        asked = ["generate", "a dot", "--model", folder, "--out", out, "--steps", 4, "--guidance-scale", 1, *more]
        asked += ["--frames", 9, "--height", 64, "--width", 64, "--device", "cpu"]
        done = CliRunner().invoke(app, [str(part) for part in asked])
        assert done.exit_code == 0, done.output
        made[name] = read_video(out)[0]
    assert made["with"].shape == (9, 64, 64, 3) and (made["with"] != made["without"]).any()


@pytest.mark.parametrize("method", ["dense", "radial"])
def test_a_folder_with_the_scheduler_of_this_package(folder, lora, tmp_path, method):
    """Its times are exact, its four steps are the default, and with sparse attention one of them stays dense."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.scheduler = vidaccel.GridScheduler()
    pipe.save_pretrained(tmp_path / "wan")
    size = {"frames": 9, "height": 64, "width": 64, "guidance_scale": 1, "device": "cpu", "progress": False}
    more = {} if method == "dense" else {"density": 0.6, "dense_steps": 1, "dense_layers": 0}
    made = vidaccel.generate(str(tmp_path / "wan"), "a dot", method=method, lora=lora, **size, **more)
    if method == "dense":
        plain = vidaccel.generate(str(tmp_path / "wan"), "a dot", method=method, **size)
        assert (made.frames != plain.frames).any()
        return
    dense = {record.step: bool(record.reason) for record in made.report.records}
    assert dense == {0: True, 1: False, 2: False, 3: False}


def test_as_a_preset(folder, lora):
    """Scheduler, LoRA and steps under one handle; the pipeline is as it was afterwards."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    own, told = pipe.scheduler, []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: told.append(float(given["timestep"][0])), with_kwargs=True
    )
    preset = vidaccel.Preset(
        scheduler=SchedulerChoice("GridScheduler"),
        loras=(LoraFile(lora),),
        num_inference_steps=4,
        guidance_scale=1.0,
    )
    with vidaccel.apply(pipe, preset) as handle:
        pipe("a dot", num_frames=9, height=64, width=64, output_type="latent", **handle.arguments)
    assert told == pytest.approx([1000 * time for time in TIMES[:-1]])
    assert pipe.scheduler is own


def test_the_page_has_these_settings():
    page = (Path(__file__).parents[3] / "docs" / "few-steps.md").read_text(encoding="utf-8")
    for setting, value in EULER.items():
        assert f'"{setting}": {json.dumps(value)}' in page or f"{setting}={json.dumps(value)}" in page, setting
