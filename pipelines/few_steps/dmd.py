"""The sampler of models that were distilled by distribution matching (DMD2), such as FastVideo's FastWan.

Saved pipelines name this module and class in their `model_index.json`, so neither may be renamed. diffusers looks for
`SchedulerMixin` in the module, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - see above

from .renoising import RenoisingScheduler

FASTWAN_TIMESTEPS = (1000, 757, 522)
FASTWAN_SHIFT = 8.0


class DMDScheduler(RenoisingScheduler):
    """The steps of a flow model that was distilled with DMD2 (arXiv 2405.14867), in any pipeline such as Wan's.

    The noise level of a timestep is that of the nearest row of a table: with u = 1, .999, ... .001, the levels are
    `shift u / (1 + (shift - 1) u)` and the timesteps 1000 times that. The model gets the timestep itself. Fewer steps
    leave out the last timesteps. What a step does, and where its noise comes from, is in `RenoisingScheduler`.

    Args:
        denoising_timesteps: what the model is told at each step, falling; FastWan's by default.
        shift: of the table; 8 is FastWan's.
        num_train_timesteps: rows of the table, and the timestep of a level of 1.

    Raises:
        ValueError: timesteps that do not fall, or lie outside of the table; a shift that is not above 0.
    """

    @register_to_config
    def __init__(
        self,
        denoising_timesteps: Sequence[float] = FASTWAN_TIMESTEPS,
        shift: float = FASTWAN_SHIFT,
        num_train_timesteps: int = 1000,
    ) -> None:
        rows = list(denoising_timesteps)
        if not rows or rows[0] > num_train_timesteps or any(a <= b for a, b in itertools.pairwise([*rows, 0])):
            raise ValueError(
                f"denoising_timesteps are {rows}: they must fall, from at most {num_train_timesteps} to above 0, such "
                f"as {list(FASTWAN_TIMESTEPS)}."
            )
        if not shift > 0:
            raise ValueError(f"shift is {shift}: it must be above 0, such as {FASTWAN_SHIFT:g}.")
        self._without_table()

    @property
    def init_noise_sigma(self) -> float:
        """What noise of deviation 1 is multiplied with before the first step."""
        return 1.0

    @property
    def most_steps(self) -> int:
        """Steps that there are times for."""
        return len(self.config.denoising_timesteps)

    def _table(self, steps: int) -> tuple[list[float], list[float]]:
        count, shift = self.config.num_train_timesteps, self.config.shift
        shares = (row / count for row in range(count, 0, -1))
        levels = [shift * u / (1 + (shift - 1) * u) for u in shares]
        rows = [float(row) for row in self.config.denoising_timesteps][:steps]
        return [*(min(levels, key=lambda level: abs(count * level - row)) for row in rows), 0.0], rows
