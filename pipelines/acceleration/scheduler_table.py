"""What a scheduler says about a run: its table of timesteps, its place in it, its noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .host_reads import place_in, read_once

ROUNDING = 2**-7  # two units of bfloat16, to which some pipelines round the timestep they send
_SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # by which `sigma_max` is read
MAX_FLOW_SIGMA = 1.001  # noise levels of flow models end at 1, but for rounding


@dataclass(frozen=True)
class Timestep:
    """What a transformer got as timestep, in numbers that tell one row of the table from another.

    Args:
        high, low, mean: over all samples, frames or tokens.
        per_frame: it has a value for each frame or token.
        dtype: of the tensor, to which the table has to be rounded before it is compared.
    """

    high: float
    low: float
    mean: float
    per_frame: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, table: Table | None = None) -> Timestep:
        """Read a tensor of any shape, with one wait for the device; with none where it was read before, or is a view of
        a row of the table."""
        row = None if table is None else place_in(table.tensor, tensor)
        high, low, mean = _read(tensor) if row is None else (table.rows[row],) * 3
        mean = high if high == low else mean  # not another one because there are more tokens to round it over
        return cls(high, low, mean, tensor.ndim > 1 and tensor.shape[-1] > 1, tensor.dtype)

    @property
    def value(self) -> float:
        """The timestep of what is denoised: clean tokens of image conditioning have 0."""
        return self.high

    def matches(self, row: float) -> bool:
        """Whether it is a row's timestep, perhaps rounded, for all frames or for those that are not clean."""
        return any(abs(value - row) <= ROUNDING * max(1.0, abs(row)) for value in (self.high, self.low))


@read_once
def _read(timestep: torch.Tensor) -> tuple[float, float, float]:
    """The highest, the lowest and the mean value."""
    values = timestep.detach().float()
    high, low, mean = torch.stack([values.max(), values.min(), values.mean()]).tolist()
    return high, low, mean


@dataclass(frozen=True)
class Table:
    """A scheduler's table as it is now.

    Args:
        scheduler: whose it is.
        tensor: its `timesteps`; a new run has a new tensor.
        rows: the same as numbers.
        index: `scheduler.step_index`, the row of the next `scheduler.step()`; None before the first one, and where the
            scheduler has no such thing.
        sigmas: its `sigmas`, as they are there; None where it has none.
        levels: the same as numbers.
    """

    scheduler: Any
    tensor: torch.Tensor
    rows: tuple[float, ...]
    index: int | None
    sigmas: Any = None
    levels: tuple[float, ...] = ()

    @property
    def counts_itself(self) -> bool:
        """Whether the scheduler has an index at all."""
        return hasattr(self.scheduler, "step_index")

    @property
    def steps(self) -> int:
        """The rows that are there to be run: not a last one without noise, which ends the table of a scheduler whose
        levels are as many as its timesteps (LTX's Euler ancestral one), and which loops leave out."""
        terminal = len(self.levels) == len(self.rows) and self.rows[-1] == 0 == self.levels[-1]
        return len(self.rows) - terminal

    def rows_in(self, walked: torch.Tensor) -> int | None:
        """Up to which row a loop over `walked` goes, told without a look at values; None where it is no part of the
        table."""
        if walked.ndim != 1 or not len(walked) or walked.stride() != self.tensor.stride():
            return None
        last = place_in(self.tensor, walked[-1])
        return None if last is None else last + 1

    @property
    def begin(self) -> int | None:
        """The first row that will be run, where the pipeline says so."""
        begin = getattr(self.scheduler, "begin_index", None)
        return begin if isinstance(begin, int) and 0 <= begin < len(self.rows) else None

    def places(self, timestep: Timestep) -> list[int]:
        """The rows with this timestep: exactly, else rounded to its dtype, else the nearest if it is near enough."""
        value = timestep.value
        exact = [i for i, row in enumerate(self.rows) if row == value]
        if exact:
            return exact
        rounded = torch.tensor(self.rows).to(timestep.dtype).float().tolist()
        found = [i for i, row in enumerate(rounded) if row == value]
        if found:
            return found
        distances = [abs(row - value) for row in self.rows]
        nearest = min(distances)
        return [i for i, d in enumerate(distances) if d == nearest and d <= ROUNDING * max(1.0, abs(value))]

    def rounded(self, place: int, dtype: torch.dtype) -> Timestep:
        """A row as a model gets it in a dtype, one for all samples."""
        value = torch.tensor(self.rows[place]).to(dtype).item()
        return Timestep(value, value, value, False, dtype)

    def start(self, timestep: Timestep) -> int:
        """The row at which a run starts, where only its first timestep tells.

        Where that stands twice, schedulers with an index start at the second row (`index_for_timestep`): in
        the tables of second-order ones, the first of the two belongs to the step before.
        """
        found = self.places(timestep)
        if not found:
            return 0
        same = [place for place in found if self.rows[place] == self.rows[found[0]]]
        return same[1] if self.counts_itself and len(same) > 1 else found[0]

    def sigma(self, place: int) -> float | None:
        """The noise level of a row; None for schedulers whose levels are not a flow's, from 0 to 1."""
        if place >= len(self.levels) or max(self.levels) > MAX_FLOW_SIGMA:
            return None
        level = self.levels[place]
        # Mochi's table counts what is clean instead of what is noise.
        inverted = getattr(getattr(self.scheduler, "config", None), "invert_sigmas", False)
        return 1.0 - level if inverted else level


def highest_sigma(scheduler: object) -> float | None:
    """The highest noise level of a scheduler, as far as it shows; above `MAX_FLOW_SIGMA` they are not a flow's.

    One that was not run yet may hold those of a flow and spread others over a run, from its setting `sigma_max` (Cosmos
    Predict2).
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    now, config = float(torch.as_tensor(sigmas).max()), getattr(scheduler, "config", None)
    spreads = any(getattr(config, name, False) for name in _SPREADS)
    return max(now, float(getattr(config, "sigma_max", None) or now)) if spreads else now


def read_table(scheduler: object | None, known: Table | None) -> Table | None:
    """The table of a scheduler; None without one, before `set_timesteps`, and when all of it was run.

    Args:
        scheduler: any object, or None.
        known: the table that was read last, whose rows and levels are not copied from the device again.
    """
    tensor = getattr(scheduler, "timesteps", None)
    if not isinstance(tensor, torch.Tensor):
        tensor = None if tensor is None else torch.as_tensor(tensor)
    if tensor is None or tensor.numel() == 0 or tensor.ndim != 1:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is not None:
        index = int(index)
    config = getattr(scheduler, "config", {})
    trained = config.get("num_train_timesteps") if hasattr(config, "get") else None
    if index is None and len(tensor) == trained and getattr(scheduler, "num_inference_steps", None) is None:
        return None  # a scheduler that was only made shows the timesteps of training
    if index is not None and not 0 <= index < len(tensor):
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    rows = known.rows if known is not None and known.tensor is tensor else tuple(tensor.float().tolist())
    if known is not None and known.sigmas is sigmas:
        levels = known.levels
    else:
        levels = () if sigmas is None else tuple(torch.as_tensor(sigmas).tolist())
    return Table(scheduler, tensor, rows, index, sigmas, levels)
