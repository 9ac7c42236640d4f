"""SpargeAttn's first stage: against the published implementation's maps, a map written out, and its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from vidaccel import METHODS, Sparge, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory

DATA = Path(__file__).parents[1] / "data"
GOLDEN = ("sparge_cdf97_sim30_ragged", "sparge_topk20_below_one_q64k128")


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(("published", "key"), [(True, "block_map"), (False, "block_map_tail_ignored")])
def test_the_maps_of_the_published_implementation(name, published, key):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rule = {"topk": float(facts["topk"])} if facts["topk"] != "None" else {"cdf": float(facts["cdfthreshd"])}
    block = (int(facts["block_q"]), int(facts["block_k"]))
    method = Sparge(similarity=float(facts["simthreshd1"]), block=block, published=published, **rule)
    assert torch.equal(method.block_mask(tensors["q"], tensors["k"]), tensors[key].bool())


def written_out(q, k, block, topk, similarity):
    """The map of one head, block by block."""
    k = k - k.mean(0, keepdim=True)
    q_blocks, k_blocks = q.split(block[0]), k.split(block[1])

    def alike(rows):
        return float((F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T).mean()) > similarity

    mask = torch.zeros(len(q_blocks), len(k_blocks), dtype=torch.bool)
    fixed = [not alike(rows) for rows in k_blocks]
    for i, rows in enumerate(q_blocks):
        scores = torch.stack([rows.mean(0) @ keys.mean(0) for keys in k_blocks]) / q.shape[-1] ** 0.5
        scores[torch.tensor(fixed)] = -torch.inf
        best = scores.softmax(0).sort(descending=True, stable=True).indices[: max(1, int(topk * len(k_blocks)))]
        mask[i, best] = True
        mask[i] |= torch.tensor(fixed)
        mask[i] |= not alike(rows)
    return mask


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("similarity", [-0.1, 0.35])
def test_plans_with_an_odd_number_of_tokens_and_text_on_any_side(text, similarity):
    layout = VideoLayout(5, 3, 7, text_before=text[0], text_after=text[1])
    torch.manual_seed(2)
    drift = torch.randn(2, 3, layout.tokens, 16).cumsum(2) / 3  # neighbours are alike
    q, k = drift + torch.randn_like(drift), drift.flip(-1) + torch.randn_like(drift)
    method = Sparge(topk=0.4, block=(16, 8), similarity=similarity)
    plan = method.plan(q, k, k, layout, PlanMemory()).validate()
    mask = plan.to_dense_mask()
    video = layout.video
    for b in range(2):
        for h in range(3):
            blocks = written_out(q[b, h, video], k[b, h, video], (16, 8), 0.4, similarity)
            expected = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
            expected[video, video] = blocks.repeat_interleave(16, 0)[:105].repeat_interleave(8, 1)[:, :105]
            assert torch.equal(mask[b, h], expected)
    v = torch.randn_like(q)
    out = sparse_attention(q, k, v, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", [0, 60])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_a_density_is_met_to_a_block(density, text):
    layout = VideoLayout(16, 8, 8, text_after=text)
    method = Sparge.for_density(layout, density)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
    assert method.plan(q, k, v, layout, PlanMemory()).density() == pytest.approx(density, abs=0.5 / 16 + 1e-6)


@pytest.mark.parametrize("layout", [VideoLayout(16, 8, 8), VideoLayout(9, 8, 11, text_after=60)])
@pytest.mark.parametrize("settings", [{}, {"sink": True}, {"published": True}, {"block": (16, 8)}])
def test_the_density_told_before_is_that_of_the_calls(layout, settings):
    q, k, v = torch.randn(3, 1, 4, layout.tokens, 16)
    for topk in (0.2, 0.5, 1.0):
        method = Sparge(topk=topk, **settings)
        density = method.plan(q, k, v, layout, PlanMemory()).density()
        assert method.expected_density(layout) == pytest.approx(density, abs=0.02)
    for other in (Sparge(cdf=0.9), Sparge(similarity=0.2)):
        assert other.expected_density(layout) is None


def test_the_mean_of_the_keys_and_the_sink():
    """A constant added to all keys changes no softmax, so it must change no choice."""
    q, k = torch.randn(2, 1, 2, 200, 16)
    method = Sparge(topk=0.3, block=(32, 16))
    assert torch.equal(method.block_mask(q, k), method.block_mask(q, k + 7.0))
    sink = Sparge(topk=0.3, block=(32, 16), sink=True).block_mask(q, k)
    assert sink[..., 0].all() and torch.equal(sink[..., 1:], method.block_mask(q, k)[..., 1:])


def test_blocks_that_are_all_unlike_read_and_are_read_by_everything():
    q, k = torch.randn(2, 1, 1, 128, 32)
    assert Sparge(cdf=0.5, similarity=0.9, block=(32, 32)).block_mask(q, k).all()


def test_it_plans_without_reading_anything_on_the_host():
    layout = VideoLayout(3, 4, 5, text_before=2, text_after=3)
    q, k, v = (torch.empty(2, 3, layout.tokens, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    for method in (Sparge(block=(16, 8)), Sparge(cdf=0.9, similarity=0.5, block=(16, 8), sink=True)):
        assert method.plan(q, k, v, layout, PlanMemory()).device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0.5, "cdf": 0.9}, r"topk 0\.5 and cdf 0\.9: give one of them"),
        ({"topk": 0.0}, "topk is 0.0: it must be above 0 and at most 1"),
        ({"cdf": 1.5}, "cdf is 1.5: it must be above 0"),
        ({"similarity": 2}, "similarity is 2: it is a mean cosine, from -1 to 1"),
        ({"similarity": "0.5"}, "similarity is '0.5': it is a mean cosine"),
        ({"pv_threshold": "10"}, "pv_threshold is '10': it must be above 0"),
        ({"sink": 1}, "sink is 1: it must be True or False"),
        ({"block": 64}, r"block is 64: it is \(queries, keys\)"),
        ({"block": (64, 0)}, r"block\[1\] is 0: it must be a whole number of at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sparge(**settings)


def test_a_density_that_cannot_be():
    assert METHODS["sparge"] is Sparge and Sparge().topk == 0.5
    with pytest.raises(ValueError, match=r"density 0\.01 is below 0\.250, .*raise density, or use smaller blocks"):
        Sparge.for_density(VideoLayout(4, 8, 8), 0.01)
    with pytest.raises(ValueError, match=r"density 0\.6 is below 1\.000, .*raise density, or use smaller blocks"):
        Sparge.for_density(VideoLayout(3, 4, 5), 0.6)  # in one block
    assert Sparge.for_density(VideoLayout(3, 4, 5), 1.0).topk == 1.0
    with pytest.raises(ValueError, match="and the text"):
        Sparge.for_density(VideoLayout(16, 8, 8, text_after=300), 0.2)


def test_a_density_and_what_it_decides_are_not_both_given():
    for name in ("topk", "cdf"):
        with pytest.raises(ValueError, match=rf"^Sparge has density 0\.5 and {name} 0\.1: give one of them\.$"):
            Sparge.for_density(VideoLayout(21, 8, 8), 0.5, **{name: 0.1})
    assert Sparge.for_density(VideoLayout(21, 8, 8), 0.5, topk=None, cdf=None).topk == pytest.approx(0.5, abs=0.03)


def test_all_of_the_mass_is_all_blocks():
    layout = VideoLayout(8, 12, 16)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 4, layout.tokens, 32)
    assert Sparge(cdf=1.0, block=(16, 8)).block_mask(q, k).all()


@pytest.mark.parametrize("settings", [{"sink": True}, {"published": True}, {"sink": True, "published": True}])
def test_a_density_counts_what_is_read_in_any_case(settings):
    layout = VideoLayout(9, 8, 11)  # 792 tokens: neither kind of block fits
    q, k, v = torch.randn(3, 1, 4, layout.tokens, 16)
    for density in (0.4, 0.6):
        plan = Sparge.for_density(layout, density, **settings).plan(q, k, v, layout, PlanMemory())
        assert plan.density() == pytest.approx(density, abs=0.5 / 13 + 0.01)
    with pytest.raises(ValueError, match="of 64 tokens for each query block, the sink"):
        Sparge.for_density(layout, 0.05, sink=True)


def test_no_density_where_the_content_decides():
    with pytest.raises(ValueError, match=r"similarity is 0\.3: .* no topk gives a density of 0\.5"):
        Sparge.for_density(VideoLayout(9, 8, 8), 0.5, similarity=0.3)
