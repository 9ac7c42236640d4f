from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tiny_wan import make_pipe


@pytest.fixture
def pipe() -> WanPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
