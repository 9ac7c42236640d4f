"""FastVideo's FastWan models as folders of diffusers, with the gates of VSA and the sampler of their distillation,
or as one file for ComfyUI.

FastVideo (https://github.com/hao-ai-lab/FastVideo) publishes Wan 2.1 and 2.2 distilled to three steps with DMD2 and,
but for those named FullAttn, trained for Video Sparse Attention (arXiv 2505.13389). The files are in diffusers' layout,
but name a pipeline of FastVideo's, and diffusers' transformer has no place for the gates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel, __version__

from ...autoencoders.checkpoint_file import CheckpointError
from ..acceleration.vsa_gates import write_config
from ..deep_compression.adapter_folder import DEFAULTS_FILE
from ..deep_compression.published_files import read_json
from ..files.drafts import beside, take
from ..files.json_files import write_json
from .dmd import DMDScheduler
from .fastwan_native import write_native
from .fastwan_source import fastwan_folder, trained_for

COMPONENTS = ("text_encoder", "tokenizer", "vae")
"""What is taken as it is."""
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
    """Write a FastWan model as a folder that `WanPipeline.from_pretrained` loads and `accelerate` knows, or its
    transformer as one file that ComfyUI loads.

    Keys and shapes are checked before anything is written; `target` appears at the end, whole. Weights are copied as
    they are, byte for byte.

    Args:
        source: folder or hub id, such as "FastVideo/FastWan2.1-T2V-1.3B-Diffusers".
        target: the new folder, or a new file that ends in `.safetensors`, for ComfyUI; must not exist.
        density: of VSA, 1 - sparsity; None for what the source states, as a folder of ours does, or else 0.2 with 1.3B
            and 5B and 0.1 with 14B, as FastVideo's scripts have it: its files do not say what they were trained for.
        revision: of a hub id: a branch, a tag or a commit; None for the newest.
        link: link files instead of copying them; of a folder alone.

    Raises:
        CheckpointError: it is no FastWan of text to video, or not whole; the target is there.
        LayoutError: it cannot be had.
        ValueError: a density out of its bounds.
    """
    target = Path(target)
    native = target.suffix == ".safetensors"
    if target.exists():
        raise CheckpointError(
            f"{target} exists already: give a new {'name' if native else 'folder'}, or delete it first."
        )
    if native and link:
        raise CheckpointError(f"link is for a folder, and {target.name} is one file, which is written: leave it out.")
    folder = fastwan_folder(source, () if native else COMPONENTS, revision)
    trained = trained_for(folder, density)
    if native:
        return write_native(folder, target, trained)
    stated = read_json(folder / "model_index.json")
    with beside(target) as draft:
        for name in COMPONENTS:
            take(folder / name, draft / name, link)
        (draft / "transformer").mkdir()
        for file in sorted((folder / "transformer").iterdir()):
            take(file, draft / "transformer" / file.name, link and file.name != "config.json")  # which is written to
        if trained is not None:
            write_config(draft / "transformer", trained)
        DMDScheduler().save_pretrained(draft / "scheduler")
        frames, height, width = _VIDEOS[bool(stated.get("expand_timesteps"))]
        video = {"frames": frames, "height": height, "width": width}
        defaults = {**video, "steps": DMDScheduler().most_steps, "guidance_scale": 1.0}
        write_json(draft / DEFAULTS_FILE, defaults)
        write_json(draft / "model_index.json", _index(stated))
    return target


def _index(stated: dict[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of what is written, from that of the source."""
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
