"""Radial Attention: the published masks, and what the exact rule promises on any grid."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidaccel.attention import DenseSchedule, PlanMemory, Radial, VideoLayout, sparse_attention

DATA = Path(__file__).parents[1] / "data"
GOLDEN = sorted(DATA.glob("radial_*.npz"))

# Frames that are whole blocks and frames that are not, fewer tokens than a block, text on either side, one frame.
RAGGED = [
    VideoLayout(9, 8, 8),
    VideoLayout(7, 6, 13),
    VideoLayout(7, 6, 13, text_before=19),
    VideoLayout(7, 6, 13, text_after=21),
    VideoLayout(5, 10, 21, text_before=3, text_after=50),
    VideoLayout(20, 1, 7),
    VideoLayout(1, 9, 9),
    VideoLayout(2, 3, 3, text_after=1),
]
CONFIGS = [
    Radial(16),
    Radial(8, decay=0.6, sink=2),
    Radial(32, sink=False, near=0.3, min_window=0),
    Radial(16, decay=3.0, thinning=4),
    Radial(),
]


def name(value: Radial | VideoLayout) -> str:
    """A short test id."""
    if isinstance(value, VideoLayout):
        return "x".join(map(str, (value.frames, value.height, value.width))) + f"+{value.text_tokens}"
    return f"block{value.block_size}-decay{value.decay}-sink{int(value.sink)}"


def wan(frames: int, height: int, width: int) -> VideoLayout:
    """The token grid of a Wan video in pixels: 4x in time and 8x in space, then patches of 2 x 2."""
    return VideoLayout((frames - 1) // 4 + 1, height // 16, width // 16)


def by_pairs(config: Radial, layout: VideoLayout) -> torch.Tensor:
    """The block mask by definition: every token pair written out, every part of every block counted."""
    s, block = layout.tokens_per_frame, config.resolved_block_size(layout)
    thin_below = next((size for size in (128, 64, 32, 16) if s >= 8 * size), 8)
    largest_power = 2 ** (s.bit_length() - 1)

    def pair_of_frames(i: int, j: int) -> torch.Tensor:
        distance = abs(i - j)
        apart = (torch.arange(s) - torch.arange(s)[:, None]).abs()
        if j < int(config.sink):
            return torch.ones(s, s, dtype=torch.bool)
        if distance == 0:
            return apart <= int(min(2 * config.near, 1) * s)
        if distance == 1:
            return apart <= int(config.near * s)
        group = 2 ** (distance.bit_length() - 1)
        every = 1
        while (
            every < group and largest_power / group * max(config.decay, 1) * 2 * every <= thin_below * config.thinning
        ):
            every *= 2
        if distance % every:
            return torch.zeros(s, s, dtype=torch.bool)
        return apart <= max(config.min_window * block, config.decay * largest_power / group)

    frame = torch.full((layout.tokens,), -1)
    frame[layout.video] = torch.arange(layout.frames).repeat_interleave(s)
    place = torch.zeros(layout.tokens, dtype=torch.int64)
    place[layout.video] = torch.arange(s).repeat(layout.frames)
    pairs = {(i, j): pair_of_frames(i, j) for i in range(layout.frames) for j in range(layout.frames)}
    blocks = torch.arange(layout.tokens).split(block)
    of_video = [bool((frame[rows] >= 0).all()) for rows in blocks]
    parts = []  # of each block: a frame, and from which to which of its places
    for rows in blocks:
        frames = [(i, place[rows[frame[rows] == i]]) for i in frame[rows].unique().tolist()]
        parts.append([(i, slice(int(places[0]), int(places[-1]) + 1)) for i, places in frames])
    own_place = torch.eye(s, dtype=torch.bool)
    mask = torch.zeros(len(blocks), len(blocks), dtype=torch.bool)
    for a, b in itertools.product(range(len(blocks)), repeat=2):
        if not (of_video[a] and of_video[b]):
            mask[a, b] = True
            continue
        for (i, x), (j, y) in itertools.product(parts[a], parts[b]):
            part = pairs[i, j][x, y]
            mask[a, b] |= bool(2 * part.sum() >= part.numel() or (part & own_place[x, y]).any())
    return mask


# -- the published rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_rule_equals_the_published_generator(path: Path) -> None:
    data = {key: value.item() if value.ndim == 0 else value for key, value in np.load(path).items()}
    layout = VideoLayout(data["frames"], data["tokens_per_frame"] // 16, 16, text_after=data["text_tokens"])
    config = Radial(data["block_size"], data["decay_factor"], sink=data["model"] == "wan", rule="published")
    assert torch.equal(config.block_mask(layout), torch.from_numpy(data["mask"]))


def test_the_golden_masks_are_there() -> None:
    assert len(GOLDEN) == 3


@pytest.mark.parametrize(("block", "decay"), [(128, 0.2), (64, 0.8), (128, 1.0)])
def test_exact_and_published_agree_where_frames_are_whole_blocks(block: int, decay: float) -> None:
    layout = VideoLayout(21, 32, 40)
    exact, published = Radial(block, decay), Radial(block, decay, rule="published")
    assert exact.expected_density(layout) == pytest.approx(published.expected_density(layout), rel=0.1)
    assert (exact.block_mask(layout) ^ published.block_mask(layout)).float().mean() < 0.03


@pytest.mark.parametrize("layout", [VideoLayout(21, 30, 52), VideoLayout(21, 45, 80), VideoLayout(4, 16, 16, 128)])
def test_published_rule_says_where_it_is_not_defined(layout: VideoLayout) -> None:
    with pytest.raises(ValueError, match=r'not defined for .* tokens per frame.*rule="exact"'):
        Radial(rule="published").block_mask(layout)
    assert Radial(rule="exact").block_mask(layout).diagonal().all()


# -- the exact rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("layout", RAGGED, ids=name)
def test_exact_rule_equals_its_definition(layout: VideoLayout, config: Radial) -> None:
    assert torch.equal(config.block_mask(layout), by_pairs(config, layout))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("layout", RAGGED, ids=name)
def test_every_query_reads_itself_the_sink_and_text(layout: VideoLayout, config: Radial) -> None:
    length, s = layout.tokens, layout.tokens_per_frame
    q = torch.zeros(1, 1, length, 4)
    tokens = config.plan(q, q, q, layout, PlanMemory()).validate().to_dense_mask()[0, 0]
    assert tokens.diagonal().all()
    start = layout.video.start
    assert tokens[:, start : start + min(int(config.sink), layout.frames) * s].all()
    text = torch.ones(length, dtype=torch.bool)
    text[layout.video] = False
    assert tokens[text].all()
    assert tokens[:, text].all()
    # A query's own place in the frames at distances that are powers of two, which are never thinned out.
    for distance in (1, 2, 4, 8, 16):
        place = torch.arange(start, max(start, layout.video.stop - distance * s))
        assert tokens[place, place + distance * s].all()
        assert tokens[place + distance * s, place].all()


def test_whole_neighbours_are_whole_where_frames_end_inside_a_block() -> None:
    layout = VideoLayout(6, 6, 13)
    mask = Radial(16, sink=False).plan(*[torch.zeros(1, 1, 468, 4)] * 3, layout, PlanMemory()).to_dense_mask()[0, 0]
    frames = mask.view(6, 78, 6, 78)
    for i in range(6):
        for j in range(max(0, i - 1), min(6, i + 2)):
            assert frames[i, :, j].all()


def test_mask_does_not_depend_on_the_shape_of_a_frame() -> None:
    assert torch.equal(Radial(16).block_mask(VideoLayout(5, 6, 20)), Radial(16).block_mask(VideoLayout(5, 10, 12)))


@pytest.mark.parametrize("layout", [VideoLayout(9, 8, 8), VideoLayout(33, 16, 16), VideoLayout(11, 13, 17, 5, 7)])
def test_density_rises_with_decay_and_near_and_falls_with_thinning(layout: VideoLayout) -> None:
    base = Radial(decay=0.05, min_window=0)
    decays = [
        replace(base, decay=x).expected_density(layout) for x in (0.01, 0.05, 0.2, 0.5, 0.8, 1.0, 1.3, 2, 3, 5, 9, 40)
    ]
    assert decays == sorted(decays)
    assert decays[0] < 0.55
    assert decays[-1] == 1
    nears = [replace(base, near=x).expected_density(layout) for x in (0.01, 0.1, 0.3, 0.5, 0.7, 1.0)]
    assert nears == sorted(nears)
    assert nears[0] < nears[-1]
    thinned = [replace(base, thinning=x).expected_density(layout) for x in (1, 2, 4, 8)]
    assert thinned == sorted(thinned, reverse=True)
    assert thinned[-1] < thinned[0]
    masks = [replace(base, decay=x).block_mask(layout) for x in (0.2, 0.8, 1.3, 3)]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))


@pytest.mark.parametrize(
    ("config", "layout", "published"),
    [
        (Radial(128, 0.2), wan(81, 720, 1280), 0.26),
        (Radial(128, 0.2), wan(161, 720, 1280), 0.18),
        (Radial(128, 0.2), wan(321, 720, 1280), 0.12),
        (Radial(128, 0.95, sink=False), VideoLayout(30, 45, 80, text_after=256), 0.28),
    ],
    ids=["wan81", "wan161", "wan321", "hunyuan117"],
)
def test_density_is_near_the_published_one(config: Radial, layout: VideoLayout, published: float) -> None:
    # The published generator's block density at 720p; it does not take these grids without padding.
    assert config.expected_density(layout) == pytest.approx(published, abs=0.015)


@pytest.mark.parametrize("block", [64, 128])
def test_wan_720p_is_fast_to_plan(block: int) -> None:
    # Measured on one CPU thread: 0.010 s with blocks of 128, 0.04 s with blocks of 64.
    layout = wan(81, 720, 1280)
    assert layout.tokens == 75_600
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mask = Radial(block).block_mask(layout)
        times.append(time.perf_counter() - start)
    assert mask.shape == (-(-75_600 // block),) * 2
    assert min(times) < 1.0


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (wan(81, 720, 1280), 128),
        (wan(81, 480, 832), 128),
        (VideoLayout(33, 16, 16), 32),
        (VideoLayout(9, 8, 8), 8),
        (VideoLayout(4, 2, 2), 8),
    ],
)
def test_automatic_block_size(layout: VideoLayout, block: int) -> None:
    assert Radial().resolved_block_size(layout) == block
    assert Radial(24).resolved_block_size(layout) == 24
    assert Radial(rule="published").resolved_block_size(layout) == 128


# -- plans ----------------------------------------------------------------------------------------------------------


def test_plan_is_kept_per_config_in_the_memory_of_a_layout() -> None:
    layout = VideoLayout(5, 8, 8)
    q, memory = torch.zeros(2, 3, layout.tokens, 4), PlanMemory()
    plan = Radial(16).plan(q, q, q, layout, memory)
    assert plan.lead == (1, 1)
    assert plan.details["block_size"] == 16
    assert Radial(16).plan(q, q, q, layout, memory) is plan
    assert Radial(16, decay=0.9).plan(q, q, q, layout, memory) is not plan
    moved = Radial(16).plan(*[q.to("meta")] * 3, layout, PlanMemory())
    assert moved.device.type == "meta"


def test_a_mask_of_all_blocks_is_a_dense_plan() -> None:
    layout = VideoLayout(1, 8, 8)
    q = torch.zeros(1, 1, layout.tokens, 4)
    assert Radial(16).plan(q, q, q, layout, PlanMemory()).is_dense


@pytest.mark.parametrize("layout", RAGGED, ids=name)
def test_density_of_config_and_plan_agree(layout: VideoLayout) -> None:
    q = torch.zeros(1, 1, layout.tokens, 4)
    plan = Radial(16).plan(q, q, q, layout, PlanMemory())
    assert plan.density() == pytest.approx(Radial(16).expected_density(layout), abs=1e-12)


def test_attention_through_the_plan_equals_masked_attention() -> None:
    layout = VideoLayout(7, 6, 13, text_after=21)
    q, k, v = torch.randn(3, 2, 2, layout.tokens, 16).unbind()
    config = Radial(16, min_window=0)
    plan = config.plan(q, k, v, layout, PlanMemory())
    blocks = config.block_mask(layout).repeat_interleave(16, 0).repeat_interleave(16, 1)
    mask = blocks[: layout.tokens, : layout.tokens]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert mask.float().mean() < 0.8
    assert (sparse_attention(q, k, v, plan, backend="reference") - expected).abs().max() < 2e-6


def test_plan_needs_the_layout_of_the_sequence() -> None:
    q = torch.zeros(1, 1, 100, 4)
    with pytest.raises(ValueError, match=r"100 tokens, but .* has 64; pass the layout"):
        Radial().plan(q, q, q, VideoLayout(1, 8, 8), PlanMemory())


# -- a wanted density -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("density", [0.2, 0.25, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("layout", [VideoLayout(9, 8, 8), VideoLayout(33, 16, 16), VideoLayout(21, 15, 26)], ids=name)
def test_for_density_comes_close(layout: VideoLayout, density: float, sink: bool) -> None:
    config = Radial.for_density(layout, density, sink=sink)
    assert config.sink is sink
    assert config.expected_density(layout) == pytest.approx(density, abs=0.02)
    assert config.block_mask(layout).diagonal().all()


def test_for_density_keeps_what_is_given() -> None:
    schedule = DenseSchedule(first_steps=3)
    config = Radial.for_density(
        VideoLayout(33, 16, 16), 0.3, block_size=64, near=0.5, min_window=0.5, thinning=2, schedule=schedule
    )
    assert (config.block_size, config.near, config.min_window, config.thinning) == (64, 0.5, 0.5, 2)
    assert config.schedule is schedule
    assert config.expected_density(VideoLayout(33, 16, 16)) == pytest.approx(0.3, abs=0.05)


def test_for_density_prefers_the_published_form() -> None:
    config = Radial.for_density(VideoLayout(21, 15, 26), 0.6)
    assert (config.near, config.min_window, config.thinning) == (1, 1, 1)


@pytest.mark.parametrize("layout", [VideoLayout(1, 8, 8), VideoLayout(2, 8, 8), VideoLayout(3, 1, 1)], ids=name)
def test_for_density_on_hardly_any_video(layout: VideoLayout) -> None:
    assert Radial.for_density(layout, 1.0).expected_density(layout) == 1


def test_for_density_says_what_is_reachable() -> None:
    layout = VideoLayout(9, 8, 8)
    with pytest.raises(ValueError, match=r"density 0\.05 .* blocks of 8, sink=True: 0\.182 to 1\.000 is possible"):
        Radial.for_density(layout, 0.05, sink=True)
    # What is so already is not advised.
    for settings, advice in (
        ({"block_size": 8, "sink": False}, ""),
        ({"block_size": 8, "sink": True}, "; for less, use sink=False"),
        ({"block_size": 16, "sink": False}, "; for less, use smaller blocks"),
        (
            {"block_size": 16, "sink": 1, "near": 1.0},
            "; for less, use smaller blocks or sink=False; leave near to the search",
        ),
    ):
        with pytest.raises(ValueError, match=rf"1\.000 is possible{advice}\.$"):
            Radial.for_density(layout, 0.01, **settings)
    with pytest.raises(ValueError, match=r"density 0\.99 .* to 0\.[0-9]+ is possible"):
        Radial.for_density(layout, 0.99, near=0.1)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 4}, "block_size is 4.*at least 8"),
        ({"block_size": 4096}, "block_size is 4096.*at most 1024"),
        ({"block_size": 64.0}, "block_size is 64.0.*whole number"),
        ({"block_size": True}, "block_size is True.*whole number"),
        ({"decay": 0}, "decay is 0.*above 0"),
        ({"decay": -0.2}, "decay is -0.2.*above 0"),
        ({"decay": float("nan")}, "decay is nan.*finite"),
        ({"decay": float("inf")}, "decay is inf.*finite"),
        ({"decay": "0.2"}, "decay is '0.2'.*number"),
        ({"sink": -1}, "sink is -1.*at least 0"),
        ({"sink": 0.5}, "sink is 0.5.*whole number"),
        ({"rule": "paper"}, "rule is 'paper'.*exact.*published"),
        ({"near": 0}, "near is 0.*above 0"),
        ({"near": 1.5}, "near is 1.5.*at most 1"),
        ({"min_window": -1}, "min_window is -1.*0 or more"),
        ({"thinning": 0}, "thinning is 0.*at least 1"),
        ({"thinning": 1.5}, "thinning is 1.5.*whole number"),
        ({"rule": "published", "sink": 2}, 'sink=2.*rule="exact"'),
        ({"rule": "published", "min_window": 0}, 'min_window=0.*rule="exact"'),
        ({"rule": "published", "thinning": 2}, 'thinning=2.*rule="exact"'),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Radial(**settings)


@pytest.mark.parametrize("density", [0, -0.1, 1.2, float("nan"), "0.3", True])
def test_bad_density(density: object) -> None:
    with pytest.raises(ValueError, match=r"density is .* above 0 and at most 1"):
        Radial.for_density(VideoLayout(9, 8, 8), density)
