"""What samplers have in common that remove all noise in each step, and put less of it back for the next.

diffusers looks for `SchedulerMixin` in the modules that saved pipelines name, so theirs import it, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .even_sigmas import steps_of


class RenoisingScheduler(SchedulerMixin, ConfigMixin):
    """A step from noise level t to t' of a flow model makes of the sample x and the velocity v

        x' = (1 - t') (x - t v) + t' noise    with new noise, or, where the config has an `ode` that is true,
        x' = x - (t - t') v.

    The sample stays in float64 between steps (float32 on devices without it) and is given back in the dtype that it
    came in at the last step.

    diffusers' Wan pipelines give `step` no generator. Without one the new noise is a function of the sample that a run
    starts with: a seeded run is the same again, on any device, alone or in a batch, and processes that share a sequence
    draw the same.

    Subclasses have `num_train_timesteps` in their config, and call `_without_table` at the end of their `__init__`.
    """

    order = 1

    def _without_table(self) -> None:
        """As long as there are no timesteps."""
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._times: list[float] = []
        self._begin_index: int | None = None
        self._start_run(None)

    def _start_run(self, sample: torch.Tensor | None) -> None:
        """Forget the run before; the sample is the first of a run."""
        self._step_index: int | None = None
        self._dtype = None if sample is None else sample.dtype
        self._digests: list[bytes] = []

    @property
    def step_index(self) -> int | None:
        """The row of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The row of the first step, where the pipeline says it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say with which row the run begins."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Make the table of a run: `timesteps` [n], and `sigmas` [n + 1] with 0 at the end, in float32.

        Args:
            num_inference_steps: n. device: of the timesteps.
            sigmas: n evenly spaced ones instead, of which only the number counts; see `even_sigmas`.
            mu: of a shift by the size of the video, which times of a distillation do not have.

        Raises:
            ValueError: more steps than there are times for, fewer than 1, or levels that are given.
        """
        if sigmas is not None:
            num_inference_steps = steps_of(sigmas)
        if num_inference_steps is None or not 1 <= num_inference_steps <= self.most_steps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}: this model is distilled to 1 to {self.most_steps} "
                f"steps. Give {self.most_steps}."
            )
        self._times, timesteps = self._table(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.tensor(self._times, dtype=torch.float32)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
        self._begin_index = None
        self._start_run(None)

    @property
    def most_steps(self) -> int:
        """Steps that there are times for."""
        raise NotImplementedError

    def _table(self, steps: int) -> tuple[list[float], list[float]]:
        """The noise levels of so many steps, with 0 at the end, and what the model is told at each but that."""
        raise NotImplementedError

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The row that has this timestep.

        Raises:
            ValueError: none has.
        """
        value = float(timestep)
        rows = self.timesteps.tolist()
        if value not in rows:
            raise ValueError(f"timestep is {value:g}: it must be one of scheduler.timesteps, {rows}.")
        return rows.index(value)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself; pipelines of other models call this before each pass."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The sample at the next time.

        Args:
            model_output: velocity (noise - data), [B, ...].
            timestep: the row's.
            sample: [B, ...] at the row's time.
            generator: of the new noise, one or one for each sample; None for noise that follows from the first sample.

        Raises:
            ValueError: there is no table, or no row is left of it.
        """
        if self.num_inference_steps is None:
            raise ValueError("there are no timesteps yet: call set_timesteps first.")
        if self._step_index is None:
            self._start_run(sample)
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        if index >= self.num_inference_steps:
            raise ValueError(f"all {self.num_inference_steps} steps are done: call set_timesteps before the next run.")
        now, then = self._times[index : index + 2]
        exact = torch.float32 if sample.device.type == "mps" else torch.float64
        x, v = sample.to(exact), model_output.to(exact)
        if self.config.get("ode", False):
            x = x - (now - then) * v
        else:
            x = (1 - then) * (x - now * v)
            if then > 0:
                x = x + then * self._new_noise(sample, index, generator).to(x)
        self._step_index = index + 1
        if self._step_index == self.num_inference_steps:
            x = x.to(self._dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _new_noise(
        self, sample: torch.Tensor, index: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        if generator is not None:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        if not self._digests:
            self._digests = [_digest(one) for one in sample]
        noise = [torch.randn(sample.shape[1:], generator=_generator(digest, index)) for digest in self._digests]
        return torch.stack(noise)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(1 - t) data + t noise, at 1000 t = `timesteps`, one for all samples or one for each."""
        time = timesteps.to(original_samples) / self.config.num_train_timesteps
        time = time.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (1 - time) * original_samples + time * noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` as diffusers' flow schedulers have it."""
        noise = torch.randn_like(sample) if noise is None else noise
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _digest(sample: torch.Tensor) -> bytes:
    """A hash of a sample's numbers."""
    values: Any = sample.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).digest()


def _generator(digest: bytes, index: int) -> torch.Generator:
    """The noise of a step. Made anew each time: a generator that is kept could not be copied with the pipeline."""
    seed = hashlib.blake2b(digest + index.to_bytes(2, "little"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
