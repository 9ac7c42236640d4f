"""The attention override on the calls that ComfyUI's native models make, without ComfyUI.

The shapes, layouts and keyword arguments are those of ComfyUI 0.19 and 0.33. `test_comfyui.py` runs the real thing.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vidaccel import SVG, SVG2, Radial, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.nodes import native

HEADS, DIM = 2, 16
LATENT = (1, 4, 3, 12, 16)  # [B, C, T, H, W]: 3 x 6 x 8 patches of (1, 2, 2)
GRID = (3, 6, 8)
VIDEO = 144


def model_of(kind: str) -> object:
    """A stand-in with the attributes that ComfyUI's class `kind` has."""
    space = {
        "WanModel": {"patch_size": (1, 2, 2), "blocks": [0] * 3, "ref_conv": object()},
        "HunyuanVideo": {"patch_size": [1, 2, 2], "double_blocks": [0], "single_blocks": [0] * 2},
        "AsymmDiTJoint": {"patch_size": 2, "blocks": [0] * 3},
        "LTXVModel": {"transformer_blocks": [0] * 3},
        "MiniTrainDIT": {"patch_temporal": 1, "patch_spatial": 2, "blocks": [0] * 3},
        "Flux": {},
    }[kind]
    return type(kind, (), space)()


class Patcher:
    """The part of ComfyUI's `ModelPatcher` that `patch_model` uses."""

    def __init__(self, kind: str, options: dict | None = None) -> None:
        self.kind, self.model_options = kind, {"transformer_options": options or {}}
        self.wrappers: list = []
        self.callbacks: dict = {}
        sampling = SimpleNamespace(percent_to_sigma=lambda p: 1.0 - p)
        self.objects = {"diffusion_model": model_of(kind), "model_sampling": sampling}

    def clone(self) -> Patcher:
        other = Patcher(self.kind, dict(self.model_options["transformer_options"]))
        other.objects = self.objects
        return other

    def get_model_object(self, name: str) -> object:
        return self.objects[name]

    def add_wrapper_with_key(self, place: str, key: str, wrapper) -> None:
        assert (place, key) == ("apply_model", "vidaccel")
        self.wrappers.append(wrapper)

    def add_callback_with_key(self, place: str, key: str, callback) -> None:
        self.callbacks[place] = callback


def comfy_attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **_):
    """What ComfyUI's attention functions do with their arguments."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def forward(patcher: Patcher, calls, latent=LATENT, sigma=0.5, options=None, **conditioning):
    """One forward pass: each of `calls` gets `attend(q, k, v, **kwargs)`, which goes through the override."""
    shared = {"sample_sigmas": torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), **(options or {})}
    shared = {**patcher.model_options["transformer_options"], **shared}

    def executor(x, t, c_concat, c_crossattn, control, transformer_options, **_):
        def attend(q, k, v, heads=HEADS, **kwargs):
            kwargs["transformer_options"] = transformer_options
            override = transformer_options.get("optimized_attention_override")
            if override is None:
                return comfy_attention(q, k, v, heads, **kwargs)
            return override(comfy_attention, q, k, v, heads=heads, **kwargs)

        return [call(attend) for call in calls]

    for wrapper in patcher.wrappers:
        inner = executor
        executor = lambda *a, wrapper=wrapper, inner=inner, **k: wrapper(inner, *a, **k)  # noqa: E731
    batch = len(shared.get("cond_or_uncond", [0])) * latent[0]
    return executor(
        torch.zeros(batch, *latent[1:]), torch.full((batch,), sigma), None, None, None, shared, **conditioning
    )


def qkv(tokens: int, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """`[B, H, N, D]`"""
    return list(torch.randn(3, batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed)))


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


# What each model shows: (kind, tokens before, tokens after, whether tensors are [B, H, N, D], whether the output is).
SHAPES = [
    ("WanModel", 0, 0, False, False),
    ("HunyuanVideo", 10, 0, True, False),
    ("AsymmDiTJoint", 0, 7, True, False),
    ("MiniTrainDIT", 0, 0, True, False),
    ("LTXVModel", 0, 0, False, False),
    ("LTXVModel", 0, 9, False, False),
]


@pytest.mark.parametrize("method", [SVG2(density=0.6, init_iterations=3), SVG(density=0.6), Radial(block_size=16)])
@pytest.mark.parametrize(("kind", "before", "after", "split", "split_out"), SHAPES)
def test_equals_sparse_attention_with_the_plan_of_the_method(kind, before, after, split, split_out, method):
    latent = (1, 4, 3, 6, 8) if kind == "LTXVModel" else LATENT
    layout = VideoLayout(*GRID, text_before=before, text_after=after)
    q, k, v = qkv(layout.tokens)
    clone, session = native.patch_model(Patcher(kind), method)
    clone.callbacks["on_pre_run"]()
    given = (q, k, v) if split else tuple(map(flat, (q, k, v)))
    (out,) = forward(clone, [lambda attend: attend(*given, skip_reshape=split, skip_output_reshape=split_out)], latent)
    expected = sparse_attention(q, k, v, method.plan(q, k, v, layout, PlanMemory()))
    torch.testing.assert_close(out, expected if split_out else flat(expected), atol=1e-6, rtol=1e-5)
    (record,) = session.report().records
    assert not record.reason and record.density < 1 and (record.step, record.num_steps) == (2, 4)


def test_the_output_keeps_the_layout_that_was_asked_for():
    q, k, v = qkv(VIDEO)
    clone, _ = native.patch_model(Patcher("MiniTrainDIT"), SVG(density=0.6))
    both = [
        lambda attend: attend(q, k, v, skip_reshape=True, skip_output_reshape=True),
        lambda attend: attend(q, k, v, skip_reshape=True),
    ]
    split, joined = forward(clone, both)
    assert split.shape == (1, HEADS, VIDEO, DIM) and joined.equal(flat(split))


def test_density_one_is_dense():
    q, k, v = map(flat, qkv(VIDEO))
    clone, _ = native.patch_model(Patcher("WanModel"), SVG2(density=1.0))
    (out,) = forward(clone, [lambda attend: attend(q, k, v)])
    torch.testing.assert_close(out, comfy_attention(q, k, v, HEADS), atol=2e-6, rtol=1e-5)


def test_cross_attention_masks_and_refiners_are_passed_on():
    clone, session = native.patch_model(Patcher("HunyuanVideo"), SVG(density=0.6))
    q, k, v = qkv(VIDEO + 10)
    text = qkv(10)
    mask = torch.zeros(1, 1, 1, VIDEO + 10)
    calls = [
        lambda attend: attend(*text, skip_reshape=True),  # the refiner
        lambda attend: attend(q, k[:, :, :10], v[:, :, :10], skip_reshape=True),
        lambda attend: attend(q, k, v, mask=mask, skip_reshape=True),
    ]
    for out, expected in zip(forward(clone, calls), forward(Patcher("HunyuanVideo"), calls), strict=True):
        assert out.equal(expected)
    assert session.report().records == ()
    assert session.report().notes == ("calls with an attention mask stay dense",)


def test_what_was_there_before_gets_every_call_that_is_not_sparse():
    seen = []

    def earlier(func, q, k, v, heads, **kwargs):
        seen.append(q.shape)
        return func(q, k, v, heads, **kwargs)

    first = Patcher("WanModel", {"optimized_attention_override": earlier})
    clone, _ = native.patch_model(first, SVG(density=0.6), first_layers=1)
    q, k, v = map(flat, qkv(VIDEO))
    calls = [
        lambda attend: attend(q, k, v),
        lambda attend: attend(q, k[:, :5], v[:, :5]),
        lambda attend: attend(q, k, v),
    ]
    dense, cross, sparse = forward(clone, calls)
    assert len(seen) == 2  # the dense first layer and the cross-attention
    assert cross.equal(comfy_attention(q, k[:, :5], v[:, :5], HEADS))
    torch.testing.assert_close(dense, comfy_attention(q, k, v, HEADS))
    assert (sparse - dense).abs().max() > 1e-3
    assert first.model_options["transformer_options"] == {"optimized_attention_override": earlier}


def test_stacked_and_separate_guidance_branches_give_the_same():
    q, k, v = (flat(x) for x in qkv(VIDEO, batch=2))
    method = SVG2(density=0.5, init_iterations=3)
    ids = ["a", "b"]

    def video(stacked: bool) -> torch.Tensor:
        clone, session = native.patch_model(Patcher("WanModel"), method)
        clone.callbacks["on_pre_run"]()
        outs = []
        for sigma in (1.0, 0.75):  # the second step starts from the centroids of its own branch
            if stacked:
                both = {"cond_or_uncond": [0, 1], "uuids": ids}
                (out,) = forward(clone, [lambda attend: attend(q, k, v)], sigma=sigma, options=both)
            else:
                parts = []
                for i in range(2):
                    one = {"cond_or_uncond": [i], "uuids": [ids[i]]}
                    part = [lambda attend, i=i: attend(q[i : i + 1], k[i : i + 1], v[i : i + 1])]
                    parts += forward(clone, part, sigma=sigma, options=one)
                out = torch.cat(parts)
            outs.append(out)
        assert len(session.report().records) == 4
        return torch.stack(outs)

    torch.testing.assert_close(video(True), video(False), atol=1e-6, rtol=1e-5)


def test_reference_and_context_tokens_of_wan():
    before, after = 6 * 8, 30
    layout = VideoLayout(*GRID, text_before=before, text_after=after)
    q, k, v = qkv(layout.tokens)
    method = SVG(density=0.7)
    clone, session = native.patch_model(Patcher("WanModel"), method)
    given = {"reference_latent": torch.zeros(1, 16, 12, 16), "context_latents": [torch.zeros(1)]}
    (out,) = forward(clone, [lambda attend: attend(*map(flat, (q, k, v)))], **given)
    expected = sparse_attention(q, k, v, method.plan(q, k, v, layout, PlanMemory()))
    torch.testing.assert_close(out, flat(expected), atol=1e-6, rtol=1e-5)
    # The same length without a word about what the tokens are: nothing is guessed.
    (out,) = forward(clone, [lambda attend: attend(*map(flat, (q, k, v)))])
    assert out.equal(comfy_attention(*map(flat, (q, k, v)), HEADS)) and len(session.report().records) == 1
    assert "calls over 222 tokens stay dense: the video has 144" in session.report().notes[-1]


def test_an_unknown_model_stays_dense_and_says_so(caplog):
    clone, session = native.patch_model(Patcher("Flux"), SVG(density=0.6))
    assert session is None and "Flux" in caplog.text and "HunyuanVideo" in caplog.text
    assert "optimized_attention_override" not in clone.model_options["transformer_options"]


def test_the_sparse_part_of_sampling():
    clone, session = native.patch_model(Patcher("WanModel"), SVG(density=0.6), start_percent=0.25, end_percent=0.6)
    q, k, v = map(flat, qkv(VIDEO))
    for sigma in (1.0, 0.75 + 1e-7, 0.5, 0.25):  # a bound that differs in the last digit loses no step
        forward(clone, [lambda attend: attend(q, k, v)], sigma=sigma)
    assert [bool(r.reason) for r in session.report().records] == [True, False, False, True]
    assert "sigma" in session.report().records[0].reason


def test_a_run_forgets_the_last_one_and_sizes_may_change():
    clone, session = native.patch_model(Patcher("WanModel"), SVG2(density=0.5, init_iterations=3))
    q, k, v = map(flat, qkv(VIDEO))
    small = tuple(map(flat, qkv(2 * 6 * 8, seed=1)))
    results = []
    for tensors, latent in (((q, k, v), LATENT), (small, (1, 4, 2, 12, 16)), ((q, k, v), LATENT)):
        clone.callbacks["on_pre_run"]()
        results += forward(clone, [lambda attend, tensors=tensors: attend(*tensors)], latent)
        clone.callbacks["on_cleanup"]()
    assert results[0].equal(results[2]) and results[1].shape[1] == 96
    assert [r.run for r in session.report().records] == [0, 1, 2]


def test_short_videos_and_images_stay_dense():
    q, k, v = map(flat, qkv(VIDEO))
    clone, session = native.patch_model(Patcher("WanModel"), SVG(density=0.6), min_tokens=1000)
    (out,) = forward(clone, [lambda attend: attend(q, k, v)])
    assert out.equal(comfy_attention(q, k, v, HEADS)) and "below min_tokens (1000)" in session.report().notes[0]
    clone, session = native.patch_model(Patcher("WanModel"), SVG(density=0.6))
    forward(clone, [lambda attend: attend(q, k, v)], latent=(1, 4, 12, 16))
    assert "no video" in session.report().notes[0]


def test_two_clones_do_not_meet_and_one_model_takes_one_node():
    base = Patcher("WanModel")
    one, first = native.patch_model(base, SVG(density=0.6))
    two, second = native.patch_model(base, Radial(block_size=16))
    q, k, v = map(flat, qkv(VIDEO))
    forward(one, [lambda attend: attend(q, k, v)])
    assert len(first.report().records) == 1 and second.report().records == ()
    with pytest.raises(ValueError, match="already: keep one"):
        native.patch_model(two, SVG(density=0.6))
    assert base.model_options["transformer_options"] == {} and base.wrappers == []


def test_bad_percents_are_refused():
    with pytest.raises(ValueError, match="start_percent is 0.8 and end_percent 0.3"):
        native.patch_model(Patcher("WanModel"), SVG(density=0.6), start_percent=0.8, end_percent=0.3)
