from __future__ import annotations

import re

import pytest
import torch
from plans import masked_attention

from vidaccel import SVG, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.attention.methods.base import OutOfReach

LAYOUTS = [VideoLayout(5, 4, 6), VideoLayout(5, 4, 6, 7, 0), VideoLayout(7, 3, 5, 3, 5), VideoLayout(9, 8, 8, 0, 11)]


def expected_band(layout: VideoLayout, width: int, tile: int, temporal: bool, sink: bool) -> torch.Tensor:
    """The mask of a head, entry by entry: tiles of queries over the band around them, the text, and the first frame."""
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    order = (layout.token_major_order() if temporal else layout.video_last_order())[layout.text_tokens :]
    for start in range(0, layout.video_tokens, tile):
        stop = min(start + tile, layout.video_tokens)
        band = order[max(0, start - width) : stop + width]
        mask[order[start:stop].unsqueeze(1), band] = True
    if sink:
        mask[:, layout.video][:, : layout.tokens_per_frame] = True
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.video] = False
    mask[:, text] = True
    mask[text] = True
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("width", [0, 5, 33])
def test_bands_are_exactly_as_defined(layout, temporal, sink, width):
    plan = SVG(tile=8, sink=sink).band(layout, width, temporal).validate()
    assert plan.to_dense_mask()[0, 0].equal(expected_band(layout, width, 8, temporal, sink))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.5, 0.7, 1.0])
def test_the_density_asked_for_is_computed(layout, density):
    method = SVG(density=density, tile=4, sink=False)
    q, k, v = torch.randn(3, 2, 4, layout.tokens, 8)
    plan = method.plan(q, k, v, layout, PlanMemory()).validate()
    one_more_token = 2 / layout.tokens
    assert density <= plan.density() <= density + one_more_token


def heads_of_both_kinds(layout: VideoLayout):
    """Head 0 attends within a frame, head 1 to its own place in all frames, by construction."""
    frame = torch.arange(layout.video_tokens) // layout.tokens_per_frame
    patch = torch.arange(layout.video_tokens) % layout.tokens_per_frame
    codes = [torch.nn.functional.one_hot(x, 128).float() for x in (frame, patch)]
    q = torch.stack(codes).unsqueeze(0) * 12
    return q, q.clone(), torch.randn_like(q)


def test_profiling_tells_spatial_from_temporal_heads_and_loses_little():
    layout = VideoLayout(12, 6, 6)
    q, k, v = heads_of_both_kinds(layout)
    method = SVG(density=0.35, tile=4, sink=False)
    memory = PlanMemory()
    for _ in range(6):  # every set of rows decides alike
        plan = method.plan(q, k, v, layout, memory).validate()
        assert plan.details["temporal"].tolist() == [0.0, 1.0]
    out = sparse_attention(q, k, v, plan)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    spatial = method.band(layout, method.band_width(layout), temporal=False)
    wrong = sparse_attention(q, k, v, spatial)[:, 1] - dense[:, 1]
    right = out - dense
    assert right.square().mean() < 0.02 * wrong.square().mean()


def test_the_masks_judged_are_the_masks_executed():
    """The decision equals the one made from whole outputs under the executed plans, over every row."""
    layout = VideoLayout(6, 4, 4, 0, 5)
    q, k, v = torch.randn(3, 1, 8, layout.tokens, 16) * 2
    method = SVG(density=0.55, profile_rows=layout.tokens, tile=4)
    plan = method.plan(q, k, v, layout, PlanMemory())
    dense = masked_attention(q, k, v, torch.ones(layout.tokens, layout.tokens).bool())[0]
    width = method.band_width(layout)
    errors = []
    for temporal in (False, True):
        mask = method.band(layout, width, temporal).to_dense_mask()
        errors.append((masked_attention(q, k, v, mask)[0] - dense).square().mean((-1, -2)))
    assert plan.details["temporal"].bool().tolist() == (errors[1] < errors[0])[0].tolist()


def test_rows_are_drawn_from_the_whole_sequence():
    layout = VideoLayout(40, 20, 20, 0, 64)
    memory = PlanMemory()
    q, k, v = torch.randn(3, 1, 1, layout.tokens, 4)
    SVG(density=0.5).plan(q, k, v, layout, memory)
    (static,) = memory.layout.values()
    rows = torch.cat(static.rows)
    assert rows.max() > 0.9 * layout.tokens and rows.min() < 0.1 * layout.tokens


def test_a_new_layout_has_its_own_band():
    for layout in (VideoLayout(9, 8, 8), VideoLayout(5, 8, 8)):
        q, k, v = torch.randn(3, 1, 2, layout.tokens, 8)
        assert SVG(density=0.5).plan(q, k, v, layout, PlanMemory()).validate().n_q == layout.tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0}, "density is 0"),
        ({"density": 1.2}, "density is 1.2"),
        ({"profile_rows": 0}, "profile_rows is 0"),
        ({"tile": 1.5}, "tile is 1.5"),
        ({"sink": "false"}, "sink is 'false': it must be True, False or None"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SVG(**values)


def test_a_density_that_no_band_reaches_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"density 0.05 is below 0\.\d+.*sink=False"):
        SVG(density=0.05, sink=True).check(VideoLayout(9, 8, 8))


@pytest.mark.parametrize("layout", [VideoLayout(7, 7, 1, 3, 17), VideoLayout(21, 8, 8, 0, 5), VideoLayout(13, 6, 9)])
@pytest.mark.parametrize("sink", [None, True, False])
def test_the_least_that_is_told_is_allowed(layout, sink):
    """Rounded as it is told, and where a density that was raised to it is enough to read the first frame whole."""
    for density in (0.01, 0.1, 0.2, 0.3):
        try:
            SVG(density=density, sink=sink).check(layout)
        except OutOfReach as refused:
            told = float(re.search(r"is below (\d\.\d{3})", str(refused)).group(1))
            assert density < refused.least <= told
            for least in (refused.least, told):
                SVG(density=least, sink=sink).check(layout)
            with pytest.raises(OutOfReach):
                SVG(density=refused.least - 1e-6, sink=sink).check(layout)


def test_the_first_frame_is_read_whole_where_it_is_a_small_part():
    long, short = VideoLayout(21, 8, 8), VideoLayout(9, 8, 8)
    for layout, sink in ((long, True), (short, False)):
        mask = SVG(density=0.3).band(layout, 16, temporal=False).to_dense_mask()
        assert bool(mask[..., : layout.tokens_per_frame].all()) == sink


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_short_videos_need_no_settings(frames):
    layout = VideoLayout(frames, 8, 8)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 8)
    plan = SVG().plan(q, k, v, layout, PlanMemory()).validate()
    assert plan.density() == pytest.approx(0.3, abs=0.03)
