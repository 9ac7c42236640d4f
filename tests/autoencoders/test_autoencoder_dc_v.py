from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dc import DEEP, SMALL, load_golden, make_autoencoder, make_latents, make_video

import vidaccel
from vidaccel.autoencoders import PRESETS, AutoencoderDCV, blocks, preset
from vidaccel.autoencoders.checkpoint_file import CheckpointError


@pytest.fixture(scope="module")
def golden():
    return load_golden()


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# -- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framewise", [True, False])
def test_latent_and_reconstruction_are_the_reference_s(golden, framewise):
    model, wanted = golden
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    latent = model.encode(wanted["input"]).latent
    assert latent.shape == wanted["latent"].shape and _error(latent, wanted["latent"]) < 1e-4
    reconstruction = model.decode(wanted["latent"]).sample
    assert reconstruction.shape == wanted["reconstruction"].shape
    assert _error(reconstruction, wanted["reconstruction"]) < 1e-4
    assert _error(model(wanted["input"]).sample, wanted["reconstruction"]) < 1e-4


def test_the_reference_needs_its_chunk_length(golden):
    """The comparison above can fail: with chunks of another length the latents are others."""
    model, wanted = golden
    other = AutoencoderDCV.from_config({**model.config, "chunk_size": 12})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert _error(other.encode(wanted["input"]).latent, wanted["latent"]) > 1e-2


# -- as a diffusers model ----------------------------------------------------------------------------------------------


def test_shapes_and_tuples():
    model, video = make_autoencoder(), make_video(8, 16, 24, batch=2)
    latent = model.encode(video).latent
    assert latent.shape == (2, 4, 2, 4, 6)
    assert model.decode(latent).sample.shape == video.shape
    assert model.encode(video, return_dict=False)[0].equal(latent)
    assert model.decode(latent, return_dict=False)[0].equal(model(video, return_dict=False)[0])


def test_what_the_config_tells_pipelines():
    model = make_autoencoder(**DEEP)
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (32, 4)
    assert (model.config.scale_factor_spatial, model.config.scale_factor_temporal, model.config.z_dim) == (32, 4, 4)
    assert model.config.latents_mean == [0.0] * 4 and model.config.latents_std == [2.0] * 4


@pytest.mark.parametrize("tiled", [False, True])
def test_in_float64_it_is_the_same_model(tiled):
    """The norm takes its mean square in float32 at least, and never in less than what it is given."""
    model, video = make_autoencoder(), make_video(8, 48, 48)
    if tiled:
        model.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    with torch.no_grad():
        single, double = (model.to(dtype)(video.to(dtype)).sample for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64 and 0 < _error(single.double(), double) < 1e-4


def test_save_and_load(tmp_path):
    model, video = make_autoencoder(pad_frames=4, tail="replicate"), make_video(12)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {k for k in saved if not k.startswith("_")} == {*SMALL, "in_channels", "pad_frames", "tail"}
    loaded = AutoencoderDCV.from_pretrained(tmp_path)
    assert {k: loaded.config[k] for k in saved if not k.startswith("_")} == {
        k: v for k, v in json.loads(json.dumps(model.config)).items() if k in saved and not k.startswith("_")
    }
    assert vidaccel.AutoencoderDCV is AutoencoderDCV
    assert loaded(video).sample.equal(model(video).sample)
    half = AutoencoderDCV.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_numbers_of_numpy_are_saved(tmp_path):
    numbers = {"latent_channels": np.int64(4), "chunk_size": np.int32(8), "scaling_factor": np.float32(0.5)}
    widths = {"block_out_channels": tuple(np.array([8, 8, 16, 16])), "layers_per_block": np.array([0, 1, 1, 1])}
    model = AutoencoderDCV(**{**SMALL, **numbers, **widths})
    assert model.config == make_autoencoder(layers_per_block=[0, 1, 1, 1]).config
    model.save_pretrained(tmp_path)
    assert AutoencoderDCV.from_pretrained(tmp_path).config.scaling_factor == 0.5


@pytest.mark.parametrize("info", (False, True))
def test_weights_of_flashpack_are_taken(tmp_path, monkeypatch, info):
    """Of which diffusers gives no account. The package is for GPUs, so its one function stands here."""
    model = make_autoencoder()
    model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.flashpack")

    def assign(model, path, device):
        model.load_state_dict(load_file(path), strict=False, assign=True)

    mixin = SimpleNamespace(assign_from_file=assign)
    monkeypatch.setitem(sys.modules, "flashpack", SimpleNamespace(mixin=mixin))
    monkeypatch.setattr("diffusers.models.modeling_utils.is_flashpack_available", lambda: True)
    loaded = AutoencoderDCV.from_pretrained(tmp_path, use_flashpack=True, output_loading_info=info)
    state = (loaded[0] if info else loaded).state_dict()
    assert isinstance(loaded, tuple) == info
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    del state["decoder.conv_out.weight"]
    save_file(state, tmp_path / "model.flashpack")
    with pytest.raises(CheckpointError, match=r"\(model\*\.flashpack\) lack decoder.conv_out.weight, which"):
        AutoencoderDCV.from_pretrained(tmp_path, use_flashpack=True, output_loading_info=info)


def test_a_dtype_by_name_and_weights_that_lack_one(tmp_path):
    """Of both diffusers warns alone: the first loads float32, the other fails in decoding."""
    make_autoencoder().save_pretrained(tmp_path / "vae")
    assert AutoencoderDCV.from_pretrained(tmp_path / "vae", dtype="bfloat16").dtype == torch.bfloat16
    assert AutoencoderDCV.from_pretrained(tmp_path / "vae", torch_dtype="torch.float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype='bf16' is no dtype: give one of float32"):
        AutoencoderDCV.from_pretrained(tmp_path / "vae", dtype="bf16")
    model, told = AutoencoderDCV.from_pretrained(tmp_path, subfolder="vae", output_loading_info=True)
    assert isinstance(model, AutoencoderDCV) and not told["missing_keys"]
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["decoder.conv_out.weight"]
    save_file(state, file, {"format": "pt"})
    words = r"the weights in .*vae \(diffusion_pytorch_model\*\) lack decoder.conv_out.weight, which config.json"
    for more in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises(CheckpointError, match=words):
            AutoencoderDCV.from_pretrained(tmp_path, subfolder="vae", **more)


def test_its_own_config_makes_another_without_a_warning(caplog):
    """Also what `config` adds for pipelines."""
    model = make_autoencoder(pad_frames=4)
    diffusers.utils.logging.enable_propagation()
    try:
        other = AutoencoderDCV.from_config(model.config)
        assert not caplog.records and other.config == model.config
        AutoencoderDCV.from_config({**model.config, "chunksize": 3})
        assert "chunksize" in caplog.text and "z_dim" not in caplog.text
    finally:
        diffusers.utils.logging.disable_propagation()


def test_presets_are_the_published_variants():
    assert list(PRESETS) == ["f32t4c32", "f32t4c64", "f32t4c128", "f32t4c256", "f64t4c128"]
    for name, billions in (("f32t4c32", 2.14), ("f64t4c128", 2.72)):
        with torch.device("meta"):
            model = AutoencoderDCV.from_preset(name, tail="independent")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
        assert f"f{model.spatial_compression_ratio}t4c{model.config.latent_channels}" == name
        assert model.config.chunk_size == 40 and model.config.tail == "independent"
    with pytest.raises(ValueError, match="no DC-AE-V variant 'f16'.*f32t4c32"):
        preset("f16")


def test_presets_are_copies():
    preset("f32t4c32")["latent_channels"] = 1
    assert preset("f32t4c32")["latent_channels"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8, 8)}, "block_out_channels has 2 entries and layers_per_block 4.*at least 3"),
        ({"block_out_channels": (8, 8), "layers_per_block": (0, 1)}, "2 entries.*2.*at least 3"),
        ({"layers_per_block": (1, 1, 1, 1)}, r"layers_per_block is \(1, 1, 1, 1\): it must start with 0"),
        ({"layers_per_block": (0, 1, -1, 1)}, "nothing below 0"),
        ({"block_out_channels": (8, 6, 16, 16)}, r"block_out_channels\[1\] is 6.*multiple of 4"),
        ({"block_out_channels": (8, 8, 12, 16)}, r"block_out_channels\[2\] is 12: it must divide.*32"),
        ({"chunk_size": 10}, "chunk_size is 10.*multiple of 4"),
        ({"chunk_size": 8.0}, "chunk_size is 8.0: it must be a whole number"),
        ({"pad_frames": True}, "pad_frames is True: it must be a whole number"),
        ({"latent_channels": "4"}, "latent_channels is '4': it must be a whole number"),
        ({"block_out_channels": (8, 8, 16, 16.0)}, r"block_out_channels\[3\] is 16.0: it must be a whole number"),
        ({"scaling_factor": "1"}, "scaling_factor is '1': it must be a positive number"),
        ({"chunk_size": 0}, "chunk_size is 0.*multiple of 4"),
        ({"scaling_factor": True}, "scaling_factor is True: it must be a positive number"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0.*positive"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan.*positive"),
        ({"pad_frames": -1}, "pad_frames is -1.*negative"),
        ({"tail": "wrap"}, "tail is 'wrap'.*cached, replicate, independent"),
        ({"latent_channels": 0}, "latent_channels is 0.*at least 1"),
        ({"in_channels": 0}, "in_channels is 0.*at least 1"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderDCV(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 10, 16, 16), "10 frames.*4k of them: give 8 or 12"),
        ((1, 3, 2, 16, 16), "2 frames.*give 4"),
        ((1, 3, 8, 18, 16), "18x16.*multiples of 4: pad them to 20x16 and crop"),
        ((1, 3, 8, 16, 15), "16x15.*pad them to 16x16"),
        ((1, 4, 8, 16, 16), r"\[B, 3, T, H, W\], not \[1, 4, 8, 16, 16\]"),
        ((3, 8, 16, 16), r"\[B, 3, T, H, W\], not \[3, 8, 16, 16\]"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_autoencoder().encode(torch.zeros(shape))


@pytest.mark.parametrize(("pad", "frames"), [(3, 2), (3, 8), (5, 1), (9, 2)])
def test_the_frames_that_are_suggested_are_right(pad, frames):
    """Every number that the message offers is one that the autoencoder takes."""
    model = make_autoencoder(pad_frames=pad)
    with pytest.raises(ValueError, match=f"4k - {pad} of them: give ") as caught:
        model.encode(make_video(frames))
    offered = [int(word) for word in str(caught.value).rstrip(".").split("give ")[1].split(" or ")]
    assert offered
    for number in offered:
        assert model(make_video(number)).sample.shape[2] == number


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 4, T, H, W\], not \[1, 5, 2, 4, 4\]"):
        make_autoencoder().decode(torch.zeros(1, 5, 2, 4, 4))
    padded = make_autoencoder(pad_frames=4)
    for decode in (padded.decode, lambda z: list(padded.decode_chunks(z))):
        with pytest.raises(ValueError, match="1 frames are nothing but the 4 of padding"):
            decode(make_latents(1))


def test_latents_without_frames_are_refused():
    for shape in ((1, 4, 0, 4, 4), (1, 4, 2, 0, 4)):
        with pytest.raises(ValueError, match="have no frames, rows or columns: each must be at least 1"):
            make_autoencoder().decode(torch.zeros(shape))


def test_no_videos_give_no_videos():
    for model in (make_autoencoder(), make_autoencoder(tail="replicate")):
        for framewise in (True, False):
            model.use_framewise_encoding = model.use_framewise_decoding = framewise
            latent = model.encode(make_video(20, batch=0)).latent
            assert latent.shape == (0, 4, 5, 4, 4) and model.decode(latent).sample.shape == (0, 3, 20, 16, 16)


# -- the same numbers in other ways ------------------------------------------------------------------------------------


def test_slicing_gives_the_same():
    model, video = make_autoencoder(), make_video(8, batch=3)
    latent, sample = model.encode(video).latent, model(video).sample
    model.enable_slicing()
    batches = []
    hook = model.encoder.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    torch.testing.assert_close(model.encode(video).latent, latent)
    torch.testing.assert_close(model(video).sample, sample)
    hook.remove()
    assert set(batches) == {1}


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_convolutions_split_along_time_give_the_same(monkeypatch, limit):
    model, video = make_autoencoder(), make_video(12, batch=2)
    latent, sample = model.encode(video).latent, model(video).sample
    monkeypatch.setattr(blocks, "MAX_ELEMENTS", limit)
    pieces = []
    convolve = torch.nn.functional.conv3d
    monkeypatch.setattr(
        torch.nn.functional, "conv3d", lambda x, *args: (pieces.append(x.shape[2] - 2), convolve(x, *args))[1]
    )
    torch.testing.assert_close(model.encode(video).latent, latent)
    torch.testing.assert_close(model(video).sample, sample)
    # The step down in time takes four frames at once.
    assert (max(pieces) == 4) == (limit == 1) and len(set(pieces)) > (limit > 1)


def test_what_is_split_stays_under_the_limit(monkeypatch):
    """Inputs and outputs both; the step up in time has four times the channels behind it."""
    monkeypatch.setattr(blocks, "MAX_ELEMENTS", 6_000)
    sizes = []
    convolve = blocks.ChunkConv3d._convolve

    def record(self, x):
        out = convolve(self, x)
        if out.shape[2] > 1:  # a frame is not split
            sizes.append(max(x.numel(), out.numel()))
        return out

    monkeypatch.setattr(blocks.ChunkConv3d, "_convolve", record)
    make_autoencoder(chunk_size=40)(make_video(40))
    assert sizes and max(sizes) <= 6_000


@pytest.mark.parametrize("framewise", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(framewise):
    """Three chunks, so that gradients also flow through what is remembered."""
    model, video = make_autoencoder().requires_grad_(True).train(), make_video(20)
    model.use_framewise_encoding = model.use_framewise_decoding = framewise

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(video).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
    calls = []
    model.encoder.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients()
    assert len(calls) == (6 if framewise else 4)  # each chunk, and each again in the backward pass
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_flow_through_what_is_remembered():
    model, video = make_autoencoder(), make_video(16).requires_grad_(True)
    model.encode(video).latent[:, :, 2:].sum().backward()
    of_frame = video.grad.abs().sum((0, 1, 3, 4))
    assert of_frame[7] > 0 and of_frame[8] > 0


def test_channels_last_gives_the_same():
    model, video = make_autoencoder(), make_video(12)
    latent, sample = model.encode(video).latent, model(video).sample
    model.to(memory_format=torch.channels_last_3d)
    video = video.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(model.encode(video).latent, latent, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(video).sample, sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("framewise", [True, False])
def test_bfloat16_is_near_float32(framewise):
    model, video = make_autoencoder(), make_video(20)
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    latent, sample = model.encode(video).latent, model.decode(make_latents(5)).sample
    model.to(torch.bfloat16)
    got = model.encode(video.bfloat16()).latent, model.decode(make_latents(5).bfloat16()).sample
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert _error(got[0].float(), latent) < 0.03 and _error(got[1].float(), sample) < 0.03


def test_compiled_gives_the_same():
    """In one graph: a break at each convolution would take ten times as long to compile."""
    model, video = make_autoencoder(), make_video(12)
    with torch.no_grad():
        wanted = model(video).sample
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(video).sample
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.compiler
def test_compiled_for_the_cpu_gives_the_same():
    """The norms, which diffusers' `compile_repeated_blocks` compiles."""
    model, video = make_autoencoder(layers_per_block=(0, 1, 0, 0)), make_video(12)
    with torch.no_grad():
        wanted = model.encode(video).latent
        torch._dynamo.reset()
        model.compile_repeated_blocks()
        torch.testing.assert_close(model.encode(video).latent, wanted, atol=1e-5, rtol=1e-4)


def test_repeated_blocks_compile_without_a_break(monkeypatch):
    """Three widths, as published; both ways, with tails, at several sizes, whole and in pieces."""
    widths, layers = (8, 8, 16, 32, 32), (0, 1, 1, 1, 1)
    model = make_autoencoder(block_out_channels=widths, layers_per_block=layers)
    videos = [make_video(16, 16, 24), make_video(20, 16, 24), make_video(20, 32, 32), make_video(12, 24, 48)]
    with torch.no_grad():
        wanted = [model(video).sample for video in videos]
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for _ in range(2):
            for video, sample in zip(videos, wanted, strict=True):
                torch.testing.assert_close(model(video).sample, sample)
            monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 10_000)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_one_small_video_on_a_cpu_is_not_convolved_by_a_plain_loop():
    """Which torch would take for it; the output is that of two such videos."""
    model = make_autoencoder().eval()
    latents = make_latents(4)
    with torch.no_grad(), torch.profiler.profile() as profile:
        one = model.decode(latents).sample
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names and not any("slow_conv" in name for name in names)
    with torch.no_grad():
        two = model.decode(latents.expand(2, -1, -1, -1, -1)).sample
    torch.testing.assert_close(one, two[:1], atol=1e-5, rtol=1e-4)
