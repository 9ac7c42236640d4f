"""Copies, files, wrappers and replaced parts of accelerated pipelines."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import threading
import weakref

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig, get_peft_model
from tiny_wan import generate, make_pipe, make_scheduler, make_transformer
from torch.utils._pytree import tree_leaves

import vidaccel
from vidaccel import SVG2, DenseSchedule, Tangent
from vidaccel.pipelines import find_transformers
from vidaccel.pipelines.hooks.running_pipeline import running_pipeline

METHOD = SVG2(density=0.4, schedule=DenseSchedule(first_steps=1))


def inputs(batch: int = 1) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 4, 5, 8, 8), torch.full((batch,), 900.0), torch.randn(batch, 6, 16)


class TestSteps:
    def test_a_second_order_scheduler_has_its_last_steps(self):
        pipe = make_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
        schedule = DenseSchedule(first_steps=1, last_steps=2)
        with vidaccel.accelerate(pipe, METHOD, schedule=schedule) as handle:
            generate(pipe, steps=4)
            report = handle.report()
        dense = {r.step for r in report.records if r.reason}
        assert dense == {0, 5, 6} and {r.step for r in report.records} == set(range(7))
        assert not [note for note in report.notes if "steps seen" in note]

    def test_a_run_broken_off_is_in_the_report(self, pipe):
        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = step >= 1
            return kwargs

        with vidaccel.accelerate(pipe, METHOD) as handle:
            generate(pipe, callback_on_step_end=stop)
            assert "note: run 0: steps seen 2, expected 4" in str(handle.report())
            handle.reset()
            pipe._interrupt = False
            generate(pipe)
            assert not [note for note in handle.report().notes if "steps seen" in note]

    def test_noise_levels_that_nobody_knows_are_refused(self, pipe):
        schedule = DenseSchedule(sigma_above=0.9)
        with pytest.raises(ValueError, match="goes by noise levels, but WanTransformer3DModel is no pipeline"):
            vidaccel.accelerate(pipe.transformer, METHOD, schedule=schedule)
        with vidaccel.accelerate(pipe, METHOD, schedule=schedule) as handle:
            generate(pipe, steps=5)
            assert set(handle.report().dense_reasons()) == {"sigma above 0.9"}
        diffusion = UniPCMultistepScheduler(prediction_type="epsilon")  # sigmas up to 157
        with (
            vidaccel.accelerate(pipe, METHOD, schedule=schedule),
            pytest.raises(ValueError, match="sigma_above needs the noise level.*Use first_steps"),
        ):
            pipe.scheduler = diffusion
            generate(pipe)

    @pytest.mark.parametrize("bound", ["sigma_above", "sigma_below"])
    def test_noise_levels_that_are_no_flows_are_refused_at_once(self, pipe, bound):
        processors = dict(pipe.transformer.attn_processors)
        flow, schedule = pipe.scheduler, DenseSchedule(**{bound: 0.5})
        for diffusion, said in (
            (UniPCMultistepScheduler(prediction_type="epsilon"), r"reach \d+"),
            (EulerDiscreteScheduler(), r"reach \d+"),
            (DDIMScheduler(), "has none"),
            (CogVideoXDPMScheduler(), "has none"),
        ):
            pipe.scheduler = diffusion
            with pytest.raises(ValueError, match=rf"{bound}=0.5.*{type(diffusion).__name__} {said}.*first_steps"):
                vidaccel.accelerate(pipe, METHOD, schedule=schedule)
        assert pipe.transformer.attn_processors == processors
        late = LTXEulerAncestralRFScheduler()  # has its levels once it has timesteps
        for able in (flow, FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), late):
            pipe.scheduler = able
            vidaccel.accelerate(pipe, METHOD, schedule=schedule).remove()

    def test_the_report_says_that_records_of_old_runs_were_dropped(self, pipe):
        with vidaccel.accelerate(pipe, METHOD, schedule=DenseSchedule(first_layers=3)) as handle:
            for _ in range(8):
                generate(pipe, steps=1)
            assert not [note for note in handle.report().notes if "dropped" in note]
            for _ in range(2):
                generate(pipe, steps=1)
            report = handle.report()
            assert report.runs() == list(range(2, 10))
            assert "note: records before run 2 were dropped: those of the last 8 calls are kept" in str(report)
            handle.reset()
            assert not handle.report().notes

    @pytest.mark.parametrize("bad", ["batch", "timestep"])
    def test_nonsense_gets_one_clear_error(self, bad):
        transformer = make_transformer()
        latents, timestep, text = inputs()
        with vidaccel.accelerate(transformer, METHOD), pytest.raises(ValueError, match=r"transformer was called with"):
            if bad == "batch":
                transformer(latents[:0], timestep[:0], text[:0])
            else:
                transformer(latents, timestep[:0], text)


class TestCopies:
    def test_a_copied_pipeline_follows_its_own_scheduler(self, pipe):
        schedule = DenseSchedule(first_steps=0.5)
        with vidaccel.accelerate(pipe, METHOD, schedule=schedule):
            expected = generate(pipe, steps=6)
            copied = copy.deepcopy(pipe)
            copied.scheduler = make_scheduler()
            assert generate(copied, steps=6).equal(expected)
            records = copied.transformer.blocks[0].attn1.processor.site.engine.report().records
        last = [r for r in records if r.run == max(r.run for r in records)]
        assert {r.num_steps for r in last} == {6} and {r.step for r in last if r.reason} == {0, 1, 2}

    def test_a_transformer_copied_alone_leaves_the_pipeline_behind(self, pipe):
        pipe.text_encoder = torch.nn.Linear(1, 1)
        with vidaccel.accelerate(pipe, METHOD, schedule=DenseSchedule(first_steps=1)):
            memo: dict = {}
            alone = copy.deepcopy(pipe.transformer, memo)
            assert id(pipe) not in memo and id(pipe.text_encoder) not in memo
            with torch.no_grad():
                alone(*inputs())
        assert alone.blocks[0].attn1.processor.site.engine.report().records

    @pytest.mark.parametrize(
        ("schedule", "needs", "unknown"),
        [
            (DenseSchedule(first_steps=0.3), "counts in fractions of a run", "the number of steps is unknown"),
            (DenseSchedule(last_steps=1), "or from its end", "the number of steps is unknown"),
            (DenseSchedule(sigma_above=0.9), "goes by noise levels", "they are unknown"),
        ],
    )
    def test_a_copy_whose_schedule_needs_the_pipeline_says_so_in_its_first_call(self, pipe, schedule, needs, unknown):
        with vidaccel.accelerate(pipe, METHOD, schedule=schedule):
            expected = generate(pipe)
            alone = copy.deepcopy(pipe.transformer)
            message = rf"^DenseSchedule.* {needs}.*transformer was copied without its pipeline, so {unknown}: copy"
            with torch.no_grad(), pytest.raises(ValueError, match=message):
                alone(*inputs())
            copied = copy.deepcopy(pipe)
            assert generate(copied).equal(expected)
            vidaccel.restore(alone)
            with torch.no_grad():
                alone(*inputs())
            other = make_pipe(transformer=alone)
            with vidaccel.accelerate(other, METHOD, schedule=schedule):
                assert generate(other).equal(expected)

    def test_a_transformer_that_was_accelerated_alone_is_copied(self):
        transformer = make_transformer()
        with torch.no_grad(), vidaccel.accelerate(transformer, METHOD) as handle:
            copied = copy.deepcopy(transformer)
            for model in (transformer, copied):
                for timestep in (900.0, 500.0):
                    model(inputs()[0], torch.tensor([timestep]), inputs()[2])
            assert len(handle.report().records) == 6
            assert len(copied.blocks[0].attn1.processor.site.engine.report().records) == 6

    def test_a_shallow_copy_of_a_processor_says_what_to_do(self, pipe):
        handle = vidaccel.accelerate(pipe, METHOD)
        said = r"shallow copy of SparseWanAttnProcessor would share.*copy\.deepcopy.*handle\.remove\(\)"
        with pytest.raises(TypeError, match=said):
            copy.copy(pipe.transformer.blocks[0].attn1.processor)
        handle.remove()

    @pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
    def test_pickling_says_what_to_do(self, pipe, save):
        handle = vidaccel.accelerate(pipe, METHOD)
        for whole in (pipe, pipe.transformer, pipe.transformer.blocks[0]):
            with pytest.raises(TypeError, match=r"cannot be pickled.*handle.remove\(\).*save_pretrained"):
                save(whole)
        handle.remove()
        save(pipe.transformer)

    def test_weights_are_saved_as_they_are(self, pipe, tmp_path):
        with vidaccel.accelerate(pipe, METHOD):
            pipe.transformer.save_pretrained(tmp_path)
        again = type(pipe.transformer).from_pretrained(tmp_path)
        for name, value in pipe.transformer.state_dict().items():
            assert again.state_dict()[name].equal(value)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "peft": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"])),
    "data parallel": torch.nn.DataParallel,
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "two of them": lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through(name, one_process):
    inner = make_transformer()
    wrapped = WRAPPERS[name](inner)
    ((_, (found, _)),) = find_transformers(wrapped).items()
    assert found is inner
    torch._dynamo.reset()
    with torch.no_grad(), vidaccel.accelerate(wrapped, METHOD) as handle:
        wrapped(*inputs())
        assert len(handle.report().records) == 3


def test_data_parallel_over_several_devices_is_refused():
    wrapped = torch.nn.DataParallel(make_transformer())
    wrapped.device_ids = [0, 1]  # there is no second device here
    with pytest.raises(RuntimeError, match="threads on 2 devices.*DistributedDataParallel"):
        vidaccel.accelerate(wrapped, METHOD)


def test_layers_that_an_error_kept_from_their_calls_are_not_said_to_make_none(pipe):
    def full(*_):
        raise torch.OutOfMemoryError

    with vidaccel.accelerate(pipe, METHOD) as handle:
        hook = pipe.transformer.blocks[0].ffn.register_forward_pre_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            generate(pipe)
        hook.remove()
        generate(pipe)
        assert "made no attention call" not in str(handle.report())


def test_a_replaced_transformer_is_reported(pipe):
    handle = vidaccel.accelerate(pipe, METHOD)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert not handle.report().notes  # the same one, wrapped
    pipe.transformer = make_transformer(seed=1)
    generate(pipe)
    report = handle.report()
    assert not report.records
    assert [note for note in report.notes if "transformer was replaced" in note and "accelerate again" in note]
    assert "transformer was replaced" in str(report)
    handle.remove()
    with vidaccel.accelerate(pipe, METHOD) as handle:
        generate(pipe)
        assert handle.report().records


def test_a_wrapper_that_is_refused_does_not_stop_report_and_remove(pipe):
    processors = dict(pipe.transformer.attn_processors)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        inner = pipe.transformer
        pipe.transformer = torch.nn.DataParallel(inner)
        pipe.transformer.device_ids = [0, 1]  # there is no second device here
        assert not handle.report().notes
    assert inner.attn_processors == processors


@pytest.mark.parametrize("reports", [0, 2])
def test_a_replaced_transformer_is_warned_of_once_even_without_a_report(pipe, caplog, reports):
    with caplog.at_level(logging.WARNING), vidaccel.accelerate(pipe, METHOD) as handle:
        pipe.transformer = make_transformer(seed=1)
        for _ in range(reports):
            handle.report()
    handle.remove()
    assert len([r for r in caplog.records if "transformer was replaced after accelerate" in r.getMessage()]) == 1


class TestDiffusersHooks:
    OPTIONS = ("skip_attention", "skip_attention_scores")

    @pytest.fixture
    def known(self, monkeypatch):
        """diffusers 0.42 registers an alias of Wan's processor only; some users register it themselves."""
        AttentionProcessorRegistry._register()
        entry = AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, *args, **kwargs: args[0])
        monkeypatch.setitem(AttentionProcessorRegistry._registry, WanAttnProcessor, entry)

    @staticmethod
    def config(skip: str) -> LayerSkipConfig:
        """All layers are skipped, so sparse and stock must agree."""
        return LayerSkipConfig(
            indices=[0, 1, 2], fqn="blocks", **{"skip_attention": False, "skip_ff": False, skip: True}
        )

    @pytest.mark.parametrize("skip", OPTIONS)
    def test_skipped_attention_is_skipped_in_sparse_layers_too(self, known, skip):
        given = inputs()
        stock, ours = make_transformer(), make_transformer()
        plain = stock(*given).sample
        for transformer in (stock, ours):
            apply_layer_skip(transformer, self.config(skip))
        expected = stock(*given).sample
        assert not torch.allclose(expected, plain)
        with torch.no_grad(), vidaccel.accelerate(ours, METHOD, schedule=DenseSchedule()) as handle:
            torch.testing.assert_close(ours(*given).sample, expected)
            reasons = handle.report().dense_reasons()
        assert reasons == ({"perturbed attention": 3} if skip == "skip_attention_scores" else {})
        with torch.no_grad():
            torch.testing.assert_close(ours(*given).sample, expected)

    @pytest.mark.parametrize("skip", OPTIONS)
    def test_what_stock_refuses_is_refused(self, skip):
        """Not done to the accelerated model alone, where nothing dense could be held against it."""
        with pytest.raises(ValueError, match="WanAttnProcessor'> not registered"):
            apply_layer_skip(make_transformer(), self.config(skip))
        before = dict(AttentionProcessorRegistry._registry)
        with vidaccel.accelerate(make_transformer(), METHOD) as handle:
            with pytest.raises(ValueError, match="not registered"):
                apply_layer_skip(handle._installed[0].transformer, self.config(skip))
            assert before == AttentionProcessorRegistry._registry

    def test_blocks_are_skipped_as_in_stock(self):
        config = LayerSkipConfig(indices=[1], fqn="blocks")
        transformer = make_transformer()
        apply_layer_skip(transformer, config)
        with torch.no_grad(), vidaccel.accelerate(transformer, METHOD) as handle:
            transformer(*inputs())
            assert [r.layer for r in handle.report().records] == [0, 2]


class Remembered:
    """Which transformers remember something of a run, at the end of each step and once the pipeline has returned."""

    def __init__(self, pipe, handle) -> None:
        self.engines = {installed.name: installed.engine for installed in handle._installed}
        self.after_steps: list[list[str]] = []
        generate(pipe, steps=6, callback_on_step_end=self._note)

    def now(self) -> list[str]:
        return [name for name, engine in self.engines.items() if engine.memory.calls]

    def _note(self, pipe, step, timestep, kwargs):
        self.after_steps.append(self.now())
        return kwargs


def test_nothing_of_a_run_is_remembered_while_its_latents_are_decoded(pipe):
    with vidaccel.accelerate(pipe, METHOD) as handle:
        seen = Remembered(pipe, handle)
        assert seen.after_steps == [[], *[["transformer"]] * 4, []] and not seen.now()
        expected = generate(pipe)
        assert generate(pipe).equal(expected)
        copied = copy.deepcopy(pipe)
        generate(copied)
        site = copied.transformer.blocks[0].attn1.processor.site
        assert not site.engine.memory.calls


def test_what_a_pipeline_lets_go_of_in_a_call_is_freed_at_once():
    """Frames of Python 3.11 and 3.12 keep what is read of their variables."""
    freed, seen = [], []

    class Big(WanPipeline):
        def __call__(self, keeps=False):
            (lambda: self)()  # a variable that others close over
            mine = locals() if keeps else {}
            big = torch.zeros(10)
            alive = weakref.ref(big)
            with self.progress_bar(total=1):
                seen.append(running_pipeline())
            del big
            freed.append(alive() is None)
            self.maybe_free_model_hooks()
            return mine

    pipe = make_pipe(Big)
    with vidaccel.accelerate(pipe, Tangent(density=0.4, q_clusters=6, k_clusters=12)):
        pipe()
        assert pipe(keeps=True)["self"] is pipe  # what somebody else reads of them stays
    assert freed[0] and seen == [pipe, pipe]


def test_the_first_of_two_transformers_forgets_before_the_second_remembers():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        seen = Remembered(pipe, handle)
    first = seen.after_steps.count(["transformer"])
    assert first and seen.after_steps == [[], *[["transformer"]] * first, *[["transformer_2"]] * (4 - first), []]


@pytest.mark.parametrize(("steps", "guidance"), [(1, 5.0), (1, 1.0), (2, 5.0)])
def test_runs_of_few_steps_remember_nothing_either(pipe, steps, guidance):
    method = SVG2(density=0.4, schedule=DenseSchedule())
    with vidaccel.accelerate(pipe, method) as handle:
        engine, kept = handle._installed[0].engine, []
        pipe.transformer.proj_out.register_forward_hook(lambda *_: kept.append(bool(engine.memory.calls)))
        generate(pipe, steps=steps, guidance_scale=guidance)
        assert all(kept) and len(kept) == steps * (1 + (guidance > 1))
        assert not engine.memory.calls


class TestRunsThatEndEarly:
    """What a method remembers has no use after them."""

    def look(self, engine, seen, interrupt=False):
        """What is called after a step: it takes weak references to what is remembered after step 1."""

        def after(pipe, step, timestep, kwargs):
            if step == 1:
                seen.extend(weakref.ref(x) for x in tree_leaves(engine.memory.calls) if isinstance(x, torch.Tensor))
                pipe._interrupt = interrupt
            return kwargs

        return after

    @pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("where", ["transformer", "scheduler"])
    def test_it_is_freed_at_once(self, pipe, error, where):
        expected = generate(pipe)
        with vidaccel.accelerate(pipe, SVG2(density=0.4, schedule=DenseSchedule())) as handle:
            sparse = generate(pipe)
            seen: list = []
            engine = handle._installed[0].engine
            after = self.look(engine, seen, interrupt=error is None)
            if error is None:
                generate(pipe, callback_on_step_end=after)
            else:
                with pytest.raises(type(error)) as raised, failing(pipe, where, error):
                    generate(pipe, callback_on_step_end=after)
                raised.value.__traceback__ = None
            assert seen and not any(reference() is not None for reference in seen) and not engine.memory.calls
            pipe._interrupt = False
            assert generate(pipe).equal(sparse)
        assert "progress_bar" not in vars(pipe) and generate(pipe).equal(expected)

    def test_of_a_transformer_alone_an_error_frees_it(self):
        transformer = make_transformer()
        with torch.no_grad(), vidaccel.accelerate(transformer, METHOD, schedule=DenseSchedule()) as handle:
            transformer(*inputs())
            engine = handle._installed[0].engine
            assert engine.memory.calls
            hook = transformer.blocks[1].register_forward_pre_hook(failing_hook(RuntimeError("out of memory")))
            with pytest.raises(RuntimeError, match="out of memory"):
                transformer(*inputs())
            hook.remove()
            assert not engine.memory.calls

    def test_a_copy_frees_its_own(self, pipe):
        """And the original is as it was, whichever of the two is removed."""
        with vidaccel.accelerate(pipe, SVG2(density=0.4, schedule=DenseSchedule())):
            copied = copy.deepcopy(pipe)
            copied.set_progress_bar_config(disable=True, desc="copy")
            with pytest.raises(KeyboardInterrupt), failing(copied, "scheduler", KeyboardInterrupt()):
                generate(copied)
            assert not copied.transformer.blocks[0].attn1.processor.site.engine.memory.calls
            assert vars(copied)["progress_bar"] is not vars(pipe)["progress_bar"]
            vidaccel.restore(copied)
            assert "progress_bar" not in vars(copied) and "progress_bar" in vars(pipe)

    def test_a_bar_that_is_closed_by_hand_ends_the_loop(self, pipe):
        """As LTX2DFRPipeline does, which passes over the steps left after `pipe.interrupt` and leaves no block."""
        with vidaccel.accelerate(pipe, SVG2(density=0.4, schedule=DenseSchedule())) as handle:
            pipe.scheduler.set_timesteps(4)
            bar = pipe.progress_bar(total=4)
            with torch.no_grad():
                pipe.transformer(*inputs())
            bar.update()
            assert handle._installed[0].engine.memory.calls
            bar.close()
            assert not handle._installed[0].engine.memory.calls

    def test_a_progress_bar_of_ones_own_is_kept(self, pipe):
        made = []

        def bar(*args, **kwargs):
            made.append(type(pipe).progress_bar(pipe, *args, **kwargs))
            return made[-1]

        pipe.progress_bar = bar
        with vidaccel.accelerate(pipe, METHOD):
            generate(pipe)
        assert pipe.progress_bar is bar and len(made) == 1 and made[0].total == 4


def failing_hook(error):
    def fail(*_):
        raise error

    return fail


@contextlib.contextmanager
def failing(pipe, where, error):
    """An error in the third pass of the transformer, or in the third step of the scheduler."""
    calls = []
    step = pipe.scheduler.step

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # two passes a step
            raise error

    def third_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return step(*args, **kwargs)

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(third) if where == "transformer" else None
    if hook is None:
        pipe.scheduler.step = third_step
    try:
        yield
    finally:
        if hook is None:
            del pipe.scheduler.step
        else:
            hook.remove()


def test_a_second_transformer_with_one_step_forgets_it():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    with vidaccel.accelerate(pipe, SVG2(density=0.4, schedule=DenseSchedule())) as handle:
        generate(pipe, steps=2)
        records = handle.report().last().records
        assert {(r.model, r.step) for r in records} == {("transformer", 0), ("transformer_2", 1)}
        assert not any(installed.engine.memory.calls for installed in handle._installed)


def test_another_thread_may_go_on_after_an_interrupt(pipe):
    """torch calls no hook for what is no Exception, and the thread that was interrupted lives on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with vidaccel.accelerate(pipe, METHOD):
        expected = generate(pipe)
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        hook.remove()
        made = []
        thread = threading.Thread(target=lambda: made.append(generate(pipe)))
        thread.start()
        thread.join()
        assert made[0].equal(expected)


def test_two_threads_at_once_are_refused_one_after_the_other_are_not(pipe):
    """A server whose pipelines share a transformer: one run would read the plans of the other."""
    other = make_pipe(transformer=pipe.transformer)
    errors = []

    def elsewhere():
        try:
            generate(other)
        except (RuntimeError, ValueError, SystemExit) as error:
            errors.append(str(error))

    def in_a_thread(*_):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with vidaccel.accelerate(pipe, METHOD) as handle:
        inside = pipe.transformer.blocks[0].register_forward_pre_hook(in_a_thread)  # in the midst of a pass
        expected = generate(pipe)
        inside.remove()
        assert len(errors) == 8 and "transformer is called by two threads at once" in errors[0]
        assert generate(pipe).equal(expected)
        in_a_thread()
        assert len(errors) == 8
        pipe.transformer.blocks[2].attn1.to_q.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            generate(pipe)
        in_a_thread()  # the pass that ended by an error is over
        assert len(errors) == 9 and "NaN" in errors[-1]

        def leave(*_):
            raise SystemExit

        left = pipe.transformer.blocks[0].register_forward_pre_hook(leave)
        in_a_thread()  # which ends here, and torch calls no hook for what is no Exception
        left.remove()
        with pytest.raises(ValueError, match="NaN"):
            generate(pipe)
    assert handle.report().records
