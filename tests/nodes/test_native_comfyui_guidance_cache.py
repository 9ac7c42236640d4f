"""The guidance cache with ComfyUI's own models in this process.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging

import pytest
import torch
from gft_adapters import write_native
from native_comfyui import defaults, models, patched, sample, tiny

from vidaccel import GuidanceCache
from vidaccel.nodes.native_guidance import guide
from vidaccel.nodes.native_guidance_cache import cache_guidance
from vidaccel.nodes.wording import InputError

EVERY_2 = GuidanceCache(2, first_steps=0)


def conditions(model) -> list[list[int]]:
    """Which conditions each forward pass from now on computes, 0 the positive one, in a clone's wrapper."""
    from comfy.patcher_extension import WrappersMP

    seen: list[list[int]] = []

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        seen.append(list((transformer_options or {})["cond_or_uncond"]))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **more)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", wrapper)
    return seen


def by_hand(model):
    """A clone that makes all passes, and puts what the rule says in the place of the negative ones of step 2 of 4."""
    seen: list[torch.Tensor] = []

    def replaced(args):
        (positive, negative), sigma = args["conds_out"], float(args["sigma"].flatten()[0])
        seen.append((positive - negative) / sigma)
        if len(seen) == 3:
            negative = positive - sigma * (seen[1] + 0.5 * (seen[1] - seen[0]))
        return [positive, negative]

    clone = model.clone()
    clone.set_model_sampler_pre_cfg_function(replaced, disable_cfg1_optimization=True)
    return clone


@pytest.mark.parametrize("name", models())
def test_what_stands_for_the_negative_pass(name, caplog):
    description, model, unpatched = tiny(name)
    if description.cfg == 1:
        pytest.skip("it is sampled without guidance")
    wanted = sample(by_hand(model), description)
    clone = cache_guidance(model, EVERY_2)
    seen = conditions(clone)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native_guidance_cache"):
        made = sample(clone, description)
    assert sum(kinds.count(1) for kinds in seen) == 3 and sum(kinds.count(0) for kinds in seen) == 4
    assert "Guidance Cache: 3 of 4 passes of the negative prompt were made." in caplog.text
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=1e-3)
    assert not made.equal(unpatched)
    assert sample(clone, description).equal(made) and sample(model, description).equal(unpatched)


def test_without_guidance_nothing_changes(caplog):
    from dataclasses import replace

    description, model, _ = tiny("wan_t2v")
    plain = replace(description, cfg=1.0)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native_guidance_cache"):
        assert sample(cache_guidance(model, EVERY_2), plain).equal(sample(model, plain))
    assert not caplog.text


@pytest.mark.parametrize("first", ["sparse", "cache"])
def test_with_sparse_attention_in_either_order(first):
    description, model, _ = tiny("wan_t2v")
    made = cache_guidance(model, EVERY_2) if first == "cache" else model
    made, session = patched(made)
    made = made if first == "cache" else cache_guidance(made, EVERY_2)
    sample(made, description)
    records = session.report().records
    steps = {branch: {r.step for r in records if r.branch == branch} for branch in ("cond", "uncond")}
    assert steps == {"cond": {0, 1, 2, 3}, "uncond": {0, 1, 3}}


def test_the_node():
    from vidaccel.nodes.guidance_cache_node import NODES, VidaccelGuidanceCache

    description, model, unpatched = tiny("wan_t2v")
    [clone] = VidaccelGuidanceCache.execute(model, **defaults(VidaccelGuidanceCache)).result
    assert clone is not model and not sample(clone, description).equal(unpatched)
    assert [VidaccelGuidanceCache] == NODES


def test_all_passes_made_is_told(caplog):
    description, model, unpatched = tiny("wan_t2v")
    assert sample(cache_guidance(model, GuidanceCache(first_steps=1.0)), description).equal(unpatched)
    assert "all 4 passes of the negative prompt were made" in caplog.text


def test_what_it_refuses(tmp_path):
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(InputError, match="has a guidance cache already"):
        cache_guidance(cache_guidance(model, EVERY_2), EVERY_2)
    with pytest.raises(InputError, match="guidance-free"):
        cache_guidance(guide(model, write_native(tmp_path), 4.0), EVERY_2)
