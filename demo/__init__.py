"""The built-in models: procedural captioned videos and a tiny, architecture-true Wan pipeline trained on them.

    from diffusers import WanPipeline
    import vidaccel.demo

    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())

The same model in the latent space of a deep-compression autoencoder:

    pipe = vidaccel.DCVideoGenPipeline.from_pretrained(vidaccel.demo.path("demo-dc"))

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path

from .world import held_out_prompts

__all__ = ["DC", "HELD_OUT_PROMPTS", "WAN", "few_steps", "length_lora", "path"]

WAN, DC = MODELS = "demo", "demo-dc"
"""Names of the two models, each and together."""

# Folder of each, and the file without which it is not there. The second holds an adapter to the first.
_FOLDERS = {WAN: ("weights", "model_index.json"), DC: ("weights_dc", "adapter.json")}

HELD_OUT_PROMPTS: tuple[str, ...] = held_out_prompts()
"""The 64 captions that training never sees."""


def path(model: str = WAN) -> Path:
    """Folder of a shipped model, for `from_pretrained`.

    Args:
        model: "demo" for `WanPipeline`, "demo-dc" for `vidaccel.DCVideoGenPipeline`.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: when the weights are not installed with the package.
    """
    if model not in _FOLDERS:
        raise ValueError(f"there is no built-in model {model!r}: give {' or '.join(_FOLDERS)}")
    name, marker = _FOLDERS[model]
    folder = Path(__file__).resolve().parent / name
    if not (folder / marker).is_file():
        raise FileNotFoundError(f"{folder} holds no model: reinstall vidaccel with its package data, or train one")
    return folder


def length_loras() -> list[Path]:
    """The LoRAs with which "demo" makes longer videos (recipe `length`), up to 65 frames and up to 129."""
    return sorted((Path(__file__).resolve().parent / "weights_length").glob("*.safetensors"))


def few_steps() -> list[Path]:
    """The adapters with which "demo-dc" makes few steps of one pass (recipe `consistency`), most steps first."""
    folder = Path(__file__).resolve().parent / _FOLDERS[DC][0] / "transformer"
    return sorted(folder.glob("few_steps_*.safetensors"), reverse=True)
