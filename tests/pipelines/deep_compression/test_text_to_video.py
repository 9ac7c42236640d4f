from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.video_processor import VideoProcessor
from peft import LoraConfig
from tiny_dc import DEEP, generate_dc, make_autoencoder, make_dc_pipe, make_dc_transformer, make_text

import vidaccel
from vidaccel import SVG2, DenseSchedule, tiny_decoder
from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.memory import memory_to_decode
from vidaccel.autoencoders.tiny import TinyVideoDecoder
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline

CLASSES = [DCVideoGenPipeline, DCVideoGenImageToVideoPipeline]


@pytest.fixture
def text_pipe() -> DCVideoGenPipeline:
    return make_dc_pipe(DCVideoGenPipeline)


@pytest.fixture
def image_pipe() -> DCVideoGenImageToVideoPipeline:
    return make_dc_pipe(DCVideoGenImageToVideoPipeline)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size", [(8, 32, 64), (1, 17, 33), (10, 40, 31), (13, 64, 32)])
def test_any_size_and_frame_count(cls, size):
    pipe = make_dc_pipe(cls)
    frames, height, width = size
    video = generate_dc(pipe, *size)
    assert video.shape == (1, frames, 3, height, width) and video.isfinite().all()
    latents = generate_dc(pipe, *size, output_type="latent")
    assert latents.shape == (1, 4, -(-frames // 4), -(-height // 32), -(-width // 32))


@pytest.mark.parametrize("cls", CLASSES)
def test_it_is_a_part_of_the_canvas(cls):
    pipe = make_dc_pipe(cls)
    picture = {"image": torch.full((1, 3, 8, 8), 0.3)} if cls is CLASSES[1] else {}
    part = generate_dc(pipe, 6, 41, 50, **picture)
    whole = generate_dc(pipe, 8, 64, 64, **picture)
    torch.testing.assert_close(part, whole[:, :6, :, 11:52, 7:57])


def test_another_size_is_said(text_pipe, caplog):
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        generate_dc(text_pipe, 8, 32, 64, num_inference_steps=1)
        assert "asked for" not in caplog.text
        generate_dc(text_pipe, 9, 30, 64, num_inference_steps=1)
    assert "9 frames of 64x30 were asked for; 12 of 64x32 are made" in caplog.text


def test_output_types_agree(text_pipe):
    tensors = generate_dc(text_pipe, 5, 30, 40)
    arrays = generate_dc(text_pipe, 5, 30, 40, output_type="np")
    pictures = generate_dc(text_pipe, 5, 30, 40, output_type="pil")
    assert arrays.shape == (1, 5, 30, 40, 3) and tensors.min() >= 0 and tensors.max() <= 1
    np.testing.assert_allclose(arrays, tensors.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert [len(one) for one in pictures] == [5] and pictures[0][0].size == (40, 30)
    np.testing.assert_allclose(np.asarray(pictures[0][4]) / 255, arrays[0, 4], atol=0.51 / 255)
    assert text_pipe(
        prompt_embeds=torch.zeros(1, 2, 16), height=32, width=32, num_frames=4, num_inference_steps=1,
        guidance_scale=1.0, output_type="pt", return_dict=False,
    )[0].shape == (1, 4, 3, 32, 32)  # fmt: skip


def test_the_defaults_are_np_at_480p(text_pipe, monkeypatch):
    asked = {}

    def record(self, prompt, negative_prompt, height, width, num_frames, *args, **kwargs):
        asked.update(size=(num_frames, height, width), **kwargs)
        return (np.zeros((1, 80, 480, 832, 3)),)

    monkeypatch.setattr(WanPipeline, "__call__", record)
    assert text_pipe("a").frames.shape == (1, 80, 480, 832, 3)
    assert asked == {"size": (77, 480, 832), "output_type": "np", "return_dict": False}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("size", "message"), [((0, 32, 32), "num_frames is 0"), ((4, 0, 32), "height is 0"), ((4, 32, -5), "width is -5")]
)
def test_sizes_under_one_are_refused(cls, size, message):
    with pytest.raises(ValueError, match=f"{message}: it must be at least 1"):
        generate_dc(make_dc_pipe(cls), *size)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("vae", [{"pad_frames": 3}, {"block_out_channels": (4,) * 4, "layers_per_block": (0, 1, 0, 1)}])
def test_other_autoencoders(cls, vae):
    """One with padding frames, which makes 4k + 1; one of 4x, whose own sizes diffusers would refuse."""
    pipe = make_dc_pipe(cls, vae=make_autoencoder(**{**DEEP, **vae}))
    for size in ((9, 20, 36), (8, 32, 16)):
        assert generate_dc(pipe, *size).shape == (1, size[0], 3, *size[1:])


def test_patches_of_2():
    pipe = make_dc_pipe(DCVideoGenPipeline, transformer=make_dc_transformer(patch_size=(1, 2, 2)))
    assert generate_dc(pipe, 8, 40, 64).shape == (1, 8, 3, 40, 64)
    assert generate_dc(pipe, 8, 40, 64, output_type="latent").shape == (1, 4, 2, 2, 2)


def test_tiled_decode(text_pipe):
    whole = generate_dc(text_pipe, 8, 64, 128)
    text_pipe.vae.enable_tiling(64, 64, 32, 32)
    widths = []
    text_pipe.vae.decoder.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    tiled = generate_dc(text_pipe, 8, 64, 128)
    assert tiled.shape == whole.shape and set(widths) == {2} and len(widths) == 3
    assert (tiled - whole).abs().mean() < 0.5 * (tiled - tiled.flip(-1)).abs().mean()


# -- latents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_latents_are_reproducible(cls):
    pipe = make_dc_pipe(cls)
    first = generate_dc(pipe, output_type="latent")
    assert generate_dc(pipe, output_type="latent").equal(first)
    assert not torch.allclose(generate_dc(pipe, output_type="latent", seed=1), first, atol=1e-2)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    assert generate_dc(pipe, output_type="latent", latents=noise, generator=None).equal(first)


@pytest.mark.parametrize("cls", CLASSES)
def test_latents_are_scaled(cls):
    """The video is the decoder's at latents / scaling_factor."""
    pipe = make_dc_pipe(cls)
    latents = generate_dc(pipe, output_type="latent")
    decoded = pipe.vae.decode(latents / DEEP["scaling_factor"]).sample
    torch.testing.assert_close(generate_dc(pipe), (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2))


@pytest.mark.parametrize("cls", CLASSES)
def test_several_prompts_and_videos(cls):
    pipe = make_dc_pipe(cls, **make_text())
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 0, 1)]
    videos = generate_dc(pipe, prompt=["a cat", "a dog"], num_videos_per_prompt=2, generator=generators)
    assert videos.shape == (4, 8, 3, 32, 64)
    for number, (prompt, seed) in enumerate((("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1))):
        alone = generate_dc(pipe, prompt=prompt, seed=seed)
        torch.testing.assert_close(videos[number : number + 1], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="4.* 2"):
        generate_dc(pipe, prompt=["a cat", "a dog"], generator=generators)


def test_guidance_and_text():
    pipe = make_dc_pipe(DCVideoGenPipeline, **make_text())
    assert not generate_dc(pipe, prompt="a cat").equal(generate_dc(pipe, prompt="a dog"))
    assert not generate_dc(pipe, prompt="a cat", negative_prompt="b").equal(generate_dc(pipe, prompt="a cat"))
    free = generate_dc(pipe, prompt="a cat", negative_prompt="b", guidance_scale=1.0)
    assert free.equal(generate_dc(pipe, prompt="a cat", guidance_scale=1.0))


@pytest.mark.parametrize("cls", CLASSES)
def test_callbacks_see_and_change_the_latents(cls):
    pipe, steps = make_dc_pipe(cls), []

    def keep(pipe, step, timestep, tensors):
        steps.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = generate_dc(pipe, 10, 40, 31, output_type="latent", callback_on_step_end=keep)
    assert steps == [(0, (1, 4, 3, 2, 1)), (1, (1, 4, 3, 2, 1))] and latents.abs().max() == 0


def test_a_callback_can_stop(text_pipe):
    calls = []

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        calls.append(step)
        return tensors

    generate_dc(text_pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert calls == [0]


# -- components that do not belong together ----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_another_autoencoder_is_refused(cls):
    wan = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    for vae, name in ((wan, "AutoencoderKLWan"), (None, "None")):
        with pytest.raises(ValueError, match=f"vae of {cls.__name__} is {name}: it must be an AutoencoderDCV"):
            generate_dc(make_dc_pipe(cls, vae=vae))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_autoencoder_of_other_channels_is_refused(cls):
    pipe = make_dc_pipe(cls, vae=make_autoencoder(**{**DEEP, "latent_channels": 6}))
    given, wanted = (4, 6) if cls is DCVideoGenPipeline else (12, 16)
    with pytest.raises(ValueError, match=f"takes {given} channels and makes 4, but .*6 latent.*takes {wanted} and"):
        generate_dc(pipe)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_decoding_that_will_not_fit_is_said_before_the_first_step(cls, monkeypatch, caplog):
    """The device is asked for its memory; everything else runs on the CPU."""
    pipe = make_dc_pipe(cls)
    monkeypatch.setattr(cls, "_execution_device", torch.device("cuda", 0))
    memory = SimpleNamespace(total_memory=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    pipe._canvas(80, 720, 1280, 1)
    (message,) = [record.message for record in caplog.records if "Decoding" in record.message]
    assert "Decoding 80 frames of 1280x736 takes about" in message and "call pipe.vae.enable_tiling()" in message
    caplog.clear()
    one = memory_to_decode(pipe.vae, 80, 736, 1280)
    memory.total_memory = 3 * one // 2
    pipe._canvas(80, 720, 1280, 1)
    assert "Decoding" not in caplog.text
    pipe._canvas(80, 720, 1280, 2)
    assert "Decoding 2 videos of 80 frames" in caplog.text and "call pipe.vae.enable_slicing()" in caplog.text
    caplog.clear()
    pipe.vae.enable_slicing()
    pipe._canvas(80, 720, 1280, 2)
    assert "Decoding" not in caplog.text
    pipe.vae.use_framewise_decoding = False
    memory.total_memory = memory_to_decode(pipe.vae, 80, 736, 1280) - 1
    pipe._canvas(80, 720, 1280, 2)
    assert "set pipe.vae.use_framewise_decoding to True" in caplog.text


@pytest.mark.parametrize("cls", CLASSES)
def test_a_decoding_that_is_none_of_the_autoencoder_s_is_no_matter(cls, monkeypatch, caplog):
    """Latents that are given out, and frames of a tiny decoder."""
    pipe = make_dc_pipe(cls)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "_check_memory", None)
        assert generate_dc(pipe, 8, output_type="latent").ndim == 5
    monkeypatch.setattr(cls, "_execution_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1))
    shape = {"block_out_channels": (8,) * 6, "layers_per_block": 1, "time_growth": (1, 1, 1, 2, 2)}
    decoder = TinyVideoDecoder(4, **shape, first_frame_alone=False, autoencoder="AutoencoderDCV")
    with tiny_decoder(pipe, decoder):
        pipe._canvas(80, 720, 1280, 1)
        assert "Decoding" not in caplog.text
    pipe._canvas(80, 720, 1280, 1)
    assert "Decoding" in caplog.text


@pytest.mark.parametrize("cls", CLASSES)
def test_an_autoencoder_that_is_set_later(cls):
    """diffusers keeps the factors of the autoencoder that a pipeline is made with, or Wan's."""
    late, usual = make_dc_pipe(cls, vae=None), make_dc_pipe(cls)
    late.vae = usual.vae
    torch.testing.assert_close(generate_dc(late, 10, 40, 31), generate_dc(usual, 10, 40, 31))


@pytest.mark.parametrize("cls", CLASSES)
def test_latents_of_another_shape_are_refused(cls):
    pipe = make_dc_pipe(cls)
    latents = torch.randn(1, 4, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(generate_dc(pipe, latents=latents), generate_dc(pipe))
    with pytest.raises(ValueError, match=r"latents is \[1, 4, 2, 2, 2\], and this video takes \[1, 4, 2, 1, 2\]"):
        generate_dc(pipe, latents=torch.randn(1, 4, 2, 2, 2))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ("prompt_embeds", "negative_prompt_embeds"))
def test_embeddings_that_are_not_finite_are_refused_before_the_steps(cls, name):
    """Of one NaN all frames were NaN, once all steps were made."""
    pipe = make_dc_pipe(cls)
    pipe.transformer.forward = None
    for value in (float("nan"), float("inf")):
        embeds = torch.zeros(1, 6, 16)
        embeds[0, 2, 3] = value
        with pytest.raises(ValueError, match=f"^{name} has NaN or infinite values, of which nothing is made"):
            generate_dc(pipe, **{name: embeds})


@pytest.mark.parametrize("cls", CLASSES)
def test_the_transformer_of_the_other_task_is_refused(cls):
    other = make_dc_transformer(image=cls is DCVideoGenPipeline)
    wanted = "takes 12 channels.*needs one that takes 4 " if cls is CLASSES[0] else "takes 4 .*needs one that takes 12 "
    with pytest.raises(ValueError, match=wanted):
        generate_dc(make_dc_pipe(cls, transformer=other))
    # Also as the second of two.
    with pytest.raises(ValueError, match=wanted):
        generate_dc(make_dc_pipe(cls, transformer_2=other, boundary_ratio=0.5))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_the_pipelines_do_not_do_is_refused(cls):
    with pytest.raises(ValueError, match="does not do expand_timesteps.*adapt a model with"):
        generate_dc(make_dc_pipe(cls, expand_timesteps=True))
    with pytest.raises(ValueError, match="has no transformer"):
        generate_dc(make_dc_pipe(cls, transformer=None))


def test_two_transformers():
    pipe = make_dc_pipe(DCVideoGenPipeline, transformer_2=make_dc_transformer(seed=1), boundary_ratio=0.9)
    calls = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    assert generate_dc(pipe, 6, 20, 20, num_inference_steps=3).shape == (1, 6, 3, 20, 20)
    assert set(calls) == {"transformer", "transformer_2"}


# -- what diffusers' users expect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_save_and_load(cls, tmp_path):
    pipe = make_dc_pipe(cls, **make_text())
    wanted = generate_dc(pipe, 6, 30, 40, prompt="a cat")
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__ and index["vae"][1] == "AutoencoderDCV"
    assert index["vae"][0].split(".")[0] == "vidaccel"
    loaded = cls.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is cls and type(loaded.vae) is AutoencoderDCV
    # Weights that are mapped from a file lie elsewhere in memory, and sums round differently.
    torch.testing.assert_close(generate_dc(loaded, 6, 30, 40, prompt="a cat"), wanted, atol=1e-5, rtol=1e-4)
    half = cls.from_pretrained(str(tmp_path / "model"), dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert {half.vae.dtype, half.transformer.dtype} == {torch.bfloat16}
    assert generate_dc(half, 6, 30, 40, prompt="a cat").isfinite().all()


def test_stock_pipelines_take_components_over(text_pipe, image_pipe):
    again = DCVideoGenPipeline.from_pipe(text_pipe)
    again.set_progress_bar_config(disable=True)
    assert generate_dc(again).equal(generate_dc(text_pipe))
    assert isinstance(text_pipe, WanPipeline) and isinstance(image_pipe, WanImageToVideoPipeline)


@pytest.mark.parametrize("cls", CLASSES)
def test_lora_is_loaded_and_unloaded(cls, tmp_path):
    pipe = make_dc_pipe(cls)
    before = generate_dc(pipe)
    trained = make_dc_transformer(image=cls is CLASSES[1])
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from peft import get_peft_model_state_dict

    cls.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained))
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    with_lora = generate_dc(pipe)
    assert not torch.allclose(with_lora, before, atol=1e-3)
    torch.testing.assert_close(with_lora, generate_dc(make_dc_pipe(cls, transformer=trained)))
    pipe.set_adapters("style", 0.0)
    torch.testing.assert_close(generate_dc(pipe), before)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(generate_dc(pipe), with_lora, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert generate_dc(pipe).equal(before) or torch.allclose(generate_dc(pipe), before, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_are_offloaded(cls, kind, monkeypatch):
    pipe = make_dc_pipe(cls)
    before = generate_dc(pipe, 6, 30, 40)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    moved, onload = set(), ModuleGroup.onload_

    def noted(group):
        moved.update(map(id, group.modules))
        return onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", noted)
    assert generate_dc(pipe, 6, 30, 40).equal(before)
    # All that decodes was moved, though no one calls the forward of the autoencoder.
    assert {id(module) for module in pipe.vae.decoder.modules() if isinstance(module, torch.nn.Conv3d)} <= moved


@pytest.mark.parametrize("cls", CLASSES)
def test_accelerate_on_top(cls):
    pipe = make_dc_pipe(cls)
    size = {"frames": 14, "height": 120, "width": 128, "output_type": "latent"}
    before = generate_dc(pipe, **size)
    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=DenseSchedule(first_steps=1)) as handle:
        sparse = generate_dc(pipe, **size)
        report = handle.report()
    assert sparse.shape == before.shape == (1, 4, 4, 4, 4) and not sparse.equal(before)
    assert len(report.records) == 2 * 2 * 2 and min(record.density for record in report.records) < 0.6
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=1.0)):
        assert generate_dc(pipe, **size).equal(before)
    assert generate_dc(pipe, **size).equal(before)


def test_compiled_blocks(text_pipe):
    before = generate_dc(text_pipe)
    torch._dynamo.reset()
    text_pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    text_pipe.vae = torch.compile(text_pipe.vae, backend="eager")
    torch.testing.assert_close(generate_dc(text_pipe), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_a_video_without_a_picture_is_told_of(output_type, caplog):
    """As of float16, which overflows; PIL would make it black."""
    pipe = make_dc_pipe(DCVideoGenPipeline)
    generate_dc(pipe, output_type=output_type)
    assert not caplog.text
    pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    generate_dc(pipe, output_type=output_type)
    assert "The video has NaN or infinite values in torch.float32: nothing here is in float16, so look" in caplog.text
    caplog.clear()
    pipe.vae.half()
    generate_dc(pipe, output_type=output_type)
    assert "vae in float16 may have overflowed, as models" in caplog.text
    assert "load the pipeline in bfloat16 or float32" in caplog.text


@pytest.mark.parametrize("cls", CLASSES)
def test_a_video_processor_of_one_s_own_stays(cls):
    class Mirrored(VideoProcessor):
        def postprocess_video(self, video, output_type="np"):
            return super().postprocess_video(video.flip(-1), output_type)

    pipe = make_dc_pipe(cls)
    plain = generate_dc(pipe)
    pipe.video_processor = own = Mirrored(vae_scale_factor=32)
    assert torch.equal(generate_dc(pipe), plain.flip(-1)) and pipe.video_processor is own
    pipe = make_dc_pipe(cls)
    generate_dc(pipe)
    own = pipe.video_processor
    postprocess = own.postprocess_video
    own.postprocess_video = lambda video, *args, **options: postprocess(video.flip(-1), *args, **options)
    assert torch.equal(generate_dc(pipe), plain.flip(-1)) and pipe.video_processor is own
    pipe.video_processor = VideoProcessor(vae_scale_factor=8, do_normalize=False)
    generate_dc(pipe)
    assert pipe.video_processor.config.vae_scale_factor == 32 and not pipe.video_processor.config.do_normalize


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"output_type": "foo"}, "output_type is 'foo': give 'np', 'pt', 'pil' or 'latent'"),
        ({"height": "64"}, "height is '64': it must be at least 1 and whole"),
        ({"frames": True}, "num_frames is True: it must be at least 1 and whole"),
        ({"latents": torch.full((1, 4, 2, 1, 2), float("nan"))}, "latents has NaN or infinite values"),
        ({"latents": np.zeros((1, 4, 2, 1, 2), np.float32)}, r"latents is a ndarray: give a tensor \[1, 4, 2, 1, 2\]"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(cls, given, words, monkeypatch):
    pipe = make_dc_pipe(cls)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=words):
        generate_dc(pipe, **given)
