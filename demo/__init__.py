"""The embedded default: procedural captioned videos and a tiny, architecture-true Wan pipeline trained on them.

    from diffusers import WanPipeline
    import vidaccel.demo

    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path

from .world import held_out_prompts

__all__ = ["HELD_OUT_PROMPTS", "path"]

HELD_OUT_PROMPTS: tuple[str, ...] = held_out_prompts()
"""The 64 captions that training never sees."""


def path() -> Path:
    """Folder of the shipped pipeline, for `WanPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: when the weights are not installed with the package.
    """
    folder = Path(__file__).resolve().parent / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: reinstall vidaccel with its package data, or train one")
    return folder
