"""FastVideo's FastWan models as they are found: a folder, checked, and what its transformer was trained for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ...attention.methods.vsa import CUBE
from ...autoencoders.checkpoint_file import CheckpointError
from ..acceleration.vsa_gates import GATE, TrainedVSA, published_density, read_config
from ..deep_compression.published_files import download, read_json
from ..files.weight_files import transformer_shapes

logger = logging.getLogger(__name__)


def fastwan_folder(source: str | Path, components: Iterable[str], revision: str | None) -> Path:
    """The folder of a FastWan model, fetched from the hub where it is an id.

    Args:
        source: folder or hub id. components: that are wanted beside its transformer.
        revision: of a hub id.

    Raises:
        CheckpointError: it has not all of them, or is no FastWan of text to video.
        LayoutError: it cannot be had.
    """
    components = tuple(components)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        parts = [f"{name}/*" for name in ("transformer", *components)]
        folder = download("source", str(source), ["model_index.json", *parts], {"revision": revision})
    elif revision is not None:
        raise CheckpointError(f"revision is {revision!r}, and {source} is a folder here: leave it out.")
    stated = read_json(folder / "model_index.json")
    kind = str(stated.get("_class_name"))
    if kind not in ("WanDMDPipeline", "WanPipeline"):
        raise CheckpointError(f"{folder} is a {kind}: a FastWan model is a WanDMDPipeline of text to video.")
    if (folder / "transformer_2").is_dir():
        raise CheckpointError(f"{folder} has two transformers: a FastWan model has one.")
    missing = [name for name in ("transformer", *components) if not (folder / name).is_dir() or name not in stated]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: give the whole model.")
    return folder


def trained_for(folder: Path, density: float | None) -> TrainedVSA | None:
    """What the transformer in a folder was trained for, once all its tensors are checked; None where it has no gates.

    Args:
        folder: see `fastwan_folder`.
        density: of VSA; None for the one that the folder states, or else that FastVideo's scripts have.

    Raises:
        CheckpointError: something is missing, unknown or of another shape, or there are no gates for a density.
        ValueError: a density out of its bounds.
    """
    config = read_json(folder / "transformer/config.json")
    if not _check_weights(folder, config):
        if density is not None:
            raise CheckpointError(f"{folder} has no gates ({GATE}), so it is dense: leave density out.")
        return None
    stated = read_config(str(folder))
    if density is None and stated is not None:
        return stated
    if density is None:
        density = published_density(config)
        logger.info("density %g is that of FastVideo's scripts for a model of this size.", density)
    trained = TrainedVSA(density=density, cube=CUBE if stated is None else stated.cube)
    trained.method()  # refuses what is out of bounds
    return trained


def _check_weights(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a transformer has gates; it has all that diffusers' class has, and nothing else.

    Raises:
        CheckpointError: something is missing, unknown or of another shape.
    """
    if config.get("in_channels") != config.get("out_channels"):
        raise CheckpointError(
            f"{folder} takes {config.get('in_channels')} channels and makes {config.get('out_channels')}: text to "
            "video takes as many as it makes."
        )
    with torch.device("meta"):
        model: Any = WanTransformer3DModel.from_config(config)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = transformer_shapes(str(folder))
    gates = {name: shape for name, shape in found.items() if f".{GATE}." in name}
    width = model.config.num_attention_heads * model.config.attention_head_dim
    for number in range(model.config.num_layers if gates else 0):
        inside = any(name.startswith(f"blocks.{number}.attn1.{GATE}") for name in gates)
        place = f"blocks.{number}.{'attn1.' if inside else ''}{GATE}"
        wanted |= {f"{place}.weight": [width, width], f"{place}.bias": [width]}
    for what, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has, beside its own,", found.keys() - wanted.keys()),
    ):
        if names:
            raise CheckpointError(f"{folder}/transformer {what} {len(names)} tensors, such as {min(names)}.")
    wrong = next((name for name in sorted(wanted) if found[name] != wanted[name]), None)
    if wrong is not None:
        raise CheckpointError(
            f"{wrong} of {folder}/transformer is {found[wrong]}, and its config needs {wanted[wrong]}."
        )
    return bool(gates)
