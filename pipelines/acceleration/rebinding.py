"""The seam between diffusers' attention processors and sparse attention: their own code, with its attention rebound.

Every video family of diffusers has processors of its own: projections, norms, rotary embedding, gates, the text beside
the video. All of them end in one of two calls, `dispatch_attention_fn` or `F.scaled_dot_product_attention`, and nothing
else of them concerns sparse attention. So for a processor class C this makes `class SparseC(C)`, whose `__call__` is
C's own code object with a copy of its globals, in which these two names are ours. Nothing is patched on a class, a
module or diffusers; what diffusers changes in C's code holds for SparseC too, and a dense call is stock's call.

What breaks it, and what is done about it:

- Callers filter keyword arguments by the signature of `__call__`: ours is wrapped by `functools.wraps`, which hands the
  signature through. Otherwise rotary embeddings would be dropped in silence.
- Dynamo looks globals up in `sys.modules[__name__]`, which would be the original module: the copy has no `__name__`.
- Our two functions must know which processor runs: a `threading.local`, which Dynamo traces (but no `ContextVar`).
- A processor whose code has neither name cannot be rebound and is refused by name (`NotRebindable`).
- The copy of the globals is made once: who patches the module of the processor afterwards is not seen. Sites that make
  no call are reported after the first forward pass.
- A padding mask is not wanted where the layout says what is valid, and one family builds an N x N mask from it in every
  layer before it dispatches. There the processor gets `PADDING`, which survives that arithmetic and costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .copies import CopiedNotPickled
from .site import Site, StockAttention, site_of
from .vsa_gates import gate_of

_running = threading.local()
SETTINGS = {"backend": "_attention_backend", "parallel_config": "_parallel_config"}  # of processors, for the dispatch
_NAMES = {"dispatch_attention_fn", "scaled_dot_product_attention"}


class NotRebindable(TypeError):
    """A processor whose code makes no attention call that could be taken over."""


class Padding:
    """Stands for a mask that hides padding alone, which the layout tells too."""

    shape = (0, 0)

    def bool(self) -> Padding:
        return self

    def view(self, *sizes: int) -> Padding:
        return self

    repeat = transpose = view

    def __and__(self, other: object) -> Padding:
        return self


PADDING = Padding()


class SparseProcessor(CopiedNotPickled):
    """What all rebound processors have in common: their site. Made by `rebind`."""

    site: Site
    _dispatch: Callable[..., torch.Tensor] | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.site.processor = self

    def settings(self) -> dict[str, Any]:
        """What is set on this processor, as it was on the one before: a backend, or the processes that share a call."""
        return {name: value for name, value in self.__dict__.items() if name != "site"}

    def stock(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The attention of the processor that was there, `[B, H, N, D]`, with the backend that the user chose."""
        gqa = q.shape[1] != k.shape[1]
        if type(self)._dispatch is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        more = {name: getattr(self, attribute, None) for name, attribute in SETTINGS.items()}
        return type(self)._dispatch(q, k, v, attn_mask=mask, enable_gqa=gqa, **more).transpose(1, 2)


def rebind(processor: Any, site: Site) -> SparseProcessor:
    """A copy of a processor whose attention call is a site's.

    Raises:
        NotRebindable: its code makes no such call, or it is a module with weights of its own.
    """
    cls: Any = type(processor)
    code = inspect.unwrap(cls.__call__)
    if isinstance(processor, torch.nn.Module) or not isinstance(code, types.FunctionType):
        raise NotRebindable(f"{cls.__name__} is no plain attention processor, so its attention call cannot be rebound.")
    new = object.__new__(_rebound(cls, code.__globals__.get("dispatch_attention_fn")))
    new.__dict__.update(processor.__dict__)
    new.site = site
    site.processor = new
    return new


@functools.cache
def _rebound(cls: type, dispatch: Callable[..., torch.Tensor] | None) -> type[SparseProcessor]:
    """The class of rebound processors of a class, whose module has this `dispatch_attention_fn`."""
    code = inspect.unwrap(cls.__call__)
    names = _names_in(code.__code__) & _NAMES
    if not names:
        raise NotRebindable(
            f"{cls.__name__} calls neither {' nor '.join(sorted(_NAMES))}, so there is no attention call to rebind."
        )
    # A nested function shares the globals of the function around it.
    own = {name: value for name, value in code.__globals__.items() if name != "__name__"}
    own |= {"dispatch_attention_fn": _dispatch_for(dispatch), "F": _Functional()}
    call = types.FunctionType(code.__code__, own, code.__name__, code.__defaults__, code.__closure__)
    call.__kwdefaults__ = code.__kwdefaults__

    parameters = list(inspect.signature(code).parameters)
    place = parameters.index("attention_mask") - 1 if "attention_mask" in parameters else len(parameters)

    @functools.wraps(code)
    def sparse_call(self: SparseProcessor, *args: Any, **kwargs: Any) -> Any:
        if self.site.trims:
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = PADDING
            elif len(args) > place and args[place] is not None:
                args = (*args[:place], PADDING, *args[place + 1 :])
        _running.site, _running.gate = self.site, gate_of(*args, **kwargs)
        try:
            return call(self, *args, **kwargs)
        finally:
            _running.site = _running.gate = None

    used = dispatch if "dispatch_attention_fn" in names else None
    attributes = {"__call__": sparse_call, "_dispatch": staticmethod(used) if used else None, "__module__": __name__}
    return type(f"Sparse{cls.__name__}", (SparseProcessor, cls), attributes)


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _dispatch_for(dispatch: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """`dispatch_attention_fn` as rebound processors see it: `[B, N, H, D]`."""

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
            out = dispatch(
                *(x.transpose(1, 2) for x in (q, k, v)),
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
            return out.transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _call(q, k, v, attn_mask, stock, plain=_plain(q, dropout_p, is_causal, scale)).transpose(1, 2)

    return dispatch_attention_fn


class _Functional:
    """`torch.nn.functional` as rebound processors see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def pad(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if isinstance(x, Padding) else F.pad(x, *args, **kwargs)

    @staticmethod
    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
            more: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, **more)

        return _call(query, key, value, attn_mask, stock, plain=_plain(query, dropout_p, is_causal, scale))


def _plain(q: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> bool:
    """Whether a call is the softmax attention that plans are for: every query may see every key."""
    usual = scale is None or math.isclose(scale, q.shape[-1] ** -0.5, rel_tol=1e-6)  # as 1 / sqrt(D) differs in a bit
    if not usual and not torch.compiler.is_compiling():
        told = f"attention calls with a scale of their own ({scale:.4g} for heads of {q.shape[-1]}) stay dense"
        _running.site.engine.note(told, logging.WARNING)
    return not is_causal and dropout_p == 0.0 and usual


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, stock: StockAttention, plain: bool
) -> torch.Tensor:
    """One attention call of the running processor, `[B, H, N, D]`."""
    if isinstance(mask, Padding):
        mask = None
    if not plain or not (mask is None or isinstance(mask, torch.Tensor)):
        return stock(q, k, v, mask)  # causal, or with a mask of blocks: not what plans are for
    q, k, v = _under_autocast(q, k, v)
    site, gate = _running.site, _running.gate
    if gate is not None:
        gate = gate.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)  # by head, as q
    if torch.compiler.is_compiling():
        return site_attention(q, k, v, mask, site.tensor, gate)
    return site.attend(q, k, v, mask, stock, gate)


def _under_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v as torch's own attention takes them under autocast.

    Norms are computed in float32 there, on a GPU, and leave q and k in it, where v comes from a linear layer in half
    precision.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


# `torch.compile` cannot trace a step that looks at data to decide what to compute, so a compiled block sees one opaque
# operator. A CUDA graph would repeat in every step what that one has decided in one of them.
_UNSAFE = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("vidaccel::site_attention", mutates_args=(), tags=_UNSAFE)
def site_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    site: torch.Tensor,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """The call of a site as one operator.

    Args:
        q: `[B, H, n_q, D]`.
        k, v: `[B, Hkv, n_kv, D]`.
        mask: of the model.
        site: the site's number.
        gate: see `Site.attend`.

    Returns:
        `[B, H, n_q, D]`, in memory token by token, whatever the layout of q: that may be another one when the graph
        runs than when it was made. Models merge the heads behind it, which then copies nothing.
    """
    here = site_of(int(site))
    made = here.attend(q, k, v, mask, here.processor.stock, gate)
    wanted = _token_by_token(q)
    return made if made.stride() == wanted.stride() else wanted.copy_(made)


@site_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    site: torch.Tensor,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    return _token_by_token(q)


def _token_by_token(q: torch.Tensor) -> torch.Tensor:
    """Memory for an output in the shape of q, `[B, H, N, D]`, with the heads of a token side by side."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _refuse_gradients(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    """Called before a compiled forward pass with gradients; without it, the backward pass alone would fail."""
    raise RuntimeError(
        "sparse attention has no backward inside torch.compile: train without compiling, or run the compiled model "
        "under torch.no_grad()."
    )


site_attention.register_autograd(lambda ctx, grad: None, setup_context=_refuse_gradients)
