"""Published tiny decoders: files in the layout of TAEHV."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch

from ..checkpoint_file import CheckpointError, read_file
from .decoder import TinyVideoDecoder

_PLAIN = re.compile(r"decoder\.(\d+)\.weight")
_GROW = re.compile(r"decoder\.(\d+)\.conv\.weight")
_BLOCK = re.compile(r"decoder\.(\d+)\.conv\.0\.weight")

_OF = {
    "taew2_": "AutoencoderKLWan",
    "taehv1_5": "AutoencoderKLHunyuanVideo15",
    "taehy1_5": "AutoencoderKLHunyuanVideo15",
    "taehv": "AutoencoderKLHunyuanVideo",
    "taecvx": "AutoencoderKLCogVideoX",
    "taeltx": "AutoencoderKLLTX2Video",
}
"""How names of files begin -> the autoencoder whose latents they decode; the first that fits."""


def read_tiny(path: str | Path, *, latents: str | None = None, first_frame_alone: bool = True) -> TinyVideoDecoder:
    """The decoder of a file in the layout of TAEHV, such as taew2_1.safetensors or lighttaew2_1.safetensors.

    What its weights do not tell is told by the name: LightX2V's files begin with "light"; they decode latents as the
    autoencoder takes them, and that for HunyuanVideo 1.5 has another activation.

    Args:
        path: `.safetensors`, or `.pth`, of which nothing is run.
        latents: see `TinyVideoDecoder`; None for what the name says.
        first_frame_alone: see `TinyVideoDecoder`; all published ones are of causal autoencoders.

    Raises:
        CheckpointError: a file that is missing, damaged, or in another layout; says which key.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    content = read_file(path)
    weights = content if isinstance(content, Mapping) else {}
    weights = {k: v for k, v in weights.items() if str(k).startswith("decoder.") and isinstance(v, torch.Tensor)}
    config = _config_of(weights, path)
    name = path.stem.lower()
    light, name = name.startswith("light"), name.removeprefix("light")
    config["latents"] = latents or ("autoencoder" if light else "transformer")
    config["autoencoder"] = next((of for begin, of in _OF.items() if name.startswith(begin)), "")
    if light and config["autoencoder"] == "AutoencoderKLHunyuanVideo15":
        config["activation"] = "leaky_relu"
    with torch.device("meta"):
        decoder = TinyVideoDecoder(**config, first_frame_alone=first_frame_alone)
    expected = {name: tuple(x.shape) for name, x in decoder.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise CheckpointError(
                f"{path} has {key} {_shape(found.get(key))}, where a tiny decoder of its other layers has "
                f"{_shape(expected.get(key))}: it is of a kind that is not known here."
            )
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval().requires_grad_(False)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"{list(shape)}"


def _config_of(weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, object]:
    """What the shapes of weights say.

    Raises:
        CheckpointError: they are not of a tiny decoder.
    """

    def in_order(pattern: re.Pattern[str]) -> list[torch.Tensor]:
        found = [(int(m[1]), x) for name, x in weights.items() if (m := pattern.fullmatch(name))]
        return [x for _, x in sorted(found, key=lambda pair: pair[0]) if x.ndim == 4]

    plain, grows, blocks = in_order(_PLAIN), in_order(_GROW), in_order(_BLOCK)
    stages = len(grows)
    if not stages or len(plain) != stages + 2 or not blocks or len(blocks) % stages:
        keys = ", ".join(list(weights)[:3]) or "none that begins with decoder."
        raise CheckpointError(
            f"{path} is no tiny decoder in the layout of TAEHV: its keys of layers are {keys}. Give a file such as "
            "taew2_1.safetensors."
        )
    is_super = blocks[0].shape[1] == 1  # depthwise
    widths = [plain[0].shape[0], *(x.shape[0] // (4 if is_super else 1) for x in plain[1:-1])]
    return {
        "latent_channels": plain[0].shape[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": len(blocks) // stages,
        "time_growth": tuple(x.shape[0] // x.shape[1] for x in grows),
        "patch_size": isqrt(plain[-1].shape[0] // 3),
        "variant": "super" if is_super else "base",
    }
