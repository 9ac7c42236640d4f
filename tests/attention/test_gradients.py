"""Gradients through every backend, from plans of every origin."""

from __future__ import annotations

import pytest
import torch
from plans import uniform

from vidaccel import BlockPlan, sparse_attention
from vidaccel.attention.gradients import may_have_gradients

N = 150
BACKENDS = ["reference", "gather", "masked"]


def tokens(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 2, n, 32).to(dtype).unbind(0)


def gradients(inputs, plan, backend) -> tuple[torch.Tensor, ...]:
    inputs = [x.requires_grad_() for x in inputs]
    return torch.autograd.grad(sparse_attention(*inputs, plan, backend=backend).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_keys_that_many_tiles_read_lose_no_terms(dtype):
    """A sum in half precision of so many terms was off by several times as much, and the more, the more there are."""
    inputs = tokens(dtype, 2048)
    plan = uniform(1, 1, 2048, 2048, 16, 64, share=1.1)[0]
    expected = gradients([x.double() for x in inputs], plan, "reference")
    for made, right in list(zip(gradients(inputs, plan, "gather"), expected, strict=True))[1:]:
        assert made.dtype == dtype and (made - right).norm() <= 0.4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_reads_nothing_has_gradients_of_zero(backend, dtype):
    """Also of numbers whose sum is infinite in their dtype, and through the log-sum-exp."""
    inputs = [(x.abs() * 1000).requires_grad_() for x in tokens(dtype)]
    plan = BlockPlan.from_block_mask(torch.zeros(2, 2, dtype=torch.bool), -(-N // 2), -(-N // 2), N, N)
    out, lse = sparse_attention(*inputs, plan, backend=backend, return_lse=True)
    assert not out.any() and lse.requires_grad and (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.exp().sum(), inputs)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("backend", ["auto", "gather", "masked"])
def test_derivatives_of_forward_mode_are_taken_or_refused(backend):
    """Operators of our own would leave them out without a word."""
    q, k, v = tokens(torch.float64)
    plan = uniform(1, 2, N, N, 32, 32)[0]
    direction = torch.randn_like(q)

    def of(backend):
        return torch.func.jvp(lambda x: sparse_attention(x, k, v, plan, backend=backend), (q,), (direction,))[1]

    h = 1e-5
    ahead, behind = (sparse_attention(q + s * h * direction, k, v, plan, backend="reference") for s in (1, -1))
    torch.testing.assert_close(of("reference"), (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="forward mode .* supported with the backend 'reference' alone"):
        of(backend)


TRANSFORMS = {
    "grad": lambda of, q: torch.func.grad(lambda x: of(x).sum())(q),
    "vmap": lambda of, q: torch.func.vmap(of)(q.unsqueeze(0).expand(2, -1, -1, -1, -1))[1],
    "jacrev": lambda of, q: torch.func.jacrev(lambda x: of(x)[0, 0, 0])(q),
}


@pytest.mark.parametrize("backend", ["auto", "gather", "masked"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_are_made_or_refused(kind, backend):
    """They ended in errors within torch, with some backends."""
    q, k, v = tokens()
    plan = uniform(1, 2, N, N, 32, 32)[0]

    def of(backend):
        return TRANSFORMS[kind](lambda x: sparse_attention(x, k, v, plan, backend=backend), q)

    def written_out(x):
        return torch.nn.functional.scaled_dot_product_attention(x, k, v, attn_mask=plan.to_dense_mask()).nan_to_num()

    torch.testing.assert_close(of("reference"), TRANSFORMS[kind](written_out, q), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        RuntimeError, match=r"torch\.func.* supported with the backend 'reference' alone, and with no plan"
    ):
        of(backend)


@pytest.mark.parametrize("wants", ["nothing", "a parameter", "an input"])
def test_a_pass_has_a_backward_pass_where_something_wants_a_gradient(wants):
    layer, x = torch.nn.Linear(2, 2).requires_grad_(wants == "a parameter"), torch.zeros(2)
    x.requires_grad_(wants == "an input")
    assert may_have_gradients(layer, {"states": [x], "scale": 1.0}) == (wants != "nothing")
    with torch.no_grad():
        assert not may_have_gradients(layer, {"states": [x]})


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_so_it_may_have_where_a_layer_computes_something_beside_its_own_weights(how):
    """LoRAs of some trainers are no part of the module: their parameters are not among its own."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
    assert not may_have_gradients(model, torch.zeros(2))
    if how == "forward":
        model[0].forward = lambda x: x
    else:
        model[0].register_forward_hook(lambda *_: None)
    assert may_have_gradients(model, torch.zeros(2))
    model[0]._hf_hook = object()  # of accelerate, which moves weights
    assert not may_have_gradients(model, torch.zeros(2))
