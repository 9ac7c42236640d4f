"""Pictures of every kind that cameras, scanners and programs write, and their way to a size."""

from __future__ import annotations

import io
import logging
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from vidaccel.generation.media.pictures import PictureError, covering, fit_picture, picture_size, read_picture


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """The colours near the corners: upper left, upper right, lower left, lower right."""
    right, low = image.width - 3, image.height - 3
    return [image.getpixel(place) for place in ((2, 2), (right, 2), (2, low), (right, low))]


def near(found, wanted, tolerance=0) -> bool:
    return bool(np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= tolerance)


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


@pytest.fixture
def quarters() -> Image.Image:
    """64x32 in four colours."""
    image = Image.new("RGB", (64, 32), GREY)
    for box, colour in {(0, 0, 32, 16): RED, (32, 0, 64, 16): GREEN, (0, 16, 32, 32): BLUE}.items():
        image.paste(colour, box)
    return image


# What each EXIF orientation makes of the corners of `quarters`, after the standard's table.
TURNED = {
    1: [RED, GREEN, BLUE, GREY],
    2: [GREEN, RED, GREY, BLUE],
    3: [GREY, BLUE, GREEN, RED],
    4: [BLUE, GREY, RED, GREEN],
    5: [RED, BLUE, GREEN, GREY],
    6: [BLUE, RED, GREY, GREEN],
    7: [GREY, GREEN, BLUE, RED],
    8: [GREEN, GREY, RED, BLUE],
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_turned_as_their_exif_says(tmp_path, quarters, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    quarters.save(tmp_path / f"a.{suffix}", exif=exif, quality=95, **lossless)
    read = read_picture(tmp_path / f"a.{suffix}")
    assert near(corners(read), TURNED[orientation], 12)
    assert picture_size(tmp_path / f"a.{suffix}") == (read.height, read.width)
    assert (read.width, read.height) == ((64, 32) if orientation < 5 else (32, 64))


# Orientation -> what it means for the rows, as PIL calls it; 5 to 8 are turned by a quarter.
TRANSPOSED = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", TRANSPOSED)
def test_tiffs_that_are_not_compressed_are_turned_in_every_mode(tmp_path, mode, orientation):
    """PIL maps such a file into memory, where the mode allows it."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(noise).convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "turned.tif", exif=exif)
    wanted = read_picture(tmp_path / "plain.tif").transpose(Image.Transpose[TRANSPOSED[orientation]])
    read = read_picture(tmp_path / "turned.tif")
    assert read.size == (32, 64) and np.array_equal(np.asarray(read), np.asarray(wanted))
    assert picture_size(tmp_path / "turned.tif") == (64, 32)


def grey_png(path, values: np.ndarray, clear: int | None = None) -> None:
    """A 16-bit grey PNG `[H, W]`, written without PIL, with one value that is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))]
    parts += [chunk(b"tRNS", struct.pack(">H", clear))] if clear is not None else []
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_16_bits_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    wanted = np.round(ramp / 257)
    grey_png(tmp_path / "a.png", ramp)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 8 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.pgm"):
        found = np.asarray(read_picture(tmp_path / name))
        assert found.shape == (8, 64, 3) and near(found, wanted[..., None]), name


def test_a_tiff_that_counts_from_white(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert near(np.asarray(read_picture(tmp_path / "a.tif"))[..., 0], 255 - np.round(ramp / 257))


def transparent(mode: str, path) -> None:
    """White on the left, and on the right black that is clear."""
    if mode == "I;16":
        grey_png(path, np.array([[65535] * 4 + [77] * 4] * 4, np.uint16), clear=77)
        return
    if mode in ("RGBA", "LA"):
        left, right = ((255,) * 4, (0,) * 4) if mode == "RGBA" else ((255, 255), (0, 0))
        image = Image.new(mode, (8, 4), left)
        image.paste(right, (4, 0, 8, 4))
        image.save(path)
        return
    image = Image.new("RGB" if mode == "RGB" else "L", (8, 4), "white")
    image.paste((0, 0, 0) if mode == "RGB" else 0, (4, 0, 8, 4))
    if mode == "P":
        image = image.convert("P")
        clear = image.getpixel((5, 0))
        image.save(path, transparency=clear)
    else:
        image.save(path, transparency=(0, 0, 0) if mode == "RGB" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_lies_on_the_background(tmp_path, mode):
    transparent(mode, tmp_path / "a.png")
    for background in ("white", (10, 200, 30)):
        read = read_picture(tmp_path / "a.png", background)
        assert read.mode == "RGB" and read.getpixel((1, 1)) == (255, 255, 255)
        assert read.getpixel((6, 1)) == ((255, 255, 255) if background == "white" else background)


def test_what_is_half_transparent_is_mixed(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert near(read_picture(tmp_path / "a.png").getpixel((0, 0)), (255, 127, 127), 1)


def test_other_modes(tmp_path, quarters):
    quarters.quantize(8).save(tmp_path / "palette.png")
    quarters.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    quarters.convert("CMYK").save(tmp_path / "cmyk.tif")
    quarters.save(tmp_path / "still.gif")
    for name in ("palette.png", "cmyk.jpg", "cmyk.tif", "still.gif"):
        read = read_picture(tmp_path / name)
        assert read.mode == "RGB" and near(corners(read), TURNED[1], 20), name
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "bits.png")
    assert near(read_picture(tmp_path / "bits.png"), 255 * np.eye(8, dtype=int)[..., None].repeat(3, 2))


def test_colours_are_those_of_the_profile(tmp_path, caplog):
    """Most phones write Display P3, whose numbers are another red than those of sRGB."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert b"desc" in srgb
    image = Image.new("RGB", (4, 4), (200, 60, 60))
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert read_picture(tmp_path / "srgb.png").getpixel((0, 0)) == (200, 60, 60)
    image.save(tmp_path / "wide.png", icc_profile=_swapped(srgb))
    assert near(read_picture(tmp_path / "wide.png").getpixel((0, 0)), (60, 200, 60), 6)
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    for profile in (b"none", ImageCms.ImageCmsProfile(lab).tobytes()):
        image.save(tmp_path / "bad.png", icc_profile=profile)
        assert read_picture(tmp_path / "bad.png").getpixel((0, 0)) == (200, 60, 60)
    assert caplog.text.count("bad.png: its colour profile cannot be used") == 2


def _swapped(profile: bytes) -> bytes:
    """The profile of sRGB with red and green exchanged, under another name."""
    changed = profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    changed = changed.replace("sRGB".encode("utf-16-be"), "gRGB".encode("utf-16-be")).replace(b"sRGB bu", b"gRGB bu")
    assert "sRGB" not in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(changed)))
    return changed


def _linear(profile: bytes) -> bytes:
    """The profile of sRGB with a straight curve, under the same name."""
    start = profile.index(b"para")
    return profile[:start] + b"para" + struct.pack(">IHHi", 0, 0, 0, 1 << 16) + bytes(16) + profile[start + 32 :]


def _grey(profile: bytes) -> bytes:
    """A profile of grey with the curve of one of RGB."""
    return (profile[:16] + b"GRAY" + profile[20:]).replace(b"rTRC", b"kTRC", 1)


def test_a_profile_is_judged_by_its_numbers_and_not_by_its_name(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    linear = _linear(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(linear)))
    Image.new("RGB", (4, 4), (128, 0, 255)).save(tmp_path / "linear.png", icc_profile=linear)
    # Half of the light is 188 in sRGB.
    assert near(read_picture(tmp_path / "linear.png").getpixel((0, 0)), (188, 0, 255), 1)
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png", icc_profile=linear)
    assert near(read_picture(tmp_path / "grey.png").getpixel((0, 0)), (188, 188, 188), 1)
    assert not caplog.records


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_grey(tmp_path, caplog, mode):
    caplog.set_level(logging.WARNING)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.new(mode, (4, 4), 128 if mode == "L" else (128, 255))
    for profile, value in ((srgb, 128), (_linear(srgb), 188)):
        grey.save(tmp_path / "grey.png", icc_profile=_grey(profile))
        assert near(read_picture(tmp_path / "grey.png").getpixel((0, 0)), (value,) * 3, 1)
    assert not caplog.records
    # Of no use for colours, which stay.
    Image.new("RGB", (4, 4), RED).save(tmp_path / "red.png", icc_profile=_grey(srgb))
    assert read_picture(tmp_path / "red.png").getpixel((0, 0)) == RED
    assert "red.png: its colour profile cannot be used (it is for GRAY, and the picture is RGB)" in caplog.text


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_several_frames_are_refused(tmp_path, quarters, suffix):
    other = Image.new("RGB", quarters.size)
    quarters.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[other, quarters])
    for read in (read_picture, picture_size):
        with pytest.raises(PictureError, match=rf"a.{suffix} cannot be read as a picture: it holds 3 frames or pages"):
            read(tmp_path / f"a.{suffix}")


def test_a_picture_with_a_preview_is_one_picture(tmp_path, quarters):
    quarters.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[quarters.resize((16, 8))])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert read_picture(tmp_path / "a.jpg").size == (64, 32)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"text"), "is no picture"),
        (lambda path: path.write_bytes(b""), "is no picture"),
        (lambda path: path.mkdir(), "cannot be read as a picture"),
        (lambda path: None, "no such file"),
        (
            lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, format="TIFF"),
            "floating point, .*black",
        ),
        (lambda path: Image.fromarray(np.ones((4, 4), np.int32)).save(path, format="TIFF"), "32 bits, "),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, write, words):
    write(tmp_path / "a.tif")
    with pytest.raises(PictureError, match=rf"a.tif.*{words}"):
        read_picture(tmp_path / "a.tif")


def test_half_a_picture_is_no_picture(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp", "avif"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(PictureError, match=path.name):
            read_picture(path)


def test_an_avif_without_its_item(tmp_path):
    """PIL has yet another error for it."""
    path = tmp_path / "a.avif"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes().replace(b"pitm\0\0\0\0\0\1", b"pitm\0\0\0\0\0\7"))
    for read in (read_picture, picture_size):
        with pytest.raises(PictureError, match="a.avif cannot be read as a picture: .*item"):
            read(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_too_large_to_be_true(tmp_path, monkeypatch, suffix):
    """PIL's error for it is no OSError, and speaks of an attack."""
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_picture, picture_size):
        with pytest.raises(PictureError) as caught:
            read(path)
        assert str(caught.value) == f"{path} has 4,096 pixels: at most 2,000 are read. Give a smaller one."


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    """PIL warns from half of its bound on; whoever calls keeps their own filters."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert read_picture(tmp_path / "a.png").size == (64, 64) and picture_size(tmp_path / "a.png") == (64, 64)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(tmp_path / "a.png")


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_threads_leave_no_filter_of_warnings_behind(tmp_path):
    """They are the process's, and are set while a file is opened."""
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda _: picture_size(file), range(1500))) == {(8, 8)}
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


def test_proportions_are_kept_by_cutting(quarters):
    made, note = fit_picture(quarters, 16, 16)
    assert made.size == (16, 16) and near(corners(made), TURNED[1], 30)
    assert note == "64x32 is scaled to 32x16; cut off: 8 columns at the left and 8 columns at the right."
    made, note = fit_picture(quarters, 32, 11, "crop")
    assert made.size == (32, 11)
    assert note == "64x32 is scaled to 32x16; cut off: 2 rows at the top and 3 rows at the bottom."


def test_proportions_are_kept_by_filling_up(quarters):
    made, note = fit_picture(quarters, 32, 32, "pad", background="white")
    assert made.size == (32, 32) and made.getpixel((3, 3)) == made.getpixel((3, 28)) == (255, 255, 255)
    assert near(corners(made.crop((0, 8, 32, 24))), TURNED[1], 30)
    assert note == "64x32 is scaled to 32x16; added in white: 8 rows at the top and 8 rows at the bottom."
    made, note = fit_picture(quarters, 33, 16, "pad")
    assert note == "64x32 is scaled to 32x16; added in black: 1 column at the right."
    assert made.getpixel((32, 5)) == (0, 0, 0)


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_nothing_is_said_where_nothing_is_lost(quarters, how):
    made, note = fit_picture(quarters, 32, 16, how)
    assert made.size == (32, 16) and note == "" and near(corners(made), TURNED[1], 30)


def test_a_line_stays_a_picture():
    made, _ = fit_picture(Image.new("RGB", (4000, 1), "red"), 32, 32, "pad")
    assert made.size == (32, 32) and RED in [made.getpixel((16, row)) for row in range(32)]


def test_sizes_that_cannot_be(quarters):
    with pytest.raises(ValueError, match="0x16 cannot be made"):
        fit_picture(quarters, 0, 16)
    with pytest.raises(ValueError, match="how is 'stretch'"):
        fit_picture(quarters, 16, 16, "stretch")


def test_what_covers_is_never_too_small():
    for width, height in ((1000, 333), (333, 1000), (7, 7)):
        wide, high = covering(width, height, 832, 480)
        assert (wide == 832 and high >= 480) or (high == 480 and wide >= 832)
    assert covering(64, 32, 32, 16, enlarge=1.5) == (48, 24)
