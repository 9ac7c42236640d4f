"""`ae_adapt` on FLUX and SANA pipelines at tiny sizes, with diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaPipeline,
)
from safetensors.torch import load_file
from tiny_images import autoencoder_dc, flux_transformer, sana_transformer
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

import vidaccel.demo
from vidaccel.lora import run
from vidaccel.lora.adapters.adapter import AdaptedModel, save_adapter
from vidaccel.lora.backbones import open_backbone
from vidaccel.lora.config import ConfigError
from vidaccel.lora.export import export_adapter
from vidaccel.pipelines import DCGenPipeline, DCVideoGenPipeline
from vidaccel.pipelines.deep_compression.adapted_images import FLUX, retarget_flux
from vidaccel.pipelines.deep_compression.adapter_folder import AdapterError
from vidaccel.pipelines.files.weight_files import transformer_files

NAMES = ("flux", "sana")
SIZE = {"frames": 1, "height": 32, "width": 64}


def tokenizer():
    made = AutoTokenizer.from_pretrained(vidaccel.demo.path() / "tokenizer")
    made.model_max_length = 32
    return made


def flux() -> FluxPipeline:
    transformer = flux_transformer(in_channels=16, pooled_projection_dim=8, guidance_embeds=True)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=32, eos_token_id=1, max_position_embeddings=32, **clip)),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=32, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        tokenizer_2=tokenizer(),
    )


def sana() -> SanaPipeline:
    transformer = sana_transformer(sample_size=8, timestep_scale=0.5)
    gemma = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=32, num_key_value_heads=1, head_dim=6, **gemma)),
        vae=autoencoder_dc(4, 8),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The folder of each base, of factor 8, and that of an autoencoder of factor 16 with 4 channels."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("images")
    for name, make in (("flux", flux), ("sana", sana)):
        make().save_pretrained(folder / name)
    autoencoder_dc(5, 4).save_pretrained(folder / "new")
    return {name: folder / name for name in (*NAMES, "new")}


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run(bases, tmp_path, name):
    content = {
        "recipe": "ae_adapt",
        "out": str(tmp_path / "run"),
        "model": {"base": str(bases[name]), "autoencoder": str(bases["new"])},
        "data": {
            "kind": "demo",
            "clips": 4,
            "sizes": [SIZE],
            "cache": str(tmp_path / "c"),
        },
        "phases": {
            "align": {"steps": 2, "batch_size": 2},
            "head": {"steps": 1, "batch_size": 2},
            "lora": {"steps": 1, "rank": 2, "alpha": 2, "batch_size": 2},
        },
        "validation": {"clips": 1, "prompts": ["a red circle"], "steps": 1, "guidance_scale": 2},
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1, "gradient_checkpointing": True},
    }
    (tmp_path / "a.yaml").write_text(json.dumps(content))
    result = run("ae_adapt", tmp_path / "a.yaml")
    pipe = DCGenPipeline.from_pretrained(result["pipeline"])
    assert pipe.transformer.config.in_channels == 4 and pipe.vae.config.latent_channels == 4
    assert type(pipe).__name__ == {"flux": "DCGenFluxPipeline", "sana": "DCGenSanaPipeline"}[name]
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", height=32, width=64, num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (32, 64, 3)
    trained = load_file(tmp_path / "run" / "phases" / "lora.safetensors")
    assert any(".lora_A." in key for key in trained)
    assert not any("context" in key or "add_" in key or "attn2" in key or "caption" in key for key in trained)
    assert (tmp_path / "run" / "validation" / "00000004.png").is_file()
    wanted = pipe.transformer.state_dict()
    # The adapter alone, on its base: the result's, that of the last checkpoint, and what is passed on.
    exported = export_adapter(tmp_path / "run", tmp_path / "small")
    last = tmp_path / "run" / "checkpoints" / "step_00000004" / "adapter"
    for folder in (tmp_path / "run" / "adapter", last, exported):
        adapted = DCGenPipeline.from_pretrained(folder)
        assert type(adapted) is type(pipe) and adapted.vae.config.latent_channels == 4
        assert adapted.transformer.config.in_channels == adapted.transformer.config.out_channels == 4
        made, off = adapted.transformer.state_dict(), 2e-3 if folder == exported else 1e-5
        assert made.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(made[key], value, rtol=off, atol=off, msg=key)
    half = DCGenPipeline.from_pretrained(last, dtype="bfloat16", base=bases[name], autoencoder=bases["new"])
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="is an adapter for text to image: load it with DCGenPipeline"):
        DCVideoGenPipeline.from_pretrained(last)
    with pytest.raises(ValueError, match="loaded as a diffusers pipeline, which has no use for base= and autoencoder="):
        DCGenPipeline.from_pretrained(result["pipeline"], base=bases[name], autoencoder=bases["new"])


def test_an_adapter_of_another_family_or_base_is_refused(bases, tmp_path):
    torch.manual_seed(4)
    model = flux()
    model.save_pretrained(tmp_path / "other")
    transformer = retarget_flux(model.transformer, 4, 4)
    facts = {"base": str(bases["flux"]), "base_hash": transformer_files(str(bases["flux"])), "autoencoder": "none"}
    save_adapter(dict(transformer.named_parameters()), tmp_path / "a", FLUX.ends, facts, AdaptedModel.of(transformer))
    new = bases["new"]
    assert DCGenPipeline.from_pretrained(tmp_path / "a", autoencoder=new).transformer.config.in_channels == 4
    with pytest.raises(AdapterError, match="was trained on .*, and the transformer of .*other has other weights"):
        DCGenPipeline.from_pretrained(tmp_path / "a", base=tmp_path / "other", autoencoder=new)
    with pytest.raises(ValueError, match="is a WanPipeline; DC-Gen here is for FLUX and SANA"):
        DCGenPipeline.from_pretrained(tmp_path / "a", base="demo", autoencoder=new)
    with pytest.raises(AdapterError, match="made for the autoencoder in none, which is not there"):
        DCGenPipeline.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_is_what_the_pipeline_asks_the_model(bases, name, monkeypatch):
    """The same latents, prompt and time give the model the same inputs in training and in sampling."""
    backbone = open_backbone(str(bases[name]), str(bases["new"]), guidance=2.0 if name == "flux" else None)
    model = backbone.student()
    calls = []
    original = type(model).forward

    def forward(self, *args, **kwargs):
        calls.append({"hidden_states": args[0] if args else None, **kwargs})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    text, nothing = backbone.text_encoder().encode(["a red circle", ""])
    pipe = backbone.assemble(backbone.load("scheduler"), backbone.autoencoder, model)
    pipe.set_progress_bar_config(disable=True)
    guidance = {"flux": 2.0, "sana": 1.0}[name]  # SANA: no second branch
    inputs = backbone.prompt_inputs(text, nothing)
    pipe(height=32, width=64, num_inference_steps=2, guidance_scale=guidance, output_type="latent", **inputs)
    sampled = calls[-1]
    tokens = sampled["hidden_states"]
    latents = tokens.transpose(1, 2).unflatten(2, (2, 4)) if name == "flux" else tokens
    time = sampled["timestep"].float() if name == "flux" else sampled["timestep"].float() / 1000 / 0.5
    backbone.velocity(model, latents[:, :, None], time, [text], {})
    trained = calls[-1]
    for key, value in sampled.items():
        if not isinstance(value, torch.Tensor) or key == "encoder_attention_mask":
            continue
        given = trained[key]
        if key == "encoder_hidden_states" and name == "sana":
            value = value[:, : given.shape[1]]
        torch.testing.assert_close(given.float(), value.float(), rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_prompts_are_counted_as_the_pipeline_cuts_them(bases, name):
    """One word more than fits changes nothing any more, and is counted."""
    backbone = open_backbone(str(bases[name]), str(bases["new"]))
    backbone.text_length = 9
    encoder = backbone.text_encoder()
    words = ["a", "red", "circle", "moves", "left", "on", "a", "grey", "background", "below"]
    texts = [" ".join(words[:count]) for count in range(5, 11)]
    counts = encoder.count(texts)
    assert counts == list(range(counts[0], counts[0] + 6)) and counts[0] <= encoder.length - 1 and counts[-1] > 9
    states = [text["states"] for text in encoder.encode(texts)]
    for before, after, count in zip(states, states[1:], counts[1:], strict=False):
        changed = before.shape != after.shape or not torch.equal(before, after)
        assert changed == (count <= encoder.length), count


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gives_the_tokens_of_the_base(bases, name, monkeypatch):
    backbone = open_backbone(str(bases[name]), str(bases["new"]))
    encoder = backbone.encoder(("latents", "teacher"))
    pixels = torch.rand(1, 3, 1, 32, 64) * 2 - 1
    batch = encoder.encode(pixels)
    assert batch["latents"].shape == (1, 4, 1, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(backbone.transformer_class, "from_pretrained", lambda *a, **k: pytest.fail("all of it was read"))
        tokens = backbone.teacher()(batch)
    if name == "flux":
        pipe = FluxPipeline.from_pretrained(bases[name])
        latents = pipe.vae.encode(pixels[:, :, 0]).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        packed = pipe._pack_latents(latents, 1, 4, 4, 8)
        wanted = pipe.transformer.x_embedder(packed).transpose(1, 2).unflatten(2, (2, 4))
    else:
        pipe = SanaPipeline.from_pretrained(bases[name])
        latents = pipe.vae.encode(pixels[:, :, 0]).latent * 0.5
        wanted = pipe.transformer.patch_embed(latents).transpose(1, 2).unflatten(2, (4, 8))
    torch.testing.assert_close(tokens[:, :, 0], wanted)
    assert backbone.aligner()(batch).shape == (1, wanted.shape[1], 1, 2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_autoencoder_is_saved_as_it_was(bases, tmp_path, name):
    AutoencoderDC.from_pretrained(bases["new"], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    backbone = open_backbone(str(bases[name]), str(tmp_path / "half"))
    backbone.save(backbone.student(), tmp_path / "saved")
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "saved" / "vae" / weights).read_bytes() == (tmp_path / "half" / weights).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_knows_how_pictures_were_encoded(bases, name):
    ways: list[dict] = [{}, {"autoencoder_dtype": torch.bfloat16}, {"autoencoder_tiling": True}]
    parts = ("latents", "teacher")
    plain, half, tiled = (
        open_backbone(str(bases[name]), str(bases["new"]), **way).encoder(parts).identities for way in ways
    )
    assert half["latents"] != plain["latents"] and half["teacher"] == plain["teacher"]
    assert len({one["latents"] for one in (plain, half, tiled)}) == 3 and tiled["teacher"] != plain["teacher"]


def test_flux_is_told_the_time_of_its_noise_in_half_precision(bases):
    """It casts the time to the type of its tokens, so the noise is that of the time that is left."""
    backbone = open_backbone(str(bases["flux"]), str(bases["new"]))
    model, seen = backbone.student(), []
    model.time_text_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    sigma = backbone.told(torch.tensor([0.9013, 0.3331]), torch.bfloat16)
    text = backbone.text_encoder().encode(["a"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        backbone.velocity(model, torch.randn(2, 4, 1, 2, 2), sigma, [text, text], {})
    assert torch.equal(seen[0], sigma.bfloat16() * 1000) and torch.equal(sigma.bfloat16().float(), sigma)
    assert torch.equal(backbone.told(torch.tensor([0.9013]), torch.float32), torch.tensor([0.9013]))


def test_bases_that_do_not_fit(bases, tmp_path, text_base, autoencoder_folder):
    new = str(bases["new"])
    with pytest.raises(ConfigError, match="is a AutoencoderDCV; give an AutoencoderDC"):
        open_backbone(str(bases["flux"]), str(autoencoder_folder))
    with pytest.raises(ConfigError, match="for Wan text-to-video models"):
        open_backbone(str(bases["flux"]), new, merge_text_padding=True)
    backbone = open_backbone(str(bases["flux"]), new)
    assert "set frames: 1" in backbone.check_size(8, 32, 32) and "multiple of 16" in backbone.check_size(1, 40, 32)
    with pytest.raises(ConfigError, match="no diffusers pipeline: it has no model_index.json. Give"):
        open_backbone(str(tmp_path), new)
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    with pytest.raises(ConfigError, match="is a CogVideoXPipeline; ae_adapt takes WanPipeline"):
        open_backbone(str(tmp_path), new)
    import shutil

    shutil.copytree(bases["flux"], tmp_path / "fill")
    file = tmp_path / "fill" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 96}))
    with pytest.raises(ConfigError, match="takes 96 channels a token; .* with 16, 2x2 latents"):
        open_backbone(str(tmp_path / "fill"), new)


# -- as they are: the recipe `lora` ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_on_an_image_model(bases, tmp_path, name):
    """Stock diffusers loads it, and makes with it what was trained."""
    from lora_runs import recipe, write

    file = write(
        tmp_path,
        bases[name],
        data={"sizes": [SIZE]},
        train={"learning_rate": 0.1},
        flow={"guidance_preserving": 2},
    )
    result = run("lora", file)
    assert (tmp_path / "run" / "validation" / "00000002.png").is_file()
    made = recipe(file)
    trained, phases = made.transformer(), load_file(tmp_path / "run" / "phases" / "train.safetensors")
    parameters = dict(trained.named_parameters())
    for key, value in phases.items():
        parameters[key].data.copy_(value)
    pipe = (FluxPipeline if name == "flux" else SanaPipeline).from_pretrained(bases[name])
    pipe.load_lora_weights(Path(result["lora"]).parent)
    texts = made.flowing.texts(["a red circle"])
    latents, sigma = torch.randn(1, {"flux": 4, "sana": 8}[name], 1, 4, 8), torch.tensor([0.5])
    with torch.no_grad():
        wanted, loaded, plain = (
            made.backbone.velocity(model, latents, sigma, texts, {})
            for model in (trained, pipe.transformer, made.backbone.transformer())
        )
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.shape == latents.shape and (wanted - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_on_an_image_model_in_half_precision(bases, tmp_path, name):
    from lora_runs import write

    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    run("lora", write(tmp_path, bases[name], data={"sizes": [SIZE]}, model=half, loop={"mixed_precision": "bf16"}))
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert (tmp_path / "run" / "validation" / "00000002.png").is_file()


def test_flux_packs_latents_as_its_pipeline_does(bases):
    from vidaccel.lora.backbones import open_model

    model, latents = open_model(str(bases["flux"]), "lora"), torch.randn(1, 4, 4, 8)
    packed = FluxPipeline._pack_latents(latents, 1, 4, 4, 8)
    assert torch.equal(model.packed(latents).flatten(2).transpose(1, 2), packed)
    assert torch.equal(model.unpacked(model.packed(latents)), latents)


def test_what_a_lora_on_an_image_model_cannot_have(bases, tmp_path):
    from lora_runs import recipe, write

    made = recipe(write(tmp_path, bases["sana"], data={"sizes": [SIZE]}), ["validation.negative_prompt=blurry"])
    assert made.backbone.takes_negative_prompts  # SANA guides with it
    for override, words in (
        ("attention.method=radial", "a FluxTransformer2DModel trains with dense attention alone"),
        ("data.sizes.0.frames=5", "clips of 5 frames do not fit an image model"),
        ("data.sizes.0.height=24", "24x64 must be a multiple of 16"),
        ("validation.negative_prompt=blurry", "negative_prompt is 'blurry', but .* runs without one"),
        ("model.stage=low_noise", "model.stage is of no use: FluxModel has one transformer"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("lora", write(tmp_path, bases["flux"], data={"sizes": [SIZE]}), [override])
