"""Caches over steps at work in a transformer: ours, diffusers' and cache-dit's, told which steps they may not skip.

None of the others knows of steps that sparse attention keeps dense, MagCache is told the number of steps before it is
known, and cache-dit the number of passes in each. So before each forward pass each gets what the account knows
(`account.py`), by the state that it keeps itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from diffusers import (
    CacheMixin,
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import nearest_interp
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK

from ...attention import StepInfo
from ..acceleration.clock import StepClock
from ..acceleration.families import Family
from ..acceleration.ulysses import is_shared
from ..errors import first_line
from ..forecast.forecasts import Forecasts
from ..forecast.hook import Forecast, reads_latents
from ..hooks.beside_hooks import beside_hooks
from ..hooks.diffusers_hooks import hooks_of
from .block_names import use_own_names
from .dbcache import DBCache, check_dbcache
from .errors import PresetError, UnfitCacheError
from .levers import CACHES, FORECAST, Cache, forecast_settings, unshared_cache
from .loops import mend_loop
from .only_cache import check_no_cache


class CacheAtWork(Protocol):
    """A cache in one transformer."""

    one_context: ClassVar[bool]
    """Pipelines tell it the branch that runs (`cache_context`), one for all threads, before a pass can be refused."""

    def begin(self, steps: int | None) -> None:
        """A run of so many steps begins; None where their number is unknown."""

    def enter(self, step: StepInfo, keep: bool) -> None:
        """A forward pass begins, which may not be skipped if `keep`."""

    def notes(self) -> list[str]:
        """What a user should know of the last run, in sentences."""

    def remove(self) -> None:
        """Take the cache out. A second call does nothing."""


def leader_of(transformer: torch.nn.Module, name: str) -> Any:
    """The hook of a cache that decides, on the first block or on the model; it has a name in diffusers."""
    return next(_hooks_named(transformer, name))


def _hooks_named(transformer: torch.nn.Module, name: str) -> Iterator[Any]:
    return (hooks[name] for module in transformer.modules() if name in (hooks := hooks_of(module)))


def _forget(hook: Any) -> None:
    """All that a hook keeps of a run."""
    states = hook.state_manager
    context = states._context  # of the branch that runs: a run begins inside its first pass
    states.reset()
    states._context = context


class _OfDiffusers:
    """What the caches of diffusers share."""

    one_context: ClassVar[bool] = True

    def __init__(self, transformer: Any, config: Any, leader: str) -> None:
        self._transformer: Any = transformer
        transformer.enable_cache(config)
        use_own_names(transformer)
        self.config = config
        self.hook = leader_of(transformer, leader)
        self._names = False  # whether branches are named here

    def begin(self, steps: int | None) -> None:
        """Forget what a run that was broken off has left: diffusers does so at the end of a run that succeeds."""
        _forget(self.hook)

    def enter(self, step: StepInfo, keep: bool) -> None:
        """Name the branch where the pipeline does not (Kandinsky 5, Wan video to video, modular ones): each has what is
        kept for itself. And have a step computed that is to be kept."""
        if not self._is_there():
            return  # the account says so, see `OnlyCache`
        self._names = self._names or self.hook.state_manager._context is None
        if self._names:
            self._tell(CacheContext(name=step.branch), step)
        self._decide(step, keep)

    def _decide(self, step: StepInfo, keep: bool) -> None:
        """Have a step computed that is to be kept."""

    def _is_there(self) -> bool:
        """Whether nobody else took it out of the transformer."""
        return self._transformer is not None and self._transformer._cache_config is self.config

    def _tell(self, context: CacheContext, step: StepInfo) -> None:
        """Tell all hooks of the cache where the loop is."""
        told = replace(context, step_index=step.step, sigma=step.sigma, num_inference_steps=step.num_steps)
        _set_cache_context(self._transformer, told)

    def notes(self) -> list[str]:
        return []

    def state(self) -> Any:
        """What the cache keeps of the branch that runs."""
        return self.hook.state_manager.get_state()

    def remove(self) -> None:
        if self._is_there():  # otherwise it may be another's
            self._transformer._reset_stateful_cache()
            with beside_hooks(self._transformer):
                self._transformer.disable_cache()
        self._transformer = None


class _FirstBlock(_OfDiffusers):
    def __init__(self, transformer: Any, cache: Cache) -> None:
        super().__init__(transformer, FirstBlockCacheConfig(threshold=cache.limit), "fbc_leader_block_hook")
        mend_loop(transformer, self.hook, "head_block_output")
        self._keep = False
        decide = self.hook._should_compute_remaining_blocks
        # Of this hook alone, which goes with the cache.
        self.hook._should_compute_remaining_blocks = lambda residual: decide(residual) or self._keep

    def _decide(self, step: StepInfo, keep: bool) -> None:
        self._keep = keep


class _Mag(_OfDiffusers):
    def __init__(self, transformer: Any, cache: Cache) -> None:
        ratios = torch.tensor([float(ratio) for ratio in cache.settings["mag_ratios"]])
        others = {name: value for name, value in cache.settings.items() if name != "mag_ratios"}
        config = MagCacheConfig(threshold=cache.limit, num_inference_steps=len(ratios), mag_ratios=ratios, **others)
        super().__init__(transformer, config, "mag_cache_leader_block_hook")
        mend_loop(transformer, self.hook, "head_block_input")
        self._ratios = ratios

    def begin(self, steps: int | None) -> None:
        super().begin(steps)
        if steps is not None:
            self.config.num_inference_steps = steps
            self.config.mag_ratios = nearest_interp(self._ratios, steps)

    def _decide(self, step: StepInfo, keep: bool) -> None:
        state = self.state()
        # It counts its own passes, which are not the steps of a run that was broken off, or of a second transformer.
        state.step_index = min(step.step, self.config.num_inference_steps - 1)
        if keep:  # a step with nothing to go by is computed; the count of skipped steps stays what the cache made it
            state.previous_residual = None


class _Sea(_OfDiffusers):
    def __init__(self, transformer: Any, cache: Cache) -> None:
        super().__init__(transformer, SeaCacheConfig(threshold=cache.limit, **cache.settings), "sea_cache_root")

    def _decide(self, step: StepInfo, keep: bool) -> None:
        context = self.hook.state_manager._context
        # Of the pipelines of Wan, only text to video says more than the branch.
        if context.sigma is None:
            self._tell(context, step)
        state = self.state()
        if keep:
            state.previous_indicator = None  # a step with nothing to compare with is computed
        if state.gate_key is not None and step.step > state.gate_key[0] + 1:
            state.reset_trajectory()  # passes that guidance left out came between: it would warn of them, and do this


class _Taylor(_OfDiffusers):
    """diffusers' own choice of layers leaves out the attention of Wan, and sound; and what each layer of attention made
    would be kept several times. Here blocks make nothing in a step that is skipped, and the output is extrapolated."""

    def __init__(self, transformer: Any, cache: Cache) -> None:
        config = TaylorSeerCacheConfig(
            cache_interval=int(cache.limit),
            cache_identifiers=[_OUTPUTS],
            skip_predict_identifiers=[_BLOCKS],
            taylor_factors_dtype=torch.float32,  # a few numbers a token, and differences of what is nearly equal
            **{"max_order": 2, **cache.settings},
        )
        super().__init__(transformer, config, _TAYLORSEER_CACHE_HOOK)
        self._keep = False
        self._states: dict[int, _MadeTensors] = {}  # by the identity of diffusers' states, which they hold
        self._hooks = list(_hooks_named(transformer, _TAYLORSEER_CACHE_HOOK))
        for hook in self._hooks:
            hook._measure_should_compute = functools.partial(self._computes, hook._measure_should_compute)

    def begin(self, steps: int | None) -> None:
        self._states = {}
        for hook in self._hooks:  # each layer has its own states
            _forget(hook)

    @torch.compiler.disable
    def _computes(self, own: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        compute, state = own()
        if id(state) not in self._states:
            self._states[id(state)] = _MadeTensors(state)
        return compute or self._keep, self._states[id(state)]

    def _decide(self, step: StepInfo, keep: bool) -> None:
        self._keep = keep


class _MadeTensors:
    """What diffusers' TaylorSeer keeps of a layer, told of the tensors alone that it made: blocks of Kandinsky 6 make
    None beside them where there is no sound.

    Args:
        state: of a layer and a branch.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._there: list[bool] = []  # of each output of the last computed pass, whether it is a tensor

    def update(self, outputs: Sequence[torch.Tensor | None]) -> None:
        """Take what a computed pass made."""
        self._there = [output is not None for output in outputs]
        self._state.update(tuple(output for output in outputs if output is not None))

    def predict(self) -> list[torch.Tensor | None]:
        """What stands for a pass that is not computed."""
        made = iter(self._state.predict())
        return [next(made) if there else None for there in self._there]


_BLOCKS = r"\w*block\w*\.\d+"
_OUTPUTS = r"(\w+_)?(proj_out|out_layer)"
"""Layers that make the output of a transformer, for video and for sound."""


_KINDS: dict[str, Callable[[Any, Cache], CacheAtWork]] = {
    "first_block": _FirstBlock,
    "magcache": _Mag,
    "seacache": _Sea,
    "taylorseer": _Taylor,
    "cache_dit": DBCache,
}


def install_cache(name: str, transformer: Any, cache: Cache, family: Family, clock: StepClock) -> CacheAtWork:
    """Put a cache into a transformer that `check_cache` let through.

    Args:
        name: of the transformer in its pipeline.
        transformer: without what wraps it.
        cache: for it.
        family: of the transformer.
        clock: of the pipeline, one for all its transformers.

    Raises:
        PresetError: it refuses all the same.
    """
    try:
        with beside_hooks(transformer):
            if cache.name == FORECAST:
                return Forecast(name, transformer, family.timestep, clock, Forecasts(forecast_settings(cache)))
            return _KINDS[cache.name](transformer, cache)
    except (ValueError, TypeError, AssertionError) as error:
        raise UnfitCacheError(first_line(error).rstrip("."), cache.name) from error


def check_cache(part: str, transformer: Any, layers: int, cache: Cache) -> None:
    """Raise PresetError where a transformer cannot have a cache, before it has; UnfitCacheError where it never can.

    Args:
        part: name of the transformer.
        transformer: without what wraps it.
        layers: blocks of it with self-attention.
        cache: for it.
    """
    check_no_cache(part, transformer, "cache", cache.name)
    check_whole(part, transformer, cache.name)
    if cache.name == FORECAST:
        if not reads_latents(transformer):
            problem = f"a {type(transformer).__name__} ({part}) does not say which of its inputs are the latents"
            raise UnfitCacheError(problem, cache.name)
        return
    if CACHES[cache.name].package:
        check_dbcache(part, transformer, layers, cache)
        return
    kind = type(transformer).__name__
    if not isinstance(transformer, CacheMixin):
        raise UnfitCacheError(f"diffusers has no caches for a {kind} ({part})", cache.name)
    if cache.name == "taylorseer":
        _check_extrapolates(kind, transformer, cache)
        return
    blocks = [
        block
        for name, child in transformer.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, torch.nn.ModuleList)
        for block in child
    ]
    if len(blocks) < 2:
        raise PresetError("cache", f"a {kind} with {len(blocks)} blocks has nothing to skip", "", cache.name)
    for block in blocks:
        try:
            TransformerBlockRegistry.get(type(block))
        except ValueError:
            problem = f"diffusers does not know the {type(block).__name__} of a {kind} to its caches"
            raise UnfitCacheError(problem, cache.name) from None
    if cache.name == "seacache" and not _sea_reads(transformer):
        problem = f"diffusers' SeaCache reads Wan without channels beside its own, and Cosmos 3, not this {kind}"
        raise UnfitCacheError(problem, cache.name)


def check_whole(part: str, transformer: Any, cache: str) -> None:
    """Raise PresetError for a cache that would see parts of sequences alone.

    Args:
        part, transformer: see `check_cache`. cache: its name.
    """
    if is_shared(transformer) and (why := unshared_cache(cache)):
        problem = f"processes share the sequence of the {part}, and {why}"
        raise PresetError("cache", problem, "Take forecast, or leave the cache or enable_parallelism out.", cache)


def _check_extrapolates(kind: str, transformer: torch.nn.Module, cache: Cache) -> None:
    """TaylorSeer finds layers by their names."""
    what = {
        "blocks that could be skipped": any(re.fullmatch(_BLOCKS, name) for name, _ in transformer.named_modules()),
        "layer that makes its output": any(re.fullmatch(_OUTPUTS, name) for name, _ in transformer.named_children()),
    }
    missing = next((name for name, there in what.items() if not there), "")
    if missing:
        raise UnfitCacheError(f"a {kind} has no {missing} under a known name", cache.name)


def _sea_reads(transformer: Any) -> bool:
    if type(transformer).__name__ == "Cosmos3OmniTransformer":
        return True
    config = transformer.config
    return type(transformer).__name__ == "WanTransformer3DModel" and config.in_channels == config.out_channels
