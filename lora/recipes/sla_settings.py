"""Settings of the recipe `sla`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from .lora_settings import SPARSE_COMPILED, AdapterSettings, LoraSettings


@dataclass(frozen=True)
class SparseLinearSettings(Settings):
    """What the model learns to do with fewer pairs.

    Args:
        train: "full" trains all weights; "lora" a LoRA. The projections of SLA are trained as they are with both.
        start: folder or hub id of a pipeline trained for SLA to go on from, at any density; the dense teacher stays
            `model.base`, which is where None starts. A LoRA is gone on from by `lora.start`.
        loss: "white_box" regresses the velocity of the frozen dense model, for the same text; "flow" is flow matching.
        topk: share of the key blocks that each query block reads; of each of `data.sizes` at least one block.
        block_q, block_k: tokens of a query block and of a key block.
        linear_scope: keys of the linear attention: "all", "non_critical", "marginal", or "none" for block-sparse
            attention alone.
        feature_map: of the linear attention: "softmax", "elu" or "relu".
        skip: with "marginal", share of the key blocks that are of no use, the lowest; None for 0.1.
        eps: added to the denominators of the linear attention; None as published, for `linear_scope`.
        dense_layers: first layers that stay dense.
        projection_rate: what the learning rate of the projections is multiplied by.
        backend: what computes the softmax attention; "auto" chooses.
    """

    train: Literal["full", "lora"] = "full"
    start: str | None = setting(None, free=True, place=True)
    loss: Literal["white_box", "flow"] = "white_box"
    topk: float = setting(0.1, above=0, high=1)
    block_q: int = setting(64, low=1)
    block_k: int = setting(64, low=1)
    linear_scope: Literal["all", "non_critical", "marginal", "none"] = "all"
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    skip: float | None = setting(None, low=0, below=1)
    eps: float | None = setting(None, low=0)
    dense_layers: int = setting(0, low=0)
    projection_rate: float = setting(10.0, above=0)
    backend: str = setting("auto", free=True)

    def check(self) -> Iterator[str]:
        if self.start is not None and self.train == "lora":
            yield f'start is {self.start}, of use only with train "full": go on from a LoRA with lora.start.'
        if self.skip is not None and self.linear_scope != "marginal":
            yield f'skip is {self.skip:g}, of use only with linear_scope "marginal": leave it out.'


@dataclass(frozen=True, kw_only=True)
class SLASettings(LoraSettings):
    """Settings of the recipe `sla`: those of `lora`, and of the sparse attention, which takes the place of `attention`.

    Nothing of `lora` but `file_dtype` is of use where all weights are trained.
    """

    sla: SparseLinearSettings = field(default_factory=SparseLinearSettings)

    @property
    def sparse(self) -> bool:
        return True

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.attention.method != "dense":
            yield f"attention.method is {self.attention.method}: this recipe trains with SLA, set in sla; leave it out."
        if self.loop.compile:
            yield f"loop.compile is true, and this recipe trains with SLA, {SPARSE_COMPILED}"
        if self.sla.train == "full":
            if self.lora != AdapterSettings():
                yield 'lora is of use only with sla.train "lora": set that, or leave lora out.'
            if self.model.offload_blocks:
                yield f'model.offload_blocks is {self.model.offload_blocks}, for frozen weights: use sla.train "lora".'
            if self.model.quantise != "none":
                yield f'model.quantise is {self.model.quantise}, whose weights stay frozen: set sla.train to "lora".'
        apart = self.sla.linear_scope != "none" and self.sla.projection_rate != 1
        if self.train.optimizer == "muon" and apart:
            yield "train.optimizer is muon: with a sla.projection_rate of its own, use adamw, or set that rate to 1."
        if self.flow.guidance_preserving is not None and self.sla.loss == "white_box":
            yield (
                "flow.guidance_preserving is of use only with sla.loss flow: the loss white_box keeps guidance as it "
                "is in the model."
            )
