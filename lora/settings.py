"""The settings that every recipe has: the loop, a phase, the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..generation.machine import MOST_THREADS
from .config import Settings, setting


@dataclass(frozen=True)
class SizeSettings(Settings):
    """The size of the clips of a step.

    Args:
        frames, height, width: pixel frames and pixels.
        batch_size: clips a process and micro-step; None for the phase's. A run may be resumed with another one where
            the clips of a step stay the same; see `PhaseSettings`.
        share: how often a step has this size, against the shares of the others.
    """

    frames: int = setting(low=1)
    height: int = setting(low=8)
    width: int = setting(low=8)
    batch_size: int | None = setting(None, low=1, free=True)
    share: float = setting(1.0, above=0)


@dataclass(frozen=True)
class PhaseSettings(Settings):
    """One phase of training.

    Args:
        steps: optimiser steps; 0 skips the phase. A run may be resumed with another number if `lr_scheduler` is
            "constant".
        learning_rate: the peak. A run may be resumed with another one: no clip and no noise depends on it, and what is
            left of a schedule is scaled.
        lr_warmup_steps: steps in which it rises linearly to the peak.
        lr_scheduler: what follows: "constant", or "cosine" or "linear" down to `min_lr_rate` of the peak. With
            `max_minutes` these two end when the time does, if that is earlier.
        lr_decay_steps: with "constant", the last steps, in which it falls to `min_lr_rate` of the peak in a straight
            line; with `max_minutes` those before the time ends, if that is earlier, by how long steps take. So a run
            may go on for as long as it gains, and be resumed with this to end (warm-up, stable, decay; MiniCPM, arXiv
            2404.06395, section 4).
        optimizer: "adamw"; "muon" (Muon for matrices, AdamW for the rest); an AdamW whose state takes 8 or 4 bits a
            number, of torchao or of bitsandbytes; or "prodigy", which finds the learning rate itself (Prodigy, arXiv
            2306.06101), of prodigyopt. These packages must be installed.
        low_bit_linears: what the linear layers of the blocks compute their products in, forward and backward, through
            torchao, which must be installed: "int8", or "fp8_..." with one scale a tensor, one a row, or one a row
            and the gradients of weights in full. Weights stay as they are.
        betas, weight_decay: of AdamW, and the decay of Muon; only matrices and kernels of layers have it.
        max_grad_norm: bound of the gradient norm; None for none.
        ema_decay: of the EMA of the weights, which is the result of the phase; 0 for none.
        batch_size: clips a process and micro-step.
        gradient_accumulation_steps: micro-steps an optimiser step. This and `batch_size` may be others in a resumed
            run, whose clips a step, over all processes, must be as many as before; see `step_clips`.
        max_minutes: the phase ends after this time, wherever it is; None for no limit. A run may be resumed with
            another one if `lr_scheduler` is "constant".
    """

    steps: int = setting(low=0)
    learning_rate: float = setting(1e-4, above=0, free=True)
    lr_warmup_steps: int = setting(0, low=0)
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    min_lr_rate: float = setting(0.0, low=0, high=1)
    lr_decay_steps: int = setting(0, low=0)
    optimizer: Literal[
        "adamw",
        "muon",
        "adamw_8bit_torchao",
        "adamw_fp8_torchao",
        "adamw_4bit_torchao",
        "adamw_8bit_bitsandbytes",
        "prodigy",
    ] = "adamw"
    low_bit_linears: Literal["none", "int8", "fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_with_gw_hp"] = "none"
    betas: tuple[float, float] = setting((0.9, 0.99), low=0, below=1)
    weight_decay: float = setting(0.0, low=0)
    max_grad_norm: float | None = setting(1.0, above=0, free=True)
    ema_decay: float = setting(0.0, low=0, below=1)
    batch_size: int = setting(1, low=1, free=True)
    gradient_accumulation_steps: int = setting(1, low=1, free=True)
    max_minutes: float | None = setting(None, above=0)

    def free_here(self) -> Iterable[str]:
        # Without a fall of the learning rate, no step depends on how many there will be.
        return ("steps", "lr_decay_steps", "min_lr_rate", "max_minutes") if self.lr_scheduler == "constant" else ()

    def check(self) -> Iterator[str]:
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield (
                f"learning_rate is {self.learning_rate:g}, and with the optimizer prodigy it is a factor on the rate "
                "that this finds itself: set it to 1 (0.1 at least)."
            )
        if self.lr_decay_steps and self.lr_scheduler != "constant":
            yield (
                f"lr_decay_steps is {self.lr_decay_steps}, of use only with the lr_scheduler constant: "
                f"{self.lr_scheduler} falls in all steps."
            )
        if self.steps and self.lr_decay_steps and self.lr_decay_steps > self.steps - self.lr_warmup_steps:
            yield (
                f"lr_decay_steps is {self.lr_decay_steps}, more than the {self.steps - self.lr_warmup_steps} of the "
                f"{self.steps} steps that are not those of lr_warmup_steps."
            )


def nothing_trained(phases: Iterable[PhaseSettings], where: str = "phases") -> Iterator[str]:
    """The fault of phases that all have no steps: the result would be as untrained as the start."""
    if not any(phase.steps for phase in phases):
        yield f"{where}: no phase has steps, so nothing would be trained: give one at least 1."


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What the loop does beside training.

    Args:
        mixed_precision: of the forward pass; trained weights stay float32. "fp16" needs a GPU.
        gradient_checkpointing: trade time for memory.
        compile: have the repeated blocks of what is trained compiled by torch: the same up to rounding, fewer and
            larger kernels, and minutes of compilation for each size. Of transformers.
        save_every: steps between checkpoints; one is always written when a phase ends.
        keep_last: how many checkpoints stay.
        keep_adapters: "all" leaves of each older checkpoint the adapter, which is small.
        log_every: steps.
        validate_every: steps; 0 for the end of each phase alone.
        validate_first: also before the first step of each phase: what the model does untrained, and whether a
            validation has the memory that it needs.
        tracker: "auto" (tensorboard where it is installed), "none", or a name that accelerate knows, such as "wandb".
            Numbers always go to log.jsonl as well.
        tracker_project: name of the project in the tracker; None for that of the recipe.
        threads: CPU threads of torch; None leaves them.
        device: "auto" (a GPU if there is one) or "cpu".
    """

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = setting(False, free=True)
    compile: bool = setting(False, free=True)
    save_every: int = setting(500, low=1, free=True)
    keep_last: int = setting(2, low=1, free=True)
    keep_adapters: Literal["last", "all"] = setting("last", free=True)
    log_every: int = setting(20, low=1, free=True)
    validate_every: int = setting(0, low=0, free=True)
    validate_first: bool = setting(False, free=True)
    tracker: str = setting("auto", free=True)
    tracker_project: str | None = setting(None, free=True)
    threads: int | None = setting(None, low=1, high=MOST_THREADS, free=True)
    device: Literal["auto", "cpu"] = setting("auto", free=True)


@dataclass(frozen=True)
class FolderSettings(Settings):
    """One of several folders of videos or images.

    Args:
        path: of the folder; its captions are in it.
        repeats: how often its clips come while those of a folder with 1 come once.
    """

    path: str = setting(free=True, place=True)
    repeats: int = setting(1, low=1)


@dataclass(frozen=True)
class DataSettings(Settings):
    """What is trained on.

    Args:
        kind: "demo" (the procedural world), "videos" or "images" (folders with captions), or "mixed": both in the same
            folders, the images in the sizes of 1 frame and the videos in all others.
        folder: of videos or images.
        folders: several of them, instead of `folder`.
        sizes: the clips' sizes. A step has one of them; a video goes to the one whose shape is nearest.
        sizes_per_video: "best", that one alone, and of several of one shape the longest that it has frames for; or
            "all" that it fits: that it has frames for, that keep 60 % of its picture and enlarge it 1.25 times at most.
        fps: frames per second that videos are sampled at; None takes every frame.
        clips: of the demo world: how many scenes there are; None for endless new ones. Of a video folder: the most
            clips that are taken from one video.
        zoom: of the demo world: scenes are enlarged by one of these.
        missing_captions: "error", or "skip" what has none.
        contact_sheet: clips in the picture of the data that a run writes when it begins, at most; 0 for none.
        cache: folder for encoded clips and texts; None encodes them anew in each step.
        cache_dtype: of what is kept there; "float16" and "bfloat16" take half the space.
        workers: processes that prepare clips in the background.
    """

    kind: Literal["demo", "videos", "images", "mixed"] = "demo"
    folder: str | None = setting(None, free=True, place=True)
    folders: tuple[FolderSettings, ...] = ()
    sizes: tuple[SizeSettings, ...] = (SizeSettings(32, 128, 128),)
    sizes_per_video: Literal["best", "all"] = "best"
    fps: float | None = setting(None, above=0)
    clips: int | None = setting(None, low=1)
    zoom: tuple[float, ...] = setting((1.0,), low=1, high=2)
    missing_captions: Literal["error", "skip"] = "error"
    contact_sheet: int = setting(8, low=0, high=100, free=True)
    cache: str | None = setting(None, free=True, place=True)
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    workers: int = setting(0, low=0, free=True)

    @property
    def files(self) -> str:
        """What the folders hold, in words."""
        return "videos and images" if self.kind == "mixed" else self.kind

    @property
    def source(self) -> str:
        """The setting that says what there is, for messages."""
        return "data.folders" if self.folders else "data.folder"

    def check(self) -> Iterator[str]:
        if not self.sizes:
            yield "sizes is empty: give at least one, such as {frames: 80, height: 480, width: 832}."
        if not self.zoom:
            yield "zoom is empty: give at least one factor, such as [1]."
        elif self.kind != "demo" and self.zoom != (1.0,):
            yield f"zoom is {list(self.zoom)}, of use only with kind demo: leave it out, or give other sizes."
        if self.kind != "demo" and self.folder is None and not self.folders:
            yield f"folder is missing: kind is {self.kind}, so say where the {self.files} are."
        if self.folder is not None and self.folders:
            yield "folder and folders are both given: put it among `folders`, as {path: ...}."
        if self.kind == "images" and any(size.frames != 1 for size in self.sizes):
            yield "sizes of images have 1 frame: set frames: 1."
        if self.kind == "mixed" and len({size.frames == 1 for size in self.sizes}) < 2:
            yield "kind is mixed: give at least one size of 1 frame, for the images, and one of more, for the videos."


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """What recipes that train a model of videos or images measure and make on the side.

    Args:
        clips: clips whose loss is measured, each in its own size; nothing of their files is trained on. 0 for none;
            None for a tenth of all, 8 at most, and none where their files would take more than a fifth of all clips.
        prompts: of videos that are made; none for none. For image to video, the first frames of the clips are used.
        negative_prompt, steps, guidance_scale: of these.
        fps: of the files of these; None for `data.fps`, or where that is None the model's own.
    """

    clips: int | None = setting(None, low=0)
    prompts: tuple[str, ...] = setting((), free=True)
    negative_prompt: str = setting("", free=True)
    steps: int = setting(20, low=1, free=True)
    guidance_scale: float = setting(5.0, low=1, free=True)
    fps: float | None = setting(None, above=0, free=True)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Base of a recipe's settings.

    Args:
        recipe: its name.
        out: folder of the run: checkpoints, log, validation, result.
        seed: of everything random.
    """

    recipe: str = setting()
    out: str = setting(free=True, place=True)
    seed: int = setting(0, low=0, high=2**31 - 1)
    loop: LoopSettings = field(default_factory=LoopSettings)
    data: DataSettings = field(default_factory=DataSettings)

    @property
    def sparse(self) -> bool:
        """Whether the run trains with sparse attention."""
        return False
