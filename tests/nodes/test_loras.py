"""LoRAs in a pipeline of ComfyUI, written by diffusers and in ComfyUI's own form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_wan import generate, make_pipe, make_transformer

from vidaccel import demo
from vidaccel.generation.requests.settings import Settings
from vidaccel.nodes.pipeline.generating import generate as run_pipeline
from vidaccel.nodes.pipeline.loras import Lora, attach
from vidaccel.nodes.pipeline.pipelines import load
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.report.wording import InputError


def write(folder: Path, seed: int) -> Path:
    """A LoRA with random numbers, as diffusers' training scripts write them."""
    transformer = make_transformer()
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(transformer)
    state = {name: torch.randn(x.shape, generator=generator) * 0.3 for name, x in state.items()}
    WanPipeline.save_lora_weights(folder, state)
    return folder / "pytorch_lora_weights.safetensors"


def comfy_form(file: Path, into: Path) -> Path:
    """The same in the names of ComfyUI and of Wan's own code."""
    renamed = {}
    for name, value in load_file(file).items():
        name = name.replace("transformer.blocks", "diffusion_model.blocks").replace("attn1", "self_attn")
        name = name.replace("attn2", "cross_attn").replace("to_q", "q").replace("to_v", "v")
        renamed[name] = value
    save_file(renamed, into)
    return into


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return [write(tmp_path_factory.mktemp(f"lora{seed}"), seed) for seed in (1, 2)]


def made(*loras: Lora, **components) -> torch.Tensor:
    pipe = make_pipe(**components)
    attach(pipe, loras)
    return generate(pipe)


def test_a_chain_with_weights(files):
    one, two = files
    plain = made()
    assert torch.equal(made(Lora(one, 0.0)), plain)
    assert not torch.allclose(made(Lora(one)), plain)
    assert not torch.allclose(made(Lora(one, 0.5)), made(Lora(one)))
    both = made(Lora(one), Lora(two, 0.5))
    torch.testing.assert_close(both, made(Lora(two, 0.5), Lora(one)))
    assert not torch.allclose(both, made(Lora(one)))
    torch.testing.assert_close(made(Lora(one), Lora(one, -1.0)), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(made(Lora(one.parent)), made(Lora(one)))


def test_the_form_of_comfyui(files, tmp_path):
    torch.testing.assert_close(made(Lora(comfy_form(files[0], tmp_path / "own.safetensors"))), made(Lora(files[0])))


def test_the_two_transformers_of_wan_2_2(files, tmp_path):
    def second(*loras: Lora) -> list[set[str]]:
        pipe = make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.5)
        attach(pipe, loras)
        return [set(getattr(part, "peft_config", {})) for part in (pipe.transformer, pipe.transformer_2)]

    assert second(Lora(files[0])) == [{"lora_0"}, {"lora_0"}]
    chain = Lora(files[0], target="transformer"), Lora(files[1], target="transformer_2")
    assert second(*chain) == [{"lora_0"}, {"lora_1"}]
    with pytest.raises(InputError, match="is for transformer_2, and this pipeline has transformer alone. Choose all"):
        made(Lora(files[0], target="transformer_2"))
    low = tmp_path / "wan_low_noise.safetensors"
    shutil.copy(files[1], low)
    with pytest.raises(InputError, match="wan_low_noise.* set transformer of its Pipeline LoRA to transformer_2"):
        second(Lora(low))
    assert second(Lora(low, target="all")) == [{"lora_0"}, {"lora_0"}]
    tensors = load_file(files[1])
    save_file(tensors, low, {"vidaccel": json.dumps({"part": "transformer_2", "levels": [0.0, 0.875]})})
    assert second(Lora(low)) == [set(), {"lora_0"}]
    with pytest.raises(InputError, match="transformer is all, and .* was trained for transformer_2: choose automatic"):
        second(Lora(low, target="all"))
    with pytest.raises(InputError, match="transformer is transformer, and .* was trained for .*_2: choose all"):
        made(Lora(low, target="transformer"))
    made(Lora(low, target="all"))


def test_an_adapter_that_the_pipeline_has_stays(files):
    """Adapter-only weights, such as demo-dc's, are a LoRA themselves."""
    pipe = make_pipe()
    pipe.load_lora_weights(str(files[0].parent), adapter_name="own")
    attach(pipe, [Lora(files[1])])
    torch.testing.assert_close(generate(pipe), made(Lora(files[0]), Lora(files[1])))


def test_what_cannot_be_loaded(files, tmp_path):
    with pytest.raises(InputError, match="^path is .*nowhere: there is no such file or folder"):
        Lora(tmp_path / "nowhere")
    with pytest.raises(InputError, match="^transformer is other: it must be one of all"):
        Lora(files[0], target="other")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(InputError, match="^path: .*broken.safetensors is damaged, or no safetensors file"):
        Lora(broken)
    for name in ("passwd", "wan.sft", "notes.txt"):
        (tmp_path / name).write_text("root")
        with pytest.raises(
            InputError,
            match=rf"^path: .*{name} is none by its name: a LoRA is a .safetensors file, or .* renamed to that",
        ):
            Lora(tmp_path / name)
    (tmp_path / "old.pt").write_text("read by diffusers alone")
    assert Lora(tmp_path / "old.pt").path.name == "old.pt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="^path: the folder .*empty has no weights"):
        Lora(tmp_path / "empty")
    pair = {f"text_encoder.layer.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(pair, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="^loras: nothing in other.safetensors is for the WanTransformer3DModel"):
        made(Lora(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="^loras: pytorch_lora_weights.safetensors is for layers of width"):
        made(Lora(files[0]), transformer=make_transformer(num_attention_heads=4))


def test_a_pipeline_that_is_loaded_with_one(tmp_path):
    transformer = WanPipeline.from_pretrained(demo.path()).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    loaded = load("demo", "auto", Residency(torch.device("cpu"), lambda *_: None), [Lora(tmp_path, 0.5)])
    assert loaded.pipe.get_active_adapters() == ["lora_0"]
    layer = loaded.pipe.transformer.blocks[0].attn1.to_q
    assert layer.scaling["lora_0"] == 0.5 * layer.lora_alpha["lora_0"] / layer.r["lora_0"]
    assert not loaded.notes


def test_a_lora_of_other_weights_is_told_with_each_video(tmp_path):
    transformer = WanPipeline.from_pretrained(demo.path()).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {"vidaccel": json.dumps({"recipe": "lora", "base": "mine", "base_hash": "0123"})})
    loaded = load("demo", "auto", Residency(torch.device("cpu"), lambda *_: None), [Lora(file)])
    settings = Settings(prompt="a red circle", frames=5, height=32, width=32, steps=1)
    made = run_pipeline(loaded, settings, on_step=lambda *_: None)
    [note] = loaded.notes
    assert "was trained on mine (transformer), and demo has other files: other weights, or the" in note
    assert note in made.report.news().report.notes
