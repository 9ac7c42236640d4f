"""What this package gains on this machine: a built-in model lever by lever, and a step at a length that counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.files.weight_files import WEIGHTS
from ..errors import BadInput
from ..waterfall.account import Row, Waterfall
from ..waterfall.api import waterfall
from .step_times import StepTimes, quick_method, step_times, wan_inputs

if TYPE_CHECKING:
    from ...pipelines.presets import Preset

METHODS = ("radial", "svg2", "tangent")
DENSITY = 0.2
LONG = (129, 256)
"""Pixel frames, and pixels of a side, of the video whose step is measured: 8,448 tokens."""
UNTRAINED_STEPS = 6
"""Where there is no adapter for few steps: those of the model's own sampler that keep its accuracy."""
MOST_LOST = 0.05
"""Share of the prompts that few steps may lose against the plain model."""


@dataclass(frozen=True)
class Accuracy:
    """How many prompts a way was measured to show.

    Args:
        right, prompts: counts.
    """

    right: int
    prompts: int


@dataclass(frozen=True, eq=False)
class Showcase:
    """What was measured.

    Args:
        waterfall: of one prompt, lever by lever.
        accuracy: of each of its rows over many prompts, measured beforehand; None where this was not.
        tokens: of the long video.
        steps: times of its step by method, dense first; empty where it was left out.
    """

    waterfall: Waterfall
    accuracy: tuple[Accuracy | None, ...]
    tokens: int
    steps: dict[str, StepTimes]

    def in_words(self) -> str:
        """The gain in one sentence, the accuracy beside it."""
        first, last = self.waterfall.rows[0], self.waterfall.rows[-1]
        text = f"{self.waterfall.gain(last):.1f} times as fast as the plain model, from prompt to frames: "
        text += f"{last.median:.1f} s a video instead of {first.median:.1f} s"
        before, after = self.accuracy[0], self.accuracy[-1]
        if before is not None and after is not None and before.prompts == after.prompts:
            text += f", and {after.right} of {after.prompts} prompts are shown right instead of {before.right}"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Everything but pictures, in types that JSON knows."""
        told = self.waterfall.to_dict()
        for row, accuracy in zip(told["rows"], self.accuracy, strict=True):
            row["accuracy_measured_before"] = None if accuracy is None else vars(accuracy)
        steps = {name: vars(times) for name, times in self.steps.items()}
        return {"gain": self.in_words(), "waterfall": told, "long_video": {"tokens": self.tokens, "steps": steps}}


def showcase(
    prompt: str,
    seed: int = 0,
    *,
    rounds: int = 3,
    long_step: bool = True,
    progress: bool = True,
    on_method: Callable[[str], None] = lambda name: None,
) -> Showcase:
    """Measure the built-in models on the CPU.

    Args:
        prompt: of the video.
        seed: of its noise.
        rounds: how often each lever is measured, in turns.
        long_step: measure a step of a long video, too.
        progress: show bars.
        on_method: told of each method of the long step, before it.

    Raises:
        BadInput: a request that cannot be met.
    """
    if not prompt.strip():
        raise BadInput("prompt", "is empty", "Say what the video shows.")
    preset = fastest_demo()
    made = waterfall(None, preset, [prompt], seed, rounds=rounds, device="cpu", progress=progress)
    accuracy = tuple(quoted(row) for row in made.rows)
    steps, tokens = long_steps(on_method=on_method) if long_step else ({}, 0)
    return Showcase(made, accuracy, tokens, steps)


def fastest_demo() -> Preset:
    """The fastest way to make a video with the built-in models that keeps the accuracy of the plain one."""
    from ... import demo
    from ...pipelines.guidance_free.adapter_file import read_adapter
    from ...pipelines.presets import Preset

    told = measured()
    plain = next((row for row in told if row["model"] == demo.WAN), None)
    common: dict[str, Any] = {"name": "the built-in model", "model": demo.DC, "base": demo.WAN}
    kept = []
    for file in demo.few_steps():
        for decoder in ("", own_decoder()):
            wanted = {"adapter": file_digest(file), "decoder": decoder}
            found = next((row for row in told if wanted.items() <= row.items()), None)
            if found is not None and plain is not None:
                lost = plain["right"] / plain["prompts"] - found["right"] / found["prompts"]
                kept += [(found["steps"], not decoder, file)] if lost <= MOST_LOST else []
    if not kept:
        return Preset(guidance_free=("own",), num_inference_steps=UNTRAINED_STEPS, **common)
    steps, whole, file = min(kept)
    return Preset(
        guidance_free=(str(file),),
        num_inference_steps=steps,
        guidance_scale=read_adapter(file).min_scale,
        decoder=None if whole else "own",
        **common,
    )


def measured() -> list[dict[str, Any]]:
    """Accuracies over the held-out prompts, as `benchmarks/few_steps_demo.py` and `tiny_decoder_demo.py` wrote them."""
    from ... import demo

    rows: list[dict[str, Any]] = []
    for name in ("accuracy.json", "accuracy_decoder.json"):
        file = Path(demo.__file__).with_name(name)
        rows += json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return [{"decoder": "", **row} for row in rows]


def quoted(row: Row, told: Sequence[dict[str, Any]] | None = None) -> Accuracy | None:
    """The accuracy that was measured of a row of the built-in models; None of one that was not.

    Only a measurement of the same model, steps, guidance and file of the adapter counts.

    Args:
        row: of a waterfall.
        told: see `measured`.
    """
    from ... import demo
    from ...pipelines.guidance_free.adapter_file import OWN_FILE

    preset = row.stage.preset
    files = [
        demo.path(row.stage.model) / "transformer" / OWN_FILE if place == "own" else Path(place)
        for place in preset.guidance_free
    ]
    wanted = {
        "model": row.stage.model,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "adapter": " ".join(file_digest(file) for file in files),
        "decoder": own_decoder() if preset.decoder else "",
    }
    for entry in measured() if told is None else told:
        if all(entry[name] == value for name, value in wanted.items()):
            return Accuracy(entry["right"], entry["prompts"])
    return None


def own_decoder() -> str:
    """The tiny decoder of the built-in DC-VideoGen model, as the measurement names it; "" where there is none."""
    from ... import demo
    from ...pipelines.tiny_decoder.source import OWN_FOLDER

    file = demo.path(demo.DC) / OWN_FOLDER / WEIGHTS
    return file_digest(file) if file.is_file() else ""


def file_digest(file: Path) -> str:
    """Of a file, as the measurement names adapters."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def long_steps(
    size: tuple[int, int] = LONG, on_method: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, StepTimes], int]:
    """A step of the built-in transformer on a long video with each method, dense first; and the video's tokens.

    Args:
        size: pixel frames (4k + 1) and pixels of a side (a multiple of 16).
        on_method: told before each.
    """
    import torch

    from ... import demo
    from ..models.inspected import inspect_model
    from ..run import load

    facts = inspect_model(demo.WAN)
    layout = facts.layout(size[0], size[1], size[1])
    transformer = load(facts, torch.float32, "cpu").transformer.eval()
    methods = {"dense": None, **{name: quick_method(name, layout, DENSITY) for name in METHODS}}
    found = step_times(transformer, wan_inputs(transformer, layout), methods, on_method=on_method)
    return found, layout.tokens
