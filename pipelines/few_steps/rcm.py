"""The sampler of rCM (arXiv 2510.08431), which TurboDiffusion's Wan models (arXiv 2512.16093) are made for.

Saved pipelines name this module and class in their `model_index.json`, so neither may be renamed. diffusers looks for
`SchedulerMixin` in the module, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - see above

from .renoising import RenoisingScheduler

MIDDLE_TIMES = (1.5, 1.4, 1.0)
"""Of the published four steps: angles of TrigFlow between the first, atan(sigma_max), and 0."""


class RCMScheduler(RenoisingScheduler):
    """One to four steps of a model that was distilled with rCM, in any pipeline of flow models such as Wan's.

    The times are angles a of TrigFlow: atan(sigma_max), the first n - 1 of `middle_times`, and 0. As a flow's noise
    level each is t = sin(a) / (sin(a) + cos(a)); the model gets 1000 t. What a step does, and where its noise comes
    from, is in `RenoisingScheduler`.

    Args:
        sigma_max: noise to data at the start: 80 for text to video, 200 for image to video.
        ode: keep the noise instead of drawing new. The authors call it sharper and less robust.
        middle_times: angles, falling.
        num_train_timesteps: what the model is told for t = 1.

    Raises:
        ValueError: times that do not fall from one to the next.
    """

    @register_to_config
    def __init__(
        self,
        sigma_max: float = 80.0,
        ode: bool = False,
        middle_times: Sequence[float] = MIDDLE_TIMES,
        num_train_timesteps: int = 1000,
    ) -> None:
        if not (isinstance(sigma_max, (int, float)) and 0 < sigma_max < math.inf):
            raise ValueError(f"sigma_max is {sigma_max}: it must be a number above 0, such as 80.")
        angles = [math.atan(sigma_max), *middle_times, 0.0]
        if any(a <= b for a, b in itertools.pairwise(angles)):
            raise ValueError(
                f"sigma_max {sigma_max} and middle_times {list(middle_times)} are the angles "
                f"{', '.join(f'{angle:.4f}' for angle in angles)}: each must be below the one before. Give a higher "
                "sigma_max, or middle times that fall."
            )
        self._without_table()

    @property
    def most_steps(self) -> int:
        """Steps that there are times for."""
        return len(self.config.middle_times) + 1

    @property
    def init_noise_sigma(self) -> float:
        """What noise of deviation 1 is multiplied with before the first step, as always in diffusers.

        Its Wan pipelines do not do that; see `scaled_start`.
        """
        return _flow_time(math.atan(self.config.sigma_max))

    def _table(self, steps: int) -> tuple[list[float], list[float]]:
        middle = list(self.config.middle_times)[: steps - 1]
        times = [_flow_time(angle) for angle in (math.atan(self.config.sigma_max), *middle, 0.0)]
        return times, [time * self.config.num_train_timesteps for time in times[:-1]]


def _flow_time(angle: float) -> float:
    """A time of TrigFlow, whose sample is cos(a) data + sin(a) noise, as one of a flow: (1 - t) data + t noise."""
    return math.sin(angle) / (math.sin(angle) + math.cos(angle))
