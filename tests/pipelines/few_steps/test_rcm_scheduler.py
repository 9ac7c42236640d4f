"""The sampler of rCM: its times, whole trajectories in float64, its noise, and its place in real Wan pipelines."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from tiny_wan import generate, make_pipe, make_transformer

from vidaccel import RCMScheduler
from vidaccel.pipelines.few_steps import scaled_start

NO_PARTS = {"vae": None, "text_encoder": None, "tokenizer": None}
PUBLISHED = {80: [0.987654321, 0.933781, 0.852895, 0.608979, 0.0], 200: [0.995024876, 0.933781, 0.852895, 0.608979, 0]}


def _autoencoder() -> AutoencoderKLWan:
    parts = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**parts, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def _times(sigma_max: float, steps: int) -> list[float]:
    """sin / (sin + cos) by another way: tan / (1 + tan)."""
    tangents = [sigma_max, *(math.tan(a) for a in (1.5, 1.4, 1.0)[: steps - 1])]
    return [tan / (1 + tan) for tan in tangents] + [0.0]


@pytest.mark.parametrize("sigma_max", PUBLISHED)
@pytest.mark.parametrize("steps", (1, 2, 3, 4))
def test_times(sigma_max, steps):
    scheduler = RCMScheduler(sigma_max=sigma_max)
    scheduler.set_timesteps(steps)
    wanted = _times(sigma_max, steps)
    assert wanted == pytest.approx([*PUBLISHED[sigma_max][:steps], 0], abs=1e-6)
    assert scheduler.sigmas.tolist() == pytest.approx(wanted, abs=1e-7)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in wanted[:-1]], rel=1e-7)
    assert scheduler.init_noise_sigma == pytest.approx(sigma_max / (1 + sigma_max), abs=1e-15)


def _model(x: np.ndarray, t: float) -> np.ndarray:
    """Any function of sample and time will do."""
    return np.sin(3 * x) * t + 0.25 * x


@pytest.mark.parametrize("ode", (False, True))
def test_a_trajectory_in_float64(ode):
    """The published loop, written in numpy: first noise and all others from one generator."""
    shape = (2, 4, 3, 5, 6)
    drawn = torch.Generator().manual_seed(7)
    start = torch.randn(shape, generator=drawn)
    scheduler = RCMScheduler(sigma_max=200, ode=ode)
    scheduler.set_timesteps(4)
    x = (start.double() * scheduler.init_noise_sigma).requires_grad_(False)
    ours = x
    for timestep in scheduler.timesteps:
        t = scheduler._times[scheduler.step_index or 0]
        velocity = torch.from_numpy(_model(ours.numpy(), t))
        ours = scheduler.step(velocity, timestep, ours, generator=drawn, return_dict=False)[0]
        assert ours.dtype == torch.float64

    theirs, again = x.numpy(), torch.Generator().manual_seed(7)
    torch.randn(shape, generator=again)
    times = _times(200, 4)
    for t, after in itertools.pairwise(times):
        velocity = _model(theirs, t)
        if ode:
            theirs = theirs + (after - t) * velocity
        else:
            noise = torch.randn(shape, generator=again).double().numpy()
            theirs = (1 - after) * (theirs - t * velocity) + after * noise
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-13)


def _one_run(scheduler: RCMScheduler, sample: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.tanh(sample), timestep, sample).prev_sample
    return sample


def test_noise_without_a_generator_is_of_each_sample():
    """The same again whatever else is drawn, alone and in a batch; new for each step and sample; the state is exact."""
    scheduler, start = RCMScheduler(), torch.randn(3, 2, 3, 4, 4)
    made = _one_run(scheduler, start)
    assert made.dtype == torch.float32
    torch.randn(5)
    assert torch.equal(_one_run(scheduler, start), made)
    assert torch.equal(_one_run(RCMScheduler(), start[1:2]), made[1:2])
    assert not torch.equal(_one_run(scheduler, start + 1e-3), made)

    scheduler.set_timesteps(4)
    still, noises = torch.zeros_like(start), []
    sample = start
    for row, timestep in enumerate(scheduler.timesteps[:3]):
        time, after = scheduler._times[row : row + 2]
        sample = scheduler.step(sample / time, timestep, sample).prev_sample  # x - t v = 0: the noise alone is left
        assert sample.dtype == torch.float64
        noises.append(sample / after)
    pairs = torch.stack(noises).flatten(2).flatten(0, 1)  # steps x samples
    correlation = torch.corrcoef(pairs) - torch.eye(len(pairs))
    assert correlation.abs().max() < 0.5 and still.equal(torch.zeros_like(start))
    assert 0.8 < float(pairs.std()) < 1.2


def test_a_copy_in_the_middle_of_a_run_goes_on_alike():
    first = RCMScheduler()
    first.set_timesteps(4)
    sample = first.step(torch.zeros(1, 2, 2), first.timesteps[0], torch.randn(1, 2, 2)).prev_sample
    second = copy.deepcopy(first)
    for timestep in first.timesteps[1:]:
        ends = [s.step(torch.ones(1, 2, 2), timestep, sample).prev_sample for s in (first, second)]
        assert torch.equal(*ends)
        sample = ends[0]


def test_noisy_videos():
    """`add_noise` and `scale_noise`, at a time for all samples or one for each."""
    scheduler = RCMScheduler()
    data, noise = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    made = scheduler.add_noise(data, noise, torch.tensor([250.0]))
    torch.testing.assert_close(made, 0.75 * data + 0.25 * noise)
    torch.testing.assert_close(scheduler.scale_noise(data, torch.tensor(250.0), noise), made)
    each = scheduler.add_noise(data, noise, torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(each[0], made[0])
    torch.testing.assert_close(each[1], noise[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_timesteps(5), "num_inference_steps is 5: this model is distilled to 1 to 4 steps. Give 4."),
        (lambda s: s.set_timesteps(0), "num_inference_steps is 0"),
        (lambda s: RCMScheduler(sigma_max=10), "Give a higher sigma_max"),
        (lambda s: RCMScheduler(sigma_max=0), "sigma_max is 0: it must be a number above 0"),
        (lambda s: RCMScheduler(middle_times=(1.0, 1.4)), "each must be below the one before"),
        (lambda s: s.step(torch.ones(1), 1.0, torch.ones(1)), "call set_timesteps first"),
        (lambda s: (s.set_timesteps(4), s.step(torch.ones(1), 1.0, torch.ones(1))), "timestep is 1: it must be one of"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(RCMScheduler())


def test_steps_after_the_last_are_refused():
    scheduler = RCMScheduler()
    _one_run(scheduler, torch.randn(1, 2, 2))
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(torch.ones(1, 2, 2), scheduler.timesteps[-1], torch.ones(1, 2, 2))


class _Listener:
    """What a transformer was given: the timesteps, and the video it saw first."""

    def __init__(self, *transformers: torch.nn.Module) -> None:
        self.timesteps: list[list[float]] = []
        self.first: torch.Tensor | None = None
        for number, transformer in enumerate(transformers):
            self.timesteps.append([])
            transformer.register_forward_pre_hook(self._hear(number), with_kwargs=True)

    def _hear(self, number):
        def hook(module, args, kwargs):
            self.timesteps[number].append(float(kwargs["timestep"][0]))
            if self.first is None:
                self.first = kwargs["hidden_states"]

        return hook


def test_saved_and_loaded_with_a_pipeline(tmp_path):
    """By the pipeline's own class and by whatever class the folder names; the same video from the same seed."""
    pipe = make_pipe(scheduler=RCMScheduler(sigma_max=200, ode=True))
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["vidaccel.pipelines.few_steps.rcm", "RCMScheduler"]
    for cls in (WanPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path / "saved", **NO_PARTS)
        assert type(loaded) is WanPipeline and type(loaded.scheduler) is RCMScheduler
        assert (loaded.scheduler.config.sigma_max, loaded.scheduler.config.ode) == (200, True)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(generate(loaded, guidance_scale=1), generate(pipe, guidance_scale=1))


def test_in_place_of_another_scheduler():
    """diffusers' way of changing it: what the other has set does not come along, and what they share does."""
    other = UniPCMultistepScheduler(num_train_timesteps=500, use_flow_sigmas=True, prediction_type="flow_prediction")
    made = RCMScheduler.from_config(other.config, sigma_max=200)
    assert made.config.num_train_timesteps == 500 and made.config.sigma_max == 200
    made.set_timesteps(2)
    assert made.timesteps[0] == pytest.approx(500 * 200 / 201)
    with pytest.raises(ValueError, match="sigma_max is None: it must be a number above 0, such as 80"):
        RCMScheduler.from_config(dict(other.config) | {"_use_default_values": []})


def test_a_wan_pipeline_takes_the_published_times():
    """Four passes without guidance, a generator whose video is the same again, and a start of the published scale."""
    pipe = make_pipe(scheduler=RCMScheduler())
    heard = _Listener(pipe.transformer)
    made = generate(pipe, guidance_scale=1)
    assert made.dtype == torch.float32 and made.isfinite().all()
    assert heard.timesteps == [pytest.approx([1000 * t for t in PUBLISHED[80][:4]], abs=1e-3)]
    plain = heard.first
    torch.randn(3)
    assert torch.equal(generate(pipe, guidance_scale=1), made)

    heard.first = None
    with scaled_start(pipe):
        generate(pipe, guidance_scale=1)
    torch.testing.assert_close(heard.first, plain * (80 / 81))
    assert "prepare_latents" not in vars(pipe)
    assert torch.equal(generate(pipe, guidance_scale=1), made)

    heard.first = None
    with scaled_start(pipe):
        with scaled_start(pipe):  # scaled once, and by the outer one behind it, too
            pass
        generate(pipe, guidance_scale=1)
    torch.testing.assert_close(heard.first, plain * (80 / 81))
    assert "prepare_latents" not in vars(pipe)

    other = make_pipe()  # another scheduler: nothing is scaled
    with scaled_start(other):
        assert "prepare_latents" not in vars(other)


def test_wan_2_2_changes_its_model_at_the_boundary():
    """Image to video with two transformers: the first two times are above .9."""
    parts = {name: make_transformer(seed, in_channels=12) for seed, name in enumerate(("transformer", "transformer_2"))}
    pipe = make_pipe(
        WanImageToVideoPipeline, scheduler=RCMScheduler(sigma_max=200), boundary_ratio=0.9, image_encoder=None, **parts
    )
    pipe.vae = _autoencoder()
    heard = _Listener(*parts.values())
    with scaled_start(pipe):
        made = generate(pipe, guidance_scale=1, image=torch.zeros(1, 3, 64, 64))
    assert made.dtype == torch.float32 and made.isfinite().all()
    high, low = heard.timesteps
    assert (high, low) == (pytest.approx([995.02488, 933.781], abs=1e-3), pytest.approx([852.895, 608.979], abs=1e-3))
    start = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(heard.first[:, :4], start * (200 / 201))


def test_a_video_to_start_from():
    """`WanVideoToVideoPipeline` adds the noise of the row that it starts at, and does the rest of the rows."""
    pipe = make_pipe(WanVideoToVideoPipeline, scheduler=RCMScheduler())
    pipe.vae = _autoencoder()
    heard = _Listener(pipe.transformer)
    with scaled_start(pipe):
        made = generate(pipe, guidance_scale=1, video=torch.zeros(1, 17, 3, 64, 64), strength=0.5)
    assert made.isfinite().all()
    assert heard.timesteps == [pytest.approx([852.895, 608.979], abs=1e-3)]
    assert float(heard.first.std()) == pytest.approx(0.852895, abs=0.05)
