"""A recipe so small that its runs take no time, real autoencoders and Wan models at tiny sizes, and video folders."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vidaccel.lora.config import Settings, build
from vidaccel.lora.phase_run import PhaseRun
from vidaccel.lora.recipes.base import Phase, Process, Recipe, load_trained
from vidaccel.lora.settings import PhaseSettings, RunSettings, SizeSettings
from vidaccel.lora.trainer import Trainer, make_accelerator


@pytest.fixture(autouse=True, scope="module")
def _short_texts() -> Generator[None]:
    """A module whose tests are about the length of prompts has a fixture of this name that does nothing."""
    from short_texts import shorten  # scripts that import this file do not find it

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch.setattr)
        yield


class Net(nn.Module):
    """Two layers with dropout between them, which uses the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.first(x).tanh()))


@dataclass(frozen=True)
class TinyPhases(Settings):
    first: PhaseSettings = field(default_factory=lambda: PhaseSettings(steps=3, learning_rate=0.01, batch_size=2))
    second: PhaseSettings = field(
        default_factory=lambda: PhaseSettings(
            steps=3, learning_rate=0.01, batch_size=2, ema_decay=0.9, lr_warmup_steps=2
        )
    )


@dataclass(frozen=True, kw_only=True)
class TinySettings(RunSettings):
    phases: TinyPhases = field(default_factory=TinyPhases)


class TinyClips:
    sizes = (SizeSettings(4, 8, 8),)
    decodes = True

    def __init__(self, count: int | None) -> None:
        self.members = None if count is None else {0: range(count)}

    def load(self, pick) -> dict:
        x = torch.randn(4, generator=torch.Generator().manual_seed(pick.index % 2**40))
        return {"x": x, "name": str(pick.index)}


class TinyPhase(Phase):
    """Trains one of the layers."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: TinyRecipe) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def setup(self, trained):
        self.recipe.calls.append(f"setup {self.name}")
        net = Net()
        load_trained(net, trained)
        net.requires_grad_(False)
        getattr(net, self.name).requires_grad_(True)
        return net

    def clips(self):
        self.recipe.calls.append(f"clips {self.name}")
        return TinyClips(self.recipe.config.data.clips)

    def loss(self, model, batch, rng):
        self.recipe.seen.append((self.name, rng.places[0].step, tuple(batch["name"])))
        noise = rng.normal(4) * 0.1
        loss = (model(batch["x"] + noise) - batch["x"].sum(dim=1, keepdim=True)).square().mean()
        return loss, {"uniform": rng.uniform().mean()}

    def validate(self, model, folder, step):
        torch.rand(3)  # what validation generators must not change the training
        return {"bias": float(next(model.parameters()).sum())}


class TinyRecipe(Recipe):
    Config = TinySettings

    def prepare(self) -> None:
        self.seen: list = []
        self.calls: list[str] = []

    @property
    def encodings(self):
        return self.config.data.cache

    def phases(self):
        phases = self.config.phases
        return [TinyPhase("first", phases.first, self), TinyPhase("second", phases.second, self)]

    def finish(self, trained):
        self.trained = trained
        return {"parameters": len(trained)}


@pytest.fixture
def tiny_settings(tmp_path: Path) -> Callable[..., TinySettings]:
    """Settings of `TinyRecipe`; keywords replace whole sections."""

    def make(out: str = "run", **sections) -> TinySettings:
        loop = {"tracker": "none", "device": "cpu", "log_every": 1, **sections.pop("loop", {})}
        return build(TinySettings, {"recipe": "tiny", "out": str(tmp_path / out), "loop": loop, **sections})

    return make


@pytest.fixture
def tiny_phase() -> type[TinyPhase]:
    return TinyPhase


@pytest.fixture
def tiny_recipe() -> type[TinyRecipe]:
    return TinyRecipe


@pytest.fixture
def run_tiny() -> Callable[..., TinyRecipe]:
    """Run `TinyRecipe` with settings; returns it, with `trained` and `seen`."""

    def run(settings: TinySettings, resume: str | None = None) -> TinyRecipe:
        recipe = TinyRecipe(settings, Process(torch.device("cpu")))
        Trainer(recipe, make_accelerator(settings)).run(resume)
        return recipe

    return run


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], None]:
    """Let the process get SIGTERM after so many optimiser steps, once."""

    def arrange(steps: int) -> None:
        done = 0
        original = PhaseRun._one_step

        def step(self, stream):
            nonlocal done
            values = original(self, stream)
            done += 1
            if done == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return values

        monkeypatch.setattr(PhaseRun, "_one_step", step)

    return arrange


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory) -> Path:
    """Four clips of 24 frames, two wide and two tall, with captions: each frame's grey level is 8 times its number."""
    import imageio.v2 as imageio

    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for name, (height, width) in {"a": (32, 64), "b": (32, 64), "c": (64, 32), "d": (64, 32)}.items():
        with imageio.get_writer(
            folder / f"{name}.mp4", fps=8, macro_block_size=2, output_params=["-crf", "5"]
        ) as writer:
            for number in range(24):
                writer.append_data(np.full((height, width, 3), 8 * number, np.uint8))
        rows.append({"file_name": f"{name}.mp4", "text": f"video {name}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Make a video of 24 frames out of noise whose header and first clip are whole, and whose rest is not."""
    import imageio.v2 as imageio

    def write(path: Path) -> None:
        random = np.random.default_rng(0)
        options = ["-g", "4", "-bf", "0"]
        with imageio.get_writer(path, fps=8, macro_block_size=2, output_params=options) as writer:
            for _ in range(24):
                writer.append_data(random.integers(0, 255, (32, 64, 3), np.uint8))
        whole = bytearray(path.read_bytes())
        middle, count = len(whole) // 2, len(whole) // 10
        whole[middle : middle + count] = random.bytes(count)
        path.write_bytes(whole)

    return write


TINY_AUTOENCODER = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8, 8, 8, 8),
    "layers_per_block": (0, 1, 1, 1, 1, 1, 1),
    "chunk_size": 8,
}


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory) -> Path:
    """An untrained `AutoencoderDCV` of 32x and 4 channels."""
    from vidaccel.autoencoders import AutoencoderDCV

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderDCV(**TINY_AUTOENCODER, scaling_factor=1.5).save_pretrained(folder)
    return folder


TINY_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def _parts() -> dict:
    """Autoencoder, text encoder, tokenizer and scheduler of the demo model."""
    from diffusers import WanPipeline

    import vidaccel.demo

    pipe = WanPipeline.from_pretrained(vidaccel.demo.path(), transformer=None)
    return {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}


@pytest.fixture(scope="session")
def text_base(tmp_path_factory) -> Path:
    """A text-to-video Wan pipeline with an untrained transformer of 2 layers."""
    from diffusers import WanPipeline, WanTransformer3DModel

    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("text_base")
    WanPipeline(**_parts(), transformer=WanTransformer3DModel(**TINY_TRANSFORMER)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_base(tmp_path_factory) -> Path:
    """An image-to-video Wan 2.1 pipeline with an image encoder."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(7)
    changes = {"in_channels": 20, "image_dim": 16, "added_kv_proj_dim": 24}
    eye = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    pipe = WanImageToVideoPipeline(
        **_parts(),
        transformer=WanTransformer3DModel(**{**TINY_TRANSFORMER, **changes}),
        image_encoder=CLIPVisionModel(eye),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    folder = tmp_path_factory.mktemp("image_base")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan_bases(tmp_path_factory, text_base, image_base) -> dict[str, Path]:
    """A tiny Wan pipeline of each kind, by its name: 2.1 and 2.2, text and image to video."""
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("wan_bases")

    def transformer(**changes) -> WanTransformer3DModel:
        return WanTransformer3DModel(**{**TINY_TRANSFORMER, **changes})

    started = {"image_encoder": None, "image_processor": None}
    made = {
        "two stages": WanPipeline(
            **_parts(), transformer=transformer(), transformer_2=transformer(), boundary_ratio=0.875
        ),
        "two stages, first frame": WanImageToVideoPipeline(
            **_parts(),
            **started,
            transformer=transformer(in_channels=20),
            transformer_2=transformer(in_channels=20),
            boundary_ratio=0.9,
        ),
        "timestep for each token": WanPipeline(**_parts(), transformer=transformer(), expand_timesteps=True),
    }
    for name, pipe in made.items():
        pipe.save_pretrained(folder / name)
    return {"text": text_base, "first frame": image_base, **{name: folder / name for name in made}}
