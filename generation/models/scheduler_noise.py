"""The noise that a scheduler draws by itself: the same for the same seed.

Most pipelines of diffusers pass no generator to `scheduler.step`, so that a scheduler which adds noise in its steps
(LCM, SA, SDE solvers, stochastic sampling) draws it from torch's global generators, which no seed of a call reaches.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within it, torch's global generators of the CPU and of a kind of device follow from a seed; after it they are as
    they were before.

    Args:
        device: of the run.
        seed: of the first noise.
    """
    import torch

    # Another one than of the first noise, which would be drawn once more, added to itself.
    own = int.from_bytes(hashlib.blake2b(f"scheduler {seed}".encode(), digest_size=8).digest(), "little") >> 1
    if device.type == "cpu":
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(own)
            yield
        return
    module = torch.get_device_module(device)
    # All devices of the kind: which of them is the current one is the pipeline's to say.
    with torch.random.fork_rng(devices=range(module.device_count()), device_type=device.type):
        torch.default_generator.manual_seed(own)
        getattr(module, "manual_seed_all", module.manual_seed)(own)  # of mps there is one
        yield
