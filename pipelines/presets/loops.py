"""Models whose own loop does more than hand states from block to block, and the caches of diffusers that count on it.

FirstBlockCache and MagCache keep what the blocks add to the video, put it behind the first block of a pass that is
skipped, and have all others hand on what they get. With a loop that changes states between blocks, this makes another
output than was computed, even of the same input. What is changed here is in the hooks of a cache, and goes with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers.hooks.first_block_cache import FBCBlockHook

from ..hooks.diffusers_hooks import hooks_of


class _Block(NamedTuple):
    """A block, and the hook of the cache on it."""

    module: torch.nn.Module
    hook: Any


class _AddedOnce:
    """Takes what a loop adds between blocks (the hints of Wan VACE) out of what a cache keeps.

    The loop adds it to a skipped pass as well, computed anew; what the cache kept of it would come on top. So the
    states that the cache measures from move along with what the loop adds, in passes that are computed.
    """

    def __init__(self, blocks: Sequence[_Block], start: str) -> None:
        self._start = start
        self._made: torch.Tensor | None = None  # by the last block, in the pass that runs
        for block in blocks[:-1]:
            block.hook.fn_ref.post_forward = self._after
        for block in blocks[1:]:
            block.hook.fn_ref.pre_forward = functools.partial(self._before, block.hook)

    @torch.compiler.disable
    def _after(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        self._made = output
        return output

    @torch.compiler.disable
    def _before(self, hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        made, self._made = self._made, None
        given = hook._metadata._get_parameter_from_args_kwargs("hidden_states", args, kwargs)
        state = hook.state_manager.get_state()
        if state.should_compute and given is not made:
            setattr(state, self._start, getattr(state, self._start) + (given - made))
        return args, kwargs


def _added_once(transformer: Any, blocks: Sequence[_Block], start: str) -> None:
    _AddedOnce(blocks, start)


def _through_the_decoder(transformer: Any, blocks: Sequence[_Block], start: str) -> None:
    """The decoder of Motif-Video begins with the video as it was before all blocks, and has that of the encoder for its
    text. In a pass that is skipped, what the cache kept is in the encoder's, so the decoder hands on that."""
    if not transformer.config.num_decoder_layers:
        return
    first, last = blocks[-transformer.config.num_decoder_layers].hook, blocks[-1]
    first._metadata = replace(first._metadata, hidden_states_argument_name="encoder_hidden_states")
    if isinstance(last.hook, FBCBlockHook):
        last.hook.fn_ref.forward = functools.partial(_last_of_a_decoder, *last)


def _last_of_a_decoder(module: torch.nn.Module, hook: Any, *args: Any, **kwargs: Any) -> Any:
    """What FirstBlockCache does in the last block, without the text, of which a decoder has none left to compare."""
    state = hook.state_manager.get_state()
    if not state.should_compute:
        return hook.new_forward(module, *args, **kwargs)
    output = hook.fn_ref.original_forward(*args, **kwargs)
    kept = output[hook._metadata.return_hidden_states_index] - state.head_block_output[0]
    state.tail_block_residuals = (kept, kept.new_zeros(()))
    return output


_MENDS: Mapping[str, Callable[[Any, Sequence[_Block], str], None]] = {
    "WanVACETransformer3DModel": _added_once,
    "MotifVideoTransformer3DModel": _through_the_decoder,
}


def mend_loop(transformer: torch.nn.Module, leader: Any, start: str) -> None:
    """Have a skipped pass make what the computed one made, of the same input, where the model's loop would prevent it.

    Args:
        transformer: with a cache that `use_own_names` has seen.
        leader: the hook of the cache that decides.
        start: of its state, what the cache measures from: the states that it will add to in a skipped pass.
    """
    mend = _MENDS.get(type(transformer).__name__)
    if mend is None:
        return
    blocks = [
        _Block(module, hook)
        for module in transformer.modules()
        for hook in hooks_of(module).values()
        if getattr(hook, "state_manager", None) is leader.state_manager
    ]
    mend(transformer, blocks, start)
