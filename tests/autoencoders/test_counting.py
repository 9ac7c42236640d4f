"""What other autoencoders take to decode: counted without computing, it is what computing takes."""

from __future__ import annotations

import diffusers
import pytest
import torch
from live_bytes import LiveBytes

from vidaccel.autoencoders.counting import COUNTED, counted_bytes
from vidaccel.generation.forecast import memory_to_decode

TINY = {
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8, 8),
        "layers_per_block": 1,
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
}


@pytest.mark.parametrize("name", COUNTED)
def test_it_is_what_decoding_takes(name):
    vae = getattr(diffusers, name)(**TINY[name]).eval()
    frames, (_, pixels) = 9, COUNTED[name](vae.config)
    z = torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad(), LiveBytes() as live:
        video = vae.decode(z, return_dict=False)[0]
    assert video.shape[2:] == (frames, 4 * pixels, 6 * pixels)
    assert counted_bytes(name, vae.config, *video.shape[2:], 4) == live.peak
    assert memory_to_decode(vae, *video.shape[2:]) == live.peak


def test_float64_takes_twice_as_much():
    name = "AutoencoderKLHunyuanVideo15"
    vae = getattr(diffusers, name)(**TINY[name]).eval()
    assert counted_bytes(name, vae.config, 9, 64, 96, 8) == 2 * counted_bytes(name, vae.config, 9, 64, 96, 4)


def test_hunyuan_at_720p_fits_no_card_of_24_gb_whole():
    """Its published config is diffusers' defaults."""
    assert 50e9 < counted_bytes("AutoencoderKLHunyuanVideo", {}, 129, 720, 1280, 2) < 60e9
