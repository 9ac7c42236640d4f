"""Where tiny decoders come from, and whether one is for the autoencoder of a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...autoencoders.checkpoint_file import CheckpointError, variant_in
from ...autoencoders.tiny import KNOWN, TinyVideoDecoder, channels_of, compression_of, read_tiny
from ..acceleration.families import unwrap
from ..files.locations import is_hub_id
from ..files.plain_content import object_in
from ..files.run_folder import SETTINGS, taken

logger = logging.getLogger(__name__)

OWN_FOLDER = "tiny_decoder"
"""In the folder of a pipeline, the decoder that it has of its own."""
RESULT = "decoder"
"""In the folder of a training, the decoder that it made."""
# One autoencoder under two names.
_SAME = {"AutoencoderKLQwenImage": "AutoencoderKLWan"}


class TinyDecoderError(ValueError):
    """A tiny decoder that cannot be read, or is not for the autoencoder of a pipeline."""


def find_decoder(pipe: Any, source: str | Path | TinyVideoDecoder | None) -> tuple[TinyVideoDecoder, str]:
    """The decoder for a pipeline, checked against its autoencoder, and what it is called; nothing is changed.

    Args:
        pipe: a diffusers pipeline.
        source: see `tiny_decoder`.

    Raises:
        TinyDecoderError: what it is that cannot be, and why.
    """
    vae = _autoencoder(pipe)
    # `torch.compile` wraps a decoder in a class of its own.
    if isinstance(source, torch.nn.Module):
        if not isinstance(unwrap(source), TinyVideoDecoder):
            raise TinyDecoderError(
                f"a {type(unwrap(source)).__name__} is no tiny decoder: give a TinyVideoDecoder, a file, a folder or a "
                "hub id."
            )
        decoder, name = source, "a tiny decoder"
    else:
        location = _own(pipe) if source is None else str(Path(source).expanduser())
        decoder, name = read_decoder(location), Path(location).name
    check_fits(decoder, name, vae)
    return decoder, name


def check_fits(decoder: TinyVideoDecoder, name: str, vae: Any, whose: str = "of this pipeline") -> None:
    """See that a decoder is for the latents of an autoencoder.

    Args:
        decoder: to check.
        name: what it is called.
        vae: the autoencoder.
        whose: it is, for the message.

    Raises:
        TinyDecoderError: it is not; says why.
    """
    of, mine = decoder.config.autoencoder, type(vae).__name__
    if of and _SAME.get(of, of) != _SAME.get(mine, mine):
        raise TinyDecoderError(
            f"{name} is for the latents of an {of}, and the autoencoder {whose} is an {mine}: give a decoder "
            "of that one."
        )
    theirs = (decoder.config.latent_channels, decoder.temporal_compression_ratio, decoder.spatial_compression_ratio)
    own = (channels_of(vae), *compression_of(vae))
    if theirs != own:
        raise TinyDecoderError(
            f"{name} decodes latents of {_told(*theirs)}, and those of the {mine} {whose} have {_told(*own)}: give a "
            "decoder that was trained for this autoencoder."
        )


def _told(channels: int, time: int, space: int) -> str:
    return f"{channels} channels, 1/{time} of the frames and 1/{space} of each side"


def _autoencoder(pipe: Any) -> Any:
    vae = unwrap(getattr(pipe, "vae", None))
    if type(vae).__name__ not in KNOWN:
        held = "has no autoencoder" if vae is None else f"has an {type(vae).__name__}"
        raise TinyDecoderError(
            f"this {type(pipe).__name__} {held}, whose place no tiny decoder can take: there are some for "
            f"{', '.join(KNOWN)}."
        )
    return vae


def _own(pipe: Any) -> str:
    """The folder of the decoder that a pipeline's autoencoder has of its own."""
    stated = [str(getattr(part, "config", {}).get("_name_or_path") or "") for part in (pipe.vae, pipe)]
    return _own_beside([Path(place) for place in stated if place], f"this {type(pipe).__name__}")


def check_own(location: Path, name: str = "") -> None:
    """See that the folder of a pipeline has a decoder of its own, before weights are read.

    Args:
        location: of its model_index.json and its autoencoder; others are passed over, as those of adapters, whose
            autoencoder may be elsewhere.
        name: what the model is called; that of its folder by default.

    Raises:
        TinyDecoderError: there is none.
    """
    if (location / "model_index.json").is_file():
        _own_beside([location / "vae", location], name or location.name)


def _own_beside(places: Sequence[Path], whose: str) -> str:
    for place in places:
        for folder in (place, place.parent):
            if (folder / OWN_FOLDER / "config.json").is_file():
                return str(folder / OWN_FOLDER)
    raise TinyDecoderError(
        f"{whose} has no tiny decoder of its own: its folder has no {OWN_FOLDER}. Give one, such as "
        "taew2_1.safetensors for Wan (github.com/madebyollin/taehv)."
    )


def read_decoder(location: str) -> TinyVideoDecoder:
    """The decoder of a file, a folder or a hub id.

    Raises:
        TinyDecoderError: there is none that can be read.
    """
    path = Path(location).expanduser()
    try:
        if os.path.isfile(path):  # of a name that is too long it is false, where Path raises
            return read_tiny(path)
        if os.path.isdir(path) or is_hub_id(location):
            if os.path.isdir(path):
                path = _folder_of(path)
                location = str(path)
            decoder = TinyVideoDecoder.from_pretrained(location, variant=variant_in(path))
            return decoder.eval().requires_grad_(False)
    except TinyDecoderError:
        raise
    # ValueError: of a config; RuntimeError: weights of other shapes than it says.
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise TinyDecoderError(f"{location} cannot be read as a tiny decoder: {error}") from error
    raise TinyDecoderError(f"there is no tiny decoder {location}: give a file, a folder, or a hub id (owner/name).")


def _folder_of(path: Path) -> Path:
    """The folder of a decoder, from it or from that of the training that made it, which is logged.

    Raises:
        TinyDecoderError: it is neither, or its config cannot be read.
    """
    if _holds_decoder(path):
        return path
    if _holds_decoder(path / RESULT):
        logger.info("%s", taken(path, path / RESULT))
        return path / RESULT
    if (path / SETTINGS).is_file():
        raise TinyDecoderError(
            f"{path} is the folder of a training that has written no tiny decoder (no {RESULT}/ in it): give one of "
            "the recipe tiny-decoder, once it is finished."
        )
    raise TinyDecoderError(
        f"the folder {path} has no tiny decoder: give the file, such as taew2_1.safetensors, or a folder that the "
        "recipe tiny-decoder made."
    )


def _holds_decoder(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file():
        return False
    try:
        return object_in(config).get("_class_name") == TinyVideoDecoder.__name__
    except (OSError, ValueError) as error:
        raise TinyDecoderError(f"{config} cannot be read: {error}") from error
