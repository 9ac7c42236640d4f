"""The built-in models in whole pipelines on a pretended GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, WanPipeline

import vidaccel

from . import pretended_gpu

STEPS = 4  # as many as the few


def _sparse(method: str, **settings: Any) -> Callable[[DiffusionPipeline], Any]:
    return lambda pipe: vidaccel.accelerate(pipe, method, backend="triton", **settings)


def _preset(name: str) -> Callable[[DiffusionPipeline], Any]:
    return lambda pipe: vidaccel.apply(pipe, name)


CASES: dict[str, tuple[str, Callable[[DiffusionPipeline], Any]]] = {
    "tangent": ("demo", _sparse("tangent", probe=True)),
    "radial": ("demo", _sparse("radial")),
    "svg2, int8": ("demo", _sparse("svg2", precision="int8", init_iterations=3)),
    "cache": ("demo", _preset("demo-cache")),
    "longer": ("demo", lambda pipe: vidaccel.lengthen(pipe, vidaccel.demo.length_loras()[0])),
    "deep compression, few steps": ("demo-dc", _preset("demo-dc-four-steps")),
    "deep compression, guidance-free": ("demo-dc", _preset("demo-dc-fast")),
}


def run(names: list[str]) -> list[dict[str, Any]]:
    """A video of each, decoded and left where it is.

    Returns:
        `name`, the `shape` and `device` of the video, `launches` and `problems` as `PretendedGPU.seen` gives them, and
        `waits`, each with how often.
    """
    return [_video(name, *CASES[name]) for name in names]


def _video(name: str, model: str, install: Callable[[DiffusionPipeline], Any]) -> dict[str, Any]:
    pipeline, frames = (WanPipeline, 33) if model == "demo" else (vidaccel.DCVideoGenPipeline, 32)
    pipe = pipeline.from_pretrained(vidaccel.demo.path(model))
    pipe.set_progress_bar_config(disable=True)
    # The text encoder's lengths are data, which diffusers reads; the wait is not ours.
    texts = pipe.encode_prompt("a red circle moves left", negative_prompt="", do_classifier_free_guidance=True)
    size = {"num_frames": frames, "height": 128, "width": 128, "num_inference_steps": STEPS}
    with pretended_gpu() as gpu:
        pipe.to("cuda")
        text, negative = (x.to("cuda") for x in texts)
        with install(pipe):
            negatives = {} if model == "demo-dc" else {"negative_prompt_embeds": negative}
            gpu.forget()
            video = pipe(prompt_embeds=text, **negatives, **size, guidance_scale=2.0, output_type="pt").frames
            seen = {**gpu.seen(), "waits": dict(Counter(gpu.tensors.waits))}
        return {"name": name, "shape": list(video.shape), "device": str(video.device), **seen}


def generate(folder: str, **options: Any) -> dict[str, Any]:
    """`vidaccel.generate` on "cuda", from the prompt to the file. Copies on the host are black.

    Returns:
        `size` of the file in bytes, and `launches` and `problems` as `PretendedGPU.seen` gives them.
    """
    place = Path(folder) / "video.mp4"
    with pretended_gpu() as gpu:
        made = vidaccel.generate(
            "demo", "a red circle moves left", steps=STEPS, device="cuda", progress=False, **options
        )
        made.save(place)
        return {"size": place.stat().st_size, **gpu.seen()}
