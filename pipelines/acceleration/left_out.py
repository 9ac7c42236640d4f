"""What caches over steps left out of a forward pass, as they say themselves.

Layers that made no call do not tell it: guidance leaves layers out, too (skip-layer, spatio-temporal). And whoever
counts calls inside the blocks breaks the graphs of compiled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..hooks.diffusers_hooks import FORECAST_HOOK, GUIDANCE_CACHE_HOOK, hooks_of

# The hook of diffusers that decides for a whole forward pass -> whether its state says that the last one was left out.
_DECIDES: Mapping[str, Callable[[Any], bool]] = {
    "fbc_leader_block_hook": lambda state: not state.should_compute,
    "mag_cache_leader_block_hook": lambda state: not state.should_compute,
    "sea_cache_root": lambda state: state.consecutive_cached > 0,
    "taylorseer_cache": lambda state: state.last_update_step != state.current_step,  # all of its layers at once
}
# Those that decide in single layers.
_IN_LAYERS = ("pyramid_attention_broadcast", "faster_cache_denoiser", "faster_cache_block")


def pass_was_left_out(transformer: torch.nn.Module) -> bool:
    """Whether a cache left out most layers of the forward pass that has just ended, or the pass itself.

    Asked in a forward hook of the transformer: later, caches do not know any more which branch of guidance it was.

    Args:
        transformer: without what wraps it.
    """
    return second_pass_was_left_out(transformer) or a_cache_left_it_out(transformer)


def a_cache_left_it_out(transformer: torch.nn.Module) -> bool:
    """Whether a cache left out most layers of the forward pass that has just ended; asked as above, or right after it
    inside of the forward pass of the transformer.
    """
    forecast = hooks_of(transformer).get(FORECAST_HOOK)
    if forecast is not None and forecast.left_out:
        return True  # otherwise another cache, within it, may have left out what it had computed
    for name, hook in _hooks(transformer):
        decides = _DECIDES.get(name)
        if decides is not None and hook.state_manager._context is not None:
            return decides(hook.state_manager.get_state())
    return any(_cache_dit_left_out(context) for context in _cache_dit_contexts(transformer))


def has_cache(transformer: torch.nn.Module) -> bool:
    """Whether a cache over steps is at work in a transformer, which leaves passes or layers of them out."""
    found = {name for name, _ in _hooks(transformer)}
    return bool(found & {FORECAST_HOOK, *_DECIDES, *_IN_LAYERS}) or bool(_cache_dit_contexts(transformer))


def second_pass_was_left_out(transformer: torch.nn.Module) -> bool:
    """Whether the pass that has just ended was one of guidance that `guidance_cache` left out; asked as above."""
    hook = hooks_of(transformer).get(GUIDANCE_CACHE_HOOK)
    return hook is not None and hook.left_out


def layers_may_be_left_out(transformer: torch.nn.Module) -> bool:
    """Whether a cache is at work that leaves out single layers of a forward pass, and does not tell which."""
    return any(name in _IN_LAYERS for name, _ in _hooks(transformer))


def _hooks(transformer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """diffusers' hooks by their names."""
    for module in transformer.modules():
        yield from hooks_of(module).items()


def _cache_dit_contexts(transformer: Any) -> list[Any]:
    """What cache-dit keeps, one for each stack of blocks; none without it."""
    manager = getattr(transformer, "_context_manager", None)
    return [manager.get_context(name) for name in getattr(transformer, "_context_names", ())] if manager else []


def _cache_dit_left_out(context: Any) -> bool:
    steps = context.cfg_cached_steps if context.is_separate_cfg_step() else context.cached_steps
    return bool(steps) and steps[-1] == context.get_current_step()
