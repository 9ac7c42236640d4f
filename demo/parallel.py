"""Data parallelism over processes started by `torchrun`; with one process, everything here does nothing.

On a busy CPU two processes of one thread are far faster than one of two threads, which wait for each other in every
layer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def start() -> None:
    """Join the group that `torchrun` describes in the environment, if there is one."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def rank_and_size() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    import torch.distributed as dist

    if rank_and_size()[1] > 1:
        dist.barrier()


def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    import torch
    import torch.distributed as dist

    size = rank_and_size()[1]
    if size == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
