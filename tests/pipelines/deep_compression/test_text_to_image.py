"""DC-Gen image pipelines, with diffusers' own classes at tiny sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_images import autoencoder_dc, flux_transformer, sana_transformer

from vidaccel.pipelines import DCGenFluxPipeline, DCGenPipeline, DCGenSanaPipeline

NAMES = ("flux", "sana")


def autoencoder(channels: int = 8) -> AutoencoderDC:
    torch.manual_seed(0)
    return autoencoder_dc(4, channels)


def pipeline(name: str, vae: AutoencoderDC | None = None):
    vae = vae if vae is not None else autoencoder()
    torch.manual_seed(1)
    if name == "flux":
        empty = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = DCGenFluxPipeline(scheduler=scheduler, vae=vae, transformer=flux_transformer(), **empty)
    else:
        parts = {"text_encoder": None, "tokenizer": None, "scheduler": DPMSolverMultistepScheduler()}
        pipe = DCGenSanaPipeline(vae=vae, transformer=sana_transformer(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **changes):
    generator = torch.Generator().manual_seed(0)
    text = {"prompt_embeds": torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(9))}
    if isinstance(pipe, DCGenFluxPipeline):
        text["pooled_prompt_embeds"] = torch.zeros(1, 10)
    else:
        ones = torch.ones(1, 6)
        text |= {"prompt_attention_mask": ones, "negative_prompt_embeds": torch.zeros(1, 6, 12)}
        text |= {"negative_prompt_attention_mask": ones, "negative_prompt": None}
    given = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "np", **text, **changes}
    return pipe(generator=generator, **given).images


@pytest.mark.parametrize("name", NAMES)
def test_any_size_comes_out_as_asked(name):
    pipe = pipeline(name)
    for height, width in ((64, 96), (50, 33)):
        images = generate(pipe, height=height, width=width)
        assert images.shape == (1, height, width, 3) and np.isfinite(images).all()
    assert generate(pipe, height=50, width=33, output_type="pil")[0].size == (33, 50)
    assert generate(pipe, height=50, width=33, output_type="pt").shape == (1, 3, 50, 33)
    assert generate(pipe, output_type="latent").shape == (1, 8, 8, 12)


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_sees_one_token_a_latent_pixel(name):
    pipe, shapes = pipeline(name), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs.get("hidden_states", args[0] if args else None).shape),
        with_kwargs=True,
    )
    generate(pipe)
    hook.remove()
    assert shapes[0][1:] == ((8 * 12, 8) if name == "flux" else (8, 8, 12))


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_decoded_where_they_belong(name):
    """A picture of one latent pixel is the same whether the pipeline or the autoencoder decodes it."""
    pipe = pipeline(name)
    latents = generate(pipe, output_type="latent")
    with torch.no_grad():
        wanted = pipe.vae.decode(latents / 0.5).sample / 2 + 0.5
    np.testing.assert_allclose(generate(pipe)[0], wanted[0].permute(1, 2, 0).clamp(0, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_through_the_class_that_finds_the_family(name, tmp_path):
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path / name)
    absent = [part for part, component in pipe.components.items() if component is None]
    half = DCGenPipeline.from_pretrained(tmp_path / name, dtype="bfloat16", **dict.fromkeys(absent))
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    loaded = DCGenPipeline.from_pretrained(tmp_path / name, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    np.testing.assert_allclose(generate(loaded), generate(pipe), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_see_every_step(name):
    seen = []
    generate(pipeline(name), callback_on_step_end=lambda pipe, step, t, tensors: seen.append(step) or {})
    assert seen == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_do_not_belong_together(name):
    with pytest.raises(ValueError, match="makes 8 channels and the autoencoder has 16"):
        generate(pipeline(name, autoencoder(channels=16)))
    with pytest.raises(ValueError, match="height is 0"):
        generate(pipeline(name), height=0)


def test_other_families_are_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="is a WanPipeline; DC-Gen here is for FLUX and SANA"):
        DCGenPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="from_pretrained"):
        DCGenPipeline()


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = pipeline("sana")
    pipe.save_pretrained(tmp_path / "model")
    absent = {part: None for part, component in pipe.components.items() if component is None}
    assert type(DCGenPipeline.from_pretrained("~/model", **absent)) is DCGenSanaPipeline


def test_an_index_that_is_missing_or_says_nothing(tmp_path):
    with pytest.raises(OSError, match="has no model_index.json: give the folder of a pipeline"):
        DCGenPipeline.from_pretrained(tmp_path)
    for content, message in (
        ("{bad", "model_index.json cannot be read as JSON"),
        ("[]", "model_index.json holds a list"),
        ("{}", "does not say in model_index.json which pipeline it is"),
    ):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            DCGenPipeline.from_pretrained(tmp_path)


def test_how_to_reach_the_hub_holds_for_the_index_too(monkeypatch):
    from diffusers import DiffusionPipeline

    seen = []

    def load_config(*args, **kwargs):
        seen.append((args, kwargs))
        return {"_class_name": "WanPipeline"}

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    options = {"token": "secret", "revision": "v1", "cache_dir": "cache", "local_files_only": True}
    with pytest.raises(ValueError, match="some/model is a WanPipeline"):
        DCGenPipeline.from_pretrained("some/model", **options, variant="fp16")
    assert seen == [(("some/model",), options)]


def test_the_autoencoder_of_a_stock_model_is_refused():
    from diffusers import AutoencoderKL

    stock = AutoencoderKL(latent_channels=8, block_out_channels=(32,))
    flux, sana = pipeline("flux"), pipeline("sana")
    with pytest.raises(ValueError, match="vae of DCGenFluxPipeline is AutoencoderKL: .*own FluxPipeline"):
        DCGenFluxPipeline(**{**flux.components, "vae": stock})
    for pipe in (flux, sana):
        pipe.vae = stock
        with pytest.raises(ValueError, match="is AutoencoderKL: DC-Gen is for models with an AutoencoderDC"):
            generate(pipe)
        transformer, pipe.transformer = pipe.transformer, None
        with pytest.raises(ValueError, match="has no transformer: load it with one"):
            generate(pipe)
        pipe.transformer = transformer
        pipe.vae = None
        with pytest.raises(ValueError, match="has no autoencoder: set pipe.vae"):
            generate(pipe)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_there_is_none_of_is_told_before_the_first_step(name):
    pipe = pipeline(name)
    pipe.transformer.forward = None
    for output_type in ("tensor", None):
        with pytest.raises(ValueError, match=f"output_type is {output_type!r}: give 'np', 'pt', 'pil' or 'latent'"):
            generate(pipe, output_type=output_type)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_processor_of_one_s_own_stays(name):
    pipe = pipeline(name)
    plain = generate(pipe)

    class Mirrored(type(pipe.image_processor)):
        def postprocess(self, image, output_type="pil", **options):
            return super().postprocess(image.flip(-1), output_type, **options)

    pipe.image_processor = own = Mirrored(vae_scale_factor=pipe.image_processor.config.vae_scale_factor)
    assert np.array_equal(generate(pipe), plain[:, :, ::-1]) and pipe.image_processor is own


@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_was_set_on_an_image_processor_stays(name, first):
    pipe = pipeline(name)
    plain = generate(pipeline(name))
    if not first:
        generate(pipe)
    processor = pipe.image_processor
    postprocess = processor.postprocess
    processor.postprocess = lambda image, *args, **options: postprocess(image.flip(-1), *args, **options)
    for _ in range(2):
        assert np.array_equal(generate(pipe), plain[:, :, ::-1]) and pipe.image_processor is processor
    pipe.vae = other = autoencoder_dc(5, 8)
    wanted = generate(pipeline(name, other))
    assert np.array_equal(generate(pipe), wanted[:, :, ::-1]) and pipe.image_processor is processor


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_nothing_are_told(name, caplog):
    """As pixels they are black."""
    pipe = pipeline(name)
    generate(pipe, output_type="pil")
    assert "NaN" not in caplog.text
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    generate(pipe, output_type="pil")
    assert caplog.text.count("The pictures have NaN or infinite values in torch.float32: nothing here is in") == 1
    caplog.clear()
    pipe.vae.half()
    generate(pipe, output_type="pil")
    assert "vae in float16 may have overflowed" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_the_size_follows_the_autoencoder_that_is_there(name):
    """Exchanged for one that reduces sides 16 and not 8 times, or set after the pipeline was made."""
    other = autoencoder_dc(5, 8)
    pipe = pipeline(name)
    pipe.vae = other
    np.testing.assert_array_equal(generate(pipe), generate(pipeline(name, other)))
    wanted = generate(pipeline(name))
    late = type(pipe)(**{**pipeline(name).components, "vae": None})
    late.set_progress_bar_config(disable=True)
    late.vae = autoencoder()
    np.testing.assert_array_equal(generate(late), wanted)
    assert late.image_processor.config.vae_scale_factor == 8


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_taken_as_they_are_given_out(name):
    """And others refused before the first step."""
    pipe = pipeline(name)
    noise = torch.randn(1, 8, 8, 12, generator=torch.Generator().manual_seed(3))
    made = generate(pipe, latents=noise)
    if name == "flux":
        np.testing.assert_array_equal(generate(pipe, latents=noise.flatten(2).transpose(1, 2)), made)
    eight = noise.to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(generate(pipe, latents=eight), generate(pipe, latents=eight.float()))
    pipe.transformer.forward = None
    for wrong, words in (
        (noise[:, :, 1:], r"latents is \[1, 8, 7, 12\], and this picture takes \[1, 8, 8, 12\]: \[pictures, channels"),
        (noise.double() / 0, "latents has NaN or infinite values"),
        ((noise / 0).to(torch.float8_e5m2), "latents has NaN or infinite values"),
        (noise.numpy(), "latents is a ndarray: give a tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(pipe, latents=wrong)
    if name == "flux":
        with pytest.raises(ValueError, match=r"this picture takes tokens \[1, 96, 8\]: \[pictures, rows \* columns"):
            generate(pipe, latents=torch.zeros(1, 95, 8))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux", "prompt_embeds"),
        ("flux", "pooled_prompt_embeds"),
        ("sana", "prompt_embeds"),
        ("sana", "negative_prompt_embeds"),
    ],
)
def test_embeddings_that_are_not_finite_are_refused_before_the_steps(name, argument):
    pipe = pipeline(name)
    pipe.transformer.forward = None
    embeds = torch.full((1, 10) if argument == "pooled_prompt_embeds" else (1, 6, 12), float("inf"))
    with pytest.raises(ValueError, match=f"^{argument} has NaN or infinite values, of which nothing is made"):
        generate(pipe, **{argument: embeds})
