"""One phase in progress: the loop over its steps, averaged weights, validation, and the checkpoint of its state."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import Checkpoint, CheckpointError, Tensors, random_state, set_random_state
from .config import ConfigError, as_yaml
from .data.plan import Plan
from .draws import Draws, derive_seed
from .loader import batches, to_device
from .optim import learning_rate, make_optimizer, set_learning_rate
from .record import Means
from .sharding import copy_whole, optimizer_state, whole

if TYPE_CHECKING:
    from .recipes.base import Phase
    from .trainer import Trainer

logger = logging.getLogger(__name__)

AGREE_EVERY = 10
"""Steps between the times when several processes agree on whether to stop."""


class Stopped(Exception):
    """The run was asked to stop and wrote a checkpoint first."""


class Diverged(ArithmeticError):
    """The loss became NaN or infinite; the message names the last good checkpoint."""


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

    def train(self, checkpoint: Checkpoint | None) -> Tensors:
        """Run the steps that are left; returns the result of the phase, by parameter name."""
        self._build()
        if checkpoint is not None:
            self._restore(checkpoint)
        if not self._done():
            self._steps()
        return self._result()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        accelerator, phase = self.accelerator, self.phase
        seed = trainer_seed(self.trainer.config.seed, phase.name)
        _seed_all(derive_seed(seed, "process", 0))
        module = phase.setup(self.trained)
        if self.settings.optimizer == "muon" and getattr(accelerator.state, "fsdp_plugin", None) is not None:
            raise ConfigError("muon needs whole matrices, which FSDP splits: set optimizer to adamw.")
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"phase {phase.name} trains nothing: set requires_grad in its setup.")
        optimizer = make_optimizer(self.settings, named, phase.learning_rate_scale)
        accelerator.gradient_accumulation_steps = self.settings.accumulate
        accelerator.step = 0
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.module = accelerator.unwrap_model(self.model)
        # Sharding replaces parameters.
        self.named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.clips = phase.clips()
        self.plan = Plan(
            self.clips.sizes,
            self.clips.members,
            self.settings.batch_size,
            self.settings.accumulate,
            accelerator.num_processes,
            seed,
        )
        self.average = self._make_average()
        # Processes must differ in dropout and the like, but not in what `setup` initialised.
        _seed_all(derive_seed(seed, "process", accelerator.process_index))
        count = sum(p.numel() for p in self.named.values())
        self.trainer.record.say(f"phase {phase.name}: {self.settings.steps} steps, {count:,} trained parameters.")

    def _make_average(self) -> Any:
        if not self.settings.ema_decay:
            return None
        from diffusers.training_utils import EMAModel

        return EMAModel(self.named.values(), decay=self.settings.ema_decay, foreach=True)

    def _global_batch(self) -> int:
        return self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.global_batch != self._global_batch():
            raise CheckpointError(
                f"the checkpoint was written with {checkpoint.global_batch} clips a step over all processes, now there "
                f"are {self._global_batch()}: use as many processes as then, or change batch_size or accumulate."
            )
        if set(checkpoint.weights) != set(self.named):
            odd = sorted(set(checkpoint.weights) ^ set(self.named))
            raise CheckpointError(f"the checkpoint has other parameters than this model: {', '.join(odd[:3])}, ...")
        for name, parameter in self.named.items():
            copy_whole(parameter, checkpoint.weights[name])
        if self.average is not None:
            for shadow, name in zip(self.average.shadow_params, self.named, strict=True):
                copy_whole(shadow, checkpoint.average[name])
            self.average.optimization_step = checkpoint.state["average_steps"]
        inner = self.optimizer.optimizer
        ordered = [p for group in inner.param_groups for p in group["params"]]
        inner.load_state_dict(optimizer_state(checkpoint.state["optimizer"], ordered))
        if self.accelerator.scaler is not None and checkpoint.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        if len(checkpoint.random) == self.accelerator.num_processes:
            set_random_state(checkpoint.random[self.accelerator.process_index])
        self.trainer.record.say(f"phase {self.phase.name}: continues after step {self.step}.")

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        settings, loop, record = self.settings, self.loop, self.trainer.record
        means, begin, logged_at = Means(), time.perf_counter() - self.seconds, self.step
        logged_seconds = self.seconds
        stream = batches(
            self.clips,
            self.plan,
            self.accelerator.process_index,
            settings.steps,
            self.step,
            self.trainer.config.data.workers,
        )
        self.model.train()
        while not self._done():
            rate = learning_rate(settings, self.step, self.seconds)
            set_learning_rate(self.optimizer, rate)
            means.add(self._one_step(stream))
            self.step += 1
            self.seconds = time.perf_counter() - begin
            last = self._done()
            if self.step % loop.log_every == 0 or last:
                seconds = (self.seconds - logged_seconds) / (self.step - logged_at)
                values = {**means.take(self.accelerator), "learning_rate": rate, "seconds_per_step": seconds}
                self._check_loss(values["loss"])
                record.write(self.phase.name, self.step, self.total_steps, values)
                logged_at, logged_seconds = self.step, self.seconds
            if last or (loop.validate_every and self.step % loop.validate_every == 0):
                away = time.perf_counter()
                self._validate()
                begin += time.perf_counter() - away  # validation is no training time
            self.stopped = stopped = self._agree(self.trainer.stop)
            if last or stopped or self.step % loop.save_every == 0:
                away = time.perf_counter()
                self._save(must=last or stopped)
                begin += time.perf_counter() - away
            if stopped and not last:
                raise Stopped(
                    f"stopped after step {self.step} of phase {self.phase.name}; continue with --resume latest."
                )

    def _one_step(self, stream: Iterator[Any]) -> dict[str, Any]:
        means: dict[str, Any] = {}
        for _ in range(self.settings.accumulate):
            places, batch = next(stream)
            with self.accelerator.accumulate(self.model):
                batch = to_device(batch, self.accelerator.device)
                loss, values = self.phase.loss(self.model, batch, Draws(places, self.accelerator.device))
                self.accelerator.backward(loss)
            for name, value in {"loss": loss, **values}.items():
                part = value.detach() / self.settings.accumulate
                means[name] = means[name] + part if name in means else part
        if self.settings.clip is not None:
            means["gradient_norm"] = self.accelerator.clip_grad_norm_(self.named.values(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.step(self.named.values())
        return means

    def _check_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        saved = self.trainer.checkpoints.saved()
        raise Diverged(
            f"the loss of phase {self.phase.name} is {loss} by step {self.step}: lower learning_rate or clip, or use "
            f"mixed_precision bf16 or no. {f'The last checkpoint is {saved[-1]}.' if saved else 'Nothing was saved.'}"
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

    # -- averages, validation, checkpoints -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and in eval mode; nothing of the training changes."""
        states = random_state()
        if self.average is not None:
            self.average.store(self.named.values())
            self.average.copy_to(self.named.values())
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()
            if self.average is not None:
                self.average.restore(self.named.values())
            set_random_state(states)

    def _validate(self) -> None:
        with self.averaged():
            folder = self.trainer.out / "validation"
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                values = self.phase.validate(self.model, folder, self.total_steps)
            except OSError as error:
                logger.error("validation could not write to %s: %s. The run goes on.", folder, error)
                return
        if values:
            record = self.trainer.record
            record.write(
                self.phase.name, self.step, self.total_steps, {f"validation_{k}": v for k, v in values.items()}
            )

    def _result(self) -> Tensors:
        if self.average is None:
            return whole(self.named)
        return dict(zip(self.named, whole(self.average.shadow_params), strict=True))

    def _save(self, must: bool) -> None:
        """Write a checkpoint. Where it fails and need not be now, say so and go on."""
        scaler = self.accelerator.scaler
        checkpoint = Checkpoint(
            phase=self.phase.name,
            step=self.step,
            total_steps=self.total_steps,
            seconds=self.seconds,
            global_batch=self._global_batch(),
            trained=self.trained,
            weights=whole(self.named),
            average=self._result() if self.average is not None else {},
            state={
                "optimizer": whole(self.optimizer.optimizer.state_dict()),
                "average_steps": self.average.optimization_step if self.average is not None else 0,
                "scaler": scaler.state_dict() if scaler is not None else {},
            },
            random=self._random_states(),
        )
        if self.accelerator.is_main_process:
            try:
                self.trainer.checkpoints.save(checkpoint, as_yaml(self.trainer.config))
            except CheckpointError as error:
                if must:
                    raise
                logger.error("%s The run goes on and tries again in %d steps.", error, self.loop.save_every)
        self.accelerator.wait_for_everyone()

    def _random_states(self) -> list[dict[str, Any]]:
        if self.accelerator.num_processes == 1:
            return [random_state()]
        from accelerate.utils import gather_object

        return gather_object([random_state()])


def trainer_seed(seed: int, phase: str) -> int:
    """The seed of a phase: of its order of clips, its noise, and what it initialises."""
    return derive_seed(seed, "phase", phase)


def _seed_all(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)
