"""Recipe `lora` on real pipelines of HunyuanVideo, CogVideoX and LTX-Video, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoPipeline
from lora_runs import recipe, write
from PIL import Image
from safetensors.torch import load_file
from trainable import MADE, saved

from vidaccel.lora import run
from vidaccel.lora.adapters.adapter import layers_named
from vidaccel.lora.adapters.lora_file import FILE, read_lora, save_lora
from vidaccel.lora.backbones.hunyuan_image_own import HunyuanVideoImageModel
from vidaccel.lora.backbones.hunyuan_own import PUBLISHED_WIDTH
from vidaccel.lora.backbones.pipeline_family import PipelineTextEncoder
from vidaccel.lora.backbones.video_own import OwnVideoEncoder
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.flow import shifted

SIZE = {"frames": 9, "height": 32, "width": 64}
# Longer than what the tiny tokenizer of HunyuanVideo I2V has less of the words around a prompt, which are cut off.
TEXTS = ["a dot moves a dot moves a dot", "a dot moves a a dot moves moves a dot a moves"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder) for kind in MADE}


def settings(folder: Path, base: Path, **sections) -> Path:
    size = {**SIZE, "height": 64} if base.name.startswith("ltx2") else SIZE  # its decoder mirrors edges
    data = {"sizes": [size], **sections.pop("data", {})}
    if base.name == "ltx condition first frame":  # the class of its pipeline does not say so
        sections["model"] = {"first_frame": True, **sections.get("model", {})}
    return write(folder, base, data=data, **sections)


def places(count: int) -> list[Place]:
    return [Place(0, number, count, number) for number in range(count)]


def clip(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE.values(), generator=torch.Generator().manual_seed(3)) * 2 - 1


def batch_of(made: Any, count: int = 2) -> dict[str, Any]:
    seen = {"text": texts_of(made, clip(count))} if made.flowing.pictured else {}
    return {**made.backbone.encoder().encode(clip(count)), "caption": TEXTS[:count], **seen}


def texts_of(made: Any, clips: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The prompts, where the text encoder sees pictures with the first frames of the clips."""
    return made.flowing.texts(TEXTS[: len(clips)], list(clips[:, :, 0]) if made.flowing.pictured else None)


def stock(base: Path, made: Any) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, made: Any, **more: Any) -> Any:
    image = shown(clip())
    size = {"num_frames": SIZE["frames"], "height": SIZE["height"], "width": SIZE["width"]}
    if "Condition" in type(pipe).__name__:  # the picture as it is; its noise has a test of its own
        more = {"image_cond_noise_scale": 0.0, **more}
    if "LTX2" in type(pipe).__name__ and made.backbone.image:  # the picture, and not what a codec makes of it
        more = {"image_crf": 0, **more}
    return pipe(
        prompt=TEXTS[0],
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **size,
        **({"image": image} if made.backbone.image else {}),
        **more,
    ).frames


def shown(clips: torch.Tensor) -> Image.Image:
    """The first frame of the first clip, as a pipeline takes it."""
    return Image.fromarray(((clips[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def as_grid(made: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Latents as a pipeline has them, `[B, C, T, h, w]`."""
    if tensor.ndim == 3:
        return tensor.transpose(1, 2).unflatten(2, (2, 1, 2))
    return tensor.transpose(1, 2) if "CogVideoX" in type(made.backbone).__name__ else tensor


def test_no_encoder_is_loaded_where_everything_is_kept(tmp_path, bases, monkeypatch):
    loaded = []
    for cls, name in ((PipelineTextEncoder, "_loaded"), (OwnVideoEncoder, "loaded_own")):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, n=name, o=original: loaded.append(n) or o(self))
    file, made = settings(tmp_path, bases["ltx2"], validation={"prompts": []}), []
    for _ in range(2):
        before = len(loaded)
        made.append(recipe(file))
        made[-1].ready(made[-1].flowing)
    assert set(loaded) == {"_loaded", "loaded_own"} and len(loaded) == before
    assert made[0].inputs() == made[1].inputs()
    tiled = recipe(file, ["model.autoencoder_tiling=true"])
    assert tiled.flowing.identities != made[0].flowing.identities and tiled.flowing._encoder.own.use_tiling
    plain, shown = (each.backbone.decoding("scheduler", "vae").vae for each in (made[0], tiled))
    assert shown.use_tiling and not plain.use_tiling  # of the videos that a validation makes


@pytest.mark.parametrize("kind", MADE)
def test_the_model_is_called_as_its_pipeline_calls_it(tmp_path, bases, kind):
    """With its prompts, timesteps, positions, guidance and pictures: of the same latents it makes the same, also where
    prompts of different length are in one batch."""
    made = recipe(settings(tmp_path, bases[kind]))
    pipe, seen = stock(bases[kind], made), []
    pipe.transformer.register_forward_hook(
        lambda module, given, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    call(pipe, made, num_inference_steps=3)
    kwargs, wanted = seen[1]
    backbone = made.backbone
    if "ltx2" in kind:  # its pipeline makes the sound with the video, which is trained without
        with torch.no_grad():
            wanted = pipe.transformer(**{**kwargs, "isolate_modalities": True})[0]
    given = as_grid(made, kwargs["hidden_states"])
    latents = given[:, : as_grid(made, wanted).shape[1]]
    told = torch.as_tensor(kwargs["timestep"]).float()
    sigma = (told.max() if told.ndim == 2 else told.flatten()[0]).view(1) / 1000
    texts = texts_of(made, clip().repeat(2, 1, 1, 1, 1))
    # 1.5 reads a picture that was scaled to 8 bits; so does the pipeline.
    pixels = ((clip() + 1) * 127.5).round() / 127.5 - 1
    batch = backbone.encoder().encode(pixels)
    conditions = {name: value.repeat(2, 1, 1, 1, 1) for name, value in batch.items()}
    with torch.no_grad():
        found = backbone.velocity(
            backbone.transformer(), latents.repeat(2, 1, 1, 1, 1), sigma.repeat(2), texts, conditions
        )
    torch.testing.assert_close(found[:1], as_grid(made, wanted), rtol=1e-4, atol=1e-4)
    assert (found[1] - found[0]).abs().max() > 1e-6
    if backbone.clean_first:
        torch.testing.assert_close(batch["latents"][:, :, 0], latents[:, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MADE)
def test_prompts_are_those_of_the_pipeline(tmp_path, bases, kind):
    made = recipe(settings(tmp_path, bases[kind]))
    pipe = stock(bases[kind], made)
    if made.flowing.pictured:
        return check_prompts_with_pictures(made, pipe)
    if "ltx2" in kind:
        return check_prompts_behind_connectors(made, pipe)
    more = {} if "hunyuan" in kind else {"do_classifier_free_guidance": False}
    with torch.no_grad():
        theirs = pipe.encode_prompt(TEXTS, **more)
    for number, text in enumerate(made.flowing.texts(TEXTS)):
        length = len(text["states"])
        assert torch.equal(text["states"], theirs[0][number, :length])
        mask = {"hunyuan": 2, "ltx": 1}.get(kind.split()[0])
        assert length == (theirs[0].shape[1] if mask is None else int(theirs[mask][number].sum()))
        if "pooled" in text:
            assert torch.equal(text["pooled"], theirs[1][number])


def check_prompts_with_pictures(made: Any, pipe: Any) -> None:
    """Those of the first frames; what stands for no caption is what the pipeline makes of a negative prompt."""
    clips, every = clip(2), 2 if pipe.transformer.config.image_condition_type == "latent_concat" else 4
    black = Image.new("RGB", (64, 32), 0)
    asked = [(TEXTS[0], shown(clips[:1])), (TEXTS[1], shown(clips[1:])), ("", black)]
    for (prompt, image), text in zip(asked, [*texts_of(made, clips), made.phases()[0].nothing()], strict=True):
        with torch.no_grad():
            states, pooled, mask = pipe.encode_prompt(image, [prompt], image_embed_interleave=every)
        length = int(mask.sum())
        assert torch.equal(text["states"], states[0, :length]) and torch.equal(text["pooled"], pooled[0])
        assert length - bool(prompt) >= 576 // every == made.backbone.picture_tokens
    same = made.flowing.texts([TEXTS[0]] * 2, list(clips[:, :, 0]))
    assert not torch.equal(same[0]["states"], same[1]["states"])


def check_prompts_behind_connectors(made: Any, pipe: Any) -> None:
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False)
        theirs = pipe.connectors(states, mask, padding_side=pipe.tokenizer.padding_side)
    for number, text in enumerate(made.flowing.texts(TEXTS)):
        for name, their in zip(("states", "audio", "mask"), theirs, strict=True):
            assert torch.equal(text[name], their[number])


@pytest.mark.parametrize("kind", MADE)
def test_a_perfect_prediction_has_no_loss_and_is_sampled_exactly(tmp_path, bases, kind, monkeypatch):
    """By the stock pipeline, in whose steps the target of the training leads back to the latents."""
    made = recipe(settings(tmp_path, bases[kind], flow={"caption_dropout": 0}))
    backbone, phase = made.backbone, made.phases()[0]
    batch = made.flowing.complete(batch_of(made))
    noise, sigma = torch.randn_like(batch["latents"]), phase.told_levels(Generators(places(2)), batch["latents"])
    target = backbone.target(batch["latents"], noise, sigma)
    monkeypatch.setattr(backbone, "velocity", lambda *_: target)
    assert phase.flow_loss(None, batch, noise, sigma, batch["texts"])[0] == 0
    monkeypatch.setattr(backbone, "velocity", lambda *_: target + 1)
    assert phase.flow_loss(None, batch, noise, sigma, batch["texts"])[0] == pytest.approx(1, rel=1e-4)

    pipe, latents = stock(bases[kind], made), batch["latents"][:1]

    def forward(hidden_states, timestep, **sound):
        given = as_grid(made, hidden_states)[:, : latents.shape[1]]
        level = torch.as_tensor(timestep).float().max().view(1) / 1000
        zero = torch.zeros_like(latents)
        clean, share = backbone.noised(latents, zero, level), backbone.noised(zero, zero + 1, level)
        noise = ((given - clean) / share).nan_to_num(0.0, 0.0, 0.0)  # a clean first frame has none
        found = backbone.target(latents, noise, level)
        if hidden_states.ndim == 3:
            return (found.flatten(2).transpose(1, 2), *([sound["audio_hidden_states"]] if "ltx2" in kind else []))
        return (found.transpose(1, 2) if "cog" in kind else found,)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    found = as_grid(made, call(pipe, made, num_inference_steps=4))
    first = 1 if backbone.clean_first else 0
    if getattr(backbone, "frames_cut", 0):
        latents = latents[:, :, 1:]
    torch.testing.assert_close(found[:, :, first:], latents[:, :, first:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in ("cogvideox 2b", "cogvideox first frame")])
def test_stock_diffusers_loads_what_was_trained(tmp_path, bases, kind):
    """With a sample on the way."""
    file = settings(tmp_path, bases[kind], loop={"gradient_checkpointing": True})
    result = run("lora", file)
    made = recipe(file)
    trained = made.transformer()
    parameters = dict(trained.named_parameters())
    weights = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert any(value.any() for name, value in weights.items() if ".lora_B." in name)
    for name, value in weights.items():
        parameters[name].data.copy_(value)
    pipe = stock(bases[kind], made)
    pipe.load_lora_weights(Path(result["lora"]).parent)
    batch = batch_of(made)
    texts = made.flowing.complete(batch)["texts"]
    given = batch["latents"], torch.tensor([0.5, 0.8]), texts, batch
    with torch.no_grad():
        wanted = made.backbone.velocity(trained, *given)
        loaded = made.backbone.velocity(pipe.transformer, *given)
        plain = made.backbone.velocity(made.backbone.transformer(), *given)
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    assert (loaded - plain).abs().max() > 1e-4
    assert (tmp_path / "run" / "validation" / "00000002_0.mp4").is_file()


@pytest.mark.parametrize(
    "kind", ["hunyuan", "hunyuan replaced first frame", "cogvideox 5b", "ltx", "ltx condition", "ltx2"]
)
def test_training_lowers_the_loss_with_sparse_attention(tmp_path, bases, kind):
    """Of the same clips, noise and levels; blocks run again for their gradients."""
    size = {"frames": 17, "height": 128, "width": 128}
    attention = {"method": "tangent", "density": 0.85, "dense_layers": 0}
    loop = {"gradient_checkpointing": True}
    made = recipe(write(tmp_path, bases[kind], attention=attention, data={"sizes": [size]}, loop=loop))
    phase = made.phases()[0]
    model = phase.setup({})
    frames, channels = (17 - 1) // made.backbone.frame_step + 1, made.backbone.vae["latent_channels"]
    side = 128 // (32 if "ltx" in kind else 8)
    latents = torch.randn(2, channels, frames, side, side, generator=torch.Generator().manual_seed(2))
    seen = {"text": texts_of(made, clip(2))} if made.flowing.pictured else {}
    batch = {"latents": latents, "caption": TEXTS, **seen}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        phase.forget()
        loss, _ = phase.loss(model, batch, Generators(places(2)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    records = phase._handle.report().records
    assert any(record.density < 0.95 for record in records)
    phase.close()


@pytest.mark.parametrize(
    "kind",
    [
        "hunyuan",
        "hunyuan first frame",
        "ltx2 first frame",
        "cogvideox first frame",
        "ltx first frame",
        "ltx condition first frame",
    ],
)
def test_half_precision(tmp_path, bases, kind):
    loop = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    run("lora", settings(tmp_path, bases[kind], loop=loop, model=half))
    assert (tmp_path / "run" / "validation" / "00000002_0.mp4").is_file()


def test_captions_are_encoded_once_with_the_picture_of_their_clip(tmp_path, bases, monkeypatch):
    """Of HunyuanVideo I2V: each clip's in the cache, as is the text of each video of a validation; without a cache the
    training is the same."""

    def trained(name: str, *more: str) -> dict[str, torch.Tensor]:
        file = settings(tmp_path, bases["hunyuan first frame"], flow={"caption_dropout": 0.3})
        run("lora", file, [f"out={tmp_path / name}", *more])
        assert (tmp_path / name / "validation" / "00000002_0.mp4").is_file()
        return load_file(tmp_path / name / "phases" / "train.safetensors")

    seen, real = [], HunyuanVideoImageModel.encode_seeing

    def watched(self, pipe, prompts, pictures):
        seen.extend((prompt, pictures is not None) for prompt in prompts)
        return real(self, pipe, prompts, pictures)

    monkeypatch.setattr(HunyuanVideoImageModel, "encode_seeing", watched)
    first = trained("first")
    # No caption, which is the negative prompt as well; the four clips, the two that are measured, and the video's.
    assert seen.count(("", False)) == 1 and sum(pictured for _, pictured in seen) == 7 == len(seen) - 1
    seen.clear()
    again = trained("again", "data.workers=1")
    assert not seen
    without = trained("without", "data.cache=null")
    assert first.keys() == again.keys() == without.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        torch.testing.assert_close(value, without[name])


def test_a_lora_of_the_published_width_is_translated(tmp_path, bases):
    """HunyuanVideo's own names, in which q, k and v are one layer: diffusers takes apart what was put together, and it
    can be gone on from. The width is that of published models, since diffusers knows single blocks by it."""
    model = recipe(settings(tmp_path, bases["hunyuan"])).backbone
    model.width, model.config = PUBLISHED_WIDTH, {**model.config, "mlp_ratio": 0.01}
    inner = int(PUBLISHED_WIDTH * 0.01)
    layers = [
        layer for layer in layers_named(model.skeleton(), model.lora_targets, "") if layer.startswith(model.lora_within)
    ]
    assert len(layers) == 12 + 5 and model.check_layers(layers) is None

    def outputs(layer: str) -> int:
        return inner if layer.endswith(("proj_mlp", "net.0.proj")) else PUBLISHED_WIDTH

    weights = {}
    for layer in layers:
        weights[f"{layer}.lora_A.default.weight"] = torch.randn(2, 7)
        weights[f"{layer}.lora_B.default.weight"] = torch.randn(outputs(layer), 2)
    path = save_lora(weights, tmp_path / FILE, model.file_name, 3.0, {}, rows_of=model.file_rows)
    theirs = HunyuanVideoPipeline.lora_state_dict(path)
    assert {name.rpartition(".lora_")[0] for name in theirs} == {f"transformer.{layer}" for layer in layers}
    for layer in layers:
        down, up = (theirs[f"transformer.{layer}.lora_{letter}.weight"] for letter in "AB")
        wanted = weights[f"{layer}.lora_B.default.weight"] @ weights[f"{layer}.lora_A.default.weight"] * 3
        torch.testing.assert_close(up @ down, wanted)
    again = read_lora(path, layers, model.file_name, 3.0, "lora.start", rows_of=model.file_rows)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value)
    assert "attn.to_q, to_k or to_v of the dual blocks" in model.check_layers(["transformer_blocks.0.ff.net.2"])
    assert "has no name" in model.check_layers(["context_embedder.proj_in"])


def test_a_picture_has_the_noise_that_its_pipeline_shows_it_with(tmp_path, bases):
    """Of LTX-Video 0.9.5 and later: of a spread of 0.15 times the squared level."""
    made = recipe(settings(tmp_path, bases["ltx condition first frame"]))
    pipe, seen = stock(bases["ltx condition first frame"], made), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, given, kwargs: seen.append((as_grid(made, kwargs["hidden_states"]), kwargs["timestep"].max())),
        with_kwargs=True,
    )
    call(pipe, made, num_inference_steps=4, image_cond_noise_scale=0.15)
    clean = made.backbone.encoder().encode(((clip() + 1) * 127.5).round() / 127.5 - 1)["latents"]
    noise = torch.randn(200, *clean.shape[1:], generator=torch.Generator().manual_seed(5))
    for shown, told in seen:
        level = told.view(1) / 1000
        ours = made.backbone.noised(clean.repeat(200, 1, 1, 1, 1), noise, level.repeat(200))[:, :, 0] - clean[:, :, 0]
        theirs = shown[:, :, 0] - clean[:, :, 0]
        assert ours.std() == pytest.approx(0.15 * float(level) ** 2, rel=0.05)
        assert theirs.std() == pytest.approx(float(ours.std()), rel=0.6) and theirs.abs().max() > 0


# -- noise levels ------------------------------------------------------------------------------------------------------


def test_noise_levels_are_the_models_own(tmp_path, bases):
    """LTX by its tokens, as its scheduler shifts them; HunyuanVideo by its scheduler; CogVideoX at whole timesteps."""
    pipe = DiffusionPipeline.from_pretrained(bases["ltx"])
    model = recipe(settings(tmp_path, bases["ltx"])).backbone
    for size in ((2, 1, 2), (21, 16, 22)):
        tokens = size[0] * size[1] * size[2]
        config = pipe.scheduler.config
        mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - config.base_image_seq_len) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        even = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
        theirs = torch.as_tensor(pipe.scheduler.time_shift(mu, 1.0, even))
        torch.testing.assert_close(shifted(even, model.shift(torch.empty(1, 8, *size))), theirs)
    assert recipe(settings(tmp_path, bases["hunyuan"])).backbone.shift(torch.empty(0)) == 7.0
    made = recipe(settings(tmp_path, bases["cogvideox 2b"]))
    levels = made.phases()[0].told_levels(Generators(places(1000)), torch.empty(1000, 4, 3, 4, 8))
    steps = made.backbone.timestep(levels)
    assert steps.min() == 0 and steps.max() == 999 and abs(steps.float().mean() - 499.5) < 5
    torch.testing.assert_close(levels, steps / 1000)


def test_a_model_that_is_told_the_frame_rate_has_that_of_the_clips(tmp_path, bases):
    """Any rate is right for it, so none is warned of."""
    clips = {"data": {"fps": 12}}
    rates = [recipe(settings(tmp_path, bases[kind], **clips)).backbone.rate for kind in ("ltx", "hunyuan")]
    assert rates == [12, 24] and recipe(settings(tmp_path, bases["ltx"])).backbone.rate == 25


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("hunyuan", "data.sizes.0.frames=8", "HunyuanVideoPipeline takes 4k [+] 1; give 5 or 9"),
        ("cogvideox 2b", "data.sizes.0.frames=13", "CogVideoXPipeline takes 8k [+] 1; give 9 or 17"),
        ("ltx", "data.sizes.0.width=48", "32x48 must be a multiple of 32"),
        ("ltx", "model.stage=low_noise", "model.stage is low_noise, but .* has one transformer"),
        ("ltx", "model.guidance=3", "model.guidance is 3, but .* is not told any"),
        ("cogvideox 2b", "model.first_frame=true", "takes no first frames"),
        ("cogvideox first frame", "model.first_frame=false", "starts from first frames"),
        ("cogvideox 2b", "flow.logit_mean=1", "the noise levels of .* are uniform"),
        ("hunyuan first frame", "model.first_frame=false", "starts from first frames"),
        ("hunyuan", "validation.negative_prompt=blurry", "negative_prompt is 'blurry', but .* runs without one"),
        ("hunyuan", "model.merge_text_padding=true", "merge_text_padding is for Wan"),
        ("ltx", "lora.targets=[to_q, proj_in]", "proj_in has no name that both"),
        (
            "ltx2",
            "lora.targets=[to_q]",
            "audio_attn1.to_q is of the sound, which is not trained: name layers with attn1",
        ),
        ("ltx2", "lora.targets=[attn1.to_q, time_embed.linear]", "time_embed.linear is in no block"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, bases, kind, override, words):
    with pytest.raises(ConfigError, match=words):
        run("lora", settings(tmp_path, bases[kind]), [override])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "file", "values", "words"),
    [
        ("cogvideox 2b", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "CogVideoX predicts v"),
        ("cogvideox 2b", "transformer/config.json", {"in_channels": 12}, "takes 12 channels"),
        ("hunyuan", "transformer/config.json", {"image_condition_type": "token_replace"}, "and no picture"),
        ("hunyuan first frame", "transformer/config.json", {"in_channels": 8}, "takes 8 channels, .* and takes 9 w"),
        ("hunyuan replaced first frame", "transformer/config.json", {"out_channels": 9}, "takes 4 channels, makes 9"),
        ("ltx", "transformer/config.json", {"patch_size": 2}, "in patches of 1"),
        ("cogvideox 5b", "transformer/config.json", {"use_learned_positional_embeddings": True}, "has learned the pos"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, bases, kind, file, values, words):
    import shutil

    base = shutil.copytree(bases[kind], tmp_path / "base")
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **values}))
    with pytest.raises(ConfigError, match=words):
        recipe(settings(tmp_path, base))


@pytest.mark.parametrize("kind", ["cogvideox 5b", "ltx"])
def test_weights_that_cannot_be_written_are_not_trained(tmp_path, bases, kind):
    content = {
        "recipe": "sla",
        "out": str(tmp_path / "run"),
        "model": {"base": str(bases[kind])},
        "sla": {"topk": 0.5, "block_q": 8, "block_k": 8},
        "data": {"kind": "demo", "clips": 4, "sizes": [{"frames": 9, "height": 64, "width": 64}]},
        "train": {"steps": 1},
    }
    (tmp_path / "sla.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="sla.train is full, .* cannot be written: set it to lora"):
        run("sla", tmp_path / "sla.yaml")
    assert not (tmp_path / "run").exists()
