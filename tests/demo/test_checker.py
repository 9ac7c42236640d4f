from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from vidaccel.demo import world
from vidaccel.demo.checker import NONE, Reading, check


def rendered(attributes, seed=0, frames=17, size=64):
    return world.render(world.sample_scene(seed, attributes), frames, size, size)


def test_every_class_is_read_right():
    for index, attributes in enumerate(world.all_attributes()):
        assert check(rendered(attributes, seed=index)) == Reading(*attributes)


@pytest.mark.parametrize("seed", range(6))
def test_full_size_videos_are_read_right(seed):
    scene = world.sample_scene(seed + 100)
    assert check(world.render(scene)) == Reading(*scene.attributes)


@pytest.mark.parametrize("seed", range(12))
def test_blur_and_noise_do_not_matter(seed):
    scene = world.sample_scene(seed + 200)
    video = world.render(scene, 17, 96, 96)
    video = functional.avg_pool2d(functional.pad(video, (2, 2, 2, 2), mode="replicate"), 5, 1)
    video = video + 0.03 * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    assert check(video) == Reading(*scene.attributes)


def test_layouts_and_bytes_are_accepted():
    attributes = ("square", "blue", "up", "white")
    video = rendered(attributes)
    assert check((video * 255).byte().permute(0, 2, 3, 1).numpy()) == Reading(*attributes)
    with pytest.raises(ValueError, match="must be"):
        check(video[0])


def test_noise_blank_and_nan_show_nothing():
    noise = torch.rand(17, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert check(noise) == Reading(NONE, NONE, NONE, NONE)
    assert check(torch.full((17, 3, 64, 64), 0.5)) == Reading(NONE, NONE, NONE, "grey")
    assert check(torch.full((17, 3, 64, 64), float("nan"))).shape == NONE


def test_motion_needs_time_in_order():
    video = rendered(("circle", "red", "left", "black"))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    assert check(video[order]).motion == NONE
    assert check(video.flip(0)).motion == "right"
    assert check(video[:1].expand(17, -1, -1, -1)).motion == NONE
    assert check(video.transpose(2, 3)).motion == "up"


def test_a_flickering_object_is_not_there():
    video = rendered(("circle", "red", "left", "black")).clone()
    video[::2] = video[0, :, :1, :1]
    reading = check(video)
    assert reading.shape == reading.motion == NONE


def test_a_shape_of_another_kind_is_none():
    """A long bar overlaps with no shape of the world."""
    video = torch.zeros(17, 3, 64, 64)
    for i in range(17):
        video[i, 0, 10:54, 10 + i : 18 + i] = 1.0
    reading = check(video)
    assert (reading.shape, reading.colour, reading.motion) == (NONE, "red", "right")


def test_agreement_is_per_attribute():
    reading = Reading("circle", "red", "left", "grey")
    right = reading.agrees_with("a red circle moves left on a black background")
    assert right == {"shape": True, "colour": True, "motion": True, "background": False, "all": True}
    assert not reading.agrees_with("a red square moves left on a grey background")["all"]
