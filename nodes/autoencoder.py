"""DC-AE-V as the stock nodes of ComfyUI use an autoencoder. No ComfyUI module is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import demo
from ..generation.errors import BadInput
from .pipeline.pipelines import require_packages
from .report.wording import InputError

if TYPE_CHECKING:
    from ..autoencoders import AutoencoderDCV

BUILT_IN = f"{demo.DC} (built-in)"
_NAMES = ("dc-ae-v", "dc_ae_v", "dcae-v", "dc-ae_v")


class LatentScale(nn.Module):
    """An autoencoder with the two calls that ComfyUI makes, on latents as a transformer sees them (scaled).

    A video whose frames are no multiple of 4 is extended by its last frame.
    """

    def __init__(self, autoencoder: AutoencoderDCV) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, 3, T, H, W]` in [-1, 1] to `[B, C, ceil(T/4), H/f, W/f]`.

        Raises:
            InputError: a side of 0, to which ComfyUI cuts one that is below f.
        """
        if 0 in x.shape[-2:]:
            least = self.autoencoder.spatial_compression_ratio
            raise InputError(f"pixels are narrower than {least} at a side: this VAE takes at least {least}x{least}.")
        missing = -(x.shape[2] + self.autoencoder.config.pad_frames) % self.autoencoder.temporal_compression_ratio
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return self.autoencoder.encode(x).latent * self.autoencoder.config.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """`[B, C, T, H, W]` to `[B, 3, 4*T, H*f, W*f]`."""
        return self.autoencoder.decode(z / self.autoencoder.config.scaling_factor).sample

    def working_memory(self, pixels: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes beside the weights for a video `[..., T, H, W]`."""
        from ..autoencoders.memory import decoding_bytes

        frames, height, width = pixels[-3:]
        return decoding_bytes(self.autoencoder.config, frames, height, width, dtype.itemsize)


def choices(files: list[str]) -> list[str]:
    """What the menu offers: the built-in autoencoder, and those of ComfyUI's VAE files whose name says DC-AE-V."""
    return [BUILT_IN, *(name for name in files if any(word in name.lower() for word in _NAMES))]


def load(location: str | Path) -> AutoencoderDCV:
    """An autoencoder from a published file, a diffusers folder, or "demo-dc (built-in)".

    Raises:
        BadInput: there is none, or it is another model; one line.
        InputError: diffusers is not installed.
    """
    require_packages("Load DC-AE-V needs")
    from ..autoencoders import AutoencoderDCV
    from ..autoencoders.checkpoint_file import variant_in
    from ..autoencoders.convert import CheckpointError, load_published

    path = demo.path(demo.DC) / "vae" if location == BUILT_IN else Path(location).expanduser()
    try:
        # ComfyUI runs nodes in inference mode, whose tensors could not be moved in place later.
        with torch.inference_mode(False):
            if path.is_dir():
                _check_folder(path)
                return AutoencoderDCV.from_pretrained(path, dtype=torch.float32, variant=variant_in(path))
            return load_published(path)
    except (CheckpointError, OSError, ValueError) as error:
        raise BadInput("autoencoder", f"cannot be used: {' '.join(str(error).split()).rstrip('.')}") from error


def _check_folder(folder: Path) -> None:
    """ValueError for a folder of something else, before memory is taken for a model of its size."""
    from ..pipelines.deep_compression.published_files import read_json

    if not (folder / "config.json").is_file():
        inner = folder / "vae"
        if (inner / "config.json").is_file():
            raise ValueError(f"{folder} is the folder of a pipeline: give that of its autoencoder, {inner}.")
        raise ValueError(f"{folder} has no config.json: give a folder of an AutoencoderDCV, or a file.")
    name = read_json(folder / "config.json").get("_class_name")
    if name != "AutoencoderDCV":
        raise ValueError(
            f"{folder} is of the class {name}, as its config.json says: give the folder of an AutoencoderDCV."
        )
