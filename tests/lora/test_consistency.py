"""Recipe `consistency`: what is trained, on real Wan pipelines at tiny sizes, and against closed forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from gft_adapters import write_adapter
from lora_runs import recipe, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import vidaccel
from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.identities import file_identity
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.trainer import Stopped
from vidaccel.pipelines.files.run_folder import FILE

KEY = "beta_embedder.linear.weight"


def settings(folder: Path, base: Path, **sections) -> Path:
    few = {"steps": 2, "teacher_steps": 3, "guidance_scale": 2, **sections.pop("consistency", {})}
    return write(folder, base, recipe="consistency", consistency=few, **sections)


def places(count: int, step: int = 0) -> list[Place]:
    return [Place(step, number, count, number) for number in range(count)]


def batch(count: int = 2) -> dict:
    return {"latents": torch.randn(count, 8, 2, 4, 6), "caption": ["a red circle"] * count}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, text_base) -> Path:
    transformer = WanTransformer3DModel.from_pretrained(text_base, subfolder="transformer")
    return write_adapter(tmp_path_factory.mktemp("teacher"), text_base, transformer, frequencies=256, unconditional="")


TAUGHT = {"lora": {"targets": ["attn1.to_q"], "alpha": 2}}
"""The layers and the scale of the adapters of `write_adapter`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_base) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("consistency", settings(folder, text_base))


# -- the targets against closed forms ----------------------------------------------------------------------------------

SPREAD = 0.5


def gaussian(x: torch.Tensor, t: torch.Tensor, mean: float) -> torch.Tensor:
    """E[noise - x0] at x_t of clean values that are normal, of this mean and `SPREAD`."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * mean) - mean


def flowed(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, mean: float) -> torch.Tensor:
    """Where the flow of `gaussian` leads from t to s: the same number of deviations from the mean."""
    t, s = (level.view(-1, *[1] * (x.ndim - 1)) for level in (t, s))
    deviation = [((1 - level) ** 2 * SPREAD**2 + level**2).sqrt() for level in (t, s)]
    return (1 - s) * mean + deviation[1] / deviation[0] * (x - (1 - t) * mean)


@pytest.mark.parametrize("objective", ["segments", "consistency"])
def test_the_minimiser_is_the_flow_itself(tmp_path, text_base, monkeypatch, objective):
    """Of normal values, whose flow is known: a student that makes its steps has no loss, and others have."""
    few = {"objective": objective, "steps": 3, "teacher_steps": 40}
    made = recipe(settings(tmp_path, text_base, consistency=few, validation={"prompts": []}))
    phase = made.phases()[0]
    model = phase.setup({})
    grid = torch.tensor([*made.grid, 0.0])
    off = torch.tensor(0.0, requires_grad=True)

    def velocity(model, shown, sigma, texts, conditions):
        if phase._told is None:  # the base, with guidance and without the same
            return gaussian(shown, sigma, 0.7)
        end = torch.stack([grid[grid < level].max() if level > 0 else level for level in sigma])
        step = (end - sigma).view(-1, *[1] * (shown.ndim - 1))
        right = (flowed(shown, sigma, end, 0.7) - shown) / step.clamp(max=-1e-9)
        return right + off

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    found = {}
    for amount in (0.0, 0.1):
        off.data.fill_(amount)
        loss, _ = phase.loss(model, batch(12), Generators(places(12)))
        loss.backward()
        found[amount] = loss.item()
    # A second-order method in 40 steps; of the objective consistency it is one step of the teacher alone.
    assert found[0.0] < 2e-3 and found[0.1] > found[0.0]
    if objective == "segments":
        assert found[0.1] == pytest.approx(0.01, rel=0.2)


def test_the_teacher_s_flow_is_of_second_order(tmp_path, text_base, monkeypatch):
    errors = []
    for count in (8, 16):
        made = recipe(settings(tmp_path, text_base, consistency={"teacher_steps": count}))
        phase = made.phases()[0]
        model = phase.setup({})
        monkeypatch.setattr(made.backbone, "velocity", lambda m, x, t, *_: gaussian(x, t, 0.7))
        x, begin = torch.randn(4, 8, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
        given = {"scale": torch.full((4,), 2.0), "latents": x}
        there = phase._led(model, x, [phase.nothing()] * 4, given, begin, count)
        levels = torch.tensor([made.levels[0], made.levels[count]]).expand(4, 2)
        errors.append((there - flowed(x, levels[:, 0], levels[:, 1], 0.7)).abs().max().item())
    assert errors[1] < errors[0] / 3


def test_steps_are_those_of_the_samplers(tmp_path, text_base):
    """Of a shift of 5, the published four times of lightx2v; and each teacher's step is one of a finer sampler."""
    file = settings(tmp_path, text_base, consistency={"steps": 4}, flow={"shift": 5}, validation={"steps": 4})
    made = recipe(file)
    assert made.grid == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])
    assert len(made.levels) == 13 and made.levels[0] == 1 and made.levels[-1] == 0
    assert made.levels[3::3] == pytest.approx([*made.grid[1:], 0.0])


@pytest.mark.parametrize("objective", ["segments", "consistency"])
def test_what_is_drawn(tmp_path, text_base, monkeypatch, objective):
    """Each step of the student as often; segments begin at its levels, consistency anywhere but at the end."""
    few = {"objective": objective, "guidance_scale": 2, "max_guidance_scale": 3}
    made = recipe(settings(tmp_path, text_base, consistency=few))
    phase = made.phases()[0]
    phase.setup({})
    monkeypatch.setattr(phase, "flow_loss", lambda model, batch, noise, sigma, texts: (batch, {"sigma": sigma}))
    several = {"latents": torch.zeros(240, 8, 1, 1, 1), "caption": ["a red circle"] * 240}
    drawn, told = phase.loss(nn.Module(), several, Generators(places(240)))
    counts = drawn["begin"].bincount(minlength=6).tolist()
    assert counts == ([120, 0, 0, 120, 0, 0] if objective == "segments" else [40] * 6)
    assert torch.allclose(told["sigma"], torch.tensor(made.levels)[drawn["begin"]].float())
    assert 2 <= drawn["scale"].min() < 2.1 and 2.9 < drawn["scale"].max() <= 3
    assert not any(drawn["own"] for _ in range(3))


# -- the student -------------------------------------------------------------------------------------------------------


def test_the_student_starts_as_the_teacher(tmp_path, text_base, teacher):
    """At the guidance of the training, although it has no gate; the teacher is there beside it and is not trained."""
    made = recipe(settings(tmp_path, text_base, consistency={"teacher": str(teacher)}, **TAUGHT))
    phase = made.phases()[0]
    model = phase.setup({}).eval()
    shown, sigma, texts = torch.randn(2, 8, 2, 4, 6), torch.tensor([0.9, 0.4]), [phase.nothing()] * 2
    given = (shown, sigma, texts, {"scale": torch.full((2,), 2.0)})
    student = phase.guided(model, *given, torch.full((2,), 0.5), gradients=False)
    torch.testing.assert_close(student, phase._velocity(model, *given), rtol=1e-4, atol=1e-5)
    plain = phase.of_base(model, *given)
    assert (student - plain).abs().max() > 1e-3
    other = phase.guided(model, *given, torch.full((2,), 1.0), gradients=False)
    assert (other - plain).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in phase.teacher.parameters())
    pipe = WanPipeline.from_pretrained(text_base)
    with vidaccel.guidance_free(pipe, teacher), torch.no_grad():
        pipe._guidance_scale = 2.0
        theirs = made.backbone.velocity(pipe.transformer, shown, sigma, texts, {})
    torch.testing.assert_close(student, theirs, rtol=1e-4, atol=1e-4)
    phase.close()


def test_the_base_teaches_with_guidance_in_two_passes(tmp_path, text_base):
    made = recipe(settings(tmp_path, text_base))
    phase = made.phases()[0]
    model = phase.setup({}).eval()
    text = made.flowing.texts(["a red circle"])
    shown, sigma, scale = torch.randn(1, 8, 2, 4, 6), torch.tensor([0.5]), torch.tensor([3.0])
    base = made.backbone.transformer().eval()
    with torch.no_grad():
        own, without = (made.backbone.velocity(base, shown, sigma, t, {}) for t in (text, [phase.nothing()]))
    found = phase._velocity(model, shown, sigma, text, {"scale": scale})
    torch.testing.assert_close(found, without + 3 * (own - without), rtol=1e-4, atol=1e-5)


def test_own_states_are_those_of_the_sampler(tmp_path, text_base):
    """Where the student comes to from noise in a pipeline with the scheduler of the adapter."""
    few = {"steps": 3, "own_states": 1.0}
    made = recipe(settings(tmp_path, text_base, consistency=few, validation={"prompts": []}))
    phase = made.phases()[0]
    model = phase.setup({}).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    noise, text = torch.randn(3, 8, 2, 4, 6), made.flowing.texts(["a red circle"] * 3)
    given = {"latents": torch.zeros_like(noise), "scale": torch.full((3,), 2.0)}
    found = phase._student(model, noise, text, given, torch.tensor([0, 2, 3]))
    scheduler = vidaccel.GridScheduler(made.grid)
    scheduler.set_timesteps(3)
    x, states = noise, [noise]
    for t in scheduler.timesteps:
        v = phase.guided(model, x, t.expand(3) / 1000, text, given, torch.full((3,), 0.5), gradients=False)
        x = scheduler.step(v, t, x).prev_sample
        states.append(x)
    for clip, steps in enumerate((0, 2, 3)):
        torch.testing.assert_close(found[clip], states[steps][clip], rtol=1e-4, atol=1e-5)


def test_own_states_in_training(tmp_path, text_base, monkeypatch):
    """In as many of the steps as are asked for, the same for all clips of a step, and never in a validation."""
    made = recipe(settings(tmp_path, text_base, consistency={"own_states": 0.5}))
    phase = made.phases()[0]
    phase.setup({})
    monkeypatch.setattr(phase, "flow_loss", lambda model, batch, *_: (batch["own"], {}))
    model = nn.Module()
    one = {"latents": torch.zeros(1, 8, 1, 1, 1), "caption": ["a red circle"]}
    found = [phase.loss(model.train(), dict(one), Generators(places(1, step)))[0] for step in range(200)]
    assert 80 < sum(found) < 120
    assert not any(phase.loss(model.eval(), dict(one), Generators(places(1, step)))[0] for step in range(20))


# -- two transformers --------------------------------------------------------------------------------------------------

STAGES = {"high_noise": ("transformer", range(0, 2)), "low_noise": ("transformer_2", range(2, 4))}
"""Of four steps at a shift of 5, which begin at 1, 0.9375, 0.833 and 0.625, with the boundary at 0.875."""


def staged(folder: Path, base: Path, stage: str, **sections) -> Path:
    few = {"steps": 4, "teacher_steps": 4, **sections.pop("consistency", {})}
    sections = {"model": {"stage": stage}, "flow": {"shift": 5}, "validation": {"prompts": []}, **sections}
    return settings(folder, base, consistency=few, **sections)


@pytest.mark.parametrize("stage", STAGES)
def test_each_transformer_learns_the_steps_that_its_pipeline_makes_with_it(tmp_path, wan_bases, stage, monkeypatch):
    part, own = STAGES[stage]
    made = recipe(staged(tmp_path, wan_bases["two stages"], stage))
    assert made.backbone.part == part and made.own_steps == own and made.goes_beyond == (stage == "high_noise")
    phase = made.phases()[0]
    phase.setup({})
    assert (len(phase.teachers()), made.frozen_models) == ((1, 2) if stage == "high_noise" else (0, 1))
    monkeypatch.setattr(phase, "flow_loss", lambda model, batch, noise, sigma, texts: (batch, {"sigma": sigma}))
    several = {"latents": torch.zeros(40, 8, 1, 1, 1), "caption": ["a red circle"] * 40}
    drawn, _ = phase.loss(nn.Module(), several, Generators(places(40)))
    assert drawn["begin"].bincount(minlength=16).nonzero().flatten().tolist() == [4 * number for number in own]


def test_a_validation_asks_no_other_process(tmp_path, wan_bases, monkeypatch):
    """Each measures clips of its own, and a process that has none left would be waited for."""
    made = recipe(staged(tmp_path, wan_bases["two stages"], "high_noise"))
    phase = made.phases()[0]
    model, asked = phase.setup({}), []
    monkeypatch.setattr(type(made.process), "any", lambda self, flag: asked.append(flag) or flag)
    monkeypatch.setattr(made.backbone, "velocity", lambda called, shown, *more: torch.zeros_like(shown))
    x, texts = torch.zeros(2, 8, 1, 2, 2), made.flowing.texts(["a red circle"] * 2)
    batch = {"scale": torch.full((2,), 2.0), "latents": x}
    for training in (True, False):
        asked.clear()
        phase._velocity(model.train(training), x, torch.full((2,), 0.5), texts, batch)
        assert asked == ([False, True] if training else [])


@pytest.mark.parametrize("stage", STAGES)
def test_the_end_of_a_step_across_the_boundary_is_of_the_other_transformer(tmp_path, wan_bases, stage, monkeypatch):
    """Velocities that tell who made them: 2 above the boundary, and below it 5 with guidance from the other one."""
    made = recipe(staged(tmp_path, wan_bases["two stages"], stage))
    phase = made.phases()[0]
    model = phase.setup({})
    nothing = phase.nothing()["states"]

    def velocity(called, shown, sigma, texts, conditions):
        if called is not phase._beyond:
            return torch.full_like(shown, 2.0)
        empty = torch.tensor([float(torch.equal(text["states"], nothing)) for text in texts])
        return torch.full_like(shown, 5.0) - empty.view(-1, 1, 1, 1, 1)  # the guidance of 2 makes 5 + 1 * (5 - 4)

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    x, levels, first = torch.zeros(2, 8, 1, 2, 2), torch.tensor(made.levels), made.own_steps.start
    begin = torch.tensor([4 * first, 4 * first + 4])
    texts = made.flowing.texts(["a red circle"] * 2)
    there = phase._led(model, x, texts, {"scale": torch.full((2,), 2.0), "latents": x}, begin, 4)
    steps = levels[1:] - levels[:-1]
    for number, start in enumerate(begin.tolist()):
        speeds = [6.0 if stage == "high_noise" and levels[start + n] < 0.875 else 2.0 for n in range(4)]
        wanted, last = 0.0, None
        for n, speed in enumerate(speeds):
            step = steps[start + n]
            mean = speed if last is None else speed + step / (2 * last[1]) * (speed - last[0])
            wanted, last = wanted + float(step * mean), (speed, step)
        assert there[number].unique().tolist() == pytest.approx([wanted], rel=1e-5)
    assert stage == "low_noise" or 6.0 in speeds


def test_both_transformers_make_a_video_in_few_steps(tmp_path, wan_bases):
    """Each trained in a run of its own; the pipeline gives each the steps that it learned."""
    base, files = wan_bases["two stages"], []
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        result = run("consistency", staged(tmp_path / stage, base, stage))
        files.append(Path(result["lora"]).parent)
        rows = [json.loads(line) for line in (tmp_path / stage / "run" / "log.jsonl").read_text().splitlines()]
        assert any("validation_closed" in row for row in rows)
    pipe = WanPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    for name, part in (("transformer", pipe.transformer), ("transformer_2", pipe.transformer_2)):
        part.register_forward_pre_hook(
            lambda module, given, kwargs, name=name: seen.append((name, float(kwargs["timestep"].flatten()[0]))),
            with_kwargs=True,
        )
    with vidaccel.guidance_free(pipe, files):
        size = {"num_frames": 5, "height": 32, "width": 48}
        video = pipe("a red circle", guidance_scale=2.0, num_inference_steps=4, output_type="latent", **size).frames
    assert video.isfinite().all()
    assert [name for name, _ in seen] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert [level for _, level in seen] == pytest.approx([1000, 937.5, 2500 / 3, 625])


@pytest.mark.parametrize(
    ("stage", "few", "words"),
    [
        ("low_noise", {"steps": 1}, "none of the 1 steps begins at a noise level of .* low_noise names, 0 to 0.875"),
        ("low_noise", {"own_states": 0.5}, "own_states is for model.stage high_noise"),
    ],
)
def test_stages_that_do_not_fit(tmp_path, wan_bases, stage, few, words):
    with pytest.raises(ConfigError, match=words):
        recipe(staged(tmp_path, wan_bases["two stages"], stage, consistency=few))


@pytest.mark.parametrize("kind", ["first frame", "timestep for each token"])
def test_a_first_frame_stays(tmp_path, wan_bases, kind):
    """Of models that start from one, it is given or is a part of the latents, in all that the flow comes to."""
    more = {"first_frame": True} if kind == "timestep for each token" else {}
    made = recipe(settings(tmp_path, wan_bases[kind], model=more))
    phase = made.phases()[0]
    phase.clips()
    model = phase.setup({}).train()
    given = {}
    made.measured(made.flowing).mean(lambda batch, rng: given.update(batch) or {}, 1, made.process)
    loss, _ = phase.loss(model, given, Generators(places(1)))
    loss.backward()
    assert loss > 0 and model.beta_embedder.linear.weight.grad.any()
    if kind == "timestep for each token":
        given |= {"scale": torch.tensor([2.0])}
        latents = given["latents"]
        noise, nothing = torch.randn_like(latents), [phase.nothing()]
        found = phase._student(model, noise, nothing, given, torch.tensor([2]))
        assert torch.equal(found[:, :, 0], latents[:, :, 0]) and not torch.equal(found[:, :, 1], latents[:, :, 1])


# -- runs --------------------------------------------------------------------------------------------------------------


def test_training_closes_the_gap(tmp_path):
    """Of the built-in model: 0 of what few steps lose at the start, and more later."""
    more = {
        "model": {"base": "demo-dc", "merge_text_padding": True},
        "data": {"sizes": [{"frames": 8, "height": 64, "width": 64}], "clips": 24},
        "lora": {"rank": 24, "alpha": 24},
        "validation": {"clips": 4, "prompts": []},
        "train": {"steps": 25, "learning_rate": 1e-3, "lr_scheduler": "cosine", "batch_size": 4},
        "consistency": {
            "teacher": "own",
            "teacher_steps": 4,
        },
    }
    file = settings(tmp_path, Path("demo-dc"), **more)
    start = recipe(file).phases()[0]
    start.clips()
    before = start.validate(start.setup({}).eval(), tmp_path, 0)
    run("consistency", file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    after = next(line for line in reversed(lines) if any("closed" in key for key in line))
    after = {key.removeprefix("validation_"): value for key, value in after.items()}
    assert abs(before["closed"]) < 1e-4 and after["closed"] > 0.3, (before, after)


def test_an_interrupted_run_ends_bit_equal(tmp_path, text_base, teacher, stop_after):
    few = {"teacher": str(teacher), "own_states": 0.5}
    found = []
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        file = settings(tmp_path / name, text_base, consistency=few, train={"ema_decay": 0.9}, **TAUGHT)
        if name == "resumed":
            stop_after(1)
            with pytest.raises(Stopped):
                run("consistency", file)
        run("consistency", file, resume="latest" if name == "resumed" else None)
        found.append(load_file(tmp_path / name / "run" / "phases" / "train.safetensors"))
    assert found[0].keys() == found[1].keys() and found[0][KEY].any()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_checkpointed_blocks_in_half_precision(tmp_path, text_base, teacher):
    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    file = settings(
        tmp_path, text_base, loop={"mixed_precision": "bf16", "gradient_checkpointing": True}, model=half,
        consistency={"teacher": str(teacher)}, **{**TAUGHT, "lora": {**TAUGHT["lora"], "file_dtype": "float16"}},
    )  # fmt: skip
    weights = load_file(run("consistency", file)["lora"])
    assert weights.pop(KEY).any() and {value.dtype for value in weights.values()} == {torch.float16}


def test_the_file_is_sampled_as_it_was_trained(finished, text_base):
    """By `guidance_free`, in its steps, to the videos of the validation; the header says which steps and guidance."""
    folder, result = finished
    with safe_open(result["lora"], "pt") as file:
        facts = json.loads(file.metadata()["vidaccel"])
    assert facts["recipe"] == "consistency"
    assert facts["guidance_free"] == {"min_scale": 2.0, "max_scale": 2.0, "gated": False}
    assert facts["few_steps"] == {"sigmas": [1.0, 0.75], "objective": "segments", "teacher_steps": 3}
    made = recipe(folder / "a.yaml")
    phase = made.phases()[0]
    trained = phase.setup(load_file(folder / "run" / "phases" / "train.safetensors")).eval()
    pipe = WanPipeline.from_pretrained(text_base)
    pipe.set_progress_bar_config(disable=True)
    text = made.flowing.texts(["a red circle"])
    noise = torch.randn(1, 8, 2, 4, 6)
    wanted = phase._student(trained, noise, text, {"latents": noise, "scale": torch.tensor([2.0])}, torch.tensor([2]))
    with vidaccel.guidance_free(pipe, result["lora"]):
        found = pipe(
            prompt_embeds=made.backbone.pad(text), latents=noise, num_frames=5, height=32, width=48,
            num_inference_steps=2, guidance_scale=2.0, output_type="latent",
        ).frames  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_an_adapter_is_gone_on_from(finished, tmp_path, text_base, teacher):
    start = str(Path(finished[1]["lora"]).parent)
    made = recipe(settings(tmp_path, text_base, lora={"start": start}))
    trained = load_file(finished[0] / "run" / "phases" / "train.safetensors")
    named = dict(made.transformer().named_parameters())
    assert all(torch.allclose(named[name], value, atol=1e-6) for name, value in trained.items())
    with pytest.raises(ConfigError, match="consistency.teacher: .* is of the recipe consistency: give one of gft"):
        recipe(settings(tmp_path, text_base, consistency={"teacher": start}))
    with pytest.raises(ConfigError, match='unconditional is "blurry", and the LoRA in lora.start, .* away from ""'):
        recipe(settings(tmp_path, text_base, lora={"start": start}, flow={"unconditional": "blurry"}))


def test_the_folder_of_a_run_as_the_teacher(tmp_path, text_base, teacher, caplog):
    earlier = tmp_path / "earlier"
    (earlier / "adapter").mkdir(parents=True)
    file = shutil.copy(teacher, earlier / "adapter" / FILE)
    with caplog.at_level("INFO"):
        made = recipe(settings(tmp_path, text_base, consistency={"teacher": str(earlier)}, **TAUGHT))
        assert made.inputs()["consistency.teacher"] == file_identity(file)
    told = f"{earlier} is the folder of a training: its adapter/{FILE} is used."
    assert caplog.messages.count(told) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("consistency.steps=0", "steps is 0: it must be at least 1"),
        ("consistency.teacher_steps=1", "teacher_steps is 1: it must be at least 2"),
        ("consistency.max_guidance_scale=1.5", "max_guidance_scale is 1.5, below guidance_scale 2"),
        ("consistency={objective: consistency, own_states: 0.5}", "own_states is for the objective segments"),
        ("model.stage=high_noise", "validation.prompts are of no use with model.stage high_noise"),
        ("flow.density=uniform", "are of no use: the noise levels are those of the steps"),
        ("flow.min_level=0.1", "flow.min_level and flow.max_level are of no use here"),
        ("flow.guidance_preserving=3", "guidance comes from the teacher"),
        ("validation.negative_prompt=blurry", "set flow.unconditional to it"),
        ("validation.guidance_scale=5", "guidance_scale is 5, and the training has 2 to 2"),
        ("validation.steps=4", "validation.steps is 4, and consistency.steps 2"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, text_base, override, words):
    with pytest.raises(ConfigError, match=words):
        run("consistency", settings(tmp_path, text_base), [override])
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_teacher_of_its_own(tmp_path, text_base):
    with pytest.raises(ConfigError, match=r"teacher is own: .* no adapter of its own \(transformer/guidance_free.safe"):
        recipe(settings(tmp_path, text_base, consistency={"teacher": "own"}))


@pytest.mark.parametrize(
    ("facts", "more", "words"),
    [
        ({"guidance_free": {"max_scale": 1.5, "gated": True}}, {}, "guidance_scale is 2, and .* was trained up to 1.5"),
        ({"unconditional": "blurry"}, {}, 'flow.unconditional is "", and .* turns away from "blurry": set that'),
        ({"base_hash": "0123"}, {}, "has other weights: give the base"),
        ({}, {"lora": {"rank": 3, "targets": ["attn1.to_q"]}}, "the LoRA in consistency.teacher has 2: set that"),
        (
            {"guidance_free": {"max_scale": 6.0, "gated": False, "train": "full"}},
            {},
            "all weights of .* were trained, and a LoRA is needed",
        ),
    ],
)
def test_teachers_that_do_not_fit(tmp_path, text_base, facts, more, words):
    transformer = WanTransformer3DModel.from_pretrained(text_base, subfolder="transformer")
    file = write_adapter(tmp_path, text_base, transformer, frequencies=256, **{"unconditional": "", **facts})
    with pytest.raises(ConfigError, match=words):
        recipe(settings(tmp_path, text_base, consistency={"teacher": str(file)}, **{**TAUGHT, **more}))
