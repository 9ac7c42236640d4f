"""Going on from a LoRA of another tool: the training starts as what stock diffusers makes of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from lora_runs import recipe, write
from peft import LoraConfig
from safetensors.torch import save_file
from trainable import saved

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError

RANK = 2
MUSUBI = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
FFN = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}


def native(layer: str) -> str:
    """Wan's own name of a layer, as ComfyUI, diffusion-pipe and musubi-tuner write it."""
    for theirs, own in (MUSUBI | FFN).items():
        layer = layer.replace(theirs, own)
    return layer


def matrices(layers, transformer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    shapes = {name: module.weight.shape for name, module in transformer.named_modules() if name in set(layers)}
    return {name: (random(RANK, shapes[name][1]), random(shapes[name][0], RANK)) for name in layers}


def written(folder: Path, kind: str, base: Path, layers) -> Path:
    """A file of a tool, with an alpha of 6 where it has any."""
    pipe = DiffusionPipeline.from_pretrained(base)
    made = matrices(layers, pipe.transformer)
    file = folder / f"{kind}.safetensors"
    if kind == "diffusers":
        pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=6, target_modules=list(layers)))
        parameters = dict(pipe.transformer.named_parameters())
        for layer, pair in made.items():
            for letter, value in zip("AB", pair, strict=True):
                parameters[f"{layer}.lora_{letter}.default.weight"].data.copy_(value)
        state = {name.replace(".default", ""): p for name, p in parameters.items() if ".lora_" in name}
        metadata = {"r": RANK, "lora_alpha": 6, "target_modules": sorted(layers)}
        type(pipe).save_lora_weights(
            folder,
            transformer_lora_layers=state,
            weight_name=file.name,
            **{"transformer_lora_adapter_metadata": metadata},
        )
        return file
    tensors = {}
    for layer, (down, up) in made.items():
        if kind == "musubi":
            name = f"lora_unet_{native(layer).replace('.', '_')}"
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(6.0),
            }
        else:
            name = f"diffusion_model.{native(layer)}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, file)
    return file


def loaded_by_stock(base: Path, file: Path):
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return pipe.transformer


def outputs(*transformers) -> list[torch.Tensor]:
    channels = transformers[0].config.in_channels
    given = {
        "hidden_states": torch.randn(1, channels, 2, 4, 6, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad():
        return [transformer.eval()(**given).sample for transformer in transformers]


@pytest.mark.parametrize("kind", ["diffusers", "musubi", "comfyui"])
def test_it_starts_as_what_stock_diffusers_loads(tmp_path, text_base, kind):
    layers = recipe(write(tmp_path, text_base)).layers
    file = written(tmp_path, kind, text_base, layers)
    made = recipe(write(tmp_path, text_base, lora={"start": str(file), "alpha": 3}))
    plain = DiffusionPipeline.from_pretrained(text_base).transformer
    found, wanted, base = outputs(made.transformer(), loaded_by_stock(text_base, file), plain)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-2


def test_a_run_goes_on_from_it_and_a_resumed_one_knows_it(tmp_path, text_base, caplog):
    layers = recipe(write(tmp_path, text_base)).layers
    start = {"start": str(written(tmp_path, "comfyui", text_base, layers)), "alpha": None}
    file = write(tmp_path, text_base, lora=start, train={"learning_rate": 1e-9}, validation={"prompts": []})
    result = run("lora", file)
    assert "does not say which weights it was trained on" in caplog.text
    ours = loaded_by_stock(text_base, Path(result["lora"]))
    found, wanted = outputs(ours, loaded_by_stock(text_base, Path(start["start"])))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    run("lora", file, ["train.steps=3"], resume="latest")


def test_hunyuanvideo(tmp_path):
    base = saved("hunyuan", tmp_path)
    layers = recipe(write(tmp_path, base, data={"sizes": [{"frames": 9, "height": 32, "width": 64}]})).layers
    file = written(tmp_path, "diffusers", base, layers)
    sections = {"lora": {"start": str(file)}, "data": {"sizes": [{"frames": 9, "height": 32, "width": 64}]}}
    ours = dict(recipe(write(tmp_path, base, **sections)).transformer().named_parameters())
    theirs = dict(loaded_by_stock(base, file).named_parameters())
    for layer in layers:
        products = []
        for parameters, name in ((ours, "default"), (theirs, next(n for n in theirs if ".lora_" in n).split(".")[-2])):
            down, up = (parameters[f"{layer}.lora_{letter}.{name}.weight"] for letter in "AB")
            products.append(up @ down)
        torch.testing.assert_close(products[0], products[1])  # both have 3 = alpha / rank beside it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 4}}, "lora.rank is 4, but .* in lora.start has 2: set that"),
        ({"lora": {"targets": ["attn1.to_q"]}}, r"has the layer .*which lora.targets does not take: set it to \[attn1"),
        (
            {"lora": {"targets": ["to_q", "time_proj"]}},
            "has nothing for the layer .*time_proj: set lora.targets to its own",
        ),
        ({"recipe": "gft"}, "does not say which model it is for: give a LoRA that this trainer made"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text_base, changes, words):
    layers = recipe(write(tmp_path, text_base)).layers
    file = written(tmp_path, "comfyui", text_base, layers)
    sections = {**changes, "lora": {**changes.get("lora", {}), "start": str(file)}}
    with pytest.raises(ConfigError, match=words):
        recipe(write(tmp_path, text_base, **sections))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (2, 5), "B": (24, 2)}, "is for another model: its"),
        ({"a.weight": (2, 2)}, "is no plain LoRA: it has parts such as a.weight"),
    ],
)
def test_files_that_are_none(tmp_path, text_base, content, words):
    tensors = {
        name if "." in name else "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(shape)
        for name, shape in content.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lora = {"start": str(tmp_path / "a.safetensors"), "targets": ["blocks.0.attn1.to_q"]}
    with pytest.raises(ConfigError, match=words):
        recipe(write(tmp_path, text_base, lora=lora))
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="is no LoRA that diffusers reads for a WanPipeline"):
        recipe(write(tmp_path, text_base, lora=lora))
