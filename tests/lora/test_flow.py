"""Noise levels."""

from __future__ import annotations

import pytest
import torch

from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.flow import noisy, sample_levels, sample_sigmas, shifted


def generators(count: int) -> Generators:
    return Generators([Place(0, number, count, number) for number in range(count)])


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_levels_have_the_density_of_the_samplers(shift):
    """A shifted uniform number is at most s with probability s / (shift - (shift - 1) s)."""
    sigmas = sample_sigmas(generators(2000), shift)
    assert sigmas.min() >= 0 and sigmas.max() < 1
    for level in (0.2, 0.5, 0.9):
        wanted = level / (shift - (shift - 1) * level)
        assert float((sigmas <= level).float().mean()) == pytest.approx(wanted, abs=2e-3)


def test_levels_are_continuous():
    sigmas = sample_sigmas(generators(1000), 8.0)
    assert len(sigmas.unique()) > 990
    assert ((sigmas * 50).frac() > 1e-3).float().mean() > 0.95


def test_the_samplers_grid():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = shifted(torch.linspace(1, 1e-3, 1000), 5.0)
    torch.testing.assert_close(made, scheduler.sigmas[:1000], rtol=1e-4, atol=1e-5)


def test_a_focus_takes_its_share():
    sigmas = sample_sigmas(generators(1000), 3.0, logit_normal_share=0.5, mean=0.9, deviation=0.1)
    inside = ((sigmas > torch.sigmoid(torch.tensor(0.6))) & (sigmas < torch.sigmoid(torch.tensor(1.2)))).float().mean()
    assert 0.5 < float(inside) < 0.75
    everything = sample_sigmas(generators(1000), 3.0, logit_normal_share=1.0, mean=0.0, deviation=1e-6)
    torch.testing.assert_close(everything, torch.full((1000,), 0.5), rtol=0, atol=1e-4)


def test_noisy_latents():
    latents, noise = torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    assert noisy(latents, noise, torch.tensor([0.25, 1.0])).flatten().tolist() == [0.25, 1.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.9)])
def test_levels_of_a_part_have_the_density_of_the_whole_there(levels, shift):
    """Shifted back, their logits are normal, cut to the part: counted, not by the formula that draws them."""
    low, high = levels
    drawn = sample_levels(generators(4000), shift, "logit_normal", 0.5, 1.5, levels)
    assert drawn.min() >= low and drawn.max() <= high
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    whole = shifted(torch.sigmoid(0.5 + 1.5 * normal), shift)
    part = whole[(whole >= low) & (whole <= high)]
    for share in (0.1, 0.5, 0.9):
        assert float(drawn.quantile(share)) == pytest.approx(float(part.quantile(share)), abs=0.01)


def test_uniform_levels_are_those_of_the_samplers():
    levels = sample_levels(generators(500), 3.0, "uniform")
    torch.testing.assert_close(levels, sample_sigmas(generators(500), 3.0))
    assert sample_levels(generators(500), 3.0, "uniform", levels=(0.9, 1.0)).min() >= 0.9
