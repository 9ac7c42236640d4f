"""`apply`: a preset at work in a pipeline, as one handle that undoes everything."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...attention.account.records import RunReport
from ..acceleration.call_marks import CallMarks
from ..acceleration.clock import StepClock
from ..acceleration.handle import Handle, accelerate
from ..guidance_branches import TWO
from ..guidance_cache.handle import CachedGuidance
from ..guidance_free.handle import GuidanceFree, guidance_free
from ..hooks.removed import refuse_removed
from ..hooks.replaced import Replaced
from ..hooks.undo import PRESET, QUANTISED
from ..hooks.unsaved import TAKE_OUT, Unsaved
from ..tiny_decoder.handle import TinyDecoder
from .account import Account, Watch, accounts
from .caches import install_cache
from .checks import Checked, check_preset, chosen_scheduler
from .compiling import compile_blocks
from .errors import PresetError
from .files import load_preset
from .idle import dense_note, idle_note
from .levers import FORECAST
from .loras import LorasAtWork
from .only_cache import OnlyCache
from .preset import OWN, Preset
from .quantise import is_to_do, quantise

logger = logging.getLogger(__name__)


class Applied:
    """A preset at work in a pipeline. Made by `apply`; a context manager that removes itself.

    Attributes:
        preset: that is at work.
        sparse: the handle of sparse attention; None without a method.
    """

    def __init__(self, pipe: Any, preset: Preset, base: str | Path | None, measure_error: int) -> None:
        if hasattr(pipe, PRESET):
            at_work = getattr(pipe, PRESET).preset.name
            raise RuntimeError(f"the preset {at_work} is at work in this pipeline: call remove() on its handle first.")
        checked = check_preset(pipe, preset, base)
        self.preset = preset
        self.sparse: Handle | None = None
        self._free: GuidanceFree | None = None
        self._guidance: CachedGuidance | None = None
        self._decoder: TinyDecoder | None = None
        self._loras: LorasAtWork | None = None
        self._at_work: _Changed | None = None
        self._watches: list[Watch] = []
        self._only: list[OnlyCache] = []
        self._changes: list[str] = []
        self._replacements = Replaced(pipe, "apply", "runs without the preset", "apply it again")
        self._parts = {name: transformer for name, (transformer, _) in checked.parts.items()}
        self._notes: list[str] = []
        # Objects with `remove()`, and no closures: a copy of the pipeline must undo what it has, not the original's.
        self._undo: list[Any] = []
        for note in checked.notes:
            self._say(note)
        try:
            self._install(pipe, checked, base, measure_error)
            self._at_work = _Changed(pipe, PRESET, self)
        except BaseException:
            self.remove()
            raise

    def _install(self, pipe: Any, checked: Checked, base: str | Path | None, measure_error: int) -> None:
        """From the weights outwards, because each lever works on what the one before it left."""
        preset = self.preset
        if self._changed():
            self._undo.append(Unsaved(pipe, self._why_not_saved))
        if preset.scheduler is not None:
            self._undo.append(_Changed(pipe, "scheduler", chosen_scheduler(pipe, preset)))
        if preset.loras:
            self._loras = LorasAtWork(pipe, preset.loras)
            self._undo.append(self._loras)
            for note in self._loras.notes:
                self._say(note)
        if preset.guidance_free:
            adapters = None if preset.guidance_free == (OWN,) else preset.guidance_free
            self._free = guidance_free(pipe, adapters, base=base)
            self._undo.append(self._free)
        if is_to_do(pipe, preset.quantize):
            if not preset.quantize.keep:
                self._say(
                    "quantize.keep is false: the weights as they were are gone, and remove() leaves them in 8 bits"
                )
            for transformer, family in checked.parts.values():
                self._undo.append(quantise(transformer, family, preset.quantize))
        if preset.method is not None:
            options: dict[str, Any] = {"backend": preset.backend, "precision": preset.precision}
            learned: dict[str, Any] = {"base": base} if preset.method.needs_weights else {}
            if preset.method.name == "sla":
                learned["adapter"] = preset.sla
            try:
                self.sparse = accelerate(pipe, preset.method, measure_error=measure_error, **options, **learned)
            except (ValueError, RuntimeError) as error:  # the latter of a backend that cannot run here
                raise PresetError("attention", str(error).rstrip(".")) from error
            self._undo.append(self.sparse)
        if checked.decoder is not None:
            self._decoder = TinyDecoder(pipe, checked.decoder)
            self._undo.append(self._decoder)
        if preset.compile is not None:
            below_hooks = preset.cache is not None and preset.cache.name != FORECAST
            for transformer, family in checked.parts.values():
                self._undo.append(compile_blocks(transformer, family, preset.compile, below_hooks))
        clock = StepClock(pipe, logs=self.sparse is None)
        self._undo.append(CallMarks(pipe, clock))
        schedule = None if preset.method is None else preset.method.schedule
        # Differences are extrapolated from, so both of their passes have to be computed.
        whole = TWO[1] if preset.guidance_cache is not None else ""
        for name, (transformer, family) in checked.parts.items():
            cache = None
            if preset.cache is not None:
                cache = install_cache(name, transformer, preset.cache, family, clock), preset.cache.name
                self._undo.append(cache[0])
                self._only.append(OnlyCache(name, transformer, preset.cache.name))
            watch = Watch(pipe, name, transformer, family, clock, schedule, cache, whole)
            self._undo.append(watch)
            self._watches.append(watch)
        if preset.guidance_cache is not None:  # around the caches, which must not see passes that are not made
            self._guidance = CachedGuidance(pipe, preset.guidance_cache, logs=False, by="apply", dense=schedule)
            self._undo.append(self._guidance)

    def _changed(self) -> list[str]:
        """The levers that leave the pipeline with what would not be saved, or not load again."""
        merged = self._loras is not None and not self._loras.are_apart()  # by the user, for good
        names = ("scheduler", *(() if merged else ("loras",)), "quantize", "sla")
        return [name for name in names if getattr(self.preset, name)]

    def _why_not_saved(self) -> str:
        changed = self._changed()
        if not changed:
            return ""
        return f"the preset {self.preset.name} gave it {' and '.join(changed)}; {TAKE_OUT}"

    def warming_up(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block sparse attention is at work in every step; see `Handle.warming_up`."""
        return contextlib.nullcontext() if self.sparse is None else self.sparse.warming_up()

    @property
    def arguments(self) -> dict[str, Any]:
        """What the call of the pipeline should have: `pipe(prompt, **handle.arguments)`."""
        wanted = {name: getattr(self.preset, name) for name in ("num_inference_steps", "guidance_scale")}
        return {name: value for name, value in wanted.items() if value is not None}

    def report(self) -> Account:
        """What was done since `apply`: of each step, what was computed, what was skipped, and what was sparse."""
        sparse: RunReport | None = None if self.sparse is None else self.sparse.report()
        passes = [each for watch in self._watches for each in watch.passes]
        steps = accounts(passes, None if sparse is None else sparse.records)
        notes = [*self._notes, *(self._free.notes() if self._free is not None and steps else ())]
        notes += () if self._guidance is None or not steps else self._guidance.notes()
        notes += () if self._decoder is None else self._decoder.notes()
        wanted = self.preset.num_inference_steps
        others = sorted({s.num_steps for s in steps if s.num_steps is not None} - {wanted})
        if wanted is not None and others:
            notes.append(
                f"the preset is for {wanted} steps (num_inference_steps), and a run has {', '.join(map(str, others))}"
            )
        last = max((each.run for each in passes), default=None)
        for watch in self._watches:
            notes += watch.notes(last)
        could = not any(watch.could_not_skip for watch in self._watches)  # else their notes say why
        if changed := self._changed_since():
            notes += changed
        elif self.preset.cache is not None and could and (idle := idle_note(self.preset.cache, passes)):
            notes.append(idle)
        if sparse is not None:
            notes += sparse.notes
            if dense := dense_note(steps, passes, sparse.records):
                notes.append(dense)
        return Account(self.preset.name, self.preset.levers(), steps, sparse, tuple(dict.fromkeys(notes)))

    def _changed_since(self) -> list[str]:
        """What to say of what others made of the transformers while the preset was at work; logged once."""
        if self._at_work is not None:
            replaced = [] if self.sparse is not None else self._replacements.notes(self._parts)  # it says so itself
            self._changes = [*replaced, *(note for only in self._only for note in only.notes())]
        return self._changes

    def reset(self) -> None:
        """Forget what was done so far."""
        for watch in self._watches:
            watch.reset()
        if self._guidance is not None:
            self._guidance.reset()
        if self.sparse is not None:
            self.sparse.reset()

    def remove(self) -> None:
        """Put the pipeline back as it was, the last lever first. A second call does nothing.

        Raises:
            RuntimeError: LoRAs were fused into weights that are offloaded layer by layer. All else is undone; a second
                call, after the offloading was taken off, undoes them.
        """
        with contextlib.ExitStack() as stack:  # all of it, whatever one of them raises
            for each in self._undo:
                stack.callback(each.remove)
            stack.callback(self._changed_since)  # first: who never asks for a report hears of it here at the latest
        self._undo, self._only, self._parts = [], [], {}
        if self._at_work is not None:
            self._at_work.remove()
        self._at_work = None

    def _say(self, note: str) -> None:
        logger.warning("%s", note)
        self._notes.append(note)

    def __enter__(self) -> Applied:
        refuse_removed(self._at_work, "vidaccel.apply")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<vidaccel preset {self.preset.name}: {', '.join(self.preset.levers()) or 'nothing'}>"


class _Changed:
    """An attribute of a pipeline that was set, until it is what it was; what somebody else set meanwhile stays."""

    def __init__(self, pipe: Any, name: str, value: Any) -> None:
        self._pipe, self._name, self._value = pipe, name, value
        self._was_there = hasattr(pipe, name)
        self._before = getattr(pipe, name, None)
        setattr(pipe, name, value)

    def remove(self) -> None:
        if getattr(self._pipe, self._name, None) is not self._value:
            return
        if self._was_there:
            setattr(self._pipe, self._name, self._before)
        else:
            delattr(self._pipe, self._name)


def apply(pipe: Any, preset: Preset | str | Path, *, base: str | Path | None = None, measure_error: int = 0) -> Applied:
    """Put all levers of a preset to work in a pipeline, in the order in which they can be.

    Everything that can be checked is checked before the pipeline is touched, and what fails all the same is undone.

    Args:
        pipe: a diffusers pipeline.
        preset: a `Preset`, a file, or the name of one that comes with the package.
        base: folder or hub id that the pipeline is from, where it does not know itself.
        measure_error: see `accelerate`.

    Returns:
        A handle with `arguments` for the call, `report()` and `remove()`.

    Raises:
        PresetError: a preset that cannot be read, is for another model, or has a lever that cannot be used here. Later,
            in calls of the pipeline: a LoRA of the preset was unloaded or switched off.
        RuntimeError: a preset is at work in the pipeline already.
    """
    if not isinstance(preset, Preset | str | Path):
        fix = "Give a Preset, a file or a name; Preset.from_dict makes one of names and values."
        raise PresetError("", f"a {type(preset).__name__} is no preset", fix)
    chosen = preset if isinstance(preset, Preset) else load_preset(preset)
    if measure_error and chosen.method is None:
        problem = f"measure_error is {measure_error}, and a preset without a method has no sparse attention to measure"
        raise PresetError("method", problem, "Give it a method, or leave measure_error out.")
    return Applied(pipe, chosen, base, measure_error)


def quantise_for_good(pipe: Any, preset: Preset, device: torch.device | str, base: str | Path | None = None) -> None:
    """Put the layers of a pipeline that lies on the CPU into 8 bits as a preset says, and the pipeline on a device.

    The device never holds more of the whole weights than those of one layer. They are gone then; who applies a preset
    with the same `quantize` finds it at work.

    Args:
        pipe: a diffusers pipeline. preset: with `quantize`. device: where it will run.
        base: see `apply`.

    Raises:
        PresetError: it cannot be used with the pipeline.
    """
    for transformer, family in check_preset(pipe, preset, base).parts.values():
        quantise(transformer, family, replace(preset.quantize, keep=False), device)
    setattr(pipe, QUANTISED, preset.quantize)
    pipe.to(device)
