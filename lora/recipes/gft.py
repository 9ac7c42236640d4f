"""Recipe `gft`: a LoRA with which guidance takes one forward pass a step (GFT, arXiv 2501.15420)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines.guidance_free.adapter_file import OWN_FILE, RECIPE
from ..adapters.lora_file import read_facts, save_lora
from ..backbones.base import Text
from ..backbones.folders import transformer_files
from ..checkpoints.written import replaced
from ..config import ConfigError
from ..distributed.generators import Generators
from .base import Batch, Phase, load_trained
from .gft_settings import GuidanceFreeLoraSettings
from .guided_lora import GuidedLora, TrainGuided

MEASURED = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Guidance scales at which a validation tells how much of the guidance is there."""


class TrainGuidanceFree(TrainGuided):
    """Writes `out/adapter/pytorch_lora_weights.safetensors`, which `vidaccel.guidance_free` puts into a pipeline; or,
    with all weights trained, `out/pipeline`, which it takes without an adapter.
    """

    Config = GuidanceFreeLoraSettings
    config: GuidanceFreeLoraSettings

    def phases(self) -> list[Phase]:
        return [GuidanceFreeLora(self)]

    @property
    def trains_all(self) -> bool:
        return self.config.gft.train == "full"

    def plain_transformer(self) -> nn.Module:
        return self.backbone.transformer() if self.trains_all else super().plain_transformer()

    def earlier(self, path: Path, setting: str, recipe: str) -> dict[str, torch.Tensor]:
        weights = super().earlier(path, setting, recipe)
        then, now = read_facts(path, setting)["guidance_free"], self.config.gft
        if then["gated"] != now.is_gated:
            raise ConfigError(
                f"gft.gated is {_yaml(now.is_gated)}, and {path} in {setting} was trained with {_yaml(then['gated'])}: "
                "set that."
            )
        # Of one that is not gated the scale is told, and it may learn of higher ones.
        if now.is_gated and then["max_scale"] != now.max_scale:
            raise ConfigError(
                f"gft.max_scale is {now.max_scale:g}, and {path} in {setting} is gated and counts fully at "
                f"{then['max_scale']:g}: set that."
            )
        return weights

    def facts(self) -> dict[str, Any]:
        gft = self.config.gft
        stated: dict[str, Any] = {"loss": gft.loss, "max_scale": gft.max_scale, "gated": gft.is_gated}
        stated |= {"train": "full"} if self.trains_all else {}
        return {**super().facts(), "recipe": RECIPE, "guidance_free": stated}

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if not self.trains_all:
            return super().finish(trained)
        transformer = self.transformer()
        load_trained(transformer, trained)
        del transformer.beta_embedder  # diffusers would not know it
        folder, part = Path(self.config.out) / "pipeline", self.backbone.part
        with replaced(folder) as draft:
            self.backbone.save(transformer, draft)
            self.write_defaults(draft, self.config.gft.max_scale)
            facts = {**self.facts(), "base_hash": transformer_files(str(draft), part)}
            beside = {name: trained[name] for name in self.beside}
            save_lora(beside, draft / part / OWN_FILE, self.backbone.file_name, 1.0, facts, beside=self.beside)
        return {"pipeline": str(folder)}


class GuidanceFreeLora(GuidedLora):
    """The phase `train`."""

    recipe: TrainGuidanceFree

    def __init__(self, recipe: TrainGuidanceFree) -> None:
        super().__init__(recipe)
        gft = recipe.config.gft
        self.highest = gft.max_scale if gft.is_gated else None

    def trains(self, name: str) -> bool:
        return self.recipe.trains_all or super().trains(name)

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        transformer = super().setup(trained)
        if self.recipe.trains_all:
            self.teacher = self.recipe.backbone.transformer().eval()
        return transformer

    def of_base(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        if self.teacher is not None:  # the model itself is no base any more
            return self.of_teacher(shown, sigma, texts, batch)
        return super().of_base(model, shown, sigma, texts, batch)

    def _drawn(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        gft = self.recipe.config.gft
        # Of two draws, so that what the scales are spread over does not depend on how many are 1.
        unguided, scale = rng.uniform() < gft.unguided_share, 1 + (gft.max_scale - 1) * rng.uniform()
        beta = 1 / torch.where(unguided, torch.ones_like(scale), scale)
        return super()._drawn(model, {**batch, "beta": beta}, rng)

    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        backbone, latents, beta = self.recipe.backbone, batch["latents"], batch["beta"]
        shown = backbone.noised(latents, noise, sigma)
        nothing = [self.nothing()] * len(shown)
        # Passes without gradients come first: switching the LoRA off and on between a pass and its gradients would
        # lose them.
        if self.recipe.config.gft.loss == "white_box":
            wanted = self.of_base(model, shown, sigma, texts, batch)
            without = self.of_base(model, shown, sigma, nothing, batch)
        else:
            wanted = backbone.target(latents, noise, sigma)
            without = self.guided(model, shown, sigma, nothing, batch, torch.ones_like(beta), gradients=False)
        made = self.guided(model, shown, sigma, texts, batch, self._told_beta(batch))
        loss = backbone.error(mixture(made, without, beta), wanted).mean()
        return loss, {"error": loss.detach()}

    def _told_beta(self, batch: Batch) -> torch.Tensor:
        """What the model is told of the batch's beta `[B]`.

        With the loss of the paper, clips without a caption are all that teaches what guidance turns away from, which
        the model is asked for at beta 1. A gated one is the base there.
        """
        gft, beta = self.recipe.config.gft, batch["beta"]
        if gft.loss != "data" or gft.is_gated:
            return beta
        return torch.where(batch["dropped"], torch.ones_like(beta), beta)

    # -- what is measured ----------------------------------------------------------------------------------------------

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """How far the model is from the guided base, as shares of what guidance changes.

        explained_w is 1 - |f - v_w|^2 / |v_1 - v_w|^2, v_w the velocity of the base at the guidance scale w: 0 without
        guidance, 1 for all of it. off_1 is |f - v_1|^2 at scale 1, relative to |v_1 - v_2|^2, and should be 0.
        """

        def measure(batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
            return self._gaps(model, batch, rng)

        values = super().validate(model, folder, step)
        recipe = self.recipe
        self.forget()
        gaps = recipe.measured(recipe.flowing).mean(measure, self.settings.batch_size, recipe.process)
        return values | shares(gaps)

    def _gaps(self, model: nn.Module, batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
        """Mean squared distances at each measured scale, by "error_w" and "gap_w"."""
        backbone, latents, texts = self.recipe.backbone, batch["latents"], batch["texts"]
        noise = rng.normal(*latents.shape[1:])
        sigma = self.told_levels(rng, latents)
        shown = backbone.noised(latents, noise, sigma)
        nothing = [self.nothing()] * len(shown)
        own = self.of_base(model, shown, sigma, texts, batch)
        without = self.of_base(model, shown, sigma, nothing, batch)
        found = {}
        for scale in (s for s in MEASURED if s in (1.0, 2.0) or s <= self.recipe.config.gft.max_scale):
            guided = without + scale * (own - without)
            beta = torch.full((len(shown),), 1 / scale, device=shown.device)
            made = self.guided(model, shown, sigma, texts, batch, beta, gradients=False)
            found[f"error_{scale:g}"] = backbone.error(made, guided).mean()
            found[f"gap_{scale:g}"] = backbone.error(own, guided).mean()
        return found

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        if not self.recipe.trains_all:  # else the weights of the checkpoint are all there is
            super().write_adapter(folder, weights)


def _yaml(value: bool) -> str:
    return str(value).lower()


def mixture(made: torch.Tensor, without: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """beta f + (1 - beta) u: what is the conditional velocity where f is guided with 1 / beta.

    Args:
        made, without: f and u, `[B, ...]`; u without gradients.
        beta: `[B]`.
    """
    beta = beta.view(-1, *[1] * (made.ndim - 1))
    return beta * made + (1 - beta) * without


def shares(gaps: Mapping[str, float]) -> dict[str, float]:
    """The shares of `GuidanceFreeLora.validate` of mean squared distances; none where guidance changes nothing."""
    found = {
        f"explained_{name.removeprefix('gap_')}": 1 - gaps[name.replace("gap", "error")] / gap
        for name, gap in gaps.items()
        if name.startswith("gap_") and gap > 0 and name != "gap_1"
    }
    return found | ({"off_1": gaps["error_1"] / gaps["gap_2"]} if gaps.get("gap_2") else {})
