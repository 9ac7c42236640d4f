"""What the noise in latents is, against what diffusers' own schedulers add and take away."""

from __future__ import annotations

import diffusers
import pytest
import torch

from vidaccel.pipelines.forecast.level import FLOW, Level, level_of, tells_levels

VIDEO, NOISE = torch.randn(2, 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OF_DIFFUSION = {
    "epsilon": lambda a, s: NOISE,
    "v_prediction": lambda a, s: a * NOISE - s * VIDEO,
    "sample": lambda a, s: VIDEO,
}


@pytest.mark.parametrize("inverted", [False, True])
def test_of_a_flow(inverted):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
    scheduler.set_timesteps(10)
    for number in (2, 5, 8):
        sigma = float(scheduler.sigmas[number])
        share = 1 - sigma if inverted else sigma
        latents = (1 - share) * VIDEO + share * NOISE
        made = (VIDEO - NOISE) if inverted else (NOISE - VIDEO)
        level = level_of(scheduler, share, 0.0)
        assert level.place == pytest.approx(share)
        torch.testing.assert_close(level.noise_in(latents, made), NOISE, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(level.made_of(latents, NOISE), made, atol=1e-5, rtol=1e-5)
        # The rest of the way at this velocity ends at the video.
        end = latents + ((1.0 if inverted else 0.0) - sigma) * made
        torch.testing.assert_close(end, VIDEO, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("makes", OF_DIFFUSION)
@pytest.mark.parametrize("name", ["DDIMScheduler", "CogVideoXDDIMScheduler", "DDPMScheduler"])
def test_of_diffusion(name, makes):
    scheduler = getattr(diffusers, name)(prediction_type=makes)
    for timestep in (900, 500, 20):
        latents = scheduler.add_noise(VIDEO, NOISE, torch.tensor([timestep]))
        share = float(scheduler.alphas_cumprod[timestep])
        made = OF_DIFFUSION[makes](share**0.5, (1 - share) ** 0.5)
        level = level_of(scheduler, None, float(timestep))
        assert 0 < level.place < 1 and level.makes == makes
        torch.testing.assert_close(level.noise_in(latents, made), NOISE, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(level.made_of(latents, NOISE), made, atol=1e-3, rtol=1e-3)


def test_half_precision_comes_back_in_float32():
    level = Level(0.4, 0.6)
    noise = level.noise_in(VIDEO.bfloat16(), NOISE.bfloat16())
    assert noise.dtype == torch.float32 == level.made_of(VIDEO.bfloat16(), noise).dtype


def test_schedulers_that_tell_no_level():
    flow = diffusers.UniPCMultistepScheduler(prediction_type=FLOW, use_flow_sigmas=True, flow_shift=3.0)
    edm = diffusers.EDMEulerScheduler()
    assert tells_levels(flow) and tells_levels(diffusers.DDIMScheduler())
    assert not tells_levels(edm) and not tells_levels(None)
    spread = {"use_karras_sigmas": True, "sigma_max": 80.0, "sigma_min": 0.002}  # Cosmos Predict2, as it was made
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.register_to_config(**spread)
    assert float(flow.sigmas.max()) == 1.0 and not tells_levels(flow)
    flow.register_to_config(use_karras_sigmas=False)  # then that is not read
    assert tells_levels(flow)
    assert level_of(edm, None, 1.0) is None and level_of(None, None, 1.0) is None
    assert level_of(diffusers.DDIMScheduler(), None, 5000.0) is None
