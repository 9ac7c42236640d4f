"""LVSA: its masks against a definition written out pair by pair, and what is promised of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vidaccel.attention import LVSA, DenseSchedule, PlanMemory, SparseAttention, StepInfo, VideoLayout
from vidaccel.attention.heads import ALL_HEADS
from vidaccel.attention.methods.base import OutOfReach

LAYOUTS = [
    VideoLayout(17, 2, 3),
    VideoLayout(13, 3, 3, text_before=5),
    VideoLayout(10, 1, 7, text_after=4),
    VideoLayout(5, 2, 2, text_before=1, text_after=2),
    VideoLayout(1, 3, 3),
]
CONFIGS = [
    LVSA(reference=9),
    LVSA(reference=4, window=1, first_frames=2),
    LVSA(window=2, interval=4),
    LVSA(window=0, interval=3),
    LVSA(window=1, interval=5, first_frames=0, rotate=False),
]


def anchors_of(config: LVSA, frames: int, interval: int, turn: int) -> set[int]:
    offset = turn % interval if config.rotate else 0
    return {
        *range(min(config.first_frames, frames)),
        *((offset + interval * n) % frames for n in range(-(-frames // interval))),
    }


def by_pairs(config: LVSA, layout: VideoLayout, turn: int) -> torch.Tensor:
    """The mask by definition, token by token: windows grow outward one frame at a time, the earlier side first."""
    frames, s = layout.frames, layout.tokens_per_frame
    interval = config.interval_of(frames)
    anchors = anchors_of(config, frames, interval, turn)
    wanted = min(2 * config.window + 1 if config.window else 0, frames - len(anchors))
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[:] = True
    for i in range(frames):
        read = set()
        for distance in range(frames):
            for j in (i - distance, i + distance):
                if 0 <= j < frames and j not in anchors and len(read) < wanted:
                    read.add(j)
        for j in set(range(frames)) - read - anchors:
            rows, columns = (layout.text_before + x * s for x in (i, j))
            mask[rows : rows + s, columns : columns + s] = False
    return mask


def plan(config: LVSA, layout: VideoLayout, memory: PlanMemory):
    q = torch.zeros(1, 2, layout.tokens, 4)
    return config.plan(q, q, q, layout, memory)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.frames}+{layout.text_tokens}")
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_plans_of_several_steps_are_those_of_the_definition(config, layout):
    memory = PlanMemory()
    for turn in range(config.interval_of(layout.frames) + 2):
        made = plan(config, layout, memory).validate()
        assert torch.equal(made.to_dense_mask()[0, 0], by_pairs(config, layout, turn))


def test_each_frame_reads_as_many_frames_and_every_frame_is_an_anchor_once():
    config, layout = LVSA(window=2, interval=4, first_frames=0), VideoLayout(16, 1, 1)
    memory, anchors = PlanMemory(), []
    for _ in range(4):
        mask = plan(config, layout, memory).to_dense_mask()[0, 0]
        assert mask.sum(-1).unique().tolist() == [4 + 5]
        anchors += mask.all(0).nonzero().flatten().tolist()
    assert sorted(anchors) == list(range(16))


def test_the_published_intervals():
    """Of Wan (reference 21) with a window of 4, from the table that the authors published of what is left out."""
    for frames, sparsity in ((21, 0.0), (33, 0.21), (41, 0.44), (49, 0.55), (65, 0.66), (81, 0.74), (121, 0.82)):
        read = LVSA(window=4, rotate=False).expected_density(VideoLayout(frames, 1, 1))
        assert read == pytest.approx(1 - sparsity, abs=0.006), frames


def test_a_video_of_the_usual_length_is_dense():
    layout = VideoLayout(9, 2, 2)
    assert plan(LVSA(reference=9), layout, PlanMemory()).is_dense
    assert LVSA(reference=9).expected_density(layout) == 1


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: f"{layout.frames}+{layout.text_tokens}")
def test_the_density_told_before_is_the_mean_over_the_turns(layout):
    """In the first turn the moving anchors fall on the first frame, and one frame fewer is read."""
    for config in CONFIGS:
        memory = PlanMemory()
        turns = [plan(config, layout, memory).density() for _ in range(config.interval_of(layout.frames))]
        assert sum(turns) / len(turns) == pytest.approx(config.expected_density(layout)), config


def test_the_least_density_that_is_told_can_be_had():
    layout = VideoLayout(9, 4, 4)
    with pytest.raises(OutOfReach) as refused:
        LVSA.for_density(layout, 0.1)
    config, memory = LVSA.for_density(layout, refused.value.least), PlanMemory()
    turns = [plan(config, layout, memory).density() for _ in range(config.interval)]
    assert sum(turns) / len(turns) == pytest.approx(refused.value.least)


def test_an_interval_beyond_the_video_is_one_round_of_it():
    assert LVSA(interval=10**12).expected_density(VideoLayout(9, 1, 1)) == pytest.approx((8 + 8 * 9) / 81)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8, 1.0])
def test_a_density_is_met_as_nearly_as_whole_frames_can(density):
    layout = VideoLayout(21, 2, 2, text_after=3)
    config = LVSA.for_density(layout, density, schedule=DenseSchedule(first_layers=1))
    assert abs(config.expected_density(layout) - density) < 0.04 and config.schedule.first_layers == 1
    with pytest.raises(OutOfReach, match="is possible"):
        LVSA.for_density(layout, 0.01)


@pytest.mark.parametrize("frames", [5, 9, 21])
def test_a_frame_reads_itself_at_every_density_that_can_be_reached(frames):
    layout = VideoLayout(frames, 1, 2)
    for density in (n / 50 for n in range(1, 51)):
        try:
            config = LVSA.for_density(layout, density)
        except OutOfReach:
            continue
        assert config.frames_read(frames).diagonal().all(), density
    asked = LVSA.for_density(layout, 0.4, window=0)  # anchors alone, as published
    assert asked.window == 0 and not asked.frames_read(frames).diagonal().all()


def test_what_is_given_beside_a_density_is_kept_or_refused():
    layout = VideoLayout(21, 4, 4)
    config = LVSA.for_density(layout, 0.7, interval=2)
    assert config.interval == 2 and config.expected_density(layout) == pytest.approx(0.7, abs=0.05)
    assert LVSA.for_density(layout, 0.5, interval=None) == LVSA.for_density(layout, 0.5)
    with pytest.raises(
        OutOfReach, match=r"0\.2 with 21 frames and interval 2: 0\.\d+ to 0\.\d+ is possible\..*or another interval\."
    ) as refused:
        LVSA.for_density(layout, 0.2, interval=2)
    assert refused.value.eased_by == ("interval",)
    with pytest.raises(OutOfReach, match=r"0\.9 with 21 frames and window 1, interval 7") as refused:
        LVSA.for_density(layout, 0.9, window=1, interval=7)
    assert refused.value.least == pytest.approx(refused.value.most)
    for name, value in (("window", 2.7), ("window", "3"), ("interval", 2.5), ("reference", "9")):
        with pytest.raises(ValueError, match=f"LVSA {name} is {value!r}: it must be a whole number"):
            LVSA.for_density(layout, 0.5, **{name: value})


@torch.no_grad()
def test_a_run_that_begins_at_a_turn_goes_on_from_there():
    config, layout = LVSA(window=2, interval=4), VideoLayout(17, 2, 3)
    x = torch.randn(1, 1, layout.tokens, 4)
    engine = SparseAttention(config, num_layers=1)
    engine.enter(StepInfo(), layout)
    for begun in (0, 3, 6):
        engine.begin_anew(begun)
        for step in range(2):
            engine.enter(StepInfo(step=step), layout)
            plan = engine._plan(x, x, x, 0, 0, ALL_HEADS)
            assert plan.to_dense_mask()[0, 0].equal(by_pairs(config, layout, begun + step))
    assert len(engine.memory._of_place((layout, x.device), 1)) == 4  # masks of each turn, which are made once


def test_layers_and_guidance_branches_have_the_anchors_of_the_step():
    layout = VideoLayout(8, 1, 2)
    engine = SparseAttention(LVSA(window=1, interval=4), num_layers=2, backend="reference")
    q = torch.randn(1, 2, 16, 8)
    seen = []
    for step in range(3):
        for branch in ("cond", "uncond"):
            engine.enter(StepInfo(step=step, num_steps=3, branch=branch), layout)
            seen.append([engine(q, q, q, layer=layer) for layer in range(2)])
    for made in (seen[at] + seen[at + 1] for at in (0, 2, 4)):
        assert all(torch.equal(made[0], other) for other in made)
    assert not torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference": 0}, "reference is 0"),
        ({"window": -1}, "window is -1"),
        ({"interval": 0}, "interval is 0"),
        ({"rotate": 1}, "rotate is 1"),
        ({"first_frames": 1.5}, "first_frames is 1.5"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LVSA(**settings)


def test_the_interval_makes_the_budget_of_the_training():
    config = LVSA(reference=9)
    assert config.interval_of(17) == 16 and config.frames_read(17).sum(-1).unique().tolist() == [9]
    assert math.isclose(replace(config, rotate=False).expected_density(VideoLayout(17, 8, 8)), 9 / 17)
