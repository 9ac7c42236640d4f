from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel, WanPipeline
from tiny_wan import generate, make_pipe, make_transformer
from torch.utils.checkpoint import checkpoint

import vidaccel
from vidaccel import SVG, SVG2, DenseSchedule, Radial, Sparge, Tangent, VideoLayout
from vidaccel.attention import BlockPlan, RandomBlocks
from vidaccel.pipelines import supported_pipelines
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor

SPARSE = DenseSchedule(first_steps=1, first_layers=1)
METHODS = [
    Radial(decay=0.05, block_size=8, near=0.25, min_window=0.0, sink=False),
    SVG(density=0.6),
    SVG2(density=0.4),
    RandomBlocks(density=0.4),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_sparse_changes_the_video_and_remove_brings_it_back(pipe, method):
    before = generate(pipe)
    processors = dict(pipe.transformer.attn_processors)
    handle = vidaccel.accelerate(pipe, method, schedule=SPARSE)
    sparse = generate(pipe)
    report = handle.report()
    handle.remove()
    assert report.records and 0 < (sparse - before).abs().max() < 10 * before.abs().max()
    assert generate(pipe).equal(before)
    after = pipe.transformer.attn_processors
    assert list(after) == list(processors) and all(after[n] is p for n, p in processors.items())


def test_a_schedule_of_dense_steps_gives_the_stock_video_bit_for_bit(pipe):
    before = generate(pipe)
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=1.0)):
        assert generate(pipe).equal(before)


def test_full_density_gives_the_stock_video(pipe):
    before = generate(pipe)
    for method in (SVG(density=1.0), SVG2(top_p=1.0)):
        with vidaccel.accelerate(pipe, method, schedule=DenseSchedule()):
            torch.testing.assert_close(generate(pipe), before, atol=1e-4, rtol=1e-4)


def test_only_self_attention_is_touched(pipe):
    with vidaccel.accelerate(pipe, "svg2"):
        own = [n for n, p in pipe.transformer.attn_processors.items() if isinstance(p, SparseProcessor)]
    assert own == [f"blocks.{i}.attn1.processor" for i in range(3)]


def test_the_report_knows_every_call(pipe):
    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SPARSE) as handle:
        generate(pipe, steps=3)
        generate(pipe, steps=2)
        report = handle.report()
    assert len(report.records) == (3 + 2) * 3 * 2
    assert report.runs() == [0, 1]
    assert {(r.step, r.num_steps) for r in report.last().records} == {(0, 2), (1, 2)}
    for record in report.records:
        dense = record.step == 0 or record.layer == 0
        assert (record.density == 1.0 and record.reason != "") if dense else (record.density < 0.6)
        assert record.branch in ("cond", "uncond") and record.model == "transformer"
    assert "first steps (6)" in str(report) and "density" in str(report)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_run_is_its_own(pipe, method):
    """The same seed gives the same video again, at another size in between: nothing of a run reaches the next."""
    with vidaccel.accelerate(pipe, method, schedule=SPARSE):
        first = generate(pipe)
        generate(pipe, frames=9, size=96, steps=2)
        assert generate(pipe).equal(first)


def test_a_run_broken_off_leaves_nothing_behind(pipe):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 1
        return kwargs

    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SPARSE) as handle:
        first = generate(pipe)
        generate(pipe, callback_on_step_end=stop)
        assert max(r.step for r in handle.report().last().records) == 1
        pipe._interrupt = False
        assert generate(pipe).equal(first)


def test_one_branch_without_guidance(pipe):
    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SPARSE) as handle:
        generate(pipe, guidance_scale=1.0)
        assert {r.branch for r in handle.report().records} == {"cond"}


def test_both_branches_in_one_batch_equal_two_calls():
    transformer = make_transformer()
    latents, text = torch.randn(1, 4, 5, 8, 8), torch.randn(2, 6, 16)
    with torch.no_grad(), vidaccel.accelerate(transformer, SVG2(top_p=0.7), schedule=DenseSchedule()):
        one = transformer(latents.expand(2, -1, -1, -1, -1), torch.tensor([500.0, 500.0]), text).sample
    with torch.no_grad(), vidaccel.accelerate(transformer, SVG2(top_p=0.7), schedule=DenseSchedule()):
        two = [transformer(latents, torch.tensor([500.0]), text[i : i + 1]).sample for i in range(2)]
    torch.testing.assert_close(one, torch.cat(two), atol=1e-5, rtol=1e-5)


def test_accelerating_twice_is_refused_and_the_first_stays(pipe):
    handle = vidaccel.accelerate(pipe, "svg2", schedule=SPARSE)
    with pytest.raises(RuntimeError, match=r"accelerated already.*restore\(pipe\).*where another thread makes a video"):
        vidaccel.accelerate(pipe, "svg")
    generate(pipe, steps=2)
    assert handle.report().records
    handle.remove()
    handle.remove()
    with vidaccel.accelerate(pipe, SVG(density=0.6)):
        generate(pipe, steps=2)


def test_restore_undoes_what_nobody_holds_a_handle_of(pipe):
    before = generate(pipe)
    vidaccel.accelerate(pipe, "svg2", schedule=SPARSE)
    vidaccel.restore(pipe)
    vidaccel.restore(pipe)
    assert generate(pipe).equal(before)
    assert not pipe.transformer._forward_pre_hooks


def test_a_scheduler_swapped_after_accelerate_is_followed(pipe):
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=0.5)) as handle:
        generate(pipe, steps=4)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        generate(pipe, steps=6)
        report = handle.report().last()
    assert {r.num_steps for r in report.records} == {6}
    assert {r.step for r in report.records if r.reason} == {0, 1, 2}


def test_a_transformer_alone_needs_a_schedule_of_whole_numbers():
    transformer = make_transformer()
    with pytest.raises(ValueError, match=r"no pipeline.*first_steps=\.\.\."):
        vidaccel.accelerate(transformer, "svg2")
    with torch.no_grad(), vidaccel.accelerate(transformer, "svg2", schedule=DenseSchedule(first_steps=1)) as handle:
        for timestep in (900.0, 500.0):
            transformer(torch.randn(1, 4, 5, 8, 8), torch.tensor([timestep]), torch.randn(1, 6, 16))
    assert [bool(r.reason) for r in handle.report().records] == [True] * 3 + [False] * 3


def test_a_copy_of_an_accelerated_pipeline_is_its_own(pipe):
    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SPARSE) as handle:
        expected = generate(pipe)
        copied = copy.deepcopy(pipe)
        first, second = (p.transformer.blocks[0].attn1.processor for p in (pipe, copied))
        assert first.site.engine is not second.site.engine and first.site.number != second.site.number
        assert second.site.tensor.tolist() == second.site.number and second.site.processor is second
        calls = len(handle.report().records)
        assert generate(copied).equal(expected)
        assert len(handle.report().records) == calls


def test_removing_frees_what_the_method_remembered(pipe):
    """In the midst of a run, which goes on dense: of a run that ended nothing is left anyway."""
    handle = vidaccel.accelerate(pipe, "svg2", schedule=SPARSE)
    engine = handle._installed[0].engine

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            assert engine.memory.calls
            handle.remove()
            assert not engine.memory.calls and not engine.memory.layouts
        return kwargs

    generate(pipe, callback_on_step_end=stop)
    assert {r.step for r in handle.report().records} == {0, 1} and not engine.memory.calls


def test_an_error_inside_the_context_still_removes(pipe):
    with pytest.raises(KeyError), vidaccel.accelerate(pipe, "svg2"):
        raise KeyError
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())


def test_a_processor_the_user_set_meanwhile_survives_remove(pipe):
    stock = pipe.transformer.blocks[0].attn1.processor
    handle = vidaccel.accelerate(pipe, "svg2")
    mine = type(stock)()
    pipe.transformer.blocks[0].attn1.set_processor(mine)
    handle.remove()
    assert pipe.transformer.blocks[0].attn1.processor is mine


def test_the_layout_is_the_patch_grid(pipe):
    with vidaccel.accelerate(pipe, "svg2") as handle:
        generate(pipe, steps=1, frames=9, size=96)
        assert handle._installed[0].engine.layout == VideoLayout(3, 6, 6)


def test_fused_projections(pipe):
    before = generate(pipe)
    pipe.transformer.fuse_qkv_projections()
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=1.0)):
        torch.testing.assert_close(generate(pipe), before, atol=1e-4, rtol=1e-4)


def gradients(transformer, timestep: float = 500.0) -> list[torch.Tensor]:
    """Of all self-attention projections, for one fixed input a timestep."""
    torch.manual_seed(int(timestep))
    inputs = torch.randn(1, 4, 5, 8, 8), torch.tensor([timestep]), torch.randn(1, 6, 16)
    transformer.zero_grad()
    transformer(*inputs).sample.square().mean().backward()
    return [block.attn1.to_q.weight.grad.clone() for block in transformer.blocks]


def test_gradients_at_full_density_are_the_dense_ones():
    transformer = make_transformer()
    expected = gradients(transformer)
    with vidaccel.accelerate(transformer, SVG2(top_p=1.0), schedule=DenseSchedule()):
        torch.testing.assert_close(gradients(transformer), expected, atol=1e-6, rtol=1e-3)


def reentrant(module, *args):
    """Checkpointing whose first pass is without gradients, as `enable_gradient_checkpointing` takes it."""
    return checkpoint(module.__call__, *args, use_reentrant=True)


@pytest.mark.parametrize("how", [None, reentrant], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_gradient_checkpointing_changes_no_gradient(method, how):
    """The layer is run again in the backward pass: by then a method that remembers would make another plan.

    The second pass of each: the first leaves nothing behind that the layers of the second begin with.
    """
    transformer = make_transformer()
    with vidaccel.accelerate(transformer, method, schedule=DenseSchedule()):
        gradients(transformer, 900.0)
        expected = gradients(transformer)
    transformer.enable_gradient_checkpointing(how)
    with vidaccel.accelerate(transformer, method, schedule=DenseSchedule()):
        gradients(transformer, 900.0)
        for one, other in zip(gradients(transformer), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("schedule", [DenseSchedule(), DenseSchedule(first_steps=1)], ids=["sparse", "first-dense"])
@pytest.mark.parametrize("teacher", [False, True], ids=["two-samples", "teacher"])
def test_gradient_checkpointing_knows_the_pass_of_a_layer_that_runs_again(schedule, teacher):
    """Two forward passes before one backward pass: the layers of the first ran again with the plans of the second."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(1, 4, 3, 8, size, generator=generator) for size in (8, 8 if teacher else 12))
    text = torch.randn(1, 5, 16, generator=generator)

    def gradients_of_both(checkpointed):
        transformer = make_transformer()
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        with vidaccel.accelerate(transformer, RandomBlocks(density=0.4), schedule=schedule):
            one = transformer(first, torch.tensor([900.0]), text).sample
            with torch.set_grad_enabled(not teacher):
                other = transformer(second, torch.tensor([500.0]), text).sample
            (one.square().mean() + other.square().mean() + (one.mean() - other.mean()) ** 2).backward()
        return [block.attn1.to_q.weight.grad for block in transformer.blocks]

    for one, other in zip(gradients_of_both(True), gradients_of_both(False), strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_that_is_kept_keeps_no_plans_once_its_backward_pass_ran():
    """A training loop holds the last output until the next one is there."""
    transformer = make_transformer()
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 16)
    with vidaccel.accelerate(transformer, RandomBlocks(density=0.4), schedule=DenseSchedule()):
        kept = transformer(*inputs).sample
        plans = [weakref.ref(x) for x in gc.get_objects() if type(x) is BlockPlan]
        kept.mean().backward()
        transformer(*inputs)
        gc.collect()
        assert len(plans) >= 3 and not any(plan() for plan in plans)


def test_unknown_pipelines_name_the_supported():
    other = DDIMPipeline(UNet2DModel(8, 1, 1, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
                                     up_block_types=("UpBlock2D",) * 2), DDIMScheduler())  # fmt: skip
    with pytest.raises(TypeError, match=r"DDIMPipeline.*Known families: Wan 2\.1 / 2\.2.*A new one is a row"):
        vidaccel.accelerate(other, "svg2")
    assert "WanVACEPipeline" in supported_pipelines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("svg3",), "unknown method 'svg3'"),
        (("svg2", "cuda"), "unknown backend 'cuda'"),
    ],
)
def test_bad_names_are_refused_before_anything_is_touched(pipe, arguments, message):
    method, *backend = arguments
    with pytest.raises(ValueError, match=message):
        vidaccel.accelerate(pipe, method, **({"backend": backend[0]} if backend else {}))
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())


def test_nan_weights_are_reported_not_hidden(pipe):
    pipe.transformer.blocks[1].attn1.to_q.weight.data[0, 0] = float("nan")
    with (
        vidaccel.accelerate(pipe, "svg2", schedule=SPARSE),
        pytest.raises(ValueError, match="NaN or infinite.*layer 1"),
    ):
        generate(pipe)


def test_a_subclassed_transformer_is_known():
    class Mine(type(make_transformer())):
        pass

    pipe = make_pipe(transformer=make_transformer(cls=Mine))
    with vidaccel.accelerate(pipe, "svg2") as handle:
        assert "transformer" in repr(handle) and isinstance(pipe, WanPipeline)
    assert "removed" in repr(handle)


class TestMeasuredErrors:
    @pytest.mark.parametrize("method", [*METHODS, Tangent(density=0.5), Sparge()], ids=lambda m: m.name)
    def test_they_are_in_the_report_and_the_video_is_the_same_to_the_bit(self, pipe, method):
        with vidaccel.accelerate(pipe, method, schedule=SPARSE):
            expected = generate(pipe)
        with vidaccel.accelerate(pipe, method, schedule=SPARSE, measure_error=16) as handle:
            assert generate(pipe).equal(expected)
            report = handle.report()
        assert {(r.layer, r.step, r.branch) for r in report.measured()} == {
            (layer, step, branch) for layer in (1, 2) for step in (1, 2, 3) for branch in ("cond", "uncond")
        }
        assert all(0 < r.error < 2 for r in report.measured())
        assert all((r.predicted_error is None) == (method.name != "tangent") for r in report.measured())
        assert "measured error of the output in 12 sparse calls" in str(report)

    @pytest.mark.parametrize("rows", [-4, 0.5])
    def test_what_is_no_count_is_refused_before_anything_is_touched(self, pipe, rows):
        with pytest.raises(ValueError, match="measure_error is"):
            vidaccel.accelerate(pipe, "svg2", measure_error=rows)
        assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())

    def test_a_copy_measures_too(self, pipe):
        with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SPARSE, measure_error=8):
            copied = copy.deepcopy(pipe)
        generate(copied, steps=2)
        assert copied.transformer.blocks[0].attn1.processor.site.engine.report().measured()

    def test_compiled_blocks_are_measured_as_eager_ones_are(self, pipe):
        method = SVG2(density=0.4)
        with vidaccel.accelerate(pipe, method, schedule=SPARSE, measure_error=8) as handle:
            generate(pipe, steps=2)
            expected = handle.report().error_map()
        torch._dynamo.reset()
        with vidaccel.accelerate(pipe, method, schedule=SPARSE, measure_error=8) as handle:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            generate(pipe, steps=2)
            assert handle.report().error_map() == pytest.approx(expected, rel=0.05, nan_ok=True)
