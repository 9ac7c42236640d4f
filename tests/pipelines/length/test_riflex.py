"""RIFLEx in the rotary embeddings of Wan and HunyuanVideo, against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from tiny_wan import make_pipe, make_transformer

import vidaccel
from vidaccel.pipelines.length import Riflex, riflex
from vidaccel.pipelines.length.rotary import RiflexRotary

HEAD = 64  # of which 24 are for frames


def by_formula(frames: int, component: int, frequency: float) -> torch.Tensor:
    """Angles `[frames, 12]` over frames, one of which is replaced."""
    frequencies = 10000.0 ** (-2 * torch.arange(12, dtype=torch.float64) / 24)
    frequencies[component - 1] = frequency
    return torch.arange(frames)[:, None] * frequencies


@pytest.mark.parametrize(("riflex", "component"), [(Riflex(9), 2), (Riflex(9, 1), 1), (Riflex(20), 3)])
def test_the_intrinsic_frequency_makes_one_period_of_the_video(riflex, component):
    own = WanRotaryPosEmbed(HEAD, (1, 2, 2), 128)
    cos, sin = RiflexRotary(own, riflex)(torch.zeros(1, 8, 40, 4, 6))
    angles = by_formula(40, component, 2 * math.pi / 40).repeat_interleave(2 * 3, 0)
    plain = own(torch.zeros(1, 8, 40, 4, 6))
    for made, stock, wanted in ((cos, plain[0], angles.cos()), (sin, plain[1], angles.sin())):
        assert made.dtype == stock.dtype
        torch.testing.assert_close(made[0, :, 0, :24:2].double(), wanted, rtol=0, atol=1e-5)
        assert torch.equal(made[0, :, 0, 24:], stock[0, :, 0, 24:])
        assert torch.equal(made[0, :, 0, 0:24:2], made[0, :, 0, 1:24:2])


def test_hunyuanvideo_has_the_component_that_the_authors_name():
    """Number 4, of a model of 33 latent frames with 16 of its 128 channels for them."""
    own = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)
    latents = torch.zeros(1, 8, 66, 4, 6)
    made, plain = RiflexRotary(own, Riflex(33)), own(latents)
    assert made.component == 4 and all(map(torch.equal, made(latents[:, :, :33]), own(latents[:, :, :33])))
    frequencies = 256.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    frequencies[3] = 2 * math.pi / 66
    angles = (torch.arange(66)[:, None] * frequencies).repeat_interleave(2 * 3, 0).repeat_interleave(2, 1)
    for found, stock, wanted in zip(made(latents), plain, (angles.cos(), angles.sin()), strict=True):
        assert found.dtype == stock.dtype and torch.equal(found[:, 16:], stock[:, 16:])
        torch.testing.assert_close(found[:, :16].double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 9])
def test_videos_of_the_usual_length_are_as_they_were(frames):
    own = WanRotaryPosEmbed(HEAD, (1, 2, 2), 128)
    latents = torch.zeros(1, 8, frames, 4, 6)
    made, stock = RiflexRotary(own, Riflex(9))(latents), own(latents)
    assert all(torch.equal(*pair) for pair in zip(made, stock, strict=True))


def test_a_frequency_is_never_raised():
    """The third component has a period of 29 frames, more than the 17 of the video."""
    own = WanRotaryPosEmbed(HEAD, (1, 2, 2), 128)
    latents = torch.zeros(1, 8, 17, 4, 6)
    assert torch.equal(RiflexRotary(own, Riflex(9, 3))(latents)[0], own(latents)[0])


def test_it_is_put_in_and_taken_out():
    transformer = make_transformer()
    own = transformer.rope
    names = set(transformer.state_dict())
    with vidaccel.riflex(transformer, Riflex(2, 1)) as handle:
        assert isinstance(transformer.rope, RiflexRotary) and set(transformer.state_dict()) == names
        with pytest.raises(RuntimeError, match="has RIFLEx already"):
            riflex(transformer, Riflex(2))
    assert transformer.rope is own
    handle.remove()
    assert transformer.rope is own


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="frames is 0: it must be a whole number of at least 1"):
        Riflex(0)
    with pytest.raises(ValueError, match="component is True"):
        Riflex(3, True)
    own = WanRotaryPosEmbed(HEAD, (1, 2, 2), 128)
    with pytest.raises(ValueError, match="component is 13: this model has 12 over frames"):
        RiflexRotary(own, Riflex(9, 13))
    with pytest.raises(ValueError, match="no component of this model has a period of that"):
        RiflexRotary(own, Riflex(10**6))
    with pytest.raises(TypeError, match=r"settings is 21: give a Riflex .* Riflex\(frames=21\)"):
        riflex(torch.nn.Linear(2, 2), 21)
    with pytest.raises(TypeError, match="which a Linear lacks"):
        riflex(torch.nn.Linear(2, 2), Riflex(9))


@pytest.mark.parametrize("alone", [False, True])
def test_restored_where_the_handle_is_lost(alone):
    pipe = make_pipe(transformer_2=make_transformer(1))
    parts = (pipe.transformer,) if alone else (pipe.transformer, pipe.transformer_2)
    own = [part.rope for part in parts]
    for _ in range(2):
        handle = riflex(pipe.transformer if alone else pipe, Riflex(2, 1))
        vidaccel.restore(pipe.transformer if alone else pipe)
        assert [part.rope for part in parts] == own
    handle.remove()
    assert [part.rope for part in parts] == own
