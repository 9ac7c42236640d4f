"""Nodes of ComfyUI that guide by further passes of the same prompt, beside caches and sparse attention.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from native_comfyui import comfy, patched, sample, tiny

from vidaccel.nodes.native.forecast import cache_steps
from vidaccel.pipelines.forecast.settings import ForecastSettings

nodes_lt = pytest.importorskip("comfy_extras.nodes_lt")
if not hasattr(nodes_lt, "LTXVModalityGuidance"):
    pytest.skip("this ComfyUI has no guidance of LTX-2 by further passes yet", allow_module_level=True)


def guided(model, stg: float = 0.0, modality: bool = False):
    """A clone with STG until a share of the sampling, and Modality Guidance behind it."""
    if stg:
        model = nodes_lt.LTXVSpatioTemporalGuidance.execute(model, 1.0, "1", 0.0, stg).args[0]
    return nodes_lt.LTXVModalityGuidance.execute(model, 3.0, 0.0, 1.0).args[0] if modality else model


def steady(model):
    """A clone whose passes each take numbers of their own off the latents: all of the way is a line for each kind."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        own = 3 if transformer_options.get("stg_self_attn_blocks") else 4
        usual, other = (torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(n)).to(x) for n in (1, own))
        further = own == 3 or transformer_options.get("a2v_cross_attn") is False
        return x - t.reshape(-1, *[1] * (x.ndim - 1)) * (usual + 0.3 * further * (other - usual))

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "steady", wrapper)
    return clone


@pytest.mark.parametrize(("stg", "modality", "left_out"), [(1.0, True, 12), (0.7, True, 8), (0.5, False, 8)])
def test_the_forecast_cache_tells_them_apart(stg, modality, left_out, caplog):
    """Guidance that ends takes the latents another way: its lines begin anew."""
    description, model, _ = tiny("ltxav")
    model = guided(steady(model), stg, modality)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.forecast"):
        made = sample(cache_steps(model, ForecastSettings(0.1, most=0)), description, steps=16)
    torch.testing.assert_close(made, sample(model, description, steps=16), atol=1e-3, rtol=1e-3)
    told = int(caplog.text.split("Forecast Cache: ")[1].split(" of 16 steps")[0])
    assert told >= left_out


@pytest.mark.parametrize("steps", [4, 5])
def test_guidance_in_every_step_is_no_change(steps, caplog):
    description, model, _ = tiny("ltxav")
    sample(cache_steps(guided(model, 1.0, True), ForecastSettings(0.001)), description, steps=steps)
    assert f"all {steps} steps were computed; " in caplog.text and "changed" not in caplog.text


def test_guidance_that_comes_and_goes_is_told(caplog):
    """In every second step: all of them begin a new line."""
    description, model, _ = tiny("ltxav")
    model, count = steady(model), iter(range(1000))

    def every_second(args):
        if next(count) % 2:
            return args["denoised"]
        inner = {**args["model_options"]["transformer_options"], "a2v_cross_attn": False}
        options = {**args["model_options"], "transformer_options": inner}
        at = args["input"], args["sigma"]
        (further,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], *at, options)
        return args["denoised"] + (args["cond_denoised"] - further)

    model.set_model_sampler_post_cfg_function(every_second)
    sample(cache_steps(model, ForecastSettings(0.1, most=0)), description, steps=12)
    assert "all 12 steps were computed; a ControlNet, a hook, a prompt or a node of guidance changed" in caplog.text


def test_each_has_a_branch_of_its_own_in_sparse_attention():
    description, model, _ = tiny("ltxav")
    clone, session = patched(guided(model, 1.0, True), dense_start_percent=0.0)
    sample(clone, description, steps=2)
    counts = Counter((r.step, r.layer, r.branch) for r in session.report().records)
    assert set(counts.values()) == {1}
    further = {"cond, stg_self_attn_blocks 1", "cond, a2v_cross_attn off, v2a_cross_attn off"}
    assert {branch for _, _, branch in counts} == {"cond", "uncond", *further}


def test_what_is_kept_of_a_pass_that_does_not_come_any_more_is_forgotten():
    """Of guidance that ends on the way; that of both prompts stays."""
    description, model, _ = tiny("ltxav")
    clone, session = patched(guided(model, 0.5), dense_start_percent=0.0)
    kept = []

    def branches(*args):
        kept.append({call[1] for engine in session._engines.values() for call in engine.memory.calls})

    sample(clone, description, steps=8, callback=branches)
    further = "cond, stg_self_attn_blocks 1"
    assert kept[1] == {"cond", "uncond", further} and kept[-1] == {"cond", "uncond"}


def test_a_strength_that_falls_with_the_noise_makes_no_other_pass():
    description, model, _ = tiny("ltxav")
    model = model.clone()

    def falling(args):
        inner = {**args["model_options"]["transformer_options"], "guidance": {"strength": float(args["sigma"].max())}}
        options = {**args["model_options"], "transformer_options": inner}
        at = args["input"], args["sigma"]
        (further,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], *at, options)
        return args["denoised"] + (args["cond_denoised"] - further)

    model.set_model_sampler_post_cfg_function(falling)
    clone, session = patched(model, dense_start_percent=0.0)
    sample(clone, description, steps=4)
    assert {r.branch for r in session.report().records} == {"cond", "uncond", "cond, guidance strength"}
