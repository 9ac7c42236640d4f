"""Dense attention with a mask: what short sequences are fastest with on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..compensate import attend_skipped
from ..groups import repeat_heads
from ..merge import attend_scores, merge
from ..orders import invert
from ..plan import BlockPlan
from .base import ANY_HEAD_DIM, EVERYWHERE, Backend, Capability, without_autocast

BIASES = 2**22  # numbers of the mask held at once: what the processor's cache can hold, more or less
KEPT = 2**23  # numbers of a mask that is kept for the next call


class MaskedBackend(Backend):
    """`scaled_dot_product_attention` with an additive float mask, some queries at a time.

    It computes every pair, and so costs what dense attention costs, whatever the plan: more than `gather` in long
    sequences, and much less where the tiles are so small that a call for each costs more than its work. k and v of
    fewer heads than q are repeated, which is little in short sequences. A mask that serves all heads, or all heads of a
    kind, is kept with its plan: making one anew takes as long as a half of attention. What stands for skipped clusters
    is further columns. Where each tile has its own, or where the log-sum-exp is wanted, the softmax is written out, and
    the tiles' own part merged with it.
    """

    name = "masked"
    summary = "dense attention with a mask; for short sequences on the CPU"
    capability = Capability(
        devices=EVERYWHERE,
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=EVERYWHERE,
        backward=EVERYWHERE,
        sparse=True,
        stand_ins=EVERYWHERE,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Elsewhere a look at which heads have which plan would cost a wait.
        if plan.shares_masks and not return_lse and q.device.type == "cpu" and plan.n_q * plan.n_kv <= KEPT:
            return _with_kept_masks(q, k, v, plan, scale), None
        if plan.skipped is not None and torch.is_autocast_enabled(q.device.type):
            return without_autocast(self.attend, q, k, v, plan, scale, return_lse)
        wide = torch.promote_types(q.dtype, torch.float32)
        bias = _in_sequence(q.new_zeros((), dtype=wide).masked_fill(~plan.keys_of_tile(), -torch.inf), plan)
        k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
        skipped = plan.skipped
        columns = skipped is not None and not skipped.of_each_tile
        if columns:
            k, v = (
                torch.cat([x.to(wide), y.to(wide).expand(*x.shape[:2], -1, -1)], 2)
                for x, y in ((k, skipped.key), (v, skipped.value))
            )
            biases = bias, plan.stand_in_bias()
            lead = torch.broadcast_shapes(*(x.shape[:2] for x in biases))
            bias = torch.cat([x.to(wide).expand(*lead, -1, -1) for x in biases], -1)
        # SDPA has no log-sum-exp, and in half precision the stand-ins' bias would be off by per cents.
        written_out = return_lse or (skipped is not None and (not columns or q.dtype != wide))
        empty = bias.amax(-1, keepdim=True) == -torch.inf
        # A pass over the output, which a look at the mask saves; elsewhere the look would cost a wait.
        fill = q.device.type != "cpu" or bool(empty.any())
        tile = plan.tile_of_token()
        rows = max(1, BIASES // (bias.shape[0] * bias.shape[1] * bias.shape[-1]))
        if written_out:
            rows = max(1, BIASES // (q.shape[0] * q.shape[1] * bias.shape[-1]))
            k, v = k.to(wide), v.to(wide).contiguous()
        outputs, sums = [], []
        for start in range(0, plan.n_q, rows):
            some = slice(start, start + rows)
            mask = _rows(bias, tile[:, :, some])
            if written_out:
                out, lse = attend_scores((q[:, :, some].to(wide) * scale) @ k.transpose(-1, -2) + mask, v)
                sums.append(lse)
            else:
                mask = mask.to(q.dtype)
                out = F.scaled_dot_product_attention(q[:, :, some], k, v, attn_mask=mask, scale=scale)
                if fill:  # what SDPA makes of a row without keys depends on the kernel that it takes
                    out = out.masked_fill(_rows(empty, tile[:, :, some]), 0.0)
            outputs.append(out)
        out = torch.cat(outputs, 2).to(q.dtype)
        lse = torch.cat(sums, 2) if written_out else None
        if skipped is not None and not columns:
            out, lse = merge(out, lse.float(), *attend_skipped(q, plan, scale))
        return out, lse.float() if return_lse else None


def _with_kept_masks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float) -> torch.Tensor:
    """`[B, H, n_q, D]` of a plan that shares masks, the heads of one mask together."""
    if plan.choice is None:
        return _with_mask(q, k, v, plan, scale)
    numbers, plans = plan.choice
    followed = numbers.unique().tolist()
    if len(followed) == 1:
        return _with_mask(q, k, v, plans[followed[0]], scale)
    of_head = numbers.expand(q.shape[:2]).flatten()
    readers = q.shape[1] // k.shape[1]  # heads of q that read one head of k and v
    q_heads, k_heads, v_heads = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    places, parts = [], []
    for number in followed:
        own = (of_head == number).nonzero().flatten()
        places.append(own)
        some = (q_heads[:, own], k_heads[:, own // readers], v_heads[:, own // readers])
        parts.append(_with_mask(*some, plans[number], scale))
    return torch.cat(parts, 1)[0, invert(torch.cat(places))].view(*q.shape[:3], -1)


def _with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float) -> torch.Tensor:
    """Attention of all heads with the one mask of a plan."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    mask, empty = plan.shared_mask(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if empty is not None:  # what SDPA makes of a row without keys depends on the kernel that it takes
        out = out.masked_fill(empty, 0.0)
    return out.to(q.dtype)


def _in_sequence(bias: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Columns of `bias [Bp, Hp, T, n_kv]` in the order of the sequence: less to move than k and v."""
    if plan.kv_order is None:
        return bias
    columns = invert(plan.kv_order)
    batch, heads = (max(sizes) for sizes in zip(bias.shape[:2], columns.shape[:2], strict=True))
    index = repeat_heads(columns, heads).expand(batch, heads, -1).unsqueeze(-2)
    return bias.expand(batch, heads, -1, -1).gather(-1, index.expand(-1, -1, bias.shape[-2], -1))


def _rows(bias: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Rows of `bias [B', H', T, K]` for each of `tile [B'', H'', R]`; whole rows are copied, which is fast."""
    batch, heads = torch.broadcast_shapes(bias.shape[:2], tile.shape[:2])
    bias = bias.expand(batch, heads, -1, -1)
    first = torch.arange(batch * heads, device=bias.device).view(batch, heads, 1) * bias.shape[2]
    index = (tile.expand(batch, heads, -1) + first).flatten()
    return bias.flatten(0, 2).index_select(0, index).view(batch, heads, -1, bias.shape[-1])
