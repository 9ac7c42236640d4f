from __future__ import annotations

import itertools

import pytest
import torch
from tiny_dc import DEEP, load_golden, make_autoencoder, make_latents, make_video

from vidaccel.autoencoders.tiling import Tiles, default_tile, run_tiled


def _up(scale: int):
    return lambda x: x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def _tiled(function, x: torch.Tensor, rows: Tiles, columns: Tiles, scale: float) -> torch.Tensor:
    """With one frame after the other."""
    return run_tiled(lambda tile: function(tile).split(1, -3), x, rows, columns, scale, x.shape[-3])


# -- the tiles themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 3), (4, 1), (7, 5), (16, 12)])
def test_tiles_cover_the_axis_and_are_of_one_size(size, stride):
    tiles = Tiles(size, stride)
    for length in range(1, 60):
        starts = tiles.starts(length)
        covered = {place for start in starts for place in range(start, min(start + size, length))}
        assert covered == set(range(length))
        assert starts == sorted(set(starts)) and all(b - a <= stride for a, b in itertools.pairwise(starts))
        assert length <= size or all(start + size <= length for start in starts)


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_that_does_not_fit_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride of tiles is {stride} and their size 4: .*at least 1 and at most"):
        Tiles(4, stride)


@pytest.mark.parametrize("scale", [1, 4, 0.5])
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 2), (8, 6), (6, 2)])
def test_weights_sum_to_one(scale, size, stride):
    """What is the same in all tiles comes out as it is, also where three tiles overlap."""
    function = _up(scale) if scale >= 1 else lambda x: x[..., ::2, ::2]
    for height, width in ((4, 22), (14, 18), (30, 6)):
        x = torch.full((1, 2, height, width), 0.7)
        out = _tiled(function, x, Tiles(size, stride), Tiles(size, stride), scale)
        assert out.shape == (1, 2, round(height * scale), round(width * scale))
        torch.testing.assert_close(out, torch.full_like(out, 0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blending_loses_no_more_than_the_type_does(dtype):
    """Also in the corners, where the ramps of both axes are near zero; and nothing where there is one tile alone."""
    x = (torch.rand(1, 1, 28, 28) * 2 - 1).to(dtype)
    error = (_tiled(_up(32), x, Tiles(16, 12), Tiles(16, 12), 32).float() - _up(32)(x).float()).abs()
    eps = torch.finfo(dtype).eps
    assert error.max() <= eps and error[..., : 12 * 32, : 12 * 32].max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_the_same_in_all_tiles_is_exact_in_half_precision(dtype):
    for value in (1.0, 0.7, 0.51, -0.93):
        for tiles in (Tiles(16, 12), Tiles(8, 2)):
            x = torch.full((1, 1, 22, 26), value, dtype=dtype)
            out = _tiled(_up(4), x, tiles, tiles, 4)
            assert out.dtype == dtype and (out == x[0, 0, 0, 0]).all()


def test_gradients_flow_through_the_blending():
    x = torch.rand(1, 1, 14, 18, dtype=torch.float64, requires_grad=True)
    _tiled(_up(2), x, Tiles(8, 3), Tiles(8, 5), 2).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0))


def test_a_position_is_kept():
    x = torch.arange(20 * 13.0).view(1, 1, 20, 13)
    torch.testing.assert_close(_tiled(_up(2), x, Tiles(8, 6), Tiles(5, 3), 2), _up(2)(x))


def test_overlaps_are_blended_linearly():
    """Two tiles of different value, of 8 with an overlap of 4: a straight line from one to the other."""
    values = iter([0.0, 1.0])
    out = _tiled(lambda t: torch.full_like(t, next(values)), torch.zeros(1, 1, 1, 12), Tiles(1, 1), Tiles(8, 4), 1)
    torch.testing.assert_close(out.flatten()[:4], torch.zeros(4))
    torch.testing.assert_close(out.flatten()[8:], torch.ones(4))
    torch.testing.assert_close(out.flatten()[4:8], torch.tensor([0.125, 0.375, 0.625, 0.875]))


# -- in the autoencoder ------------------------------------------------------------------------------------------------


def test_one_tile_is_no_tile():
    model, video = make_autoencoder(), make_video(12, 32, 24)
    latent, sample = model.encode(video).latent, model(video).sample
    model.enable_tiling(32, 32)
    assert model.encode(video).latent.equal(latent) and model(video).sample.equal(sample)


def test_shapes_and_sizes_of_the_tiles():
    model, seen = make_autoencoder(), set()
    model.enable_tiling(16, 24, 12, 16)
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, args: seen.add((type(module).__name__, *args[0].shape[-2:])))
    video = make_video(12, 44, 52)
    latent = model.encode(video).latent
    assert latent.shape == (1, 4, 3, 11, 13) and model.decode(latent).sample.shape == video.shape
    assert seen == {("Encoder", 16, 24), ("Decoder", 4, 6)}


@pytest.mark.parametrize(("factor", "side"), [(4, 512), (32, 512), (64, 512), (128, 1024)])
def test_a_tile_is_of_512_pixels_and_at_least_8_latent_pixels(factor, side):
    assert default_tile(factor) == side


def test_defaults_are_512_pixels_and_a_quarter_of_overlap():
    model = make_autoencoder(**DEEP)
    assert not model.use_tiling
    model.enable_tiling()
    assert model.use_tiling and model._tile_rows == model._tile_columns == Tiles(512, 384)
    model.enable_tiling(tile_sample_min_width=64)
    assert model._tile_columns == Tiles(64, 32)
    model.disable_tiling()
    assert not model.use_tiling


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((17, 16), "multiples of 4 pixels, not 17"),
        ((16.0, 16), "multiples of 4 pixels, not 16.0"),
        (("16", 16), "multiples of 4 pixels, not '16'"),
        ((16, 0), "multiples of 4 pixels, not 0"),
        ((16, 16, 6), "multiples of 4 pixels, not 6"),
        ((16, 16, 16, 20), "stride of tiles is 20 and their size 16.*at most the size"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_and_change_nothing(sizes, message):
    model = make_autoencoder()
    before = model._tile_rows, model._tile_columns
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(*sizes)
    assert not model.use_tiling and (model._tile_rows, model._tile_columns) == before


def test_tiles_and_slices_together():
    model, video = make_autoencoder(), make_video(8, 24, 16, batch=2)
    model.enable_tiling(16, 16)
    latent = model.encode(video).latent
    model.enable_slicing()
    torch.testing.assert_close(model.encode(video).latent, latent)


def test_far_from_the_seams_tiles_change_nothing():
    """One convolution sees one pixel around it, so pixels that see no edge of a tile are as without tiles."""
    model = make_autoencoder(layers_per_block=(0, 0, 0, 0))
    latents = make_latents(2, 32, 32)
    whole = model.decode(latents).sample
    model.enable_tiling(96, 96, 64, 64)
    tiled = model.decode(latents).sample
    difference = (tiled - whole).abs()
    # Tiles of 24 latent pixels start at 0 and 8, so they end at 24: only there is an edge within the frame.
    assert difference[..., :16, :16].max() < 1e-5 and difference[..., 112:, 112:].max() < 1e-5
    assert difference.max() > 1e-3


def test_seams_are_measured():
    """At the reference's weights, against the result without tiles: what tiles change, and how steep that change is at
    the seam, is halved by an overlap of two fifths.
    """
    model, _ = load_golden()
    whole = model.decode(make_latents(1, 10, 10)).sample

    def run(stride: int) -> tuple[float, float]:
        model.enable_tiling(160, 160, stride, stride)
        error = model.decode(make_latents(1, 10, 10)).sample - whole
        step = (error[..., 1:] - error[..., :-1]).abs().mean((0, 1, 2, 3))
        return float(error.square().mean()), float(step[159])

    hard, blended = run(160), run(96)
    assert hard[0] > 0.01
    assert blended[0] < 0.5 * hard[0] and blended[1] < 0.6 * hard[1]


def test_tiles_have_diffusers_names():
    """As of its own autoencoders, they are set one by one; that does not turn tiling on."""
    model = make_autoencoder()
    factor = model.spatial_compression_ratio
    model.tile_sample_min_height = model.tile_sample_min_width = 8 * factor
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (6 * factor, 6 * factor)
    model.tile_sample_stride_height = 7 * factor
    model.tile_sample_stride_width = 5 * factor
    assert (model._tile_rows, model._tile_columns) == (Tiles(8 * factor, 7 * factor), Tiles(8 * factor, 5 * factor))
    assert not model.use_tiling
    with pytest.raises(ValueError, match="at most the size"):
        model.tile_sample_stride_height = 9 * factor
    with pytest.raises(ValueError, match=f"must be multiples of {factor} pixels"):
        model.tile_sample_min_width = factor + 1


def test_a_stride_that_was_chosen_stays_where_the_size_changes():
    """In whichever order both are set."""
    model = make_autoencoder()
    factor = model.spatial_compression_ratio
    for axis in ("height", "width"):
        setattr(model, f"tile_sample_stride_{axis}", 4 * factor)
        setattr(model, f"tile_sample_min_{axis}", 16 * factor)
    assert model._tile_rows == model._tile_columns == Tiles(16 * factor, 4 * factor)
    model.tile_sample_min_height = 3 * factor  # into which it does not fit
    assert model._tile_rows == Tiles(3 * factor, 2 * factor)
    model.enable_tiling(16 * factor, tile_sample_stride_height=12 * factor)  # that which is the default
    model.tile_sample_min_height = 20 * factor
    assert model._tile_rows == Tiles(20 * factor, 12 * factor)
    model.enable_tiling()
    model.tile_sample_min_height = 16 * factor
    assert model._tile_rows == Tiles(16 * factor, 12 * factor)
    with pytest.raises(ValueError, match="multiples of 4 pixels, not '16'"):
        model.tile_sample_min_height = "16"


def test_an_empty_batch_is_one_with_tiles_too():
    model = make_autoencoder()
    model.enable_tiling(2 * model.spatial_compression_ratio, 2 * model.spatial_compression_ratio)
    side = 4 * model.spatial_compression_ratio
    assert model.encode(torch.zeros(0, 3, 8, side, side)).latent.shape == (0, model.config.latent_channels, 2, 4, 4)
