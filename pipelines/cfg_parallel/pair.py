"""The two processes that share guidance, and what goes between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
import torch.distributed as dist


class Pair:
    """Two processes; this one is number `rank`.

    Raises:
        RuntimeError: processes were not started, or not joined.
        ValueError: the group has another number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "cfg_parallel needs two processes: start the script by torchrun --nproc-per-node 2, and call "
                "torch.distributed.init_process_group in it first."
            )
        count = dist.get_world_size(group)
        if count != 2:
            raise ValueError(
                f"cfg_parallel is for 2 processes, one a branch of guidance, and this group has {count}: give a "
                "group of 2 (with Ulysses, of the processes that have the same part of the sequence)."
            )
        self.group, self.rank = group, dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # groups of processes cannot be copied

    def exchange(self, tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Of each tensor, the first process's and the second's; they have one shape and dtype."""
        made = []
        for x in tensors:
            x = x.contiguous()
            both = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(both, x, group=self.group)
            made.append(both)
        return made

    def agreed(self, value: float, device: torch.device, first: bool) -> float:
        """The larger of the two processes' values, or that of the first one. The host waits for the GPU.

        Args:
            value: of this process.
            device: that tensors are exchanged from.
            first: see above.
        """
        (both,) = self.exchange([torch.tensor([value], dtype=torch.float32, device=device)])
        return float(both[0] if first else torch.cat(both).max())

    def check_alike(self, latents: torch.Tensor, name: str) -> None:
        """Raise RuntimeError, in both processes, where their latents are not the same. The host waits for the GPU."""
        x = latents.detach().double()
        (both,) = self.exchange([torch.stack([x.sum(), x.abs().sum()])])
        if not torch.equal(*both):
            raise RuntimeError(
                f"the two processes call {name} with different latents, so their branches of guidance are of different "
                "videos: pass generator=torch.Generator().manual_seed(...) with one seed, and the same prompt, size, "
                "number of steps and guidance scale, in both."
            )
