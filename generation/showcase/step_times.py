"""How long a step of a transformer takes with each method, measured in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..machine import synchronise

if TYPE_CHECKING:
    import torch

    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method

MEASURED_STEPS = 3
"""After a warm-up step: the interval at which `tangent` clusters anew by default."""


@dataclass(frozen=True)
class StepTimes:
    """Mean times of the steps of a method, in seconds.

    Args:
        seconds: of a step.
        attention_seconds: of its self-attention, permutations included.
        plan_seconds: of planning.
        density: pairs computed over pairs in dense attention, mean over the calls.
        backend: what computed them.
        error: how far the result of the last step is from that of dense attention, relative to its size; None of the
            first method, with which the others are compared.
    """

    seconds: float
    attention_seconds: float
    plan_seconds: float
    density: float
    backend: str
    error: float | None = None


def step_times(
    transformer: Any,
    inputs: Callable[[int], tuple[Any, ...]],
    methods: Mapping[str, Method | None],
    *,
    steps: int = MEASURED_STEPS,
    backend: str = "auto",
    on_method: Callable[[str], None] = lambda name: None,
) -> dict[str, StepTimes]:
    """Steps of a whole transformer with each method in turn.

    The warm-up step of each (first plan, k-means from nothing, compilation) is not counted. State that a method carries
    from step to step begins anew with each.

    Args:
        transformer: of a family that `accelerate` serves, without what sparse attention is at work in it.
        inputs: of the step of a number, from 0, as the transformer takes them; its first result is compared.
        methods: by name; None for dense attention through the same seam. The first is what errors are told against.
        steps: measured ones.
        backend: see `accelerate`.
        on_method: told before each.
    """
    import torch

    from ...attention.schedule import DenseSchedule
    from ...pipelines import accelerate

    found: dict[str, StepTimes] = {}
    reference: torch.Tensor | None = None
    with torch.inference_mode():
        for name, method in methods.items():
            on_method(name)
            schedule = DenseSchedule(first_steps=10**6) if method is None else None
            with accelerate(transformer, method or "radial", backend=backend, schedule=schedule) as handle:
                for number in range(1 + steps):
                    if number == 1:
                        synchronise(transformer.device)
                        warm, start = len(handle.report().records), time.perf_counter()
                    made = transformer(*inputs(number), return_dict=False)[0].float()
                synchronise(transformer.device)
                seconds = (time.perf_counter() - start) / steps
                records = handle.report().records[warm:]
            error = None if reference is None else float((made - reference).norm() / reference.norm())
            reference = made if reference is None else reference
            found[name] = StepTimes(
                seconds,
                sum(r.attention_seconds for r in records) / steps,
                sum(r.plan_seconds for r in records) / steps,
                statistics.mean(r.density for r in records),
                records[0].backend,
                error,
            )
    return found


def quick_method(name: str, layout: VideoLayout, density: float) -> Method:
    """A method at a density without dense steps; Radial with the largest blocks that reach it, which are fastest.

    Raises:
        OutOfReach: there is none of that density.
    """
    from ...attention import METHODS
    from ...attention.methods.base import OutOfReach
    from ...attention.schedule import DenseSchedule

    for settings in [{"block_size": size} for size in (64, 32, 16)] if name == "radial" else [{}]:
        try:
            return METHODS[name].for_density(layout, density, schedule=DenseSchedule(), **settings)
        except OutOfReach as error:
            last = error
    raise last


def wan_inputs(transformer: Any, layout: VideoLayout) -> Callable[[int], tuple[Any, ...]]:
    """Inputs of the steps of a Wan transformer: the same random latents and text, at falling times.

    Args:
        transformer: of Wan.
        layout: its tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    patch = transformer.config.patch_size
    size = [n * p for n, p in zip((layout.frames, layout.height, layout.width), patch, strict=True)]
    latents = torch.randn(1, transformer.config.in_channels, *size, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    return lambda number: (latents, torch.tensor([900.0 - number]), text)
