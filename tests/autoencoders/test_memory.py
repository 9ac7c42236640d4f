"""What decoding and encoding hold at most, counted on the meta device, and the estimate of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from live_bytes import LiveBytes
from tiny_dc import make_autoencoder, make_latents, make_video

from vidaccel.autoencoders import AutoencoderDCV, blocks, preset
from vidaccel.autoencoders.memory import decoding_bytes, default_tile, memory_to_decode, video_bytes
from vidaccel.generation.forecast import transformer_bytes

# 4x in space; wide enough for features to be what counts.
MIDDLE = {
    "latent_channels": 8,
    "block_out_channels": (32, 64, 128, 256),
    "layers_per_block": (0, 2, 2, 1),
    "chunk_size": 16,
}
WAN_2_2 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12}
WAN_2_2 |= {"patch_size": 2, "is_residual": True, "scale_factor_spatial": 16}
WAN_2_2 |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


def _meta(cls, dtype=torch.float32, **config):
    with torch.device("meta"):
        return torch.nn.Module.to(cls(**config), dtype).requires_grad_(False)


def _decoding(model, frames: int, height: int, width: int) -> tuple[int, int]:
    """Bytes that decoding latents of a size takes at most, and the estimate."""
    factor = model.config.scale_factor_spatial
    shape = (1, model.config.z_dim, frames, -(-height // factor), -(-width // factor))
    latents = torch.empty(shape, device="meta", dtype=model.dtype)
    with torch.no_grad(), LiveBytes() as counted:
        video = model.decode(latents, return_dict=False)[0]
    return counted.peak, memory_to_decode(model, video.shape[2], height, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("frames", "height", "width", "tile"),
    [(8, 256, 384, None), (8, 250, 381, None), (8, 1024, 1024, None), (3, 512, 512, None), (8, 1024, 1024, 256)],
)
def test_the_estimate_is_what_is_counted_and_not_less(dtype, frames, height, width, tile):
    model = _meta(AutoencoderDCV, dtype, **MIDDLE)
    if tile:
        model.enable_tiling(tile, tile)
    counted, estimate = _decoding(model, frames, height, width)
    assert counted <= estimate <= 1.2 * counted


@pytest.mark.parametrize("changes", [{"tail": "replicate"}, {"pad_frames": 8}, {"layers_per_block": (0, 0, 3, 1)}])
def test_the_estimate_for_other_configurations(changes):
    counted, estimate = _decoding(_meta(AutoencoderDCV, **{**MIDDLE, **changes}), 5, 256, 256)
    assert counted <= estimate <= 1.2 * counted


@pytest.mark.parametrize(("frames", "tile"), [(8, None), (9, None), (3, None), (8, 128)])
def test_the_estimate_where_whole_chunks_are_decoded_together(frames, tile):
    model = _meta(AutoencoderDCV, **MIDDLE)
    if tile:
        model.enable_tiling(tile, tile)
    framewise = _decoding(model, frames, 256, 256)[1]
    model.use_framewise_decoding = False
    counted, estimate = _decoding(model, frames, 256, 256)
    assert counted <= estimate <= 1.25 * counted
    assert (estimate > 1.5 * framewise) == (frames >= 8)


@pytest.mark.parametrize(("config", "tile"), [({}, False), ({}, True), ({"base_dim": 16}, False), (WAN_2_2, False)])
def test_the_estimate_for_wan_s_autoencoder(config, tile):
    model = _meta(AutoencoderKLWan, **config)
    if tile:
        model.enable_tiling()
        assert default_tile(model.config) == (model.tile_sample_min_height, model.tile_sample_min_width)
    counted, estimate = _decoding(model, 3, 320, 320)
    assert counted <= estimate <= 1.2 * counted


def test_published_dc_ae_v_at_720p():
    """80 frames in bfloat16. Whole tensors through the last stage would be 35 GB and 39 GB."""
    model = _meta(AutoencoderDCV, torch.bfloat16, **preset("f32t4c32"))
    counted, estimate = _decoding(model, 20, 720, 1280)
    assert counted < 14e9 and counted <= estimate <= 1.1 * counted
    with torch.no_grad(), LiveBytes() as encoding:
        model.encode(torch.empty(1, 3, 80, 736, 1280, device="meta", dtype=torch.bfloat16))
    assert encoding.peak < 14.2e9 and encoding.peak <= estimate


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_chunk_holds_two_tensors_of_the_last_stage(monkeypatch, what):
    """Input and output of a residual block; and in pieces of 2 of 40 frames what comes between."""
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 1)
    model = _meta(AutoencoderDCV, **{**MIDDLE, "chunk_size": 40})
    whole = 64 * 40 * 128 * 128 * 4
    sizes = {"decode": (1, 8, 10, 64, 64), "encode": (1, 3, 40, 256, 256)}
    with torch.no_grad(), LiveBytes() as counted:
        getattr(model, what)(torch.empty(sizes[what], device="meta"))
    assert 2 * whole < counted.peak < 2.6 * whole


def test_in_tiles_a_long_video_takes_less_than_whole():
    """With a row of tiles in float32, and a tile of all frames held twice, it took more."""
    held = {}
    for tile in (None, 64):
        model = _meta(AutoencoderDCV, torch.bfloat16, **{**MIDDLE, "layers_per_block": (0, 0, 0, 0)})
        if tile:
            model.enable_tiling(tile, tile)
        for frames in (150, 200):
            counted, estimate = _decoding(model, frames, 64, 160)
            assert counted <= 1.01 * estimate <= 1.2 * counted
            held[frames, tile] = counted
    video = 3 * 50 * 4 * 64 * 160 * 2
    assert held[200, None] - held[150, None] > 1.9 * video
    assert held[200, 64] - held[150, 64] < 1.3 * video and held[200, 64] < held[200, None]


def test_blending_in_float32_holds_a_row_of_tiles_and_not_the_video():
    model = _meta(AutoencoderDCV, torch.bfloat16, **{**MIDDLE, "layers_per_block": (0, 0, 0, 0)})
    model.enable_tiling(32, 32, 32, 32)
    latents = torch.empty(1, 8, 100, 64, 16, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as counted:
        video = model.decode(latents).sample
    assert counted.peak < 1.6 * video.numel() * 2


def test_tiles_by_default_are_of_512_pixels_for_every_compression():
    """At 2160p the published 64x autoencoder needs with them what the 32x one does."""
    needs = []
    for name in ("f32t4c32", "f64t4c128"):
        config = preset(name)
        assert default_tile(config) == (512, 512)
        needs.append(decoding_bytes(config, 80, 2160, 3840, 2, default_tile(config)))
    assert max(needs) < 11.5e9 and max(needs) < 1.02 * min(needs)
    assert default_tile({"block_out_channels": (8,) * 9}) == (1024, 1024)  # 128x: 8 latent pixels


def test_the_estimate_counts_what_is_made():
    config = _meta(AutoencoderDCV, **MIDDLE).config
    assert decoding_bytes(config, 29, 254, 382, 4) == decoding_bytes(config, 32, 256, 384, 4)
    assert decoding_bytes(config, 32, 256, 384, 2) < decoding_bytes(config, 32, 256, 384, 4)
    # A tile that holds the whole frame is no tile.
    assert decoding_bytes(config, 32, 256, 384, 2, (512, 512)) == decoding_bytes(config, 32, 256, 384, 2)
    assert video_bytes(2, 4, 8) == 768 and transformer_bytes(10, 8, 2) == 2560


# -- pieces give the same ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framewise", [True, False])
@pytest.mark.parametrize("elements", [1, 20_000, 60_000])
def test_pieces_give_the_same(monkeypatch, elements, framewise):
    """Also where the output is put in the place of the input."""
    model, video = make_autoencoder(), make_video(20, batch=2)
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    latent, sample = model.encode(video).latent, model.decode(make_latents(5)).sample
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", elements)
    given, kept = make_latents(5), video.clone()
    torch.testing.assert_close(model.encode(video).latent, latent)
    torch.testing.assert_close(model.decode(given).sample, sample)
    assert given.equal(make_latents(5)) and video.equal(kept)
    assert not list(model.decode_chunks(given))[-1].requires_grad
    model.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(model.decode(given).sample, sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", ["PIECE_ELEMENTS", "MAX_ELEMENTS"])
def test_gradients_are_the_same_in_pieces(monkeypatch, limit):
    """Pieces for memory are not used where gradients are needed; those that the 32 bits ask for are."""
    model, video = make_autoencoder().requires_grad_(True), make_video(20).requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        video.grad = None
        model(video).sample.square().mean().backward()
        return [video.grad, *(parameter.grad.clone() for parameter in model.parameters())]

    whole = gradients()
    monkeypatch.setattr(blocks, limit, 20_000)
    for one, other in zip(gradients(), whole, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_what_is_remembered_is_used_up():
    """So that the frames of the chunk before are freed while those of this one come."""
    model = make_autoencoder()
    _, past = model.decoder(make_latents(2))
    count = len(past)
    _, new = model.decoder(make_latents(2), past)
    assert past == [] and len(new) == count
