"""The account of a run: what each step computed, what a cache skipped, and what was sparse.

A schedule keeps steps dense because what they decide is worth it; a cache that skips them makes the promise empty. So
a step that the schedule keeps dense is never skipped, and one that was skipped is not counted as dense.
"""

from __future__ import annotations

import inspect
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ...attention import DenseSchedule, RunReport, StepInfo
from ...attention.account.plain_values import plain
from ...attention.account.records import VERSION, CallRecord, kept_records, of_last_call
from ..acceleration.clock import StepClock
from ..acceleration.copies import CopiedNotPickled
from ..acceleration.families import Family
from ..acceleration.left_out import pass_was_left_out, second_pass_was_left_out
from ..cfg_parallel.passes import pass_is_of_another
from ..forecast.hook import Forecast
from ..guidance_cache.samples import LeftOutSamples
from ..hooks.hooked import HandleOf, hooks_on
from ..hooks.undo import PRESET
from .caches import CacheAtWork, check_whole

_OF_PASSES = ("forwards", "computed", "skipped", "halved")


@dataclass(frozen=True)
class PassRecord:
    """One forward pass of a transformer.

    Args:
        run, step, num_steps, branch: see `StepInfo`.
        model: the component.
        skipped: a cache left it out; it computes some layers to decide that. Layers that guidance leaves out are no
            cache's: such a pass was computed.
        extrapolated: it was the guidance cache that left it out, as a whole.
        halved: both branches of guidance are in its batch, and the guidance cache left out the half of one.
        kept: why the cache had to compute it; "" where it need not, or where there is none.
        call: of the pipeline, see `StepInfo`.
    """

    run: int
    step: int
    num_steps: int | None
    branch: str
    model: str
    skipped: bool = False
    kept: str = ""
    extrapolated: bool = False
    call: int | None = None
    halved: bool = False


@dataclass(frozen=True)
class StepAccount:
    """One step of a run.

    Args:
        run, step, num_steps: see `StepInfo`.
        forwards: passes of the transformers, one for each branch of guidance.
        computed: those that no cache left out. skipped: those that one did.
        attention: of those that were computed: "sparse", "dense", "mixed" where some layers stay dense, "stock" without
            a method, and "-" where none was.
        density: mean over their calls; NaN where there is none.
        why: why they are dense, with the number of calls.
        call: of the pipeline, see `StepInfo`.
        halved: of those that were computed, where one of two branches of guidance was left out of the batch.
    """

    run: int
    step: int
    num_steps: int | None
    forwards: int
    computed: int
    skipped: int
    attention: str
    density: float
    why: str = ""
    call: int | None = None
    halved: int = 0


@dataclass(frozen=True)
class Account:
    """What runs with a preset did. `str()` is a table.

    Args:
        preset: its name.
        levers: what is at work, lever -> words.
        steps: in their order.
        attention: of sparse attention, call by call; None without a method.
        notes: in sentences.
    """

    preset: str
    levers: dict[str, str]
    steps: tuple[StepAccount, ...]
    attention: RunReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def own_notes(self) -> tuple[str, ...]:
        """The notes that are not those of sparse attention's own report."""
        return tuple(note for note in self.notes if self.attention is None or note not in self.attention.notes)

    def runs(self) -> list[int]:
        """The runs that have steps."""
        return sorted({step.run for step in self.steps})

    def last(self) -> Account:
        """The last call of the pipeline alone, with all of its runs; where calls are not known, the last run."""
        if not self.steps:
            return self
        attention = self.attention and self.attention.last()
        notes = tuple(n for n in self.notes if attention is None or n in (*self.own_notes, *attention.notes))
        return replace(self, steps=of_last_call(self.steps), attention=attention, notes=notes)

    def counts(self) -> dict[str, int]:
        """Passes: "forwards", "computed", "skipped", "halved"; steps, and of these "dense", "sparse", "mixed"."""
        kinds = Counter(step.attention for step in self.steps)
        return {
            "steps": len(self.steps),
            **{name: sum(getattr(s, name) for s in self.steps) for name in _OF_PASSES},
            **{name: kinds[name] for name in ("dense", "sparse", "mixed")},
        }

    def in_words(self) -> str:
        """The sums in one line."""
        counts = self.counts()
        text = f"{counts['steps']} steps: {counts['forwards']} forwards, {counts['computed']} computed and "
        text += f"{counts['skipped']} skipped"
        if counts["halved"]:
            text += f", {counts['halved']} of those computed with one branch of guidance instead of two"
        if self.attention is not None:
            text += "; attention " + ", ".join(f"{counts[kind]} {kind}" for kind in ("sparse", "mixed", "dense"))
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows, null for NaN; the attention as its own `to_dict` gives it."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "attention"}
        attention = None if self.attention is None else self.attention.to_dict()
        return {**plain({"version": VERSION, **told}), "attention": attention}

    def __repr__(self) -> str:
        return f"<vidaccel account of {self.preset or 'a run'}: {self.in_words()}; print it for a table>"

    def __str__(self) -> str:
        lines = [f"{self.preset}  {'; '.join(f'{name}: {text}' for name, text in self.levers.items())}"]
        if not self.steps:
            return "\n".join([*lines, "no step yet", *(f"note: {note}" for note in self.notes)])
        halves = any(s.halved for s in self.steps)
        head = f"{'run':>4} {'step':>5} {'forwards':>9} {'computed':>9} {'skipped':>8}"
        lines.append(f"{head}{' halved' if halves else ''}  attention  density")
        for s in self.steps:
            density = f"{s.density:.3f}" if s.density == s.density else "-"
            lines.append(
                f"{s.run:>4} {s.step:>5} {s.forwards:>9} {s.computed:>9} {s.skipped:>8}"
                f"{f' {s.halved:>6}' if halves else ''}  {s.attention:<9}  {density:<7}  {s.why}".rstrip()
            )
        return "\n".join([*lines, self.in_words(), *(f"note: {note}" for note in self.notes)])


def mean_count(accounts: Sequence[Account], name: str) -> float:
    """The mean of one of `Account.counts` over several runs, a whole number where it is one."""
    mean = statistics.fmean(account.counts()[name] for account in accounts)
    return int(mean) if mean.is_integer() else round(mean, 1)


def accounts(passes: Iterable[PassRecord], calls: Iterable[CallRecord] | None) -> tuple[StepAccount, ...]:
    """The account of each step.

    Args:
        passes: of all transformers.
        calls: of sparse attention; None without a method.
    """
    steps: dict[tuple[int, int], list[PassRecord]] = {}
    for each in passes:
        steps.setdefault((each.run, each.step), []).append(each)
    found: dict[tuple, list[CallRecord]] = {}
    for call in calls or ():
        found.setdefault((call.run, call.step, call.model, call.branch), []).append(call)
    made = []
    for (run, step), those in sorted(steps.items()):
        whole = [p for p in those if not p.skipped]
        its = [call for p in whole for call in found.get((run, step, p.model, p.branch), ())]
        made.append(
            StepAccount(
                run,
                step,
                those[0].num_steps,
                forwards=len(those),
                computed=len(whole),
                skipped=len(those) - len(whole),
                attention=_attention(its, whole, calls is not None),
                density=sum(c.density for c in its) / len(its) if its else float("nan"),
                why=", ".join(f"{why} ({n})" for why, n in Counter(c.reason for c in its if c.reason).items()),
                call=those[0].call,
                halved=sum(p.halved for p in whole),
            )
        )
    return tuple(made)


def _attention(calls: Sequence[CallRecord], whole: Sequence[PassRecord], sparse: bool) -> str:
    if not whole:
        return "-"
    if not sparse or not calls:
        return "stock"
    dense = sum(bool(call.reason) for call in calls)
    return "sparse" if not dense else "dense" if dense == len(calls) else "mixed"


class Watch(CopiedNotPickled):
    """Notes each forward pass of a transformer, and tells a cache what it may not skip.

    Its hooks are on the transformer alone: in blocks that are compiled they would break the graphs.

    Args:
        pipe: that has the transformer. name: of it there.
        transformer: without what wraps it.
        family: of it.
        clock: of the pipeline, one for all its transformers.
        schedule: of sparse attention; None without a method.
        cache: that is at work, with its name; None without one.
        whole: a branch of guidance whose pass the cache may not skip where it did not skip that of the first one; ""
            for none.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        transformer: Any,
        family: Family,
        clock: StepClock,
        schedule: DenseSchedule | None,
        cache: tuple[CacheAtWork, str] | None,
        whole: str = "",
    ) -> None:
        self.passes: list[PassRecord] = []
        self.handle = HandleOf(pipe, PRESET)
        self._pipe, self._name, self._family, self._clock = pipe, name, family, clock
        self._cache, self._cache_name = (None, "") if cache is None else cache
        self._schedule, self._whole = schedule, whole
        self._signature = inspect.signature(type(transformer).forward)
        self._run, self._step, self._kept = -1, StepInfo(), ""
        self._mixed = False  # whether two threads made passes at once
        self._refused = 0  # passes of other threads, when this one began
        self._skipped = False  # whether the last pass was; `passes` may have been emptied since
        self._hooks = [
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(self._leave),
        ]

    @torch.compiler.disable
    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        remembers = self._cache is not None or self._schedule is not None or bool(self._whole)
        if not remembers and self._clock.is_taken(module):
            self._mixed = True  # nothing but the account depends on it
        else:
            self._clock.enter(module, self._name)
        self._refused = self._clock.threads.refused
        given = self._signature.bind(module, *args, **kwargs).arguments
        step = self._clock.observe(torch.as_tensor(given[self._family.timestep]), self._name, self._family.branches)
        if step.run != self._run:
            self._begin(step, module)
        self._kept = "" if self._schedule is None else self._schedule.step_reason(step)
        self._step = step
        if self._cache is not None:
            alike = step.branch == self._whole and not self._skipped
            self._cache.enter(step, bool(self._kept) or alike)

    def _begin(self, step: StepInfo, module: torch.nn.Module) -> None:
        if self._cache is not None:
            check_whole(self._name, module, self._cache_name)  # parallelism may have come later
        self._run = step.run
        self.passes = kept_records(self.passes, step)
        if self._cache is not None:
            self._cache.begin(step.num_steps)

    @torch.compiler.disable
    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        step = self._step
        if self._cache is not None and self._cache.one_context and self._clock.threads.refused > self._refused:
            raise RuntimeError(
                f"{self._name} was called by another thread in this pass, which was refused, but told diffusers' cache "
                "of another branch before: what this pass made is wrong. Let one thread wait for the other (a "
                "threading.Lock around the pipeline's call)."
            )
        if pass_is_of_another(module):  # the account, as the report, is of what this process computes
            self._clock.passed()
            return
        place = (step.run, step.step, step.num_steps, step.branch)
        kept = self._kept if self._cache is not None else ""
        skipped, extrapolated = pass_was_left_out(module), second_pass_was_left_out(module)
        self._skipped = skipped
        halved = any(isinstance(hook, LeftOutSamples) and hook.left_out for hook in hooks_on(module))
        self.passes.append(PassRecord(*place, self._name, skipped, kept, extrapolated, step.call, halved))
        self._clock.passed()

    def notes(self, run: int | None) -> list[str]:
        """What the cache says of a run, the last one; nothing where the transformer made no passes in it. And whether
        runs cannot be told apart."""
        here = self._cache is not None and self.passes and self.passes[-1].run == run
        mixed = f"two threads made passes of the {self._name} at once: steps of both are counted as one run, or as many"
        return [*(self._cache.notes() if here else ()), *([mixed] if self._mixed else ())]

    def reset(self) -> None:
        """Forget the passes so far."""
        self.passes.clear()
        self._mixed = False

    @property
    def could_not_skip(self) -> bool:
        """Whether the cache says that it could skip nothing, whatever its threshold."""
        return isinstance(self._cache, Forecast) and self._cache.could_not

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        if self._cache is not None:
            # Their hooks are closures over the layers of the original, which the copy would compute with.
            raise TypeError(
                f"the {self._name} has a cache over steps of a preset, whose hooks cannot be copied: call remove() on "
                "the preset's handle (or vidaccel.restore(pipe)) before copying, and apply the preset to the copy. A "
                "pipeline that shares the transformer, as of from_pipe, needs no copy and has the cache with it."
            )
        # A transformer that is copied alone must not bring a copy of its pipeline.
        memo.setdefault(id(self._pipe), None)
        return super().__deepcopy__(memo)

    def remove(self) -> None:
        """Take the hooks out. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
