"""`TinyVideoDecoder` against what TAEHV's own code decodes (tests/data/tiny_decoders.safetensors, widths cut)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidaccel.autoencoders.checkpoint_file import CheckpointError
from vidaccel.autoencoders.tiny import TinyVideoDecoder, read_tiny

GOLDEN = Path(__file__).parents[1] / "data" / "tiny_decoders.safetensors"
SMALL = {"latent_channels": 4, "block_out_channels": (8, 6, 4, 4)}


def part(kind: str, prefix: str) -> dict[str, torch.Tensor]:
    begin = f"{kind}.{prefix}"
    return {name.removeprefix(begin): x for name, x in load_file(GOLDEN).items() if name.startswith(begin)}


def written(tmp_path: Path, kind: str, name: str = "taew2_1.safetensors", **changes: torch.Tensor) -> Path:
    save_file({**part(kind, "weights."), **changes}, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kind", ["base", "super", "long"])
def test_it_decodes_what_taehv_does_in_chunks_of_any_length(tmp_path, kind):
    decoder = read_tiny(written(tmp_path, kind))
    golden = part(kind, "")
    for at_once in (1, 2, 3, None):
        with torch.no_grad():
            made = decoder(golden["latents"], at_once)
        torch.testing.assert_close(made, 2 * golden["video"] - 1, atol=1e-4, rtol=0)
    assert golden["video"].std() > 0.05


def test_the_shape_of_a_file_is_read_off_its_weights(tmp_path):
    decoder = read_tiny(written(tmp_path, "long"))
    config = decoder.config
    assert (config.block_out_channels, config.time_growth, config.patch_size) == ((8, 6, 4, 4), (2, 2, 2), 2)
    assert (decoder.temporal_compression_ratio, decoder.spatial_compression_ratio) == (8, 16)
    assert decoder.frames_of(3) == 17
    assert read_tiny(written(tmp_path, "super")).config.variant == "super"


@pytest.mark.parametrize(
    ("name", "autoencoder", "latents", "activation"),
    [
        ("taew2_1.safetensors", "AutoencoderKLWan", "transformer", "relu"),
        ("lighttaew2_2.safetensors", "AutoencoderKLWan", "autoencoder", "relu"),
        ("taehv.safetensors", "AutoencoderKLHunyuanVideo", "transformer", "relu"),
        ("taehv1_5.safetensors", "AutoencoderKLHunyuanVideo15", "transformer", "relu"),
        ("lighttaehy1_5.safetensors", "AutoencoderKLHunyuanVideo15", "autoencoder", "leaky_relu"),
        ("mine.safetensors", "", "transformer", "relu"),
    ],
)
def test_the_name_of_a_file_tells_what_its_weights_do_not(tmp_path, name, autoencoder, latents, activation):
    config = read_tiny(written(tmp_path, "base", name)).config
    assert (config.autoencoder, config.latents, config.activation) == (autoencoder, latents, activation)


def test_a_torch_file_is_read_too(tmp_path):
    torch.save(part("base", "weights."), tmp_path / "taew2_1.pth")
    assert read_tiny(tmp_path / "taew2_1.pth").config.block_out_channels == (8, 6, 4, 4)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no tiny decoder in the layout of TAEHV"):
        read_tiny(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="There is no file"):
        read_tiny(tmp_path / "missing.safetensors")


def test_a_layer_that_does_not_fit_is_named(tmp_path):
    changed = {"decoder.3.conv.2.weight": torch.zeros(5, 8, 3, 3)}
    with pytest.raises(CheckpointError, match=r"decoder\.3\.conv\.2\.weight \[5, 8, 3, 3\].*\[8, 8, 3, 3\]"):
        read_tiny(written(tmp_path, "base", **changed))


def test_it_is_saved_and_loaded_as_a_diffusers_model(tmp_path):
    decoder = TinyVideoDecoder(**SMALL).eval()
    decoder.save_pretrained(tmp_path)
    again = TinyVideoDecoder.from_pretrained(tmp_path).eval()
    latents = torch.randn(1, 4, 2, 3, 3)
    with torch.no_grad():
        assert again(latents).equal(decoder(latents))
    assert TinyVideoDecoder.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    lost = min(state)
    del state[lost]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lack {lost}, which config.json there asks for"):
        TinyVideoDecoder.from_pretrained(tmp_path)


def test_without_a_first_frame_of_its_own_nothing_is_dropped():
    decoder = TinyVideoDecoder(**SMALL, first_frame_alone=False)
    assert decoder.frames_of(2) == 8
    assert decoder(torch.randn(1, 4, 2, 3, 3)).shape == (1, 3, 8, 24, 24)


def test_gradients_reach_the_first_layer():
    decoder = TinyVideoDecoder(**SMALL)
    decoder(torch.randn(2, 4, 3, 3, 3)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert decoder.decoder[1].weight.grad.abs().sum() > 0


def test_a_long_video_is_decoded_in_chunks(monkeypatch):
    decoder = TinyVideoDecoder(**SMALL).eval()
    lengths = []
    decode = TinyVideoDecoder._decode

    def watched(self, latents, past):
        lengths.append(latents.shape[2])
        return decode(self, latents, past)

    monkeypatch.setattr(TinyVideoDecoder, "_decode", watched)
    with torch.no_grad():
        decoder(torch.randn(1, 4, 9, 32, 32))
    assert lengths == [8, 1]  # 64 MiB on a CPU: of a latent frame, 4 frames of 8 channels of 256 x 256 in float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "huge"}, "variant is 'huge': choose 'base' or 'super'"),
        ({"time_growth": (1, 3, 2)}, "time_growth has 3: each step makes 1 or 2 frames"),
        ({"block_out_channels": (8, 8)}, "block_out_channels has 2 numbers for 3 of time_growth"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"variant": "super", "activation": "leaky_relu"}, "of the base variant alone"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TinyVideoDecoder(**{**SMALL, **changes})


def test_frames_that_are_not_made_are_refused():
    decoder = TinyVideoDecoder(**SMALL)
    for frames in (0, 9):
        with pytest.raises(ValueError, match=rf"frames is {frames}: of 2 latent frames 1 to 8 are made"):
            decoder(torch.zeros(1, 4, 2, 3, 3), frames=frames)


def test_latents_of_other_channels_are_refused():
    for shape in ((1, 16, 2, 3, 3), (1, 4, 2, 0, 3), (0, 4, 2, 3, 3)):
        words = rf"takes latents \[B, 4, T, h, w\] with at least 1 of each, got \({', '.join(map(str, shape))}\)"
        with pytest.raises(ValueError, match=words):
            TinyVideoDecoder(**SMALL)(torch.zeros(shape))
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"at_once is {count}: a chunk has at least 1 latent frame"):
            TinyVideoDecoder(**SMALL)(torch.zeros(1, 4, 2, 3, 3), at_once=count)
