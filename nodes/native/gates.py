"""Gates of VSA at work in a native model: what each self-attention layer is given, and what its gate makes of it.

ComfyUI tells an attention override the queries, keys and values of a call, and a gate reads what the layer was given
before. So for as long as a forward pass runs, a hook before each self-attention layer writes its input into that
pass, whose override takes it. Whatever another node makes of the layer's `forward`, the hook comes before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...attention import Method, VideoLayout
from .calls import ForwardPass


class Gates:
    """The gates of one MODEL.

    Args:
        layers: number of a layer -> its gate, `[..., C] -> [..., H * D]`.
        key: of `transformer_options`, under which a forward pass has its `ForwardPass`.
    """

    def __init__(self, layers: Mapping[int, nn.Module], key: str) -> None:
        self._layers, self._key = layers, key
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._hook: tuple[bool, Callable[..., None]] | None = None

    def watch(self, model: Any) -> None:
        """Begin to see what the self-attention layers of a model are given; a second call does nothing.

        Args:
            model: ComfyUI's module of the diffusion model, with Wan's blocks.
        """
        hook = self._hook_before()
        for block in model.blocks:
            if block.self_attn not in self._handles:
                handle = block.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
                self._handles[block.self_attn] = handle

    def release(self, model: Any = None) -> None:
        """Take the hooks away again, of one model, or of all: ComfyUI runs a model on each GPU from a thread of its
        own."""
        chosen = list(self._handles) if model is None else [block.self_attn for block in model.blocks]
        for attention in chosen:
            if handle := self._handles.pop(attention, None):
                handle.remove()

    def take(self, current: ForwardPass, layer: int) -> torch.Tensor:
        """What a layer was given, `[B, N, C]`, in the attention call that it makes now.

        Raises:
            ValueError: nobody saw it.
        """
        given, current.given = current.given, None
        if given is None:
            raise ValueError(
                f"block {layer} computes its self-attention in a way that its gate cannot follow: what the layer is "
                "given was not seen. Another node has taken its place: leave that node out."
            )
        return given

    def of(self, layer: int, given: torch.Tensor, heads: int) -> torch.Tensor:
        """The gate of each token and channel, `[B, H, N, D]`, of what the layer is given, `[B, N, C]`."""
        return self._layers[layer](given).unflatten(-1, (heads, -1)).transpose(1, 2)

    def complete(
        self,
        method: Method,
        layout: VideoLayout,
        layer: int,
        given: torch.Tensor,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """A dense call with what its method adds to dense calls, too.

        Args:
            method, layout: of the call.
            layer, given: see `of`.
            out, q, k, v: `[B, H, N, D]`.
        """
        if not method.completes_dense:
            return out
        return method.complete(out, q, k, v, None, layout, self.of(layer, given, q.shape[1]))

    def _hook_before(self) -> Callable[..., None]:
        """The hook: the same function in every pass, and outside of what torch.compile traces, as the override is."""
        compiling = "torch._dynamo" in sys.modules
        if self._hook is None or self._hook[0] != compiling:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                current = (kwargs.get("transformer_options") or {}).get(self._key)
                if current is not None:
                    current.given = args[0] if args else kwargs.get("x")

            self._hook = compiling, torch.compiler.disable(hook) if compiling else hook
        return self._hook[1]
