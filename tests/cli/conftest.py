"""A real Wan pipeline of random weights, small enough to make a video in a second."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vidaccel as package


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a `WanPipeline`: 2 layers of 2 heads; 9 frames of 64x64 are 3 x 4 x 4 tokens."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "dot": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    text_config = UMT5Config(
        vocab_size=4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_configs(tiny_model, tmp_path) -> Path:
    """The JSON of the tiny model without its weights: a request on it fails before loading, or in loading."""
    folder = tmp_path / "configs"
    for file in tiny_model.rglob("*.json"):
        target = folder / file.relative_to(tiny_model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    return folder


@pytest.fixture
def edit_json():
    """`edit_json(file, key=value)` changes a JSON file in place."""

    def edit(file: Path, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.fixture
def vidaccel():
    """Run the command line in this process: `vidaccel("generate", "a dot", ...)`."""
    from vidaccel.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def child_environment(tmp_path) -> dict[str, str]:
    """For processes that are to import the very `vidaccel` of this one, installed or not."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "vidaccel").symlink_to(package.__path__[0], target_is_directory=True)
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
