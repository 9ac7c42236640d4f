"""FastVideo's FastWan models as folders of diffusers, with the gates of VSA and the sampler of their distillation.

FastVideo (https://github.com/hao-ai-lab/FastVideo) publishes Wan 2.1 and 2.2 distilled to three steps with DMD2 and,
but for those named FullAttn, trained for Video Sparse Attention (arXiv 2505.13389). The files are in diffusers' layout,
but name a pipeline of FastVideo's, and diffusers' transformer has no place for the gates.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel, __version__

from ...attention.methods.vsa import CUBE
from ...autoencoders.checkpoint_file import CheckpointError
from ..acceleration.vsa_gates import GATE, TrainedVSA, published_density, write_config
from ..deep_compression.published_files import download, read_json
from ..drafts import beside, take
from ..json_files import write_json
from ..weight_files import transformer_shapes
from .dmd import DMDScheduler

logger = logging.getLogger(__name__)

COMPONENTS = ("text_encoder", "tokenizer", "vae")
"""What is taken as it is."""
_DEFAULTS = "generation_defaults.json"  # read by `generation.model_facts`
_VIDEOS = {False: (81, 480, 832), True: (121, 704, 1280)}
"""Frames, height and width, by whether a model is Wan 2.2's of 5B, which alone expands timesteps."""


def convert_fastwan(
    source: str | Path,
    target: str | Path,
    *,
    density: float | None = None,
    revision: str | None = None,
    link: bool = False,
) -> Path:
    """Write a FastWan model as a folder that `WanPipeline.from_pretrained` loads and `accelerate` knows.

    Keys and shapes are checked before anything is written; `target` appears at the end, whole. Weights are copied as
    files.

    Args:
        source: folder or hub id, such as "FastVideo/FastWan2.1-T2V-1.3B-Diffusers".
        target: the new folder; must not exist.
        density: of VSA, 1 - sparsity; None for 0.2 with 1.3B and 5B and 0.1 with 14B, as FastVideo's scripts have it.
            The files do not say what they were trained for.
        revision: of a hub id: a branch, a tag or a commit; None for the newest.
        link: link files instead of copying them.

    Raises:
        CheckpointError: it is no FastWan of text to video, or not whole.
        LayoutError: it cannot be had.
        ValueError: a density out of its bounds.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: give a new folder, or delete it first.")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        parts = [f"{name}/*" for name in ("transformer", *COMPONENTS)]
        folder = download("source", str(source), ["model_index.json", *parts], {"revision": revision})
    elif revision is not None:
        raise CheckpointError(f"revision is {revision!r}, and {source} is a folder here: leave it out.")
    index = _index(folder)
    config = read_json(folder / "transformer/config.json")
    gated = _check_weights(folder, config)
    trained = _trained(config, density) if gated else None
    if density is not None and not gated:
        raise CheckpointError(f"{source} has no gates ({GATE}), so it is dense: leave density out.")
    large = bool(index.get("expand_timesteps"))
    with beside(target) as draft:
        for name in COMPONENTS:
            take(folder / name, draft / name, link)
        (draft / "transformer").mkdir()
        for file in sorted((folder / "transformer").iterdir()):
            take(file, draft / "transformer" / file.name, link and file.name != "config.json")  # which is written to
        if trained is not None:
            write_config(draft / "transformer", trained)
        DMDScheduler().save_pretrained(draft / "scheduler")
        frames, height, width = _VIDEOS[large]
        video = {"frames": frames, "height": height, "width": width}
        defaults = {**video, "steps": DMDScheduler().most_steps, "guidance_scale": 1.0}
        write_json(draft / _DEFAULTS, defaults)
        write_json(draft / "model_index.json", index)
    return target


def _index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of what is written."""
    stated = read_json(folder / "model_index.json")
    kind = str(stated.get("_class_name"))
    if kind not in ("WanDMDPipeline", "WanPipeline"):
        raise CheckpointError(f"{folder} is a {kind}: a FastWan model is a WanDMDPipeline of text to video.")
    if (folder / "transformer_2").is_dir():
        raise CheckpointError(f"{folder} has two transformers: a FastWan model has one.")
    missing = [name for name in ("transformer", *COMPONENTS) if not (folder / name).is_dir() or name not in stated]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: give the whole model.")
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": __version__,
        "boundary_ratio": None,
        "expand_timesteps": bool(stated.get("expand_timesteps", False)),
        **{name: stated[name] for name in COMPONENTS},
        "transformer": ["diffusers", WanTransformer3DModel.__name__],
        "transformer_2": [None, None],
        "scheduler": [DMDScheduler.__module__, DMDScheduler.__name__],
    }


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


def _trained(config: dict[str, Any], density: float | None) -> TrainedVSA:
    if density is None:
        density = published_density(config)
        logger.info("density %g is that of FastVideo's scripts for a model of this size.", density)
    trained = TrainedVSA(density=density, cube=CUBE)
    trained.method()  # refuses what is out of bounds
    return trained
