from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import clusters, masked_attention

from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.merge import merge


def halves(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask split into two that share no key, unevenly over the rows."""
    first = torch.rand(mask.shape) < 0.4
    return mask & first, mask & ~first


def test_two_halves_make_the_whole_and_so_do_their_gradients():
    mask = torch.rand(2, 2, 20, 30) < 0.3
    mask[:, :, 0], mask[:, :, 1] = False, False
    mask[:, :, 1, 4] = True  # in one half only
    inputs = [torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (20, 30, 30)]
    rows = mask.any(-1)
    weight, weight_lse = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20)

    def gradients(out, lse):
        loss = (out * weight * rows.unsqueeze(-1)).sum() + (lse.masked_fill(~rows, 0.0) * weight_lse).sum()
        return torch.autograd.grad(loss, inputs)

    # Autograd through a softmax over nothing is NaN, so rows without keys get one key, and then an LSE of -inf.
    def attention(part):
        empty = ~part.any(-1)
        out, lse = masked_attention(*inputs, part | empty.unsqueeze(-1))
        return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, float("-inf"))

    whole = attention(mask)
    merged = merge(*(x for part in halves(mask) for x in attention(part)))
    torch.testing.assert_close(merged, whole)
    assert merged[0][:, :, 0].eq(0).all() and merged[1][:, :, 0].eq(float("-inf")).all()
    for one, other in zip(gradients(*merged), gradients(*whole), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_far_apart_sums_neither_overflow_nor_vanish():
    out = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    for high, low in ((500.0, -500.0), (500.0, 499.0), (-500.0, -501.0)):
        merged, lse = merge(out[0], torch.full((1, 1, 1), high), out[1], torch.full((1, 1, 1), low))
        share = torch.sigmoid(torch.tensor(high - low))
        torch.testing.assert_close(merged, share.expand(1, 1, 1, 2))
        torch.testing.assert_close(lse, torch.full((1, 1, 1), high) - share.log())


def test_dtypes_stay():
    out, lse = torch.randn(1, 1, 3, 4).half(), torch.randn(1, 1, 3)
    merged, total = merge(out, lse, out, lse)
    assert merged.dtype == torch.float16 and total.dtype == torch.float32
    assert merged.equal(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, s: (o, s, o[:, :, 1:], s[:, :, 1:]), r"of one shape.*\(1, 2, 5, 4\).*\(1, 2, 4, 4\)"),
        (lambda o, s: (o, s.unsqueeze(-1), o, s), r"\[B, H, N\]"),
        (lambda o, s: (o, s, o.half(), s), "one dtype.*float32 and torch.float16"),
        (lambda o, s: (o, s, o.to("meta"), s), "one device"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        merge(*change(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)))


def test_kernel_outputs_of_two_halves_make_the_whole(device):
    """Gradients flow through both outputs and both log-sum-exps of the kernels."""
    pytest.importorskip("triton")
    n = 1000 if device.type == "cuda" else 50
    plan, _ = clusters(1, 2, n, n, 4, 10)
    inputs = [torch.randn(1, 2, n, 64, device=device, requires_grad=True) for _ in range(3)]
    starts, ends = plan.run_start, plan.run_start + plan.run_len
    results = []
    for side in ({"max": n // 3}, {"min": n // 3}):  # every run is cut at one key
        first, last = starts.clamp(**side), ends.clamp(**side)
        half = replace(plan, run_start=first, run_len=last - first)
        results += TritonBackend().attend(*inputs, half.to(device), 0.1, True)
    out, lse = merge(*results)
    whole, whole_lse = TritonBackend().attend(*inputs, plan.to(device), 0.1, True)
    torch.testing.assert_close(out, whole, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse, whole_lse, atol=3e-6, rtol=3e-6)
    weight = torch.randn_like(out)
    got, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, whole))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
