"""One self-attention layer of a transformer at work: what its attention call becomes."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...attention import SparseAttention
from ...attention.engine import DenseAttention
from ...attention.heads import ALL_HEADS, HeadShare
from .diffusers_hooks import scores_are_skipped
from .rank_heads import RankHeads
from .ulysses import Ulysses

StockAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""A model's own attention, `(q, k, v, mask) -> out`, `q [B, H, N, D]`."""

_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Site:
    """A layer's place in its engine, and how the sequence of its calls becomes one that a plan describes.

    Args:
        engine: decides and computes.
        layer: the site's number in running order, counted from 0.
        own_samples: the model calls attention once for each sample (Mochi), each with its own text.
        reads_prefix: keys begin with tokens that are no queries (Cosmos 3).
        weights: what was trained for the method in this layer.
    """

    def __init__(
        self,
        engine: SparseAttention,
        layer: int,
        *,
        own_samples: bool = False,
        reads_prefix: bool = False,
        weights: torch.nn.Module | None = None,
    ) -> None:
        self.engine, self.layer, self.weights = engine, layer, weights
        self.own_samples, self.reads_prefix = own_samples, reads_prefix
        self.trims = False  # whether tokens behind those of the layout are padding, in this forward pass
        self.shared: Ulysses | None = None  # how processes share the sequence of this forward pass
        self._shares: dict[tuple, RankHeads] = {}  # which heads are this process's, in this run
        self._run = -1
        self.dense = ""  # why calls of this forward pass stay dense, whatever the schedule says
        self.calls = 0
        self.processor: Any = None  # whose attention this is
        self._turn = 0
        self._number()

    def _number(self) -> None:
        self.number = next(_numbers)
        # A tensor, not a number: a Python int per layer would compile every layer anew.
        self.tensor = torch.tensor(self.number, device="cpu")
        _sites[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        # Groups of processes cannot be copied. The next forward pass says again which they are.
        return {**self.__dict__, "shared": None, "_shares": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy must not be answered for by the original in compiled blocks, which find their site by its number.
        self.__dict__.update(state)
        self._number()

    def enter(self, trims: bool, dense: str, shared: Ulysses | None = None) -> None:
        """Say what holds for the calls of the forward pass that begins."""
        self.trims, self.dense, self.shared, self._turn = trims, dense, shared, 0

    def pass_again(self) -> Callable[[], None]:
        """What brings the forward pass that was entered last back; see `SparseAttention.pass_again`."""
        return functools.partial(self.enter, self.trims, self.dense, self.shared)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        stock: StockAttention,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The call, eagerly.

        Args:
            q: `[B, H, n_q, D]`, padded where the model pads; the tokens of this process, where several share them.
            k, v: `[B, Hkv, n_kv, D]`; `n_kv` above `n_q` where keys have a prefix.
            mask: what the model gives its attention; None where that is only padding, which is cut off here.
            stock: the model's own attention.
            gate: what the layer's own weights for the method make of its input, of the shape of q; None where it has
                none of that kind.

        Returns:
            `[B, H, n_q, D]`; zeros at padding.
        """
        self.calls += 1
        dense = self.dense or ("attention mask" if mask is not None else "")
        dense = dense or ("perturbed attention" if scores_are_skipped() else "")

        def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return stock(q, k, v, mask)

        if self.shared is None:
            return self._all(q, k, v, gate, masked, dense, ALL_HEADS)
        heads, tokens = self._heads(self.shared, q, k), q.shape[2]
        if not dense:
            self.engine.check_able(q, k, v)
        dense = dense or self.engine.dense_reason(self.shared.tokens(tokens), q.device, self.layer)
        if dense:  # diffusers' own attention shares the heads itself
            out = self.engine(q, k, v, self.layer, dense=dense, stock=masked)
            return out if gate is None else out + self._added(q, k, v, gate, heads)
        q, k, v = (self.shared.gather(x, heads) for x in (q, k, v))
        gate = None if gate is None else self.shared.gather(gate, heads)
        return self.shared.scatter(self._all(q, k, v, gate, masked, "", heads), heads, tokens)

    def _added(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, heads: RankHeads
    ) -> torch.Tensor:
        """What the method adds to a dense call of processes that share the sequence, of the tokens of this one."""
        assert self.shared is not None
        tokens, layout = q.shape[2], self.engine.layout
        if layout is None or self.shared.tokens(tokens) != layout.tokens:
            return torch.zeros_like(q)
        q, k, v, gate = (self.shared.gather(x, heads) for x in (q, k, v, gate))
        nothing = q.new_zeros(()).expand_as(q)  # without memory of its own
        added = self.engine.method.complete(nothing, q, k, v, None, layout, gate)
        return self.shared.scatter(added, heads, tokens)

    def _heads(self, shared: Ulysses, q: torch.Tensor, k: torch.Tensor) -> RankHeads:
        """The heads of this process in a call, after what each head took in the last such call of this run."""
        step, place = self.engine.step, (self.engine.step.branch, self.engine.layouts, *q.shape[:2])
        if step.run != self._run:
            self._run, self._shares = step.run, {}
        heads = self._shares.get(place) or shared.heads(q.shape[1], k.shape[1])
        # With grouped heads, those of a group would have to stay together; and a backward pass that computes the layer
        # again must find the heads where they were.
        if self.engine.method.uneven_heads and q.shape[1] == k.shape[1] and not self.engine.with_gradients:
            heads = heads.balanced()
        self._shares[place] = heads
        return heads

    def _all(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        stock: DenseAttention,
        dense: str,
        heads: HeadShare,
    ) -> torch.Tensor:
        """The call with the whole sequence, and some heads or all."""
        count = len(self.engine.layouts)
        if count < 2:
            return self._one(q, k, v, gate, stock, 0, dense, heads)
        if self.own_samples:
            sample = self._whose(q.shape[2])
            self._turn = sample + 1
            return self._one(q, k, v, gate, stock, sample, dense, heads)
        if count != q.shape[0]:
            raise RuntimeError(f"a call with a batch of {q.shape[0]} in a forward pass with one of {count}.")
        one = (slice(i, i + 1) for i in range(count))
        return torch.cat(
            [self._one(q[i], k[i], v[i], None if gate is None else gate[i], stock, i.start, dense, heads) for i in one]
        )

    def _whose(self, tokens: int) -> int:
        """The sample of a call: they come in order, but caches leave some out, which the length of others tells."""
        layouts = self.engine.layouts
        turns = [(self._turn + ahead) % len(layouts) for ahead in range(len(layouts))]
        return next((sample for sample in turns if layouts[sample].tokens == tokens), turns[0])

    def _one(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        stock: DenseAttention,
        sample: int,
        dense: str,
        heads: HeadShare,
    ) -> torch.Tensor:
        """The call of samples that share a layout."""
        padded = q.shape[2]
        if self.trims:
            q, k, v = (x[:, :, : self.engine.layouts[sample].tokens] for x in (q, k, v))
        queries = q.shape[2]
        prefix = k.shape[2] - queries if self.reads_prefix else 0
        # Rows for the prefix are computed and thrown away: a plan's queries are its keys.
        rows = F.pad(q, (0, 0, prefix, 0)) if prefix else q
        out = self.engine(
            rows,
            k,
            v,
            self.layer,
            dense=dense,
            stock=(lambda rows, k, v: stock(q, k, v)) if prefix else stock,
            sample=sample,
            heads=heads,
            weights=self.weights if gate is None else gate[:, :, :queries],
            first=prefix,
        )
        if out.shape[2] > queries:
            out = out[:, :, -queries:]
        return F.pad(out, (0, 0, 0, padded - queries)) if padded > queries else out


def site_of(number: int) -> Site:
    """The site with a number."""
    return _sites[number]
