"""The guidance-free adapters that the built-in models are shipped with."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel import DCVideoGenPipeline, demo
from vidaccel.pipelines.files.weight_files import transformer_files
from vidaccel.pipelines.guidance_free.adapter_file import OWN_FILE, read_adapter

SHIPPED = [model for model in demo.MODELS if (demo.path(model) / "transformer" / OWN_FILE).is_file()]


def test_there_are_some():
    assert SHIPPED


@pytest.mark.parametrize("model", SHIPPED)
def test_it_is_small_and_for_this_model(model):
    file = demo.path(model) / "transformer" / OWN_FILE
    assert file.stat().st_size <= 2_000_000
    adapter = read_adapter(file)
    assert adapter.base == model and adapter.base_hash == transformer_files(str(demo.path(model)))
    assert adapter.max_scale >= 4 and adapter.unconditional == ""


@pytest.mark.parametrize("model", SHIPPED)
def test_a_pass_makes_most_of_what_guidance_changes(model):
    """The velocity at a high noise level, against that of two passes, as a share of what guidance changes."""
    pipe = (WanPipeline if model == demo.WAN else DCVideoGenPipeline).from_pretrained(demo.path(model))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 9, 16, 16) if model == demo.WAN else (1, 32, 8, 4, 4)
    latents, timestep = torch.randn(shape, generator=generator), torch.tensor([950.0])
    texts = [
        pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0] for prompt in (demo.HELD_OUT_PROMPTS[0], "")
    ]

    @torch.no_grad()
    def velocity(text):
        return pipe.transformer(latents, timestep, text, return_dict=False)[0]

    own, without = (velocity(text) for text in texts)
    guided = without + 2 * (own - without)
    with vidaccel.guidance_free(pipe):
        pipe._guidance_scale = 2.0
        made = velocity(texts[0])
    assert (made - guided).square().mean() < 0.7 * (own - guided).square().mean()
