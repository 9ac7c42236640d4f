"""Recipe `length`: what is trained and what its file says, on real Wan pipelines at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from lora_runs import recipe, write
from PIL import Image
from safetensors.torch import load_file
from tiny_images import flux_transformer
from trainable import saved

import vidaccel
from vidaccel.attention import Radial
from vidaccel.lora import run
from vidaccel.lora.config import ConfigError, build
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.recipes.length import TrainLength
from vidaccel.lora.recipes.length_settings import LengthLoraSettings
from vidaccel.lora.trainer import Stopped
from vidaccel.pipelines.length import LengthError, Riflex, read_length
from vidaccel.pipelines.length.rotary import RiflexRotary

SIZE = {"frames": 17, "height": 64, "width": 96}


def settings(folder: Path, base: Path, **sections) -> Path:
    length = {"base_frames": 5, **sections.pop("length", {})}
    data = {"sizes": [SIZE], **sections.pop("data", {})}
    attention = {
        "block_size": 8,
        "density": 0.6,
        "dense_layers": 1,
        "backend": "gather",
        **sections.pop("attention", {}),
    }
    more = {"length": length, "data": data, "attention": attention, **sections}
    return write(folder, base, recipe="length", **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_base) -> tuple[Path, dict]:
    """With an EMA and a sample on the way."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("length", settings(folder, text_base, train={"ema_decay": 0.5}))


def test_the_file_has_the_mask_of_the_training_and_lengthen_puts_it_in(finished, text_base):
    adapter = read_length(finished[1]["lora"])
    method = adapter.trained.method
    assert isinstance(method, Radial) and method.block_size == 8
    assert (method.schedule.first_layers, method.schedule.first_steps) == (1, 0)
    assert (adapter.trained.base_frames, adapter.trained.frames, adapter.trained.riflex) == (2, 5, None)
    layers = {name.partition("blocks.0.")[2].partition(".lora_")[0] for name in adapter.weights() if "blocks.0" in name}
    assert layers == {f"self_attn.{matrix}" for matrix in "qkvo"}
    pipe = WanPipeline.from_pretrained(text_base)
    with vidaccel.lengthen(pipe, finished[1]["lora"], backend="gather") as handle:
        assert handle.sparse.method == method
    assert (finished[0] / "run" / "validation" / "00000002_0.mp4").is_file()


def test_the_model_of_the_training_is_that_of_lengthen(tmp_path, finished, text_base):
    """One forward pass under the mask, with the weights of the result."""
    made = recipe(settings(tmp_path, text_base))
    phase = made.phases()[0]
    trained = load_file(finished[0] / "run" / "phases" / "train.safetensors")
    inputs = {
        "hidden_states": torch.randn(1, made.backbone.config["in_channels"], 5, 8, 12),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    }
    with torch.no_grad():
        wanted = phase.setup(trained)(**inputs).sample
        phase.close()
        pipe = WanPipeline.from_pretrained(text_base)
        with vidaccel.lengthen(pipe, finished[1]["lora"], backend="gather"):
            torch.testing.assert_close(pipe.transformer(**inputs).sample, wanted, rtol=1e-4, atol=1e-5)
        pipe.load_lora_weights(Path(finished[1]["lora"]).parent)
        assert (pipe.transformer(**inputs).sample - wanted).abs().max() > 1e-4  # dense is another


def test_gradients_pass_through_the_mask(tmp_path, text_base):
    made = recipe(settings(tmp_path, text_base))
    phase = made.phases()[0]
    model = phase.setup({})
    batch = {"latents": torch.randn(2, made.backbone.config["in_channels"], 5, 8, 12), "caption": ["a red circle"] * 2}
    loss, _ = phase.loss(model, batch, Generators([Place(0, n, 2, n) for n in range(2)]))
    loss.backward()
    records = phase._handle.report().records
    assert {record.reason for record in records} == {"", "first layers"}
    assert all(record.backend == "gather" and record.density < 0.8 for record in records if not record.reason)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".attn1." in name and p.grad is not None for name, p in trained.items())
    assert all(p.grad.any() for name, p in trained.items() if ".lora_B." in name)
    phase.close()


def test_an_interrupted_run_ends_bit_equal(finished, tmp_path, text_base, stop_after):
    file = settings(tmp_path, text_base, train={"ema_decay": 0.5})
    stop_after(1)
    with pytest.raises(Stopped):
        run("length", file)
    run("length", file, resume="latest")
    straight, resumed = (load_file(f / "run" / "phases" / "train.safetensors") for f in (finished[0], tmp_path))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_riflex_in_training(tmp_path, text_base):
    file = settings(tmp_path, text_base, length={"rope": "riflex", "component": 1}, validation={"prompts": []})
    made = recipe(file)
    phase = made.phases()[0]
    model = phase.setup({})
    assert isinstance(model.rope, RiflexRotary)
    phase.close()
    assert not isinstance(model.rope, RiflexRotary)
    assert read_length(run("length", file)["lora"]).trained.riflex == Riflex(2, 1)


def test_dense_is_the_other_arm(tmp_path, text_base):
    dense = {"method": "dense", "block_size": None, "density": None, "dense_layers": None, "backend": "auto"}
    made = recipe(settings(tmp_path, text_base, attention=dense))
    assert made.trained().method is None and made.trained().density == 1


def test_what_is_left_out():
    content = {"recipe": "length", "out": "a", "model": {"base": "demo"}, "train": {"steps": 1}}
    made = build(LengthLoraSettings, {**content, "lora": {"alpha": 3}})
    assert (made.lora.rank, made.lora.alpha, made.attention.method) == (128, 3, "radial")
    assert made.length.rope == "plain" and made.lora.targets is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"length": {"base_frames": 17}}, "the longest clips have 17 frames, no more than the 17 of the base"),
        ({"length": {"base_frames": 1}}, "clips of 17 frames are more than 4 times the 1 of the base"),
        ({"length": {"base_frames": None}}, "no more than the 81 of the base"),
        ({"length": {"rope": "riflex", "component": 99}}, "length: Riflex component is 99: this model has"),
        ({"length": {"component": 1}}, "component is of use only with RIFLEx"),
        ({"attention": {"density": 0.01}}, "attention.method"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text_base, sections, words):
    with pytest.raises(ConfigError, match=words):
        recipe(settings(tmp_path, text_base, **sections))


def test_other_families_are_refused(tmp_path):
    made = object.__new__(TrainLength)
    with pytest.raises(ConfigError, match="is for Wan and HunyuanVideo, and this is a FluxTransformer2DModel"):
        made.check_transformer(flux_transformer())
    with pytest.raises(ConfigError, match="is for Wan and HunyuanVideo, and this is a LTXVideoTransformer3DModel"):
        recipe(settings(tmp_path, saved("ltx", tmp_path)))


@pytest.mark.parametrize("kind", ["hunyuan", "hunyuan replaced first frame", "hunyuan first frame"])
def test_hunyuanvideo_makes_longer_videos(tmp_path, kind):
    """What is trained, and `lengthen` in its own pipeline: mask, bound of frames and RIFLEx, which all go again."""
    base = saved(kind, tmp_path)
    rope = {"rope": "riflex", "component": 1}
    size = {"frames": 17, "height": 32, "width": 96}
    # Next to so few tokens of video, those of the text leave no choice of a density.
    samples = {} if kind == "hunyuan" else {"validation": {"prompts": []}}
    file = settings(tmp_path, base, length=rope, data={"sizes": [size]}, attention={"density": None}, **samples)
    result = run("length", file)
    names = set(read_length(result["lora"]).weights())
    assert any(".single_transformer_blocks.0.attn.to_v." in name for name in names)
    assert any(".transformer_blocks.0.attn.add_q_proj." in name for name in names)
    assert not any("context_embedder" in name or "proj_mlp" in name or "ff" in name for name in names)
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    phase = recipe(file).phases()[0]
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    own = pipe.transformer.rope

    def call(frames: int) -> torch.Tensor:
        picture = {"image": Image.new("RGB", (96, 32), "red")} if "first frame" in kind else {}
        generator = torch.Generator().manual_seed(1)
        more = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **picture}
        return pipe(prompt="a dot moves a dot moves a dot", height=32, width=96, num_frames=frames, **more).frames

    plain = call(17)
    with vidaccel.lengthen(pipe, result["lora"], backend="gather") as handle:
        hook = pipe.transformer.register_forward_hook(lambda *each: seen.append(each[2:]), with_kwargs=True)
        made = call(17)
        hook.remove()
        kwargs, (wanted,) = seen[0]
        assert {record.reason for record in handle.report().records} == {"", "first layers"}
        with pytest.raises(LengthError, match="the video has 6 latent frames, and .* was trained up to 5"):
            call(21)
    assert pipe.transformer.rope is own and torch.equal(call(17), plain) and not torch.equal(made, plain)
    with torch.no_grad():
        torch.testing.assert_close(phase.setup(trained)(**kwargs)[0], wanted, rtol=1e-4, atol=1e-5)
    phase.close()
