"""What `accelerate` refuses before anything is touched: schedules and backends that cannot be followed."""

from __future__ import annotations

from typing import Any

import torch

from ...attention import DenseSchedule, Method
from ...attention.backends import nothing_is_fast, refusal, special_refusal, with_stand_ins
from ...attention.schedule import check_kind
from .scheduler_table import MAX_FLOW_SIGMA, highest_sigma


def check_schedule(schedule: Any, pipe: Any) -> None:
    """Refuse what is no schedule, and one that the pipeline's scheduler cannot tell the steps or noise levels of."""
    check_kind("schedule", schedule)
    if not hasattr(pipe, "scheduler"):
        fix = "pass schedule=DenseSchedule(first_steps=...) with a whole number."
        check_without_scheduler(f"{type(pipe).__name__} is no pipeline, so", schedule, fix)
    elif schedule.needs_sigma:
        check_noise_levels(pipe.scheduler, schedule)


def check_without_scheduler(what: str, schedule: DenseSchedule, fix: str) -> None:
    """Refuse a schedule that needs what only a scheduler tells.

    Args:
        what: why there is none, as the start of a clause.
        fix: what to do.
    """
    if schedule.needs_num_steps:
        raise ValueError(
            f"{schedule} counts in fractions of a run or from its end, but {what} the number of steps is unknown: {fix}"
        )
    if schedule.needs_sigma:
        raise ValueError(f"{schedule} goes by noise levels, but {what} they are unknown: {fix}")


def check_noise_levels(scheduler: object, schedule: DenseSchedule) -> None:
    """Refuse bounds on noise levels at once where the scheduler shows that its own are not a flow's, from 0 to 1.

    So do those of diffusion that have no `sigmas` at all, such as DDIM. What is not known yet is told in the first
    step: levels may come with the table of timesteps (`sigmas` is None until then), and people swap schedulers.
    """
    instead = "use first_steps and last_steps, or give the pipeline a scheduler for flow models first."
    if scheduler is not None and not hasattr(scheduler, "sigmas"):
        raise ValueError(f"{schedule} goes by noise levels, but {type(scheduler).__name__} has none: {instead}")
    # Schedulers that can do both hold the levels of diffusion until their timesteps are set.
    if getattr(getattr(scheduler, "config", None), "use_flow_sigmas", False):
        return
    highest = highest_sigma(scheduler)
    if highest is not None and highest > MAX_FLOW_SIGMA:
        raise ValueError(
            f"{schedule} goes by noise levels from 0 to 1, but those of {type(scheduler).__name__} reach "
            f"{highest:.3g}: {instead}"
        )


def check_runs(transformer: torch.nn.Module, method: Method, backend: str, precision: str | None) -> None:
    """Refuse what a machine or a backend cannot compute, which the first sparse step would come too late to tell.

    Raises:
        RuntimeError: a backend that cannot run here or has no stand-ins; a precision, or a second stage, that neither
            this machine nor the named backend has; with "auto", no backend that is faster than dense attention.
    """
    places = places_of(transformer)
    reason = special_refusal(backend, places[-1], precision, method.second_stage)
    if reason is not None:
        raise RuntimeError(reason)
    reasons = [_cannot_run(backend, place, method) for place in places]
    if None not in reasons:
        raise RuntimeError(f"backend {backend!r} cannot be used here: it {reasons[-1]}.")


def _cannot_run(backend: str, place: torch.device, method: Method) -> str | None:
    if backend == "auto":
        return nothing_is_fast(place)
    if reason := refusal(backend, place):
        return f"{reason}. Give 'auto', or another"
    able = with_stand_ins(place)
    if method.stands_in and backend not in able:
        stand_ins = f"cannot compute what stands for the keys that {method.name} skips on {place.type}"
        return f"{stand_ins}. Give {', '.join(map(repr, ['auto', *able]))}, or another method"
    return None


def places_of(transformer: torch.nn.Module) -> list[torch.device]:
    """Where a transformer may compute: where its weights are, and if that is the CPU, from where they may be moved or
    offloaded later, also on the accelerator, which comes last.
    """
    place = next((p.device for p in transformer.parameters() if p.device.type != "meta"), torch.device("cpu"))
    present = torch.accelerator.current_accelerator(check_available=True)
    return [place] if place.type != "cpu" or present is None else [place, torch.device(present.type)]
