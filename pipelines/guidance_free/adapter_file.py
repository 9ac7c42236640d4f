"""Files of guidance-free adapters: a LoRA, the embedder of beta, and in the header what they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.adapter_files import read_header, read_split
from .beta import BETA, BetaEmbedder

RECIPE, FEW_STEPS_RECIPE = RECIPES = "gft", "consistency"
"""The recipes that make such adapters: for the steps of any sampler, and for few steps of their own."""
FEW_STEPS = "few_steps"
"""Of the header: what an adapter for few steps was trained for."""
OWN_FILE = "guidance_free.safetensors"
"""Of a model that has its own, beside the weights of the transformer: an adapter of it, or, of a model whose weights
were all trained, the embedder alone."""


class GuidanceFreeError(ValueError):
    """An adapter that cannot be used, or a call that it cannot do; the message says why, and the fix."""


@dataclass(frozen=True, eq=False)
class GuidanceFreeAdapter:
    """A guidance-free adapter as its file has it; the weights are read when they are needed.

    Args:
        path: of the file.
        base, base_hash: name and hash of the transformer that it was trained on.
        part: name of that transformer in its pipeline.
        max_scale: highest guidance scale that it was trained with.
        unconditional: the text that guidance turns away from.
        gated: whether it counts in proportion to the guidance; see `BetaSlot`.
        full: whether all weights of the transformer were trained, so that there is no LoRA.
        min_scale: lowest guidance scale that it was trained with.
        sigmas: noise levels of the few steps that it was trained for; None for the steps of any sampler.
    """

    path: Path
    base: str
    base_hash: str
    part: str
    max_scale: float
    unconditional: str
    gated: bool
    full: bool = False
    min_scale: float = 1.0
    sigmas: tuple[float, ...] | None = None

    def weights(self) -> tuple[dict[str, torch.Tensor], BetaEmbedder]:
        """The matrices of the LoRA by their names in the file, and the embedder.

        Raises:
            GuidanceFreeError: some are no weights.
        """
        lora, beside = read_split(self.path, lambda name: name.startswith(f"{BETA}."), GuidanceFreeError)
        weight = beside[f"{BETA}.linear.weight"]
        embedder = BetaEmbedder(*weight.shape)
        embedder.load_state_dict({"linear.weight": weight})
        return lora, embedder.requires_grad_(False)

    def refused_scale(self, scale: float) -> tuple[str, str] | None:
        """Why it cannot do a guidance scale, and what to do; None where it can. Below 1 is no guidance, as 1 is."""
        if scale > self.max_scale:
            return f"{self.path.name} was trained up to {self.max_scale:g}", "Give at most that."
        if max(1.0, scale) < self.min_scale:
            return f"{self.path.name} was trained from {self.min_scale:g} up", "Give at least that."
        return None

    def check_scale(self, scale: float) -> None:
        """Raise GuidanceFreeError for a guidance scale that is none of those of the training."""
        if refusal := self.refused_scale(scale):
            raise GuidanceFreeError(f"guidance_scale is {scale:g}: {refusal[0]}. {refusal[1]}")

    def check_negative(self, text: Any, embeds: Any = None) -> None:
        """Raise GuidanceFreeError for another negative prompt than that of the training."""
        texts = [text] if isinstance(text, str) or text is None else list(text)
        if embeds is not None or any(t not in ("", None, self.unconditional) for t in texts):
            baked = f'"{self.unconditional}"' if self.unconditional else "the empty one"
            raise GuidanceFreeError(
                f"negative_prompt is of no use with a guidance-free adapter: {baked} is baked into {self.path.name}. "
                "Leave it out, or train an adapter with another flow.unconditional."
            )


def read_adapter(location: str | Path) -> GuidanceFreeAdapter:
    """What the header of an adapter says.

    Args:
        location: of the file, its folder, or that of a run, see `run_folder.adapter_path`.

    Raises:
        GuidanceFreeError: there is none, or it is no guidance-free adapter.
    """
    path, facts, shapes = read_header(location, RECIPES, GuidanceFreeError)
    embedder = f"{BETA}.linear.weight"
    if embedder not in shapes:
        raise GuidanceFreeError(f"{path} has no embedder of beta: it was not written as a whole.")
    if len(shapes[embedder]) != 2:
        problem = f"{path} has {embedder} of the shape {shapes[embedder]}, where a matrix has two dimensions"
        raise GuidanceFreeError(f"{problem}: the file is damaged; save or download it again.")
    try:
        guidance, few = facts["guidance_free"], facts.get(FEW_STEPS)
        if few is None and facts["recipe"] == FEW_STEPS_RECIPE:
            raise KeyError(FEW_STEPS)
        return GuidanceFreeAdapter(
            path,
            str(facts["base"]),
            str(facts["base_hash"]),
            str(facts["part"]),
            float(guidance["max_scale"]),
            str(facts["unconditional"]),
            bool(guidance["gated"]),
            guidance.get("train") == "full",
            float(guidance.get("min_scale", 1.0)),
            None if few is None else tuple(float(sigma) for sigma in few["sigmas"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GuidanceFreeError(f"{path}: its header lacks {error}: train it again.") from error
