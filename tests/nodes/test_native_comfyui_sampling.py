"""Sampling with ComfyUI's own models in this process: samplers, batches, other nodes beside sparse attention.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import pytest
import torch
from native_comfyui import comfy, layouts, management, models, patched, sample, tiny

from vidaccel import SVG2, GuidanceCache, Radial, VideoLayout
from vidaccel.nodes.native.forecast import cache_steps
from vidaccel.nodes.native.guidance_cache import cache_guidance, guidance_log
from vidaccel.nodes.native.override import KEY
from vidaccel.nodes.report.tables import report_text
from vidaccel.pipelines.forecast.settings import ForecastSettings


@pytest.mark.parametrize("name", models("wan_t2v", "hunyuan", "mochi", "ltxv", "cosmos_predict2"))
def test_the_original_model_is_as_it_was(name):
    description, model, unpatched = tiny(name)
    before = dict(model.model_options["transformer_options"])
    clone, _ = patched(model)
    sample(clone, description)
    assert sample(model, description).equal(unpatched)
    assert model.model_options["transformer_options"] == before
    assert not any(KEY in kinds for kinds in (*model.wrappers.values(), *model.callbacks.values()))


@pytest.mark.parametrize("name", models("wan_t2v", "hunyuan", "mochi", "ltxv"))
def test_guidance_in_one_batch_equals_guidance_in_two_calls(name, monkeypatch):
    description, model, _ = tiny(name)
    method = Radial(block_size=16, decay=0.1, near=0.4)  # not one of clusters, which a last bit moves
    clone, together = patched(model, method)
    batched = sample(clone, description)
    clone, apart = patched(model, method)
    monkeypatch.setattr(management, "get_free_memory", lambda *args, **kwargs: 0)
    torch.testing.assert_close(sample(clone, description), batched, rtol=1e-3, atol=1e-3)
    assert sorted(r.branch for r in together.report().records) == sorted(r.branch for r in apart.report().records)


def test_a_second_run_is_the_first_again_also_after_another_size():
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, lambda layout: SVG2(density=0.6))
    first = sample(clone, description)
    assert sample(clone, description).equal(first)
    sample(clone, description, latent=(4, 12, 20))
    assert sample(clone, description).equal(first)
    assert layouts(session) == [VideoLayout(4, 6, 10), VideoLayout(5, 8, 8)]  # the one used last is the last
    assert session.report().runs() == [0, 1, 2, 3]


def test_two_patched_clones_do_not_meet():
    description, model, _ = tiny("wan_t2v")
    svg2, one = patched(model)
    radial, other = patched(model, Radial(block_size=16, decay=0.1, near=0.4))
    alone = sample(svg2, description)
    sample(radial, description)
    assert sample(svg2, description).equal(alone)
    assert one.report().runs() == [0, 1] and other.report().runs() == [0]


def test_an_interrupted_run_can_be_queued_again():
    description, model, _ = tiny("wan_t2v")
    clone, _ = patched(model)
    first = sample(clone, description)

    def interrupt(step, *args):
        if step == 1:
            raise management.InterruptProcessingException

    with pytest.raises(management.InterruptProcessingException):
        sample(clone, description, callback=interrupt)
    assert sample(clone, description).equal(first)


def test_two_samplers_share_the_scale_of_percentages():
    """Wan 2.2: one model up to step 2, another from there; only the first step of four is dense."""
    description, model, _ = tiny("wan_t2v")
    (high, first), (low, second) = (patched(model, dense_start_percent=0.25) for _ in range(2))
    sample(high, description, last_step=2)
    sample(low, description, start_step=2, disable_noise=True)
    assert [d == 1 for d in first.report().density_by_step().values()] == [True, False]
    assert [d == 1 for d in second.report().density_by_step().values()] == [False, False]


def test_from_a_video_to_noise():
    """FlipSigmas: steps are counted in the order in which they are, so that the caches keep the first ones."""
    description, model, _ = tiny("wan_t2v")
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 8).flip(0)
    sigmas[0] = 1e-4  # as the node has it
    clone, session = patched(cache_steps(model, ForecastSettings(1e6, most=0, last_steps=2)), dense_start_percent=0.0)
    sample(clone, description, steps=8, sigmas=sigmas)
    assert {record.step for record in session.report().records} == {0, 1, 2, 6, 7}
    guided = cache_guidance(model, GuidanceCache(3, first_steps=2), log := guidance_log())
    sample(guided, description, steps=8, sigmas=sigmas)
    assert "4 of 8 passes of the negative prompt were made" in report_text(log.news())


@pytest.mark.parametrize("sampler", ["heun", "res_multistep", "dpmpp_2s_ancestral"])
def test_samplers_of_higher_order_keep_their_steps(sampler):
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model)
    sample(clone, description, sampler=sampler)
    report = session.report()
    assert sorted(report.density_by_step()) == [0, 1, 2, 3] and {r.num_steps for r in report.records} == {4}


def test_a_latent_batch_of_two():
    description, model, _ = tiny("hunyuan")
    clone, session = patched(model)
    assert sample(clone, description, batch=2).shape[0] == 2
    assert session.report().density_by_step()[3] == pytest.approx(0.6, abs=0.03)


def test_an_override_of_another_node_gets_the_other_calls():
    description, model, _ = tiny("wan_t2v")
    seen = []

    def former(func, q, k, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return func(q, k, *args, **kwargs)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = former
    clone, _ = patched(other)
    out = sample(clone, description)
    assert seen.count((320, 320)) == 3 and seen.count((320, 7)) == 12  # one dense step, four of cross-attention
    without, _ = patched(model)
    assert sample(without, description).equal(out)
    # And with the other node behind ours.
    clone, _ = patched(model)
    clone.model_options["transformer_options"]["optimized_attention_override"] = former
    assert sample(clone, description).equal(out)


def test_beside_easycache():
    from comfy_extras.nodes_easycache import EasyCacheNode

    description, model, _ = tiny("wan_t2v")
    for order in (0, 1):
        clone, session = patched(model)
        if order:
            clone, session = patched(EasyCacheNode.execute(model, 5.0, 0.3, 0.9, False)[0])
        else:
            clone = EasyCacheNode.execute(clone, 5.0, 0.3, 0.9, False)[0]
        assert sample(clone, description, steps=8).isfinite().all()
        steps = session.report().density_by_step()
        assert len(steps) < 8 and min(steps.values()) < 0.7  # the cache skipped some, the others were sparse
        assert not any("no attention call" in note for note in session.report().notes)


def test_a_compiled_model_is_sparse():
    """`TorchCompileModel` wraps the diffusion model; dynamo must not trace into the choice of keys."""
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model)
    eager = sample(clone, description)
    compiled = clone.clone()
    diffusion_model = torch.compile(compiled.model.diffusion_model, backend="eager")
    compiled.add_object_patch("diffusion_model", diffusion_model)
    torch.testing.assert_close(sample(compiled, description), eager, rtol=1e-3, atol=1e-3)
    assert session.report().last().density_by_step()[3] == pytest.approx(0.6, abs=0.03)


def test_cross_attention_as_long_as_the_video_is_not_taken_for_self_attention():
    """NAG: another node attends in each block to a text of its own, here with as many tokens as the video has."""
    description, model, _ = tiny("wan_t2v")
    text = torch.randn(1, 320, 48, generator=torch.Generator().manual_seed(3))

    def nag(model) -> None:
        for number, block in enumerate(model.model.diffusion_model.blocks):
            own = block.cross_attn

            class Guided(type(own)):
                def forward(self, x, context, transformer_options=None, **kwargs):
                    out = super().forward(x, context, transformer_options=transformer_options, **kwargs)
                    away = super().forward(
                        x, text.expand(len(x), -1, -1), transformer_options=transformer_options, **kwargs
                    )
                    return out + 0.5 * (out - away)

            guided = Guided.__new__(Guided)
            guided.__dict__.update(own.__dict__)
            model.add_object_patch(f"diffusion_model.blocks.{number}.cross_attn", guided)

    dense_model = model.clone()
    nag(dense_model)
    clone, session = patched(dense_model, SVG2(density=1.0))
    torch.testing.assert_close(sample(clone, description), sample(dense_model, description), rtol=1e-3, atol=1e-3)
    clone, session = patched(dense_model)
    sample(clone, description)
    assert {record.layer for record in session.report().records} == {0, 1, 2}
    assert len(session.report().records) == 4 * 3 * 2
    assert any("no block of Wan makes it" in note for note in session.report().notes)
