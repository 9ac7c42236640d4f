"""`BlockPlan`: which keys every tile of queries reads, and in which token order. The one interface of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .gradients import normal_tensors
from .groups import repeat_heads
from .orders import invert
from .plan_checks import check_promises, check_shapes
from .runs import FEW_RUNS, cut_segments, expand_runs, merge_segments, starts_of
from .skipped import SkippedClusters

TILES, RUNS = ("tile_start", "tile_len"), ("run_start", "run_len")
TENSORS = (*TILES, *RUNS, "q_order", "kv_order", "linear", "coarse")
KEPT = ("_block_masks", "_walks", "_masks", "_copies")
"""What backends make of a plan, and keep on it."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The sparsity of one attention call: query tiles, and the runs of keys each tile reads.

    `Bp` is 1 or the batch size, `Hp` is 1 or the number of heads: a dimension of 1 holds for all. Tile and run
    positions count in the *permuted* sequences: permuted query `i` is token `q_order[..., i]`, permuted key `j` is
    token `kv_order[..., j]`; an order of `None` is the sequence itself. Tiles ascend, do not overlap and cover every
    query; a tile of length 0 is padding. The runs of a tile ascend and do not overlap; a run of length 0 is padding. A
    tile without any run gives an output of 0 and a log-sum-exp of -inf.

    Heads are those of the queries, also where k and v have fewer (grouped-query attention). `kv_order` alone may have
    one entry for each of G groups of neighbouring heads: one for each head of k and v (SVG2, Tangent) leaves k and v as
    many heads as they have, one for each query head (SVG) repeats k and v where a backend puts them in order.

    Args:
        n_q: number of queries.
        n_kv: number of keys.
        tile_start: `[Bp, Hp, T]` int32, first permuted query of the tile.
        tile_len: `[Bp, Hp, T]` int32, queries in the tile; any length, backends cut to what suits them.
        run_start: `[Bp, Hp, T, R]` int32, first permuted key of the run.
        run_len: `[Bp, Hp, T, R]` int32, keys in the run; unaligned.
        q_order: `[1|B, 1|H, n_q]` int64 or None.
        kv_order: `[1|B, 1|G|H, n_kv]` int64 or None; G divides `Hp`.
        block: `(queries, keys)` when tiles and runs are multiples of a uniform block, None for ragged plans.
        is_dense: known, without a look at the runs, to cover every pair.
        selection: `(selected [Bp, Hp, T, C] bool, sizes [Bp, Hp, C])` when the runs were made from key clusters: the
            same fact in a form that some backends want. None for other plans.
        skipped: what stands for those clusters, when what a tile skips shall enter through it (`attention/skipped.py`).
            A backend whose capability has `stand_ins` attends to it; with others, that part is merged with theirs.
        linear: `[Bp, Hp, T, C]` bool over tiles and key blocks of the video alone: what enters by linear attention
            beside the softmax (`SLA`); None where that is nothing or everything. Never read by a backend.
        coarse: `[B, H, n, D]`, of the one call that the plan was made for: attention of the means of its n cubes, which
            is added to what a backend makes (`VSA`); None where that is computed then. Never read by a backend.
        choice: `(number [B, H] bool or integer, plans)` where each head follows one of a few plans, which are for all
            heads and for many calls: the same fact in a form that keeps what a backend makes of them. None for others.
        pv_threshold: the second stage of SpargeAttn, in a backend whose capability has it: a tile of keys whose scaled
            scores all lie more than this below the largest so far of their query is left out, within the softmax. Each
            of its keys has a weight below `exp(-pv_threshold)` of that of the best. None leaves nothing out.
        details: facts for a report (head kinds, cluster sizes), never read by a backend.

    Raises:
        ValueError: tensors whose shapes, dtypes or devices disagree, or a threshold that is not above 0.
    """

    n_q: int
    n_kv: int
    tile_start: torch.Tensor
    tile_len: torch.Tensor
    run_start: torch.Tensor
    run_len: torch.Tensor
    q_order: torch.Tensor | None = None
    kv_order: torch.Tensor | None = None
    block: tuple[int, int] | None = None
    is_dense: bool = False
    selection: tuple[torch.Tensor, torch.Tensor] | None = None
    skipped: SkippedClusters | None = None
    linear: torch.Tensor | None = None
    coarse: torch.Tensor | None = None
    choice: tuple[torch.Tensor, tuple[BlockPlan, ...]] | None = None
    pv_threshold: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    # Of `block_mask.to_block_mask`, by block size: a static plan serves every layer and step, and building one costs
    # milliseconds.
    _block_masks: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False)
    _walks: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False)  # of `kernels.walk.kept_on`
    _masks: dict[torch.dtype, Any] = field(default_factory=dict, init=False, repr=False)  # of `shared_mask`
    _copies: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # of `for_gradients`
    _of_inference: bool = field(default=False, init=False, repr=False)  # whether a tensor was made in inference mode

    def __post_init__(self) -> None:
        of_tiles, of_runs = ({name: getattr(self, name) for name in names} for names in (TILES, RUNS))
        check_shapes(self.n_q, self.n_kv, of_tiles, of_runs, self.q_order, self.kv_order)
        if self.pv_threshold is not None and not self.pv_threshold > 0:
            raise ValueError(f"BlockPlan.pv_threshold is {self.pv_threshold}: it must be above 0, or None for none.")
        if self.skipped is not None:
            if self.selection is None:
                raise ValueError(
                    "BlockPlan.skipped needs the selection it belongs to: make the plan with from_clusters."
                )
            tiles, clusters = self.selection[0].shape[-2:]
            self.skipped.check(tiles, clusters, self.device)
        if len({t.device for t in self._tensors()}) > 1:
            raise ValueError(f"BlockPlan tensors lie on several devices: {[str(t.device) for t in self._tensors()]}.")
        self._look_for_inference()

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, n_q: int, n_kv: int, device: torch.device | str | None = None) -> BlockPlan:
        """Every query reads every key."""
        tile = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
        run = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
        return cls(n_q, n_kv, tile, tile + n_q, run, run + n_kv, is_dense=True)

    @classmethod
    def from_block_mask(
        cls, mask: torch.Tensor, block_q: int, block_k: int, n_q: int, n_kv: int, *, max_runs: int | None = None
    ) -> BlockPlan:
        """Uniform blocks.

        Args:
            mask: `[nq, nk]`, `[H, nq, nk]` or `[B, H, nq, nk]` bool (`B`, `H` may be 1) with `nq = ceil(n_q /
                block_q)`, `nk = ceil(n_kv / block_k)`; the last block of either axis may be shorter.
            block_q: queries per block. block_k: keys per block. n_q: queries. n_kv: keys.
            max_runs: as for `from_clusters`.

        Raises:
            ValueError: the mask has other dimensions, or is not bool; a `max_runs` as for `from_clusters`.
        """
        if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
            raise ValueError(f"mask must be bool with 2 to 4 dimensions, got {mask.dtype} with {mask.ndim}.")
        q_sizes, k_sizes = _block_sizes(n_q, block_q, mask.device), _block_sizes(n_kv, block_k, mask.device)
        if mask.shape[-2:] != (q_sizes.numel(), k_sizes.numel()):
            raise ValueError(
                f"mask covers {tuple(mask.shape[-2:])} blocks, but n_q={n_q} in blocks of {block_q} and n_kv={n_kv} in "
                f"blocks of {block_k} make ({q_sizes.numel()}, {k_sizes.numel()})."
            )
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        lead = mask.shape[:2]
        sizes = (q_sizes.expand(*lead, -1), k_sizes.expand(*lead, -1))
        plan = cls.from_clusters(*sizes, mask, n_q=n_q, n_kv=n_kv, max_runs=max_runs)
        return replace(plan, block=(block_q, block_k))

    @classmethod
    def from_clusters(
        cls,
        q_sizes: torch.Tensor,
        k_sizes: torch.Tensor,
        selected: torch.Tensor,
        q_order: torch.Tensor | None = None,
        kv_order: torch.Tensor | None = None,
        *,
        n_q: int | None = None,
        n_kv: int | None = None,
        max_runs: int | None = None,
    ) -> BlockPlan:
        """Clusters of queries that each read some clusters of keys; neighbouring selected clusters become one run.

        Args:
            q_sizes: `[Bp, Hp, Cq]` integer, queries per cluster in permuted order; 0 is an empty cluster.
            k_sizes: `[Bp, Hp, Ck]` integer, keys per cluster in permuted order.
            selected: `[Bp, Hp, Cq, Ck]` bool.
            q_order: `[1|B, 1|H, n_q]` int64, tokens sorted by query cluster. kv_order: likewise for keys, `[1|B,
                1|G|H, n_kv]`.
            n_q, n_kv: the sequence lengths; read from the orders or from the sizes (a host sync) when not given.
            max_runs: run slots per tile; when not given, on the CPU what the data need, elsewhere what they can need.
                It must suffice: further keys of a tile are left out on a GPU, which would have to be waited for.

        Raises:
            ValueError: shapes disagree, `selected` is not bool, or `max_runs` is below 1. On the CPU, where that costs
                no wait: the sizes of some head do not add up to the sequence length, or one is negative; `max_runs`
                does not suffice.
        """
        expected = (*q_sizes.shape, k_sizes.shape[-1])
        if q_sizes.ndim != 3 or k_sizes.shape[:2] != q_sizes.shape[:2] or selected.shape != expected:
            raise ValueError(
                f"from_clusters needs q_sizes [B, H, Cq], k_sizes [B, H, Ck], selected [B, H, Cq, Ck], got "
                f"{tuple(q_sizes.shape)}, {tuple(k_sizes.shape)}, {tuple(selected.shape)}."
            )
        if selected.dtype != torch.bool:
            raise ValueError(f"from_clusters needs selected as bool, got {selected.dtype}: cast it with .bool().")
        n_q = _sequence_length("q", n_q, q_order, q_sizes)
        n_kv = _sequence_length("kv", n_kv, kv_order, k_sizes)
        run_start, run_len = merge_segments(selected, k_sizes, max_runs)
        tile_start, tile_len = starts_of(q_sizes)
        selection = (selected, k_sizes.long())
        return cls(n_q, n_kv, tile_start, tile_len, run_start, run_len, q_order, kv_order, selection=selection)

    def with_details(self, **details: Any) -> BlockPlan:
        """The same plan, carrying more facts for the report."""
        return replace(self, details={**self.details, **details})

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        return self._with_each(lambda x: x.to(device), lambda plan: plan.to(device))

    def for_gradients(self) -> BlockPlan:
        """The plan for a call that has gradients: where it was made in inference mode, a copy, which is made once (in
        compiled code at each call).

        Autograd keeps no tensor of inference mode.
        """
        if not self._of_inference:
            return self
        made = self._copies.get("gradients") or self._with_each(torch.clone, lambda plan: plan.for_gradients())
        if not torch.compiler.is_compiling():
            self._copies["gradients"] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and written to files: the plan, without what backends made of it, which they make again."""
        return self.__dict__ | {name: {} for name in KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look_for_inference()

    # -- what it says ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors lie."""
        return self.tile_start.device

    @property
    def lead(self) -> tuple[int, int]:
        """`(Bp, Hp)`, broadcast over tiles and both orders."""
        shapes = [tuple(t.shape[:2]) for t in self._tensors() if t is not self.kv_order]
        if self.kv_order is not None:
            batch, heads = self.kv_order.shape[:2]
            known = torch.broadcast_shapes(*shapes)[1]
            shapes.append((batch, known if known % heads == 0 else heads))  # one entry for a group of heads
        return tuple(torch.broadcast_shapes(*shapes))

    @property
    def is_scattered(self) -> bool:
        """Whether tiles read many short runs at any place (clusters), not blocks of one size nor a few long runs."""
        return self.block is None and self.run_start.shape[-1] > FEW_RUNS

    def pairs(self, first: int = 0) -> torch.Tensor:
        """Query-key pairs computed, `[Bp, Hp]` int64; what stands for a skipped cluster counts as one key.

        Args:
            first: of the queries that count, in the order of the sequence.
        """
        keys = self.run_len.sum(-1)
        if self.skipped is not None:
            keys = keys + self.is_skipped().sum(-1)
        queries = self.tile_len.long() if first == 0 else self._queries_from(first)
        return (queries * keys).sum(-1)

    def _queries_from(self, first: int) -> torch.Tensor:
        """The queries of each tile from the `first` one of the sequence on, `[1|B, 1|H, T]` int64."""
        start, end = self.tile_start.long(), (self.tile_start + self.tile_len).long()
        if self.q_order is None:
            return end.clamp(min=first) - start.clamp(min=first)
        counted = torch.nn.functional.pad((self.q_order >= first).cumsum(-1), (1, 0))
        lead = torch.broadcast_shapes(counted.shape[:2], start.shape[:2])
        counted = counted.expand(*lead, -1)
        return counted.gather(-1, end.expand(*lead, -1)) - counted.gather(-1, start.expand(*lead, -1))

    def is_skipped(self) -> torch.Tensor:
        """The clusters that each tile skips, `[Bp, Hp, T, C]` bool; an empty one is not skipped."""
        selected, sizes = self.selection
        return ~selected & (sizes > 0).unsqueeze(-2)

    def stand_in_bias(self) -> torch.Tensor:
        """What is added to the scaled score of each stand-in, `[B, H, T, C]` float32; -inf where none is read."""
        bias = self.skipped.bias
        if bias is None:
            bias = self.selection[1].log().unsqueeze(-2)
        selected, sizes = self.selection
        return bias.masked_fill(selected | (sizes == 0).unsqueeze(-2), -torch.inf)

    def density(self) -> float:
        """Pairs computed over pairs in dense attention, the mean over batch and heads; exact, one host sync."""
        pairs = self.pairs()
        return int(pairs.sum()) / (pairs.numel() * self.n_q * self.n_kv)

    def tile_of_query(self) -> torch.Tensor:
        """The tile of each permuted query, `[Bp, Hp, n_q]` int64."""
        ends = (self.tile_start + self.tile_len).long().contiguous()
        positions = torch.arange(self.n_q, device=self.device).expand(*ends.shape[:2], -1).contiguous()
        return torch.searchsorted(ends, positions, right=True)

    def tile_of_token(self) -> torch.Tensor:
        """The tile of each query in sequence order, `[1|B, 1|H, n_q]` int64."""
        tiles = self.tile_of_query()
        if self.q_order is None:
            return tiles
        batch, heads = (max(pair) for pair in zip(tiles.shape[:2], self.q_order.shape[:2], strict=True))
        return tiles.expand(batch, heads, -1).gather(-1, invert(self.q_order).expand(batch, heads, -1))

    def keys_of_tile(self) -> torch.Tensor:
        """The permuted keys each tile reads, `[Bp, Hp, T, n_kv]` bool."""
        return expand_runs(self.run_start, self.run_len, self.n_kv)

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        """The keys that some queries read, without building the rest of the mask.

        Args:
            queries: `[R]` int64, positions in the sequence (not permuted).

        Returns:
            `[Bp, Hp, R, n_kv]` bool over keys in sequence order.
        """
        batch, heads = self.lead
        positions = queries.expand(batch, heads, -1)
        if self.q_order is not None:
            positions = invert(self.q_order).expand(batch, heads, -1).gather(-1, positions)
        tiles = self.tile_of_query().expand(batch, heads, -1).gather(-1, positions).unsqueeze(-1)
        run_start, run_len = (
            x.expand(batch, heads, -1, -1).gather(2, tiles.expand(*tiles.shape[:3], x.shape[-1]))
            for x in (self.run_start, self.run_len)
        )
        mask = expand_runs(run_start, run_len, self.n_kv)
        if self.kv_order is None:
            return mask
        columns = repeat_heads(invert(self.kv_order), heads).unsqueeze(2).expand(mask.shape)
        return mask.gather(-1, columns)

    @property
    def shares_masks(self) -> bool:
        """Whether one mask serves all batch entries and heads, or one for each of a few plans does."""
        return self.skipped is None and (self.choice is not None or self.lead == (1, 1))

    def shared_mask(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mask of all heads, made once and kept. Quadratic: for short sequences.

        Returns:
            What is added to the scores, 0 or -inf, `[1, 1, n_q, n_kv]`; and which queries read nothing, `[1, 1, n_q,
            1]` bool, None where all read something.
        """
        if dtype not in self._masks:
            with normal_tensors():
                kept = self.to_dense_mask()
                empty = ~kept.any(-1, keepdim=True)
                mask = torch.zeros(kept.shape, dtype=dtype, device=self.device).masked_fill_(~kept, -torch.inf)
            self._masks[dtype] = mask, empty if empty.any() else None
        return self._masks[dtype]

    def to_dense_mask(self) -> torch.Tensor:
        """The whole mask `[Bp, Hp, n_q, n_kv]` bool in sequence order: it is quadratic."""
        return self.rows(torch.arange(self.n_q, device=self.device))

    def cut(self, max_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut tiles to at most `max_rows` queries, for backends that work on bounded tiles.

        Returns:
            `(start, length, tile)`, each `[Bp, Hp, n_q // max_rows + T]` int32: pieces in order with the tile whose
            runs they read, padded with length 0. The shape depends on no value, so a GPU step needs no sync.
        """
        return cut_segments(self.tile_start, self.tile_len, self.n_q, max_rows)

    def validate(self) -> BlockPlan:
        """Check every promise of the class docstring (several host syncs) and return the plan.

        Raises:
            ValueError: tiles that overlap or miss a query, runs that overlap, do not ascend or leave the sequence, an
                order that is no permutation.
        """
        tiles, runs = (self.tile_start, self.tile_len), (self.run_start, self.run_len)
        check_promises(self.n_q, self.n_kv, tiles, runs, self.q_order, self.kv_order)
        return self

    def _tensors(self) -> list[torch.Tensor]:
        tensors = [getattr(self, name) for name in (*TILES, *RUNS, "q_order", "kv_order")]
        return [t for t in tensors if t is not None]

    def _with_each(
        self, change: Callable[[torch.Tensor], torch.Tensor], follow: Callable[[BlockPlan], BlockPlan]
    ) -> BlockPlan:
        """What `change` makes of each of its tensors, and `follow` of the plans that it chooses from."""
        changed: dict[str, Any] = {name: change(x) for name in TENSORS if (x := getattr(self, name)) is not None}
        if self.selection is not None:
            changed["selection"] = change(self.selection[0]), change(self.selection[1])
        if self.skipped is not None:
            changed["skipped"] = self.skipped.with_each(change)
        if self.choice is not None:
            changed["choice"] = change(self.choice[0]), tuple(follow(plan) for plan in self.choice[1])
        return replace(self, **changed)

    def _look_for_inference(self) -> None:
        """Once, since `torch.compile` breaks its graph where a tensor is asked."""
        if torch.compiler.is_compiling():
            return
        numbers, plans = self.choice or (None, ())
        tables = () if self.skipped is None else self.skipped.tables
        tensors = (*(getattr(self, name) for name in TENSORS), *(self.selection or ()), *tables, numbers)
        found = any(x is not None and x.is_inference() for x in tensors) or any(plan._of_inference for plan in plans)
        object.__setattr__(self, "_of_inference", found)


def _block_sizes(length: int, block: int, device: torch.device) -> torch.Tensor:
    """Tokens per block when `length` tokens are cut into blocks of `block`, `[ceil(length / block)]` int64."""
    if block < 1:
        raise ValueError(f"the block size is {block}: it must be at least 1.")
    count = -(-length // block)
    sizes = torch.full((count,), block, dtype=torch.int64, device=device)
    sizes[-1] = length - (count - 1) * block
    return sizes


def _sequence_length(name: str, given: int | None, order: torch.Tensor | None, sizes: torch.Tensor) -> int:
    """The sequence length, checked against the cluster sizes where that costs no GPU sync."""
    length = given if given is not None else order.shape[-1] if order is not None else int(sizes[0, 0].sum())
    if sizes.device.type == "cpu" and (sizes < 0).any():
        raise ValueError(f"the {name} cluster sizes must not be negative, got {int(sizes.min())}.")
    if sizes.device.type == "cpu" and not (sizes.sum(-1) == length).all():
        raise ValueError(
            f"the {name} cluster sizes add up to {sorted(set(sizes.sum(-1).flatten().tolist()))}, "
            f"but the sequence has {length} tokens."
        )
    return length
