"""The run of the dense model, kept pass by pass, and single steps of a preset held against it.

A step of a preset is measured where the dense run was: the pipeline goes through the whole schedule, but at steps that
are not measured the transformer is not asked, and at those that are, it gets the dense run's inputs. So an error is
that of the step alone, and a few steps cost a few passes instead of a video.

Time is that of `forward`, in which diffusers' hooks are. What is held against the dense outputs is what torch's hooks
leave: they may take samples out of the batch before `forward`, and put others in their place after it.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compiled import uncompiled
from ..machine import synchronise
from ..run import run

if TYPE_CHECKING:
    from ...pipelines.presets import Preset
    from ..requests.settings import Settings

Clock = Callable[[], float]
"""Seconds from some start; `time.perf_counter`, but for tests."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What the dense transformer gave, in the order of its passes.

    Args:
        outputs: of each pass, in main memory, in the structure in which the pipeline got them.
        steps: the step of each pass.
        seconds: of each pass.
        whole: seconds of the call of the pipeline.
        cut: see `Run`.
    """

    outputs: tuple[Any, ...]
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    whole: float
    cut: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return 1 + max(self.steps)

    @property
    def step_seconds(self) -> float:
        """Median over the steps of the time in the transformers."""
        sums: defaultdict[int, float] = defaultdict(float)
        for step, seconds in zip(self.steps, self.seconds, strict=True):
            sums[step] += seconds
        return statistics.median(sums.values())


@dataclass(frozen=True)
class Probe:
    """Steps of a preset, measured on the inputs of the dense run.

    Args:
        errors: step -> `norm(output - dense) / norm(dense)` over its passes.
        seconds: step -> time in the transformers.
        computed: step -> share of the passes that no cache left out, where one takes samples out of their batch of
            these.
        attention: `[layers][steps that were measured]`, the meter's error of attention; None where it has none.
    """

    errors: Mapping[int, float]
    seconds: Mapping[int, float]
    computed: Mapping[int, float]
    attention: tuple[tuple[float | None, ...], ...] = ()

    @property
    def error(self) -> float:
        """Root mean square over the steps."""
        return float(np.sqrt(np.mean(np.square(list(self.errors.values())))))

    @property
    def step_seconds(self) -> float:
        """Median over the steps that were not the first of theirs, when a method makes ready."""
        values = list(self.seconds.values())
        return statistics.median(values[1:] or values)

    @property
    def incomplete(self) -> list[int]:
        """The steps of which something was left out."""
        return [step for step, share in self.computed.items() if share < 1]

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        rows = [[step, self.errors[step], self.seconds[step], self.computed[step]] for step in self.errors]
        return {"steps": rows, "attention": [list(row) for row in self.attention]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Probe:
        """What `to_dict` made."""
        errors, seconds, computed = ({row[0]: row[i] for row in content["steps"]} for i in (1, 2, 3))
        return cls(errors, seconds, computed, tuple(tuple(row) for row in content["attention"]))


def probed_steps(steps: int, pairs: int = 3) -> tuple[int, ...]:
    """Steps to measure: neighbours, of which the second finds what the first made ready, spread over the run."""
    if steps <= 2 * pairs:
        return tuple(range(steps))
    starts = [round(i * (steps - 2) / (pairs - 1)) for i in range(pairs)]
    return tuple(sorted({step for start in starts for step in (start, start + 1)}))


def record(pipe: Any, settings: Settings, clock: Clock = time.perf_counter) -> tuple[Trajectory, np.ndarray]:
    """Run the pipeline as it is, and keep what its transformers give.

    Returns:
        The trajectory, and the frames `[F, H, W, 3]` uint8.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    outputs: list[Any] = []
    steps: list[int] = []
    seconds: list[float] = []
    at = [0]

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        synchronise(device)
        start = clock()
        out = forward(*args, **kwargs)
        synchronise(device)
        seconds.append(clock() - start)
        outputs.append(tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), out))
        steps.append(at[0])
        return out

    device = pipe._execution_device
    start = clock()
    with _tapped(pipe, around):
        made = run(pipe, settings, on_step=lambda done, *_: at.__setitem__(0, done))
    whole = clock() - start
    return Trajectory(tuple(outputs), tuple(steps), tuple(seconds), whole, made.cut), as_bytes(made.frames)


def probe(
    pipe: Any,
    settings: Settings,
    trajectory: Trajectory,
    preset: Preset,
    steps: Collection[int],
    *,
    base: str | None = None,
    rows: int = 0,
    clock: Clock = time.perf_counter,
) -> Probe:
    """Measure some steps of a preset.

    Args:
        pipe: the pipeline, as it is.
        settings: those of the trajectory.
        trajectory: of `record`.
        preset: to be measured.
        steps: that are measured; all for one with a cache of whatever kind, which needs those before.
        base: see `apply`.
        rows: queries of each sparse call whose error the meter measures, see `accelerate`; seconds then include it.
        clock: of the times.

    Raises:
        PresetError: the pipeline refuses the preset.
    """
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    from ...pipelines.guidance_branches import tensors_in
    from ...pipelines.presets import apply

    device = pipe._execution_device
    wrong: dict[int, float] = {}
    norm: dict[int, float] = {}
    seconds: defaultdict[int, float] = defaultdict(float)
    shares: defaultdict[int, list[float]] = defaultdict(list)  # of its samples, for each pass
    passes: Iterator[tuple[int, Any]] = iter(())
    now: list[tuple[int, Any]] = []  # of the pass that runs: its step, and the dense output

    def around(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        step, dense = next(passes)
        given = tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), dense)
        now[:] = [(step, given)]
        if step not in steps:
            return given
        synchronise(device)
        start = clock()
        out = forward(*args, **kwargs)
        synchronise(device)
        seconds[step] += clock() - start
        shares[step].append(len(tensors_in(out)[0]) / len(tensors_in(given)[0]))
        return out

    def after(out: Any) -> Any:
        ((step, given),) = now
        if step not in steps:
            return given
        for a, b in zip(tree_leaves(out), tree_leaves(given), strict=True):
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                wrong[step] = wrong.get(step, 0.0) + float((a.float() - b.float()).square().sum())
                norm[step] = norm.get(step, 0.0) + float(b.float().square().sum())
        return given

    with apply(pipe, preset, base=base, measure_error=rows) as applied:

        def measured_once() -> None:
            nonlocal passes
            passes = iter(zip(trajectory.steps, trajectory.outputs, strict=True))
            for each in (wrong, norm, seconds, shares):
                each.clear()
            applied.reset()
            with _tapped(pipe, around, after):
                run(pipe, settings, decode=False)

        uncompiled(measured_once)
        account = applied.report().last()
    computed = {s.step: s.computed / s.forwards * statistics.fmean(shares[s.step] or [1.0]) for s in account.steps}
    measured = sorted(wrong)
    return Probe(
        {step: float(np.sqrt(wrong[step] / norm[step])) if norm[step] else 0.0 for step in measured},
        {step: float(seconds[step]) for step in measured},
        {step: computed.get(step, 1.0) for step in measured},
        _attention(account.attention, measured),
    )


def _attention(report: Any, steps: list[int]) -> tuple[tuple[float | None, ...], ...]:
    if report is None or not report.measured():
        return ()
    errors = report.error_map()
    own = [step for step in steps if step < errors.shape[1]]
    return tuple(tuple(None if np.isnan(x) else float(x) for x in row[own]) for row in errors)


@contextlib.contextmanager
def _tapped(
    pipe: Any,
    around: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any],
    after: Callable[[Any], Any] = lambda output: output,
) -> Iterator[None]:
    """Each forward pass of the pipeline's transformers goes through `around`, and what torch's hooks make of it through
    `after`; both outermost, and gone at the end.
    """
    from ...pipelines.acceleration.families import find_transformers

    undo: list[Callable[[], Any]] = []
    try:
        for transformer, _family in find_transformers(pipe).values():
            own = transformer.__dict__.get("forward")  # of a hook of somebody else
            forward = transformer.forward

            @functools.wraps(forward)
            def tapped(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                return around(forward, args, kwargs)

            undo.append(transformer.register_forward_hook(lambda _module, _args, output: after(output)).remove)
            transformer.forward = tapped
            undo.append(
                functools.partial(transformer.__dict__.pop, "forward")
                if own is None
                else functools.partial(setattr, transformer, "forward", own)
            )
        yield
    finally:
        for each in reversed(undo):
            each()


def as_bytes(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] as uint8."""
    return (frames * 255).round().astype(np.uint8)
