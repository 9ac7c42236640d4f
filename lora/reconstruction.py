"""What an autoencoder's reconstructions are trained on and judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from .config import ConfigError, Settings, setting

_VGG = "vgg16-397923af.pth"


@dataclass(frozen=True)
class LossSettings(Settings):
    """Weights of the parts of the loss; a part of weight 0 is not computed.

    Args:
        l1, mse: absolute and squared error of pixels in [-1, 1].
        edges: absolute error of differences between neighbouring pixels.
        latent: mean square of the latents, which keeps their scale bounded.
        perceptual: LPIPS on VGG features; needs torchvision and its weights on this machine.
        adversarial: a hinge loss against a patch discriminator.
        discriminator_rate: learning rate of the discriminator, relative to that of the autoencoder.
        adversarial_from: step of the phase from which the autoencoder is trained against the discriminator.
    """

    l1: float = setting(1.0, low=0)
    mse: float = setting(0.0, low=0)
    edges: float = setting(0.0, low=0)
    latent: float = setting(0.0, low=0)
    perceptual: float = setting(0.0, low=0)
    adversarial: float = setting(0.0, low=0)
    discriminator_rate: float = setting(1.0, above=0)
    adversarial_from: int = setting(0, low=0)

    def check(self) -> Iterator[str]:
        if self.l1 + self.mse + self.edges + self.perceptual == 0:
            yield "l1, mse, edges and perceptual are all 0: one must be above."


def perceptual_network() -> nn.Module:
    """LPIPS on VGG16, frozen, for pictures `[B, 3, H, W]` in [-1, 1].

    Raises:
        ConfigError: torchvision or the weights are not on this machine.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _VGG
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise ConfigError("loss.perceptual needs torchvision: pip install torchvision, or set it to 0.") from None
    if not weights.is_file():
        raise ConfigError(
            f"loss.perceptual needs the weights {weights}, which are not here: download "
            f"https://download.pytorch.org/models/{_VGG} to there, or set it to 0."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("vgg").net.requires_grad_(False).eval()


Wanted = Callable[[torch.Tensor, Any], torch.Tensor]
"""Of a video `[B, 3, T, H, W]` in [-1, 1] and what the autoencoder's `encode` gave, what should be made of it."""


class PatchDiscriminator(nn.Module):
    """Scores `[B, 1, t, h, w]` of how real the patches of a video `[B, 3, T, H, W]` look."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(pairwise(widths)):
            stride = (1, 2, 2) if number == 0 else (2, 2, 2)
            layers += [nn.Conv3d(a, b, 3, stride, 1), nn.GroupNorm(min(8, b), b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, 1, 1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.layers(video)


class Reconstruction(nn.Module):
    """An autoencoder with its losses, as one module, so that several processes can share its training.

    Args:
        autoencoder: an `AutoencoderDCV`, or what encodes and decodes as that does.
        settings: weights of the losses.
        wanted: what should be made of a video; None for the video itself.
    """

    autoencoder: Any

    def __init__(self, autoencoder: nn.Module, settings: LossSettings, wanted: Wanted | None = None) -> None:
        super().__init__()
        self.autoencoder, self.settings, self._wanted = autoencoder, settings, wanted
        self.discriminator = PatchDiscriminator() if settings.adversarial else None
        # In a list, so that it is no part of the module: it is not trained, saved or sharded.
        self._perceptual = [perceptual_network()] if settings.perceptual else []

    def forward(
        self, video: torch.Tensor, adversarial: bool = True, reconstruct: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and its parts, of a video `[B, 3, T, H, W]` in [-1, 1].

        Args:
            video: the clips.
            adversarial: whether the discriminator's judgement counts in the loss.
            reconstruct: give what the autoencoder makes of the video instead. It is asked through this module, because
                only its own call gathers the weights where they are sharded.
        """
        if reconstruct:
            return self.autoencoder(video).sample
        settings = self.settings
        encoded = self.autoencoder.encode(video)
        latent = encoded.latent
        if self._wanted is not None:
            video = self._wanted(video, encoded)
        made = self.autoencoder.decode(latent).sample.float()
        error = made - video
        parts = {"l1": error.abs().mean(), "mse": error.square().mean()}
        if settings.edges:
            parts["edges"] = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        if settings.latent:
            parts["latent"] = latent.float().square().mean()
        if settings.perceptual:
            network = self._perceptual[0].to(video.device)
            parts["perceptual"] = network(_pictures(made), _pictures(video)).mean()
        weights = {name: getattr(settings, name) for name in parts}
        loss = sum(weights[name] * part for name, part in parts.items())
        if self.discriminator is not None:
            judged, versus = self._adversarial(video, made)
            # The term of weight 0 keeps every parameter in the graph of every step, as several processes need.
            loss = loss + (settings.adversarial if adversarial else 0.0) * judged + versus
            parts |= {"adversarial": judged, "discriminator": versus}
        psnr = -10 * (parts["mse"].detach() / 4).clamp_min(1e-10).log10()
        return loss, {**{k: v.detach() for k, v in parts.items()}, "psnr": psnr, "latent_std": latent.detach().std()}

    def _adversarial(self, video: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The autoencoder's loss, blind to the discriminator's weights, and the discriminator's, blind to the other."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        judged = -functional_call(self.discriminator, frozen, (made,)).mean()
        real, false = self.discriminator(video), self.discriminator(made.detach())
        return judged, (functional.relu(1 - real).mean() + functional.relu(1 + false).mean()) / 2


def quality(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device | None = None) -> dict[str, float]:
    """PSNR in dB and SSIM, means over the pictures of all videos; SSIM of every fourth.

    Args:
        pairs: what was made and what it should be, each `[B, 3, T, H, W]` in [-1, 1]. They may be made on the way: one
            pair is there at a time, and of it one picture is measured at a time, since SSIM takes ten times its memory.
        device: on which pictures are measured; None for where the videos are.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    psnr: list[torch.Tensor] = []
    similar: list[torch.Tensor] = []
    for pair in pairs:
        for pictures in zip(*map(_pictures, pair), strict=True):
            made, video = ((x[None].to(device).float().clamp(-1, 1) + 1) / 2 for x in pictures)
            if len(psnr) % 4 == 0:
                value = ssim(made, video, data_range=1.0)
                assert isinstance(value, torch.Tensor)  # a pair only where it is asked for the contrast as well
                similar.append(value)
            psnr.append(-10 * (made - video).square().mean().clamp_min(1e-10).log10())
    return {"psnr": float(torch.stack(psnr).mean()), "ssim": float(torch.stack(similar).mean())}


def _pictures(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(1, 2).flatten(0, 1)
