"""One phase in progress: the loop over its steps, EMA, validation, and the checkpoint of its state."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint import Checkpoint, CheckpointError, Tensors, random_state, set_random_state
from .config import ConfigError, as_yaml
from .data.sampler import ClipSampler
from .dataloader import batches, to_device
from .ema import EMA
from .fsdp import autocast_forward, layers_of, plugin_of
from .generators import Generators, derive_seed
from .optim import learning_rate, make_optimizer, set_learning_rate
from .phase_state import restore, take
from .sharding import all_finite, whole
from .tracking import Means

if TYPE_CHECKING:
    from .recipes.base import Phase
    from .trainer import Trainer

logger = logging.getLogger(__name__)

AGREE_EVERY = 10
"""Steps between the times when several processes agree on whether to stop."""


class Stopped(Exception):
    """The run was asked to stop and wrote a checkpoint first."""


class Diverged(ArithmeticError):
    """The loss or the weights became NaN or infinite; the message names the last good checkpoint."""


class PhaseRun:
    """One phase in progress.

    Args:
        trainer: of the run.
        phase: to run.
        trained: results of the phases before.
        total_steps: steps done before this phase.
    """

    def __init__(self, trainer: Trainer, phase: Phase, trained: Tensors, total_steps: int) -> None:
        self.trainer, self.phase, self.settings = trainer, phase, phase.settings
        self.accelerator, self.loop = trainer.accelerator, trainer.config.loop
        self.trained, self.before = trained, total_steps
        self.step, self.seconds = 0, 0.0
        self.stopped = False

    @property
    def total_steps(self) -> int:
        return self.before + self.step

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and the optimiser, and take up where a checkpoint left; nothing of it is kept.

        Raises:
            ConfigError: settings that do not go together with FSDP, or no clip that can be read.
            CheckpointError: a checkpoint of another number of clips a step, or of another model; or a cache that cannot
                be written.
        """
        self._build()
        if checkpoint is not None:
            restore(self, checkpoint)
            self.trainer.tracker.say(f"phase {self.phase.name}: continues after step {self.step}.")

    def train(self) -> Tensors:
        """Run the steps that are left, after `begin`; returns the result of the phase, by parameter name.

        Raises:
            Stopped: on SIGINT or SIGTERM, after a checkpoint.
            Diverged: the loss or a weight is no number any more; no checkpoint is written of it.
            CheckpointError: the last checkpoint cannot be written.
        """
        if not self._done():
            self._steps()
        return self._result()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        accelerator, phase = self.accelerator, self.phase
        seed = trainer_seed(self.trainer.config.seed, phase.name)
        if self.settings.optimizer == "muon" and plugin_of(accelerator) is not None:
            raise ConfigError("muon needs whole matrices, which FSDP splits: set optimizer to adamw.")
        # Before the model is there, so that what encodes the clips has the memory for itself.
        self.clips = phase.clips()
        _seed_all(derive_seed(seed, "process", 0))
        module = phase.setup(self.trained)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"phase {phase.name} trains nothing: set requires_grad in its setup.")
        optimizer = make_optimizer(self.settings, named, phase.learning_rate_scale)
        accelerator.gradient_accumulation_steps = self.settings.gradient_accumulation_steps
        accelerator.step = 0
        self.model, self.optimizer = self._prepared(module, optimizer)
        self.module = accelerator.unwrap_model(self.model)
        # Sharding replaces parameters.
        self.named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.sampler = ClipSampler(
            self.clips.sizes,
            self.clips.members,
            self.settings.batch_size,
            self.settings.gradient_accumulation_steps,
            accelerator.num_processes,
            seed,
        )
        self.ema = EMA(self.named, self.settings.ema_decay) if self.settings.ema_decay else None
        # Processes must differ in dropout and the like, but not in what `setup` initialised.
        _seed_all(derive_seed(seed, "process", accelerator.process_index))
        count = sum(p.numel() for p in self.named.values())
        self.trainer.tracker.say(f"phase {phase.name}: {self.settings.steps} steps, {count:,} trained parameters.")

    def _prepared(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Both as accelerate wraps them."""
        plugin = plugin_of(self.accelerator)
        if plugin is None:
            return self.accelerator.prepare(module, optimizer)
        autocast_forward(self.accelerator, module)
        with layers_of(plugin, module) as absent:
            if absent:
                self.trainer.tracker.say(
                    f"phase {self.phase.name} has no {', '.join(absent)}: FSDP does not split by it."
                )
            return self.accelerator.prepare(module, optimizer)

    @property
    def global_batch(self) -> int:
        """Clips of an optimiser step, over all processes."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps * self.accelerator.num_processes

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        settings, loop, tracker = self.settings, self.loop, self.trainer.tracker
        means, begin, logged_at = Means(), time.perf_counter() - self.seconds, self.step
        logged_seconds = self.seconds
        stream = batches(
            self.clips,
            self.sampler,
            self.accelerator.process_index,
            settings.steps,
            self.step,
            self.trainer.config.data.workers,
        )
        self.model.train()
        while not self._done():
            rate = learning_rate(settings, self.step, self.seconds)
            set_learning_rate(self.optimizer, rate)
            step_values = self._one_step(stream)
            means.add(step_values)
            self.step += 1
            self.seconds = time.perf_counter() - begin
            last = self._done()
            if self.step % loop.log_every == 0 or last:
                seconds = (self.seconds - logged_seconds) / (self.step - logged_at)
                values = {**means.take(self.accelerator), "learning_rate": rate, "seconds_per_step": seconds}
                if not math.isfinite(values["loss"]):
                    raise self._diverged(f"the loss of phase {self.phase.name} is {values['loss']}")
                tracker.write(self.phase.name, self.step, self.total_steps, values)
                logged_at, logged_seconds = self.step, self.seconds
            if last or (loop.validate_every and self.step % loop.validate_every == 0):
                away = time.perf_counter()
                self._validate()
                begin += time.perf_counter() - away  # validation is no training time
            self.stopped = stopped = self._agree(self.trainer.stop)
            if last or stopped or self.step % loop.save_every == 0:
                away = time.perf_counter()
                self._check_finite(step_values["loss"])
                self._save(must=last or stopped)
                begin += time.perf_counter() - away
            if stopped and not last:
                raise Stopped(
                    f"stopped after step {self.step} of phase {self.phase.name}; continue with --resume latest."
                )

    def _one_step(self, stream: Iterator[Any]) -> dict[str, Any]:
        means: dict[str, Any] = {}
        for _ in range(self.settings.gradient_accumulation_steps):
            places, batch = next(stream)
            with self.accelerator.accumulate(self.model):
                batch = to_device(batch, self.accelerator.device)
                loss, values = self.phase.loss(self.model, batch, Generators(places, self.accelerator.device))
                self.accelerator.backward(loss)
            for name, value in {"loss": loss, **values}.items():
                part = value.detach() / self.settings.gradient_accumulation_steps
                means[name] = means[name] + part if name in means else part
        if self.settings.max_grad_norm is not None:
            means["gradient_norm"] = self.accelerator.clip_grad_norm_(self.named.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.ema.update()
        return means

    def _check_finite(self, loss: torch.Tensor) -> None:
        """Let nothing be saved that is no number, in whichever process it is: it would push out good checkpoints."""
        kept = [*self.named.values(), *(self.ema.tensors if self.ema is not None else ())]
        fine = all_finite([loss, *kept])
        flag = torch.tensor([float(not fine)], device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item():
            raise self._diverged(f"the loss or a weight of phase {self.phase.name} is NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        saved = self.trainer.checkpoints.saved()
        return Diverged(
            f"{what} by step {self.step}: lower learning_rate or max_grad_norm, or use mixed_precision bf16 or no. "
            f"{f'The last checkpoint is {saved[-1]}.' if saved else 'Nothing was saved.'}"
        )

    def _done(self) -> bool:
        limit = self.settings.max_minutes
        late = limit is not None and self._agree(self.seconds >= 60 * limit)
        return self.step >= self.settings.steps or late

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes it; processes ask one another only now and then."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.step % AGREE_EVERY and self.step < self.settings.steps:
            return False
        flag = torch.tensor([float(wish)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    # -- EMA, validation, checkpoints -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and in eval mode; nothing of the training changes."""
        states = random_state()
        self.model.eval()
        try:
            with torch.no_grad(), self.ema.in_place() if self.ema is not None else contextlib.nullcontext():
                yield
        finally:
            self.model.train()
            set_random_state(states)

    def _validate(self) -> None:
        with self.averaged():
            values = self.phase.validate(self.model, self.trainer.out / "validation", self.total_steps)
        if values:
            tracker = self.trainer.tracker
            tracker.write(
                self.phase.name, self.step, self.total_steps, {f"validation_{k}": v for k, v in values.items()}
            )

    def _result(self) -> Tensors:
        return whole(self.named) if self.ema is None else self.ema.whole()

    def _save(self, must: bool) -> None:
        """Write a checkpoint. Where it fails and need not be now, say so and go on."""
        checkpoint = take(self)
        if self.accelerator.is_main_process:
            try:
                self.trainer.checkpoints.save(checkpoint, as_yaml(self.trainer.config))
            except CheckpointError as error:
                if must:
                    raise
                logger.error("%s The run goes on and tries again in %d steps.", error, self.loop.save_every)
        self.accelerator.wait_for_everyone()


def trainer_seed(seed: int, phase: str) -> int:
    """The seed of a phase: of its order of clips, its noise, and what it initialises."""
    return derive_seed(seed, "phase", phase)


def _seed_all(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)
