"""Ulysses: processes share a video's tokens between attention calls, and the heads of a layer within them.

`transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))` of diffusers gives each process a
part of the sequence. Around each attention call the processes exchange it: one gets the whole sequence of some heads.
That is all that a plan needs, so a sparse call is this exchange by diffusers' own functions, with a plan in between.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import gather_size_by_comm
from diffusers.models.attention_dispatch import (
    SeqAllToAllDim,
    all_to_all_single_any_o_async,
    all_to_all_single_any_qkv_async,
)

from .rank_heads import RankHeads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SEQUENCE, HEADS = 1, 2  # dimensions of what is exchanged, `[B, N, H, D]`


@dataclass(frozen=True)
class Ulysses:
    """How processes share the sequence and the heads of a transformer's attention calls.

    Args:
        group: the processes.
        anything: whether parts may differ in size, of the sequence by a token and of the heads in the last process.
    """

    group: dist.ProcessGroup
    anything: bool = False

    @classmethod
    def of(cls, transformer: Any, name: str) -> Self | None:
        """What `enable_parallelism` set up; None where nothing is shared.

        Args:
            transformer: of diffusers.
            name: of the component, for messages.

        Raises:
            RuntimeError: ring attention, or a model without a plan of diffusers'.
        """
        config = _shared_by(transformer)
        if config is None:
            return None
        if config.ring_degree > 1:
            raise RuntimeError(
                f"{name} runs under ring attention (ring_degree={config.ring_degree}), in which no process sees a "
                "whole sequence that could be planned: use ContextParallelConfig(ulysses_degree=...) alone, or remove "
                "sparse attention."
            )
        if not shares_sequences(type(transformer)):
            raise RuntimeError(
                f"{type(transformer).__name__} has no context-parallel plan in diffusers, and with a cp_plan of your "
                "own the order of the tokens in a gathered sequence is not known: run it in one process, or remove "
                "sparse attention."
            )
        return cls(config._ulysses_mesh.get_group(), config.ulysses_anything)

    @property
    def ranks(self) -> int:
        """Processes that share a sequence."""
        return dist.get_world_size(self.group)

    def check_tokens(self, tokens: int, name: str) -> None:
        """Refuse a sequence that cannot be cut in equal parts, before diffusers asserts it without the numbers."""
        if not self.anything and tokens % self.ranks:
            raise ValueError(
                f"{name} has {tokens} tokens, which {self.ranks} processes cannot share evenly: use a size or length "
                f"whose tokens are a multiple of {self.ranks}, or ContextParallelConfig(ulysses_anything=True)."
            )

    def heads(self, total: int, of_keys: int) -> RankHeads:
        """The heads of this process in a layer of `total`.

        Args:
            of_keys: heads of keys and values, fewer where several heads of queries share one.

        Raises:
            ValueError: they cannot be shared.
        """
        heads = RankHeads(self.group, total)
        fix = f"use a ulysses_degree that divides {of_keys}"
        if self.anything and of_keys == total:
            possible = heads.most * (self.ranks - 1) < total
        else:
            possible = of_keys % self.ranks == 0
            fix += ", or ulysses_anything=True" if of_keys == total else ""
        if not possible:
            raise ValueError(f"the heads of attention, {of_keys}, cannot be shared by {self.ranks} processes: {fix}.")
        return heads

    def tokens(self, local: int) -> int:
        """Tokens of the whole sequence, of which this process has `local`."""
        return sum(gather_size_by_comm(local, self.group)) if self.anything else local * self.ranks

    def gather(self, x: torch.Tensor, heads: RankHeads) -> torch.Tensor:
        """`[B, H, n, D]`, the tokens of this process in all heads -> `[B, h, N, D]`, all tokens in its heads.

        Args:
            heads: of the layer.
        """
        x = heads.arranged(x).transpose(1, 2)
        if self.anything:
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError(
                    "ulysses_anything has no backward in diffusers: train with heads and tokens that processes share "
                    "evenly, or run under torch.no_grad()."
                )
            x = all_to_all_single_any_qkv_async(x, self.group)()
        else:
            x = SeqAllToAllDim.apply(self.group, x, HEADS, SEQUENCE)
        return x.transpose(1, 2)

    def scatter(self, x: torch.Tensor, heads: RankHeads, tokens: int) -> torch.Tensor:
        """`[B, h, N, D]` -> `[B, H, n, D]`: undo `gather`.

        Args:
            heads: of the layer.
            tokens: of this process.
        """
        x = x.transpose(1, 2)
        if self.anything:
            x = all_to_all_single_any_o_async(x, self.group, NUM_QO_HEAD=heads.count, Q_S_LOCAL=tokens)()
        else:
            x = SeqAllToAllDim.apply(self.group, x, SEQUENCE, HEADS)
        return heads.restored(x.transpose(1, 2))


def share_sequence(transformer: Any, mesh: DeviceMesh, anything: bool) -> None:
    """Have diffusers share the sequence of a transformer, for good.

    Args:
        transformer: of a class with a plan for it.
        mesh: of the processes, with the dimensions "ring", of one, and "ulysses"; also of a CPU.
        anything: whether parts may differ in size.

    Raises:
        RuntimeError, ValueError: diffusers refuses it.
    """
    config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), ulysses_anything=anything, mesh=mesh)
    # Diffusers divides by the number of accelerators, of which a CPU has none.
    on_cpu = mesh.device_type == "cpu"
    with mock.patch("torch.accelerator.device_count", lambda: 1) if on_cpu else contextlib.nullcontext():
        transformer.enable_parallelism(config=config)


def is_shared(transformer: Any) -> bool:
    """Whether a process has a part of each sequence alone, by Ulysses or ring attention."""
    return _shared_by(transformer) is not None


def _shared_by(transformer: Any) -> Any | None:
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def shares_sequences(cls: type | None) -> bool:
    """Whether diffusers can share the sequences of a transformer class between processes; of none that it has, not."""
    return getattr(cls, "_cp_plan", None) is not None
