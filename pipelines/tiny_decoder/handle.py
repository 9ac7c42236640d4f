"""`tiny_decoder`: a pipeline whose frames come from a tiny decoder, removable without a trace."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from ...attention.account.timing import Span
from ...autoencoders.dtypes import computing_dtype
from ...autoencoders.tiny import TinyVideoDecoder, frames_of, to_transformer
from ..acceleration.copies import CopiedNotPickled
from ..acceleration.families import unwrap
from ..hooks.removed import refuse_removed
from ..hooks.replaced import was_replaced
from ..hooks.undo import TINY_DECODER
from .placed import Placed
from .source import find_decoder


class _Decode(CopiedNotPickled):
    """What an autoencoder has as `decode` meanwhile.

    Args:
        vae: the autoencoder. decoder: in its place.
        dtype: in which it computes; None for `own`, and float32 on the CPU.
        own: of the transformer.
    """

    def __init__(self, vae: Any, decoder: TinyVideoDecoder, dtype: torch.dtype | None, own: torch.dtype) -> None:
        self.vae, self.dtype = vae, dtype
        self._placed = Placed(decoder, dtype)
        # Of weights that are kept in 8 bits, what they are computed in is not said.
        self.own = torch.bfloat16 if own.itemsize == 1 else own
        self.spans: list[Span] = []

    @property
    def decoder(self) -> TinyVideoDecoder:
        """The one that was given, or the copy of it that was cast or moved."""
        return self._placed.decoder

    @torch.no_grad()
    def __call__(
        self, z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """As the autoencoder's own; what only a large decoder has a use for, such as a time, is not read."""
        self.decoder.check_latents(z)
        with Span(z.device) as span, torch.autocast(z.device.type, enabled=False):
            dtype = self.dtype or (torch.float32 if z.device.type == "cpu" else self.own)
            decoder = self._placed.on(z.device, dtype)
            latents = z.float()
            if decoder.config.latents == "transformer":
                latents = to_transformer(self.vae, latents)
            frames = decoder(latents, frames=frames_of(self.vae, z.shape[2])).to(z.dtype)
        self.spans = [*self.spans[-9:], span]
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Decode:
        memo[id(self.spans)] = []  # events of a GPU cannot be copied
        return super().__deepcopy__(memo)


class TinyDecoder:
    """A tiny decoder at work in a pipeline. Made by `tiny_decoder`, and by presets of what they found when they checked
    it; a context manager that removes itself.

    Attributes:
        name: of the decoder.
    """

    def __init__(self, pipe: Any, found: tuple[TinyVideoDecoder, str], dtype: torch.dtype | None = None) -> None:
        decoder, self.name = found
        if hasattr(pipe.vae, TINY_DECODER):
            raise RuntimeError(
                f"the autoencoder of this {type(pipe).__name__} has a tiny decoder already: call remove() on its "
                "handle first."
            )
        self._vae: Any = unwrap(pipe.vae)
        transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
        own = getattr(transformer, "dtype", torch.float32)
        # Weakly: a copy of the autoencoder alone would take along the pipeline.
        self._pipe: weakref.ref[Any] | None = weakref.ref(pipe)
        self._before = self._vae.__dict__.get("decode")  # a compiled one, for example
        self._vae.decode = self._decode = _Decode(self._vae, decoder, dtype, own)
        setattr(self._vae, TINY_DECODER, self)

    @property
    def seconds(self) -> list[float]:
        """How long each of the last decodes took, ten at most."""
        return [span.seconds() for span in self._decode.spans]

    def notes(self) -> list[str]:
        """What a report should tell."""
        if self._left_behind():
            return [
                "vae was replaced after tiny_decoder was called, and the new one has its own decoder: remove() this "
                "handle and call vidaccel.tiny_decoder again"
            ]
        if not self._decode.spans:
            return []
        return [f"frames come from {self.name}, which is near to the autoencoder's own decoder and not the same"]

    def remove(self) -> None:
        """Give the autoencoder its own decoder back. A second call does nothing."""
        if self._at_work():
            del self._vae.decode
            if self._before is not None:
                self._vae.decode = self._before
            delattr(self._vae, TINY_DECODER)

    def __enter__(self) -> TinyDecoder:
        refuse_removed(self._at_work(), "vidaccel.tiny_decoder")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _at_work(self) -> bool:
        return getattr(self._vae, TINY_DECODER, None) is self

    def _left_behind(self) -> bool:
        """Whether the pipeline has another autoencoder since."""
        pipe = self._pipe() if self._pipe is not None else None
        return self._at_work() and pipe is not None and was_replaced(pipe, "vae", self._vae)

    def __deepcopy__(self, memo: dict[int, Any]) -> TinyDecoder:
        new = object.__new__(type(self))
        memo[id(self)] = new
        pipe = self._pipe() if self._pipe is not None else None
        twin = memo.get(id(pipe))  # None where the autoencoder is copied without it
        new.__dict__.update(copy.deepcopy({**self.__dict__, "_pipe": None}, memo))
        new._pipe = None if twin is None else weakref.ref(twin)
        return new

    def __repr__(self) -> str:
        state = self.name if self._at_work() else "removed"
        state += ", of an autoencoder that the pipeline has no more" if self._left_behind() else ""
        return f"<vidaccel tiny decoder: {state}>"


def tiny_decoder(
    pipe: Any, source: str | Path | TinyVideoDecoder | None = None, *, dtype: torch.dtype | str | None = None
) -> TinyDecoder:
    """Decode the latents of a pipeline with a tiny decoder in the place of its autoencoder's own.

    In runs of few steps the autoencoder takes a large part of the time and the most memory. A tiny decoder takes a
    small part of both, and what it makes is near to the same: fine texture is a little softer. Images and videos that a
    pipeline is given are encoded by the autoencoder as before, `decode_chunks` of DC-AE-V remains that of its own
    decoder, and what else is at work in the pipeline goes on. Other pipelines with the same autoencoder are changed
    with this one.

    Args:
        pipe: a diffusers pipeline with an autoencoder of Wan, HunyuanVideo, HunyuanVideo 1.5, CogVideoX, LTX-2,
            Qwen-Image, or DC-AE-V.
        source: a published file in the layout of TAEHV, such as taew2_1.safetensors (github.com/madebyollin/taehv) or
            LightX2V's lighttaew2_1.safetensors; a folder that the recipe `tiny-decoder` made, that of its training, or
            a hub id of one; a decoder, which is used as it is, or as a copy where it has to be cast or moved; or None
            for what the model has of its own, as the built-in DC-VideoGen model does. A decoder that is compiled or has
            hooks (offloading, layerwise casting) is not copied, and keeps its dtype.
        dtype: in which it computes, maybe by name, such as "bfloat16"; None for the transformer's, on the CPU float32.

    Returns:
        A handle with `remove()`, `seconds` and `notes()`.

    Raises:
        TinyDecoderError: a decoder that cannot be read, one of another autoencoder, or a `dtype` for one that is
            compiled or has hooks and computes in another.
        RuntimeError: the autoencoder has a tiny decoder already.
        ValueError: a dtype whose name is unknown, or in which layers do not compute, such as int8.
    """
    chosen = computing_dtype(dtype)
    return TinyDecoder(pipe, find_decoder(pipe, source), chosen)
