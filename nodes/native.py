"""Sparse attention in ComfyUI's native video models: an attention override, and the wrapper that tells it where it is.

No ComfyUI module is imported here: a `ModelPatcher` is used through its public methods, so tests can run all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import DenseSchedule, Method, RunReport, SparseAttention, StepInfo
from .geometry import GEOMETRIES, Geometry, Grid, grid_of

logger = logging.getLogger(__name__)

KEY = "vidaccel"
OVERRIDE = "optimized_attention_override"
# What ComfyUI's `patcher_extension` calls these places.
APPLY_MODEL, ON_PRE_RUN, ON_CLEANUP = "apply_model", "on_pre_run", "on_cleanup"
# percent_to_sigma and the sampler's own levels differ in the last digits: a bound must not lose a step by that.
SLACK = 1e-4


@dataclass
class Pass:
    """One forward pass: set up by the wrapper, read by the override. `layer` counts its self-attention calls."""

    grid: Grid
    steps: list[StepInfo]
    layer: int = 0


@dataclass
class _Dense:
    """What dense calls of the engine go through: the attention that was there before, for the call at work."""

    attention: Callable[..., torch.Tensor] | None = None
    heads: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given = {**self.options, "skip_reshape": True, "skip_output_reshape": True}
        return self.attention(q, k, v, self.heads, **given)


class NativeSession:
    """Sparse attention of one patched clone of a model.

    Args:
        method: its config.
        model: the diffusion model (`model.model.diffusion_model`), one of `GEOMETRIES`.
        start_percent, end_percent: the part of sampling that is sparse, from 0 to 1.
        percent_to_sigma: ComfyUI's, of this model.
        first_layers, last_layers: blocks that stay dense.
        min_tokens: shorter videos stay dense.
        backend: as for `vidaccel.accelerate`.

    Raises:
        ValueError: a value outside its bounds.
    """

    def __init__(
        self,
        method: Method,
        model: Any,
        percent_to_sigma: Callable[[float], float],
        *,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        first_layers: int = 0,
        last_layers: int = 0,
        min_tokens: int = 0,
        backend: str = "auto",
    ) -> None:
        if not 0 <= start_percent < end_percent <= 1:
            raise ValueError(
                f"start_percent is {start_percent} and end_percent {end_percent}: both must lie between 0 and 1, and "
                "the first below the second."
            )
        self.geometry: Geometry = GEOMETRIES[type(model).__name__]
        self.model = model
        self.min_tokens = min_tokens
        # Noise levels are compared as parts of the highest one, since some models' go beyond 1.
        self.highest = max(1.0, float(percent_to_sigma(1e-6)))
        above = None if start_percent <= 0 else round(min(1.0, self._level(percent_to_sigma(start_percent)) + SLACK), 5)
        below = None if end_percent >= 1 else round(max(0.0, self._level(percent_to_sigma(end_percent)) - SLACK), 5)
        self.engine = SparseAttention(
            method,
            num_layers=self.geometry.layers_of(model),
            schedule=DenseSchedule(
                first_layers=first_layers, last_layers=last_layers, sigma_above=above, sigma_below=below
            ),
            backend=backend,
            model=self.geometry.family,
        )
        self._dense = _Dense()
        for layer in range(self.engine.num_layers):
            self.engine.bind_dense(layer, self._dense.attend)
        self._run = -1

    def report(self) -> RunReport:
        """What the last runs did."""
        return self.engine.report()

    def start_run(self, *_: object) -> None:
        """A sampler begins: what was learnt of the last video is forgotten."""
        self._run += 1

    def end_run(self, *_: object) -> None:
        """A sampler has ended, or was interrupted: free the memory, keep the records."""
        self.engine.forget()

    def begin_pass(
        self, latent: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any], conditioning: dict[str, Any]
    ) -> Pass | None:
        """The state of a forward pass; None, said once, where it cannot be sparse."""
        grid = grid_of(self.geometry, self.model, latent, conditioning)
        if grid is None:
            self.engine.note(f"a latent of shape {tuple(latent.shape)} is no video: it stays dense", logging.WARNING)
            return None
        if grid.tokens < self.min_tokens:
            self.engine.note(f"{grid.tokens} tokens are below min_tokens ({self.min_tokens}): dense")
            return None
        level = float(sigma.flatten()[0])
        step, steps = _place(level, options.get("sample_sigmas"))
        branches = _branches(options)
        infos = [StepInfo(max(self._run, 0), step, steps, min(1.0, self._level(level)), b) for b in branches]
        return Pass(grid, infos)

    def attend(
        self,
        now: Pass,
        attention: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        options: dict[str, Any],
    ) -> torch.Tensor | None:
        """One attention call; None where it is none of ours (cross-attention, masks, other lengths).

        Args:
            now: the forward pass.
            attention: what would run without us, called as ComfyUI's attention functions are.
            q, k, v: `[B, N, H * D]`, or `[B, H, N, D]` with `skip_reshape`.
            heads: H. options: the other keyword arguments.
        """
        split = options.get("skip_reshape", False)
        length = q.shape[2 if split else 1]
        if k.shape != q.shape or v.shape != q.shape or length < now.grid.tokens:
            return None  # cross-attention, or a refiner of the text
        layout = now.grid.layout(length)
        if options.get("mask") is not None:
            self.engine.note("calls with an attention mask stay dense", logging.WARNING)
            return None
        if layout is None or q.shape[0] % len(now.steps):
            self.engine.note(
                f"calls over {length} tokens stay dense: the video has {now.grid.tokens}, and nothing tells what the "
                "others are",
                logging.WARNING,
            )
            return None
        layer, now.layer = now.layer, now.layer + 1
        if layer >= self.engine.num_layers:
            self.engine.note(f"more than {self.engine.num_layers} self-attention calls: the rest stay dense")
            return None
        if not split:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        self._dense.attention, self._dense.heads, self._dense.options = attention, heads, options
        parts = []
        # Branches that ComfyUI stacked in one batch are computed apart, as if they had been called apart: what a method
        # remembers of one must not meet the other, and a batch must give what single calls give.
        for step, *qkv in zip(now.steps, *(x.chunk(len(now.steps)) for x in (q, k, v)), strict=True):
            self.engine.enter(step, layout)
            parts.append(self.engine(*qkv, layer))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out if options.get("skip_output_reshape", False) else out.transpose(1, 2).flatten(2)

    def _level(self, sigma: float) -> float:
        return float(sigma) / self.highest


def patch_model(model: Any, method: Method, **settings: Any) -> tuple[Any, NativeSession | None]:
    """A clone of a model with sparse attention.

    Args:
        model: a ComfyUI `ModelPatcher`; stays as it is.
        method: what to do. settings: those of `NativeSession`.

    Returns:
        The clone and its session; the clone unpatched and None, with a warning, where the model is not known.

    Raises:
        ValueError: the model has sparse attention from this package already, or a value is outside its bounds.
    """
    clone = model.clone()
    diffusion = model.get_model_object("diffusion_model")
    known = type(diffusion).__name__
    if known not in GEOMETRIES:
        families = ", ".join(dict.fromkeys(g.family for g in GEOMETRIES.values()))
        logger.warning("sparse attention leaves %s dense: known are %s.", known, families)
        return clone, None
    options = clone.model_options["transformer_options"] = {**clone.model_options.get("transformer_options", {})}
    before = options.get(OVERRIDE)
    if KEY in options:
        raise ValueError("this model has a Sparse Attention node already: keep one of the two.")
    sampling = model.get_model_object("model_sampling")
    session = NativeSession(method, diffusion, sampling.percent_to_sigma, **settings)
    options[KEY] = None  # the mark of a patched model; the wrapper puts the pass in its place
    options[OVERRIDE] = make_override(session, before)
    clone.add_wrapper_with_key(APPLY_MODEL, KEY, make_wrapper(session))
    clone.add_callback_with_key(ON_PRE_RUN, KEY, session.start_run)
    clone.add_callback_with_key(ON_CLEANUP, KEY, session.end_run)
    return clone, session


def make_override(session: NativeSession, before: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """The attention override: a plain function, since old versions of ComfyUI copy what they find in the options."""

    @torch.compiler.disable
    def override(func, q, k, v, heads, *args, **kwargs):
        def attention(*inner, **options):
            return before(func, *inner, **options) if before is not None else func(*inner, **options)

        now = (kwargs.get("transformer_options") or {}).get(KEY)
        if now is not None and not args:
            out = session.attend(now, attention, q, k, v, heads, kwargs)
            if out is not None:
                return out
        return attention(q, k, v, heads, *args, **kwargs)

    return override


def make_wrapper(session: NativeSession) -> Callable[..., Any]:
    """The wrapper of one forward pass, which hands the override its place through the options."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = {**(transformer_options or {})}
        options[KEY] = session.begin_pass(x, t, options, kwargs)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return wrapper


def _place(sigma: float, levels: torch.Tensor | None) -> tuple[int, int | None]:
    """The step of a noise level among the sampler's, which end with 0, and how many there are."""
    if levels is None or len(levels) < 2:
        return 0, None
    return int((levels[:-1].float().cpu() - sigma).abs().argmin()), len(levels) - 1


def _branches(options: dict[str, Any]) -> list[str]:
    """A name for each conditioning that is stacked in the batch; one for a batch that says nothing."""
    kinds = options.get("cond_or_uncond") or [0]
    ids = options.get("uuids") or [None] * len(kinds)
    names = ("cond", "uncond")
    # Several prompts on one side are told apart by their ids.
    return [
        names[kind] if kinds.count(kind) == 1 and ids[i] is None else f"{names[kind]} {ids[i]}"
        for i, kind in enumerate(kinds)
    ]
