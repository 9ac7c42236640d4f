"""A tiny decoder where latents are, in the dtype that is wanted, and the one that was given as it was."""

from __future__ import annotations

import copy

import torch

from ...autoencoders.tiny import TinyVideoDecoder
from ..hooks.diffusers_hooks import hooks_of
from ..hooks.group_offloading import is_in_group
from .source import TinyDecoderError


class Placed:
    """A decoder that is used as it is where that suffices, otherwise as a copy.

    One that is compiled or hooked (offloading, layerwise casting) stays itself, in its own dtype: a copy loses what was
    compiled, and hooks know the weights that they were put on.

    Args:
        decoder: as it was given.
        dtype: that was asked for; None for any.

    Raises:
        TinyDecoderError: of one that stays as it is another dtype was asked for.
    """

    def __init__(self, decoder: TinyVideoDecoder, dtype: torch.dtype | None) -> None:
        self.decoder = decoder
        self._ours = False
        parts = list(decoder.modules())
        self._moves = any(is_in_group(part) or hasattr(part, "_hf_hook") for part in parts)
        self._stays = self._moves or any(_is_compiled(part) or hooks_of(part) for part in parts)
        if self._stays and dtype not in (None, decoder.dtype):
            raise TinyDecoderError(
                f"dtype is {dtype}, and this decoder is compiled or has hooks, with which it computes in "
                f"{decoder.dtype}: leave dtype out, or cast it before it is compiled or hooked."
            )

    def on(self, device: torch.device, dtype: torch.dtype) -> TinyVideoDecoder:
        """The decoder for latents on `device`, computing in `dtype` unless it stays as it is."""
        if self._moves:
            return self.decoder
        tensors = [*self.decoder.parameters(), *self.decoder.buffers()]
        wanted = None if self._stays else dtype
        if any(x.device != device or (wanted and x.is_floating_point() and x.dtype != wanted) for x in tensors):
            if not (self._ours or self._stays):
                self.decoder, self._ours = copy.deepcopy(self.decoder), True
            torch.nn.Module.to(self.decoder, device, wanted)  # diffusers' own warns of what there is none of
        return self.decoder


def _is_compiled(module: torch.nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
