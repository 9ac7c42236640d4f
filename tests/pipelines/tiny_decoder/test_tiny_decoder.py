"""`tiny_decoder`: real pipelines of several families, whose frames then come from a tiny decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import cogvideo, hunyuan, ltx, wan_kin
from safetensors.torch import save_file
from tiny_decoders import decoder_for

from vidaccel import demo, tiny_decoder
from vidaccel.autoencoders.tiny import compression_of, frames_of, to_transformer
from vidaccel.pipelines.hooks.undo import TINY_DECODER, restore
from vidaccel.pipelines.tiny_decoder import TinyDecoderError

PIPELINES = {
    "wan": wan_kin.wan,
    "wan_5b": wan_kin.wan_5b,
    "hunyuan": hunyuan.hunyuan,
    "hunyuan15": hunyuan.hunyuan_15,
    "cogvideox": cogvideo.cogvideox_2b,
    "ltx": ltx.ltx,
    "ltx2": ltx.ltx2,
}
FRAMES = 9


def made(pipe, output_type: str = "pt", **more) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_frames": FRAMES, "height": 64, "width": 64, "num_inference_steps": 2, **more}
    return pipe("a cat", generator=generator, output_type=output_type, **call).frames


@pytest.mark.parametrize("name", PIPELINES)
def test_frames_are_what_the_decoder_makes_of_the_transformers_latents(name):
    pipe = PIPELINES[name]()
    vae, decode = pipe.vae, pipe.vae.decode
    own = made(pipe)
    seen = []
    decoder = decoder_for(vae)
    forward = decoder.forward
    decoder.forward = lambda latents, **more: seen.append(latents) or forward(latents, **more)
    handle = tiny_decoder(pipe, decoder)
    frames = made(pipe)
    assert frames.shape == own.shape
    assert not torch.allclose(frames, own, atol=1e-2)
    handle.remove()
    handle.remove()
    assert vae.decode == decode and torch.equal(made(pipe), own)
    # What the pipeline hands over as latents is in the transformer's scale, whatever it does to it before decoding.
    if name not in ("ltx", "ltx2"):  # these hand over what the autoencoder takes
        latents = made(pipe, "latent")
        latents = latents.transpose(1, 2) if name == "cogvideox" else latents
        torch.testing.assert_close(seen[-1], latents.float(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        wanted = forward(seen[-1], frames=frames.shape[1])
    torch.testing.assert_close(frames, (wanted / 2 + 0.5).transpose(1, 2).to(frames), atol=1e-5, rtol=0)


def test_scaled_latents_of_ltx_are_those_of_its_transformer():
    vae = ltx.ltx().vae
    vae.latents_mean, vae.latents_std = torch.randn(8), torch.rand(8) + 0.5
    latents = torch.randn(1, 8, 2, 3, 3)
    from diffusers import LTXPipeline

    scaled = LTXPipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    torch.testing.assert_close(to_transformer(vae, scaled), latents)


def test_a_decoder_of_scaled_latents_gets_them_scaled(monkeypatch):
    pipe = wan_kin.wan()
    pipe.vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    seen = []
    for latents in ("transformer", "autoencoder"):
        decoder = decoder_for(pipe.vae, latents=latents)
        forward = decoder.forward
        decoder.forward = lambda x, forward=forward, **more: seen.append(x) or forward(x, **more)
        with tiny_decoder(pipe, decoder):
            made(pipe)
    torch.testing.assert_close(seen[1], 2 * seen[0] + 0.5, atol=1e-5, rtol=1e-5)


def test_frames_are_as_many_as_the_autoencoder_makes():
    for pipe in (wan_kin.wan(), cogvideo.cogvideox_2b(), ltx.ltx(), hunyuan.hunyuan_15()):
        channels = getattr(pipe.vae.config, "z_dim", None) or pipe.vae.config.latent_channels
        for count in (1, 2, 3):
            latents = torch.zeros(1, channels, count, 4, 4)
            time = [torch.zeros(1)] if "timestep_conditioning" in pipe.vae.config else []
            with torch.no_grad():
                own = pipe.vae.decode(latents, *time, return_dict=False)[0]
            assert frames_of(pipe.vae, count) == own.shape[2], (type(pipe.vae).__name__, count)


def test_a_copy_decodes_by_itself_and_keeps_its_decoder():
    pipe = wan_kin.wan()
    handle = tiny_decoder(pipe, decoder_for(pipe.vae))
    frames = made(pipe)
    seconds = handle.seconds
    twin = copy.deepcopy(pipe)
    assert handle.seconds == seconds and len(seconds) == 1 and twin.vae.decode.spans == []
    handle.remove()
    assert torch.equal(made(twin), frames)
    assert twin.vae.decode.vae is twin.vae


def test_its_dtype_may_be_a_name():
    pipe = wan_kin.wan()
    decoder = decoder_for(pipe.vae)
    before = copy.deepcopy(decoder.state_dict())
    with tiny_decoder(pipe, decoder, dtype="bfloat16") as handle:
        made(pipe)
        assert handle._decode.decoder.dtype == torch.bfloat16
    # A copy computes: the given one would stay rounded. Without a dtype it is in the right one.
    assert all(torch.equal(x, before[name]) for name, x in decoder.state_dict().items())
    with tiny_decoder(pipe, decoder) as handle:
        made(pipe)
        assert handle._decode.decoder is decoder
    with pytest.raises(ValueError, match="dtype='bf16' is no dtype: give one of float32, bfloat16"):
        tiny_decoder(pipe, decoder_for(pipe.vae), dtype="bf16")


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn, torch.complex64, 8))
def test_a_dtype_that_layers_do_not_compute_in_is_refused_before_the_steps(dtype):
    """It ended the run with torch's words once all steps were made."""
    pipe = wan_kin.wan()
    with pytest.raises(ValueError, match=f"dtype is {dtype}, in which layers do not compute: give one of float32"):
        tiny_decoder(pipe, decoder_for(pipe.vae), dtype=dtype)
    assert not hasattr(pipe.vae, TINY_DECODER)


def _compiled(decoder):
    decoder.compile(backend="eager")


def _offloaded_in_groups(decoder):
    decoder.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def _cast_by_layers(decoder):
    decoder.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def _offloaded(decoder):
    add_hook_to_module(decoder, AlignDevicesHook("cpu", offload=True))


@pytest.mark.parametrize("prepare", (_compiled, _offloaded_in_groups, _cast_by_layers, _offloaded))
def test_one_that_is_compiled_or_hooked_computes_as_it_is(prepare):
    pipe = wan_kin.wan()
    decoder = decoder_for(pipe.vae)
    prepare(decoder)
    latents = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        wanted = decoder(to_transformer(pipe.vae, latents), frames=frames_of(pipe.vae, 2))
    with tiny_decoder(pipe, decoder) as handle:
        frames = pipe.vae.decode(latents).sample
        assert handle._decode.decoder is decoder
    torch.testing.assert_close(frames, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(TinyDecoderError, match=r"dtype is torch\.bfloat16, .* computes in torch\.float32: leave dtype"):
        tiny_decoder(pipe, decoder, dtype="bfloat16")
    assert not hasattr(pipe.vae, TINY_DECODER) and "decode" not in pipe.vae.__dict__


def test_what_torch_compile_wraps_is_looked_through():
    """A decoder in such a wrapper was taken for a path, and an autoencoder in one for none that is known."""
    pipe = wan_kin.wan()
    decoder = decoder_for(pipe.vae)
    with tiny_decoder(pipe, decoder):
        wanted = made(pipe)
    wrapped = torch.compile(decoder, backend="eager")
    with tiny_decoder(pipe, wrapped) as handle:
        assert torch.equal(made(pipe), wanted) and handle._decode.decoder is wrapped
    vae = pipe.vae
    pipe.vae = torch.compile(vae, backend="eager")
    with tiny_decoder(pipe, decoder) as handle:
        assert torch.equal(made(pipe), wanted) and "was replaced" not in handle.notes()[0]
        restore(pipe)
    assert "decode" not in vae.__dict__ and not hasattr(vae, TINY_DECODER)
    with pytest.raises(TinyDecoderError, match="a Linear is no tiny decoder: give a TinyVideoDecoder, a file"):
        tiny_decoder(pipe, torch.compile(torch.nn.Linear(1, 1), backend="eager"))


def test_a_config_that_is_no_object_of_json_is_named(tmp_path):
    pipe = wan_kin.wan()
    for text, problem in (("{", "Expecting"), ("[1]", "it must be an object, and is a list"), ("[" * 99999, "deeply")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TinyDecoderError, match=rf"config\.json cannot be read: .*{problem}"):
            tiny_decoder(pipe, tmp_path)


def test_what_was_in_the_place_of_decode_comes_back():
    pipe = wan_kin.wan()
    own = pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    tiny_decoder(pipe, decoder_for(pipe.vae)).remove()
    assert pipe.vae.__dict__["decode"] is own


def test_images_of_qwen_have_the_autoencoder_of_wan():
    from diffusers import AutoencoderKLQwenImage

    scale = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **scale)
    assert compression_of(vae) == (4, 8) and frames_of(vae, 1) == 1
    pipe = wan_kin.wan()
    pipe.vae = vae.eval()
    with tiny_decoder(pipe, decoder_for(pipe.vae, autoencoder="AutoencoderKLWan")), torch.no_grad():
        assert pipe.vae.decode(torch.randn(1, 4, 1, 4, 4)).sample.shape == (1, 3, 1, 32, 32)


def test_time_and_notes_are_told_after_a_decode():
    pipe = wan_kin.wan()
    with tiny_decoder(pipe, decoder_for(pipe.vae)) as handle:
        assert handle.notes() == [] and handle.seconds == []
        made(pipe)
        assert len(handle.seconds) == 1 and handle.seconds[0] > 0
        assert "frames come from a tiny decoder" in handle.notes()[0]
        with pytest.raises(RuntimeError, match="has a tiny decoder already"):
            tiny_decoder(pipe, decoder_for(pipe.vae))
        assert "tiny decoder: a tiny decoder" in repr(handle)
    assert "removed" in repr(handle)


def test_an_autoencoder_that_was_replaced_is_told():
    pipe = wan_kin.wan()
    handle = tiny_decoder(pipe, decoder_for(pipe.vae))
    twin, alone = copy.deepcopy(pipe), copy.deepcopy(pipe.vae)
    made(pipe)
    pipe.vae = torch.compile(pipe.vae, backend="eager")  # a wrapper of the same
    assert "vae was replaced" not in " ".join(handle.notes())
    pipe.vae = wan_kin.autoencoder()
    made(pipe)
    assert len(handle.seconds) == 1 and "vae was replaced after tiny_decoder was called" in handle.notes()[0]
    assert "of an autoencoder that the pipeline has no more" in repr(handle)
    for copied in (twin.vae, alone):
        assert repr(getattr(copied, TINY_DECODER)) == "<vidaccel tiny decoder: a tiny decoder>"
    twin.vae, had = wan_kin.autoencoder(), twin.vae
    assert "has no more" in repr(getattr(had, TINY_DECODER))
    handle.remove()
    assert handle.notes()[0].startswith("frames come from") and repr(handle) == "<vidaccel tiny decoder: removed>"


def test_latents_of_another_shape_are_told_as_such():
    pipe = wan_kin.wan()
    with tiny_decoder(pipe, decoder_for(pipe.vae)):
        for shape in ((1, 5, 2, 4, 4), (4, 2, 4, 4), (1, 4, 2, 0, 4)):
            with pytest.raises(ValueError, match=r"takes latents \[B, 4, T, h, w\] with at least 1 of each, got"):
                pipe.vae.decode(torch.zeros(shape))


def test_the_folder_of_a_training_stands_for_its_decoder(tmp_path, caplog):
    pipe = wan_kin.wan()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: tiny_decoder\n")
    with pytest.raises(TinyDecoderError, match=r"folder of a training that has written no tiny decoder \(no decoder/"):
        tiny_decoder(pipe, run)
    decoder = decoder_for(pipe.vae)
    decoder.save_pretrained(run / "decoder")
    with caplog.at_level("INFO", "vidaccel"), tiny_decoder(pipe, run) as handle:
        assert handle.name == "run" and "is the folder of a training: its decoder is used." in caplog.text
        state = handle._decode.decoder.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in decoder.state_dict().items())


def test_a_published_file_and_a_folder_are_taken(tmp_path):
    pipe = wan_kin.wan()
    decoder = decoder_for(pipe.vae)
    save_file(decoder.state_dict(), tmp_path / "taew2_1.safetensors")
    decoder.save_pretrained(tmp_path / "folder")
    decoder.save_pretrained(tmp_path / "variant", variant="fp16")
    made_of = []
    for source in (decoder, tmp_path / "taew2_1.safetensors", tmp_path / "folder", tmp_path / "variant"):
        with tiny_decoder(pipe, source):
            made_of.append(made(pipe))
    assert all(torch.equal(made_of[0], other) for other in made_of[1:])


def test_a_decoder_of_another_autoencoder_is_refused(tmp_path):
    pipe = wan_kin.wan()
    save_file(decoder_for(pipe.vae).state_dict(), tmp_path / "taehv.safetensors")
    with pytest.raises(
        TinyDecoderError, match=r"taehv\.safetensors is for .* AutoencoderKLHunyuanVideo, and .* an AutoencoderKLWan"
    ):
        tiny_decoder(pipe, tmp_path / "taehv.safetensors")
    with pytest.raises(TinyDecoderError, match="decodes latents of 5 channels, 1/4 .* 4 channels, 1/4"):
        tiny_decoder(pipe, decoder_for(pipe.vae, latent_channels=5))
    with pytest.raises(TinyDecoderError, match="there is no tiny decoder .*nowhere"):
        tiny_decoder(pipe, tmp_path / "nowhere" / "taew2_1.safetensors")
    with pytest.raises(TinyDecoderError, match="has no tiny decoder: give the file"):
        tiny_decoder(pipe, tmp_path)
    with pytest.raises(TinyDecoderError, match="has no tiny decoder of its own"):
        tiny_decoder(pipe)
    pipe.vae = None
    with pytest.raises(TinyDecoderError, match="has no autoencoder, whose place no tiny decoder can take"):
        tiny_decoder(pipe, decoder_for(wan_kin.autoencoder()))


def test_it_runs_beside_sparse_attention_and_in_half_precision():
    from diffusers import WanPipeline

    from vidaccel import accelerate

    pipe = WanPipeline.from_pretrained(demo.path(), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    decoder = decoder_for(pipe.vae)
    with accelerate(pipe, "tangent") as sparse, tiny_decoder(pipe, decoder, dtype=torch.bfloat16):
        frames = made(pipe, height=128, width=128)
    assert frames.shape[:3] == (1, 9, 3) and frames.isfinite().all()
    assert any(record.method == "tangent" for record in sparse.report().records)
