"""The seam: processors with their attention call rebound."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from fast_set import fast
from tiny_families import build

import vidaccel
from vidaccel import DenseSchedule, Radial, SparseAttention, VideoLayout, accelerate
from vidaccel.attention import StepInfo
from vidaccel.pipelines.acceleration.rebinding import NotRebindable, rebind, site_attention
from vidaccel.pipelines.acceleration.site import Site

METHOD = Radial(decay=0.05, block_size=8, near=0.25, min_window=0.0, schedule=DenseSchedule())
COMPILED = ["wan", "hunyuan_video", "hunyuan_video_15", "cogvideox_5b", "mochi", "ltx2_3", "cosmos_25", "cosmos_3",
            "kandinsky5", "motif_video"]  # fmt: skip


def test_the_code_is_stocks_and_nothing_is_patched():
    tiny = build("wan")
    stock = type(tiny.model.blocks[0].attn1.processor)
    before, names = stock.__call__, dict(stock.__call__.__globals__)
    with accelerate(tiny.model, METHOD):
        own = type(tiny.model.blocks[0].attn1.processor)
        assert issubclass(own, stock) and own.__name__ == "SparseWanAttnProcessor"
        assert inspect.signature(own.__call__) == inspect.signature(stock.__call__)
        tiny.run()
    assert stock.__call__ is before and dict(stock.__call__.__globals__) == names


def test_the_users_attention_backend_is_kept_set_before_or_after(monkeypatch):
    import diffusers.models.transformers.transformer_wan as module

    tiny = build("wan")
    seen, dispatch = [], module.dispatch_attention_fn

    def spy(*args, backend=None, **kwargs):
        seen.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    tiny.model.set_attention_backend("_native_math")
    with accelerate(tiny.model, METHOD, schedule=DenseSchedule(first_steps=9)) as handle:
        tiny.run()
        assert any("backend set in diffusers: _native_math" in note for note in handle.report().notes)
        tiny.model.set_attention_backend("native")
        tiny.run()
    self_attention = [str(getattr(backend, "value", backend)) for backend in seen]
    assert set(self_attention[:4]) == {"_native_math"} and set(self_attention[4:]) == {"native"}


def test_processors_that_cannot_be_rebound_are_refused_by_name():
    class Linear:
        def __call__(self, attn, hidden_states):
            return hidden_states

    site = Site(SparseAttention(METHOD, num_layers=1), 0)
    with pytest.raises(NotRebindable, match="Linear calls neither dispatch_attention_fn nor scaled_dot_product"):
        rebind(Linear(), site)
    tiny = build("wan")
    processors = [block.attn1.processor for block in tiny.model.blocks]
    tiny.model.blocks[1].attn1.processor = Linear()
    with pytest.raises(TypeError, match="Linear"):
        accelerate(tiny.model, METHOD)
    assert tiny.model.blocks[0].attn1.processor is processors[0] and not tiny.model._forward_pre_hooks


def test_processors_replaced_afterwards_are_told():
    tiny = build("cogvideox_2b")
    with accelerate(tiny.model, METHOD) as handle:
        tiny.run()
        tiny.model.fuse_qkv_projections()
        tiny.run()
        assert any("replaced after accelerate" in note for note in handle.report().notes)
    tiny.model.unfuse_qkv_projections()


def test_a_copy_answers_for_itself():
    tiny = build("hunyuan_video")
    with accelerate(tiny.model, METHOD) as handle:
        tiny.run()
        count = len(handle.report().records)
        other = copy.deepcopy(tiny.model)
        other(**tiny.given)
        own = [b.attn.processor.site for m in (tiny.model, other) for b in m.transformer_blocks]
        assert len({site.number for site in own}) == len(own)
        assert len(handle.report().records) == count
        vidaccel.restore(other)
    with torch.no_grad():
        assert other(**tiny.given, return_dict=False)[0].equal(tiny.run())


@pytest.mark.parametrize("name", fast({"wan", "hunyuan_video"}, COMPILED))
def test_compiled_blocks_are_as_many_graphs_as_stocks(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    def graphs(tiny, run) -> tuple[int, torch.Tensor]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        paths = {p.rsplit(".", 2 if "video_dec" in p else 1)[0] for p in sites(tiny)}
        for path in sorted(paths):
            tiny.model.get_submodule(path).compile(backend=counter, fullgraph=True)
        return run(), counter.frame_count

    def sites(tiny):
        from vidaccel.pipelines import find_transformers

        ((model, family),) = find_transformers(tiny.model).values()
        return family.modules(model)

    tiny = build(name, layers=4)
    _, stock = graphs(tiny, tiny.run)
    tiny = build(name, layers=4)
    with accelerate(tiny.model, METHOD) as handle:
        eager = tiny.run()
        layers = len(handle.report().records)
        out, ours = graphs(tiny, tiny.run)
        assert len(handle.report().records) == 2 * layers
    torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    assert ours <= stock


def site_on(attention) -> Site:
    """A site of a video of 3 x 4 x 5 tokens, whose stock attention is the given one."""
    engine = SparseAttention(METHOD, num_layers=1, schedule=DenseSchedule())
    engine.enter(StepInfo(), VideoLayout(3, 4, 5))
    site = Site(engine, 0)
    site.enter(trims=False, dense="stays dense")
    site.processor = type("Processor", (), {"stock": staticmethod(attention)})
    return site


@pytest.mark.parametrize("token_by_token", [False, True])
def test_the_compiled_operator_copies_nothing_that_lies_as_its_queries(token_by_token):
    """As models' queries do and what backends give; what lies otherwise is copied once."""
    made = []

    def attention(q, k, v, mask=None, **_):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        made.append(out.transpose(1, 2).contiguous().transpose(1, 2) if token_by_token else out.contiguous())
        return made[-1]

    site = site_on(attention)
    q = torch.randn(1, 60, 2, 16).transpose(1, 2)
    with torch.no_grad():
        out = site_attention(q, q, q, None, site.tensor)
    assert out.stride() == q.stride() and torch.equal(out, made[-1])
    assert (out.data_ptr() == made[-1].data_ptr()) == token_by_token
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_compiled_operator_refuses_gradients_before_the_backward_pass(compiled):
    engine = SparseAttention(METHOD, num_layers=1, schedule=DenseSchedule())
    engine.enter(StepInfo(), VideoLayout(3, 4, 5))
    site = Site(engine, 0)
    site.enter(trims=False, dense="")

    class Processor:
        stock = staticmethod(torch.nn.functional.scaled_dot_product_attention)

    site.processor = Processor

    def call(q):
        return site_attention(q, q, q, None, site.tensor)

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    q = torch.randn(1, 2, 60, 16, requires_grad=True)
    with pytest.raises(Exception, match="no backward inside torch.compile: train without compiling"):
        run(q)
    with torch.no_grad():
        assert run(q).shape == q.shape


class Scaled:
    """A processor of one's own, which gives the scale."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (part(hidden_states) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.factor / math.sqrt(q.shape[-1]))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-9, 2.0])
def test_a_scale_is_compared_as_numbers_are(factor):
    """1 / sqrt(D) and D ** -0.5 differ in the last bit for D = 128."""
    tiny = build("wan")
    for block in tiny.model.blocks:
        block.attn1.set_processor(Scaled(factor))
    with accelerate(tiny.model, METHOD) as handle:
        tiny.run()
    report = handle.report()
    assert bool(report.records) == (factor < 1.5)
    assert any("a scale of their own" in note for note in report.notes) == (factor > 1.5)
