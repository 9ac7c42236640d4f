from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from vidaccel.demo import HELD_OUT_PROMPTS, world


def test_a_scene_renders_the_same_each_time_and_any_size():
    scene = world.sample_scene(5)
    assert scene == world.sample_scene(5) != world.sample_scene(6)
    video = world.render(scene, 9, 48, 64)
    assert video.shape == (9, 3, 48, 64) and video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, world.render(scene, 9, 48, 64))


def test_the_object_stays_in_the_frame_and_moves_as_captioned():
    for seed in range(60):
        scene = world.sample_scene(seed)
        video = world.render(scene, 5, 64, 64)
        background = torch.tensor(world.BACKGROUNDS[scene.background]).view(1, 3, 1, 1)
        cover = (video - background).abs().sum(1)
        assert cover[:, 0].max() == cover[:, -1].max() == cover[..., 0].max() == cover[..., -1].max() == 0
        grid = torch.arange(64.0)
        x, y = ((cover.sum(d) * grid).sum(1) / cover.sum((1, 2)) for d in (1, 2))
        moved = torch.stack([x[-1] - x[0], y[-1] - y[0]]) / 64
        expected = torch.tensor(world.MOTIONS[scene.motion]) * scene.travel
        torch.testing.assert_close(moved, expected, atol=0.01, rtol=0)


def test_first_and_last_frame_do_not_depend_on_the_number_of_frames():
    scene = world.sample_scene(1)
    short, long = world.render(scene, 5, 32, 32), world.render(scene, 33, 32, 32)
    torch.testing.assert_close(short, long[::8])


def test_captions_parse_back_and_other_text_is_refused():
    for attributes in world.all_attributes():
        assert world.parse_caption(world.caption(*attributes)) == attributes
    assert world.parse_caption(" A red circle moves up on a white background ")[1] == "red"
    for text in ("a red circle", "a red hexagon moves left on a grey background", ""):
        with pytest.raises(ValueError, match="red circle|hexagon"):
            world.parse_caption(text)


def test_bad_scenes_and_sizes_are_refused():
    with pytest.raises(ValueError, match="colour 'pink' is not known"):
        world.Scene("circle", "pink", "left", "grey")
    with pytest.raises(ValueError, match="size is 1.5"):
        world.Scene("circle", "red", "left", "grey", size=1.5)
    with pytest.raises(ValueError, match="at least 1"):
        world.render(world.sample_scene(0), frames=0)


def test_held_out_captions_are_64_balanced_and_leave_every_pair_in_training():
    held, kept = set(HELD_OUT_PROMPTS), set(world.training_captions())
    assert len(HELD_OUT_PROMPTS) == len(held) == 64 and len(kept) == 176 and not held & kept
    training = [world.parse_caption(c) for c in kept]
    for i, j in itertools.combinations(range(4), 2):
        values = {(a[i], a[j]) for a in world.all_attributes()}
        assert {(a[i], a[j]) for a in training} == values
    for i in range(4):
        counts = [sum(world.parse_caption(c)[i] == v for c in held) for v in {a[i] for a in training}]
        assert max(counts) - min(counts) <= 1


def test_training_never_draws_a_held_out_caption():
    videos, captions = world.training_batch(3, 400, 1, 8, 8)
    assert videos.shape == (400, 1, 3, 8, 8)
    assert not set(captions) & set(HELD_OUT_PROMPTS)
    assert len(set(captions)) > 140  # of 176


def test_training_batches_follow_their_seed():
    first, captions = world.training_batch(1, 3, 5, 16, 16)
    again, captions_again = world.training_batch(1, 3, 5, 16, 16)
    assert torch.equal(first, again) and captions == captions_again
    assert not torch.equal(first, world.training_batch(2, 3, 5, 16, 16)[0])


def test_importing_the_demo_loads_no_diffusers():
    code = "import sys, vidaccel.demo; print(sorted({'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
