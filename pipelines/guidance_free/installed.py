"""A guidance-free adapter in one transformer: its LoRA, and what is added to the embedding of the timestep."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..acceleration.copies import CopiedNotPickled
from ..acceleration.one_thread import others_call
from ..errors import first_line
from ..guidance_branches import is_compiled_whole
from ..hooks.group_offloading import is_on_disk, is_streamed
from ..hooks.hooked import HandleOf
from ..hooks.seen_hook import SeenHook
from ..hooks.undo import GUIDANCE_FREE
from .adapter_file import GuidanceFreeAdapter, GuidanceFreeError
from .beta import BetaEmbedder, time_embedder, width_of
from .low_rank import LowRank, gate_of, low_ranks

logger = logging.getLogger(__name__)


class Installed(CopiedNotPickled):
    """The adapter of one transformer, by hooks; the weights are changed at the first pass with a new guidance scale.

    Args:
        pipe: that has the transformer.
        name: of the transformer in it.
        transformer: without what wraps it.
        adapter: for it.
        scale: of the call that runs; 1 and less are no guidance. None in calls of other pipelines that share the
            transformer: their passes, which may be two a step, are those of the base.
        merge: the LoRA into the weights; None for where it can be.

    Raises:
        GuidanceFreeError: the adapter does not fit, or cannot be merged where that is asked for.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        transformer: Any,
        adapter: GuidanceFreeAdapter,
        scale: Callable[[], float | None],
        merge: bool | None,
    ) -> None:
        self.name, self.transformer, self.adapter = name, transformer, adapter
        self.handle = HandleOf(pipe, GUIDANCE_FREE)
        self._scale, self._merge = scale, merge
        self._embedder, self._updates = _parts(pipe, name, transformer, adapter)
        self._attentions = _attentions(transformer, self._updates)
        self._at: float | None = None
        """The guidance scale that the weights and the embedding are for; None where they are the base's."""
        self._embedding: torch.Tensor | None = None
        self._beside = ""
        """Why the LoRA is not merged."""
        self._told = False
        self._of_others = 0
        if merge and (refusal := self._why_not_merged()):
            raise GuidanceFreeError(f"{adapter.path.name} cannot be merged: {refusal}. Leave merge out, or fix that.")
        if is_compiled_whole(pipe, name, transformer):
            enter: Any = SeenHook(transformer, self._enter, before=True)
        else:
            enter = transformer.register_forward_pre_hook(self._enter)
        self._hooks = [
            enter,
            SeenHook(time_embedder(transformer), self._add),
            # What is saved, copied into an EMA or offloaded by accelerate are the weights of the base.
            transformer.register_state_dict_pre_hook(self._put_back),
            transformer.register_load_state_dict_pre_hook(self._put_back),
        ]

    def notes(self) -> list[str]:
        """Where the LoRA is, and what that costs; and the passes that were made without it."""
        notes = [self._note()]
        if self._of_others:
            notes.append(
                f"{self.name}: {self._of_others} passes of other pipelines that share it were made without the adapter"
            )
        return notes

    def _note(self) -> str:
        if self.adapter.full:
            return f"{self.name}: all weights were trained for guidance in one pass, so there is no LoRA"
        if self._beside or self._merge is False:
            why = f", because {self._beside}" if self._beside else ""
            return f"{self.name}: the LoRA is beside the weights, and costs time in each pass{why}"
        kept = sum(update.kept_bytes for update in self._updates)
        at = f" for a guidance scale of {self._at:g}" if self._at is not None else ""
        cost = f"{kept / 2**20:.1f} MiB of CPU memory keep the weights without it"
        return f"{self.name}: the LoRA is merged into the weights{at}, and {cost}"

    def _why_not_merged(self) -> str | None:
        if any(isinstance(module, FSDPModule) for module in self.transformer.modules()):
            return f"the weights of the {self.name} are sharded"  # and are plain ones between two passes
        if any(is_on_disk(module) for module in self.transformer.modules()):
            return f"the weights of the {self.name} are offloaded to disk"  # and read from there before each pass
        if any(is_streamed(module) for module in self.transformer.modules()):
            return f"the weights of the {self.name} are offloaded in groups on a stream"  # from copies of their own
        return next((refusal for update in self._updates if (refusal := update.why_not_merged())), None)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any) -> None:
        """Have the weights and the embedding be those of the guidance scale of this call."""
        fused = next((path for path, a in self._attentions.items() if getattr(a, "fused_projections", False)), None)
        if fused is not None:
            raise GuidanceFreeError(
                f"the projections of {self.name}.{fused} are fused, and {self.adapter.path.name} is for each of them: "
                "call unfuse_qkv_projections() first."
            )
        told = self._scale()
        scale = None if told is None else max(1.0, told)
        if scale != self._at or (scale is None and self._embedding is not None):
            if others_call(module):
                raise GuidanceFreeError(
                    f"{self.name} is called by two threads at once, at guidance scales (or by pipelines) for which its "
                    "weights are not the same: let one wait for the other (a threading.Lock around the call), or give "
                    "each a transformer of its own."
                )
            self._change(scale)
        if scale is None:
            self._of_others += 1

    def _change(self, scale: float | None) -> None:
        self._at = None  # of no scale until it is done: a pass in another thread takes them for its own otherwise
        if scale is None:
            with torch.no_grad():
                for update in self._updates:
                    update.stand_aside()
            self._embedding = None
            return
        highest = self.adapter.max_scale if self.adapter.gated else None
        gate = gate_of(scale, highest)
        with torch.no_grad():
            self._embedding = gate * self._embedder(torch.tensor([1 / scale]))
            refusal = None if self._merge is False else self._why_not_merged()
            if refusal and self._merge:
                raise GuidanceFreeError(f"{self.adapter.path.name} cannot be merged any more: {refusal}.")
            if refusal and not self._told:
                logger.warning("%s is not merged, which costs time in each pass: %s.", self.adapter.path.name, refusal)
            self._beside, self._told = refusal or "", self._told or bool(refusal)
            for update in self._updates:
                if self._merge is False or refusal:
                    update.stand_beside(gate)
                else:
                    update.merge(gate)
        self._at = scale

    def _add(self, module: nn.Module, args: Any, time: torch.Tensor) -> torch.Tensor | None:
        if self._embedding is None:
            return None
        if self._embedding.device != time.device:
            self._embedding = self._embedding.to(time.device)
        return time + self._embedding.to(time.dtype)

    def _put_back(self, *_: Any) -> None:
        """Have the weights be the base's until the next pass."""
        with torch.no_grad():
            for update in self._updates:
                update.restore()
        self._at = None

    def remove(self) -> None:
        """Have the transformer be as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for update in self._updates:
                update.remove()
        self._at = self._embedding = None


def has_adapter(transformer: nn.Module) -> bool:
    """Whether one is at work in a transformer, of whatever pipeline that has it."""
    return any(
        isinstance(getattr(hook, "__self__", None), Installed) for hook in transformer._forward_pre_hooks.values()
    )


def _parts(
    pipe: Any, name: str, transformer: nn.Module, adapter: GuidanceFreeAdapter
) -> tuple[BetaEmbedder, list[LowRank]]:
    """The embedder and the LoRA of an adapter, checked against the transformer."""
    lora, embedder = adapter.weights()
    if embedder.linear.out_features != width_of(transformer):
        raise GuidanceFreeError(
            f"{adapter.path.name} is for time embeddings of {embedder.linear.out_features} numbers, and the {name} "
            f"has {width_of(transformer)}: give the adapter of this model."
        )
    if adapter.full:
        return embedder, []
    try:
        # Files of LoRAs for Wan have its own names, which diffusers translates.
        return embedder, low_ranks(transformer, pipe.lora_state_dict(lora), "transformer")
    except (ValueError, LookupError) as error:
        raise GuidanceFreeError(f"{adapter.path.name} cannot be loaded: {first_line(error)}") from error


def _attentions(transformer: nn.Module, updates: list[LowRank]) -> dict[str, nn.Module]:
    """The modules whose projections may be fused and that have a LoRA, by name."""
    parents = {update.name.removeprefix("transformer.").rpartition(".")[0] for update in updates}
    return {path: m for path, m in transformer.named_modules() if path in parents and hasattr(m, "fused_projections")}
