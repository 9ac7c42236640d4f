"""One phase in progress: the loop over its steps, validation, and when its state is saved."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..attention.call_checks import NotFinite
from .checkpoints.checkpoint import Checkpoint, CheckpointError, random_state, set_random_state
from .checkpoints.phase_state import PhaseState
from .checkpoints.written import Tensors, remedy
from .config import as_yaml
from .data.dataloader import batches, to_device
from .data.sampler import ClipSampler
from .distributed.generators import Generators, derive_seed
from .distributed.prepared import prepare
from .distributed.sharding import all_finite
from .ema import EMA
from .footprint.low_bit import in_low_bits
from .footprint.memory import out_of_memory, peak_gigabytes
from .logs.pace import Pace
from .logs.progress import duration
from .optim import clip_gradients, found_rate, learning_rate, make_optimizer, set_learning_rate
from .phase_checks import check_loss
from .recipes.base import Phase
from .run_context import RunContext
from .stopping import Stopped, StopRequested

logger = logging.getLogger(__name__)


class Diverged(ArithmeticError):
    """The loss or the weights became NaN or infinite; the message names the last good checkpoint."""


class PhaseRun:
    """One phase in progress.

    Args:
        context: of the run.
        phase: to run.
        trained: results of the phases before.
        before: optimiser steps done before this phase.
    """

    def __init__(self, context: RunContext, phase: Phase, trained: Tensors, before: int) -> None:
        self.context, self.phase, self.settings = context, phase, phase.settings
        self.accelerator, self.process, self.loop = context.accelerator, context.process, context.config.loop
        self._trained, self._before = trained, before
        self._low_bits = 0
        """Linear layers that compute in low bits."""
        self._saved = (0, False)
        """The step and whether its validation is due, as the checkpoint has them that a resume would take."""

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and the optimiser, and take up where a checkpoint left; nothing of it is kept.

        Raises:
            ConfigError: no clip that can be read.
            CheckpointError: a checkpoint of another model; or a cache that cannot be written.
        """
        self._build()
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._saved = (self.state.step, self.state.validation_due)
            self.context.tracker.say(f"phase {self.phase.name}: continues after step {self.state.step}.")

    def train(self, keep: bool = True) -> Tensors:
        """Run the steps that are left, after `begin`; returns the result of the phase, by parameter name.

        Args:
            keep: whether this process needs the result; see `PhaseState.result`.

        Raises:
            Stopped: on SIGINT, SIGTERM, SIGHUP or SIGUSR1, after a checkpoint.
            Diverged: the loss or a weight is no number any more; no checkpoint is written of it.
            OutOfMemory: of the GPU, in a validation.
            CheckpointError: the last checkpoint cannot be written.
        """
        try:
            if self.state.validation_due:
                self._validate()
                if self.process.asked_to_stop():
                    self._stop(random_state())
            elif self.loop.validate_first and not self.state.step:
                self._validate_first()
            if not self._done():
                self._steps()
        except NotFinite as error:  # sparse attention plans from it before a loss shows it
            raise self._diverged(f"a weight of phase {self.phase.name} is NaN or infinite") from error
        return self.state.result(keep)

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        accelerator, phase = self.accelerator, self.phase
        seed = phase_seed(self.context.config.seed, phase.name)
        # Before the model is there, so that what encodes the clips has the memory for itself.
        self.clips = phase.clips()
        _seed_all(derive_seed(seed, "process", 0))
        module = phase.setup(self._trained)
        if self.settings.low_bit_linears != "none":
            self._low_bits = in_low_bits(module, self.settings.low_bit_linears, phase.name)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"phase {phase.name} trains nothing: set requires_grad in its setup.")
        optimizer = make_optimizer(self.settings, named, phase.learning_rate_scale)
        accelerator.gradient_accumulation_steps = self.settings.gradient_accumulation_steps
        accelerator.step = 0
        self.model, self.optimizer = prepare(
            accelerator, phase, module, optimizer, self.context.tracker.say, self.loop.compile
        )
        # Names must be those of the module that `setup` gave, also where torch.compile is around it: results, adapters
        # and checkpoints go by them.
        self.module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Sharding replaces parameters.
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.sampler = ClipSampler(
            self.clips.sizes,
            self.clips.members,
            self.settings.batch_size,
            self.settings.gradient_accumulation_steps,
            accelerator.num_processes,
            seed,
        )
        self.state = PhaseState(
            phase=phase.name,
            accelerator=accelerator,
            named=named,
            optimizer=self.optimizer,
            ema=EMA(named, self.settings.ema_decay) if self.settings.ema_decay else None,
            trained=self._trained,
            before=self._before,
            inputs=self.context.inputs,
        )
        # Processes must differ in dropout and the like, but not in what `setup` initialised.
        _seed_all(derive_seed(seed, "process", accelerator.process_index))
        self._say_what_begins()

    def _say_what_begins(self) -> None:
        sizes = self.sampler.members or range(len(self.sampler.sizes))
        counts = sorted({self.sampler.global_batch(size) for size in sizes})
        clips = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        micro, processes = self.settings.gradient_accumulation_steps, self.accelerator.num_processes
        parameters = sum(p.numel() for p in self.state.named.values())
        self.context.tracker.say(
            f"phase {self.phase.name}: {self.settings.steps} steps, {clips} clips a step "
            f"({micro} micro-batch{'es' if micro > 1 else ''} x {processes} process{'es' if processes > 1 else ''}), "
            f"{parameters:,} trained parameters."
        )
        if self.settings.lr_warmup_steps >= self.settings.steps and self.process.is_main:
            reached = learning_rate(self.settings, self.settings.steps - 1) / self.settings.learning_rate
            logger.warning(
                "phase %s: lr_warmup_steps is %d and there are %d steps, so that the learning rate rises to the end, "
                "to %.0f %% of %g: give more steps, or fewer to warm up.",
                self.phase.name, self.settings.lr_warmup_steps, self.settings.steps, 100 * reached,
                self.settings.learning_rate,
            )  # fmt: skip
        data = self.context.config.data
        if not data.workers and data.kind != "demo" and self.clips.decodes and self.process.device.type == "cuda":
            self.context.tracker.say(
                f"phase {self.phase.name}: data.workers is 0, so that the process that trains decodes each clip "
                "itself, and the GPU waits: set it to 8, or to as many CPU cores as there are for a GPU."
            )
        if self._low_bits:
            self.context.tracker.say(
                f"phase {self.phase.name}: {self._low_bits} linear layers compute in {self.settings.low_bit_linears}."
            )

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        settings, loop, tracker, state = self.settings, self.loop, self.context.tracker, self.state
        begin, pace = time.perf_counter() - state.seconds, Pace(state.step, state.seconds)
        first, before_first = state.step, state.seconds
        workers = self.context.config.data.workers
        stream = batches(self.clips, self.sampler, self.process.index, settings.steps, state.step, workers)
        self.model.train()
        with contextlib.closing(stream), self._shown() as advance:
            while not self._done():
                rate = learning_rate(settings, state.step, state.seconds, pace.seconds_per_step)
                set_learning_rate(self.optimizer, rate)
                before = random_state()
                try:
                    step_values = self._one_step(stream)
                except StopRequested:
                    self._stop(before)
                state.means.add(step_values)
                state.step += 1
                # One clock: learning rate and end follow from it, and must be the same in every process.
                state.seconds = self.process.of_main(time.perf_counter() - begin)
                pace.add(state.step, state.seconds)
                advance()
                last = self._done()
                if state.step % loop.log_every == 0 or last:
                    seconds = (state.seconds - state.logged[1]) / (state.step - state.logged[0])
                    used = rate * found_rate(self.optimizer)
                    values = {**state.means.take(self.accelerator), "learning_rate": used, "seconds_per_step": seconds}
                    values |= peak_gigabytes(self.process.device)
                    if (epochs := self.sampler.epochs(state.step)) is not None:
                        values["epoch"] = epochs
                    if not math.isfinite(values["loss"]):
                        raise self._diverged(f"the loss of phase {self.phase.name} is {values['loss']}")
                    tracker.write(
                        self.phase.name, state.step, state.total_steps, values, settings.steps, self._left(seconds)
                    )
                    state.logged = (state.step, state.seconds)
                elif state.step == first + 1:
                    self._say_first_step(state.seconds - before_first)
                away = time.perf_counter()
                validates = last or bool(loop.validate_every and state.step % loop.validate_every == 0)
                if last or state.step % loop.save_every == 0:
                    # First: validation may run out of memory.
                    self._check_finite(step_values["loss"])
                    state.validation_due = validates
                    self._save(random_state(), must=last)
                if validates:
                    self._validate()
                if self.process.asked_to_stop():
                    self._stop(random_state(), step_values["loss"])
                begin += time.perf_counter() - away  # validation and saving are no training time

    def _say_first_step(self, seconds: float) -> None:
        """What the first step took: the first line of the log may come hours later."""
        peak = peak_gigabytes(self.process.device)
        memory = f", {peak['memory_gb']:.1f} GB of the GPU" if peak else ""
        self.context.tracker.say(
            f"phase {self.phase.name}: the first step took {seconds:.3g} s{memory}; at that rate "
            f"{self._left(seconds)} for those that are left. The log has a line every {self.loop.log_every} steps."
        )

    def _one_step(self, stream: Iterator[Any]) -> dict[str, Any]:
        """One optimiser step; the means of its numbers.

        Raises:
            StopRequested: between two micro-batches; weights, optimiser and EMA are those of the step before. A step
                may take longer than whoever asked will wait.
        """
        means: dict[str, Any] = {}
        for _ in range(self.settings.gradient_accumulation_steps):
            places, batch = next(stream)
            # Behind the loading: a Ctrl-C also ends the programs that decode videos, so that this batch may be wrong.
            self.process.check_stop()
            with self.accelerator.accumulate(self.model):
                batch = to_device(batch, self.accelerator.device)
                made = self.phase.loss(self.model, batch, Generators(places, self.accelerator.device))
                loss, values = check_loss(self.phase.name, made)
                self.accelerator.backward(loss)
            for name, value in {"loss": loss, **values}.items():
                part = value.detach() / self.settings.gradient_accumulation_steps
                means[name] = means[name] + part if name in means else part
        if self.settings.max_grad_norm is not None:
            means |= clip_gradients(
                self.accelerator, self.state.named, self.phase.clipped_with, self.settings.max_grad_norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.state.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.state.ema.update()
        return means

    def _stop(self, random: dict[str, Any], loss: torch.Tensor | None = None) -> None:
        """End the run after `state.step`, with a checkpoint of it where there is none yet.

        Args:
            random: the states of the random generators after that step.
            loss: of that step, where it was just done.

        Raises:
            Stopped: always.
        """
        name, step = self.phase.name, self.state.step
        self.optimizer.zero_grad(set_to_none=True)
        if (step, self.state.validation_due) == self._saved:
            if not step and not self._before:
                raise Stopped(f"stopped before the first step of phase {name}; there is nothing to resume yet.")
        else:
            self._check_finite(loss)
            self._save(random, must=True)
        raise Stopped(f"stopped after step {step} of phase {name}; {self.context.checkpoints.how_to_resume()}.")

    def _check_finite(self, loss: torch.Tensor | None) -> None:
        """Let nothing be saved that is no number, in whichever process it is: it would push out good checkpoints."""
        ema = self.state.ema
        kept = [*self.state.named.values(), *(ema.tensors if ema is not None else ())]
        if self.process.any(not all_finite([*kept, *(() if loss is None else (loss,))])):
            raise self._diverged(f"the loss or a weight of phase {self.phase.name} is NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        """What to do is what a resume allows; another precision is none of it."""
        folder, precision = self.context.checkpoints, self.loop.mixed_precision
        told = "Nothing was saved" if folder.current is None else f"The last checkpoint is {folder.current}"
        better = {"fp16": "bf16 or no", "bf16": "no"}.get(precision)
        anew = f"; or begin anew, in another out, with mixed_precision {better}" if better else ""
        return Diverged(
            f"{what} by step {self.state.step}. {told}: {folder.how_to_resume()}, and with a lower learning_rate or "
            f"max_grad_norm{anew}."
        )

    def _done(self) -> bool:
        limit = self.settings.max_minutes
        late = limit is not None and self.state.seconds >= 60 * limit
        return self.state.step >= self.settings.steps or late

    def _left(self, seconds_per_step: float) -> str:
        """How long the phase still takes, in words."""
        left = (self.settings.steps - self.state.step) * seconds_per_step
        if self.settings.max_minutes is not None:
            left = min(left, 60 * self.settings.max_minutes - self.state.seconds)
        return duration(max(0.0, left))

    def _shown(self) -> contextlib.AbstractContextManager:
        """A bar of the phase, in the main process."""
        if not self.process.is_main:
            return contextlib.nullcontext(lambda: None)
        name, total = f"phase {self.phase.name}", self.settings.steps
        return self.process.progress.task(name, total, self.state.step, lines=False)

    # -- validation and checkpoints ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model with the weights of its EMA and in eval mode; nothing of the training changes."""
        states, ema = random_state(), self.state.ema
        self.model.eval()
        try:
            with torch.no_grad(), ema.in_place() if ema is not None else contextlib.nullcontext():
                yield
        finally:
            self.model.train()
            set_random_state(states)

    def _validate_first(self) -> None:
        """Validate what is not trained yet. A run that goes on from here does so again, so a stop saves nothing."""
        # After an earlier phase the same number of steps has files already.
        self._validate(f"before_{self.phase.name}" if self._before else "")
        self.state.validation_due = False
        if self.process.asked_to_stop():
            self._stop(random_state())

    def _validate(self, within: str = "") -> None:
        """Validate; where a stop cuts it off, remember that it is due.

        Args:
            within: folder of its files, below that of all others.
        """
        state, folder = self.state, self.context.out / "validation" / within
        state.validation_due = True
        try:
            with self.ema_weights():
                values = self.phase.validate(self.module, folder, state.total_steps)
        except StopRequested:
            return
        except torch.cuda.OutOfMemoryError as error:
            where = f"in the validation after step {state.step} of phase {self.phase.name}"
            go_on = f"{self.context.checkpoints.how_to_resume()}."
            raise out_of_memory(
                self.context.config, where, go_on, trains=False, measures=True, makes_videos=True
            ) from error
        state.validation_due = False
        if self._saved == (state.step, True):
            if self.process.is_main:
                self.context.checkpoints.validated()
            self._saved = (state.step, False)
        if values:
            self.context.tracker.write_validation(
                self.phase.name, state.step, state.total_steps, values, self.settings.steps
            )
        self.context.tracker.show(self.phase.name, state.total_steps, folder)

    def _save(self, random: dict[str, Any], must: bool) -> None:
        """Write a checkpoint. Where it fails and need not be now, say so and go on."""
        checkpoint, failed = self.state.take(random), False
        self.context.tracker.goes_on()
        if self.process.is_main:
            try:
                self.context.checkpoints.save(checkpoint, as_yaml(self.context.config), self.phase.write_adapter)
            except CheckpointError as error:
                if must:
                    raise CheckpointError(
                        f"{error} {remedy(error)}, and {self.context.checkpoints.how_to_resume()}."
                    ) from error
                failed = True
                logger.error("%s The run goes on and tries again in %d steps.", error, self.loop.save_every)
        self.process.wait()
        if not self.process.any(failed):
            self._saved = (self.state.step, self.state.validation_due)
            self.context.checkpoints.current = self.context.checkpoints.path(self.state.total_steps)


def phase_seed(seed: int, phase: str) -> int:
    """The seed of a phase: of its order of clips, its noise, and what it initialises."""
    return derive_seed(seed, "phase", phase)


def _seed_all(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)
