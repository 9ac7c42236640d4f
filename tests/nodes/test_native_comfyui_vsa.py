"""*Apply VSA* on ComfyUI's own Wan model in this process, against the same weights in diffusers.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from fastwan_models import LAYERS, WIDTH, write_fastwan
from native_comfyui import defaults, management, nodes, patched, tiny
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import vidaccel
from vidaccel import SVG2, VSA, DMDScheduler
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.few_steps import convert_fastwan

LATENT = (1, 16, 7, 12, 20)  # 2x2x3 cubes of 7x6x10 tokens, of which those at the edges are smaller
SIGMAS = [1.0, 0.757, 0.522, 0.0]  # as the workflow has them


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_fastwan(tmp_path_factory.mktemp("published") / "FastWan", shards=2)


@pytest.fixture(scope="module")
def file(published, tmp_path_factory):
    return convert_fastwan(published, tmp_path_factory.mktemp("native") / "fastwan.safetensors")


@pytest.fixture(scope="module")
def model(file):
    return load(file)


def load(file, **options):
    """*Load Diffusion Model*."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(file), model_options=options)


def applied(model, place, **inputs):
    node = nodes()["VidaccelApplyVSA"]
    return node.execute(model, **(defaults(node) | {"path": str(place), "min_tokens": 0} | inputs)).result


def text(batch: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, 7, 4096, generator=torch.Generator().manual_seed(seed))


def noise(seed: int = 0, shape=LATENT) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, sigmas=SIGMAS, sampler: str = "lcm", cfg: float = 1.0, start: torch.Tensor | None = None):
    """SamplerCustom's work; the latent as the model has it."""
    import comfy.sample
    import comfy.samplers

    start = noise() if start is None else start
    prompts = [[[text(seed=seed), {}]] for seed in (5, 6)]
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object(sampler),
            torch.tensor(sigmas),
            *prompts,
            torch.zeros(start.shape),
            seed=3,
            disable_pbar=True,
        )
        return model.model.process_latent_in(out)


class SameNoise(DMDScheduler):
    """Draws what ComfyUI's sampler does: from one generator for the whole run, with the next seed on a CPU.

    `levels` are those of the steps; None for the scheduler's own.
    """

    levels = None

    def _table(self, steps):
        levels, timesteps = super()._table(steps)
        return self.levels or levels, timesteps

    def _new_noise(self, sample, index, generator):
        if index == 0:
            self.own = torch.Generator().manual_seed(3 + 1)
        return torch.randn(sample.shape, generator=self.own)


def in_diffusers(published, levels: list[float] | None = SIGMAS, **method) -> torch.Tensor:
    """The same video by diffusers' pipeline and our acceleration of it, of the same noise levels unless said."""
    transformer = WanTransformer3DModel.from_pretrained(published, subfolder="transformer", dtype=torch.float32)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": SameNoise()}
    pipe = WanPipeline(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.levels = levels
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "num_frames": 25, "height": 96, "width": 160}

    def video():
        return pipe(prompt_embeds=text(), latents=noise(), output_type="latent", **call).frames

    if not method:
        return video()
    with vidaccel.accelerate(pipe, VSA(**method), base=str(published)):
        return video()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_the_file_loads_without_a_word_and_has_the_gates_beside_it(file, caplog):
    with caplog.at_level(logging.INFO):
        loaded = load(file)
    assert type(loaded.model.diffusion_model).__name__ == "WanModel"
    assert loaded.model.diffusion_model.dim == WIDTH and len(loaded.model.diffusion_model.blocks) == LAYERS
    assert not any(word in caplog.text for word in ("unexpected", "missing", "left over"))


def test_what_is_written_beside_the_weights_would_be_told_as_unexpected_among_them(file, tmp_path, caplog):
    """Why the gates have names of their own."""
    among = {name.removeprefix("vsa.").removeprefix("model.diffusion_model."): x for name, x in load_file(file).items()}
    save_file(among, tmp_path / "among.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path / "among.safetensors")
    assert "unet unexpected" in caplog.text
    assert sample(applied(loaded, tmp_path / "among.safetensors")[0]).isfinite().all()  # found there all the same


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_three_steps_are_those_of_the_pipeline(published, file, model, density):
    clone, session = applied(model, file, density=0.0 if density == 0.2 else density)
    made, expected = sample(clone), in_diffusers(published, density=density)
    assert distance(made, expected) < 1e-4
    # Without gates, and with fewer cubes, videos are far from that.
    assert distance(sample(model), expected) > 0.1 and distance(sample(model), in_diffusers(published)) < 1e-4
    assert distance(in_diffusers(published, density=0.2), in_diffusers(published, density=1.0)) > 0.02
    report = session.report()
    assert {record.reason for record in report.records} == {""} and len(report.records) == 3 * LAYERS
    assert report.mean_density() == pytest.approx(density, abs=0.15)  # 3 of 12 cubes
    assert report.config["density"] == density and report.config["cube"] == (4, 4, 4)


def test_these_sigmas_are_nearest_to_the_scheduler_of_the_distillation(published, file, model):
    """ComfyUI tells a model 1000 times the level, and FastVideo a timestep whose level is the next of a table: not both
    can be met, and the model hears the timestep more than it sees so little noise."""
    scheduler = DMDScheduler()
    scheduler.set_timesteps(3)
    assert torch.tensor(SIGMAS[:3]).mul(1000).equal(scheduler.timesteps)
    assert torch.tensor(SIGMAS).sub(scheduler.sigmas).abs().max() < 3e-4
    clone, _ = applied(model, file)
    expected = in_diffusers(published, levels=None, density=0.2)
    by_timestep, by_level = (
        distance(sample(clone, sigmas), expected) for sigmas in (SIGMAS, scheduler.sigmas.tolist())
    )
    assert by_timestep < 0.01 < by_level


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_other_samplers_make_something_else(published, file, model, sampler):
    clone, _ = applied(model, file)
    assert distance(sample(clone, sampler=sampler), in_diffusers(published, density=0.2)) > 0.05


@pytest.mark.parametrize("place", ["pipeline", "transformer", "converted folder"])
def test_gates_are_read_from_what_people_have(published, file, model, place, tmp_path):
    where = {"pipeline": published, "transformer": published / "transformer"}.get(place)
    if where is None:
        source = shutil.copytree(published, tmp_path / "whole")
        index = source / "model_index.json"
        for name in ("vae", "text_encoder", "tokenizer"):
            (source / name).mkdir()
            index.write_text(index.read_text().replace("{", f'{{"{name}": [null, null],', 1))
        where = convert_fastwan(source, tmp_path / "converted", density=0.3)
    clone, session = applied(model, where)
    expected, _ = applied(model, file, density=0.3 if place == "converted folder" else 0.2)
    assert sample(clone).equal(sample(expected))
    unstated = [note for note in session.report().notes if "do not say what the gates were trained for" in note]
    assert bool(unstated) == (place != "converted folder")


def test_dense_calls_keep_the_coarse_branch(file, model):
    """Short videos, where all stays dense but for what the model learned."""
    short, session = applied(model, file, min_tokens=10_000)
    every, _ = applied(model, file, density=1.0)
    assert distance(sample(short), sample(every)) < 1e-4 < distance(sample(short), sample(model))
    assert set(session.report().dense_reasons()) == {"min_tokens 10000, above the video's 420 tokens"}


def test_the_model_that_comes_in_stays_as_it_is(file, model):
    before = sample(model)
    one, _ = applied(model, file)
    other, _ = applied(model, file, density=0.6)
    first, second = sample(one), sample(other)
    assert not first.equal(second)
    assert sample(one).equal(first) and sample(model).equal(before) and sample(other.clone()).equal(second)
    # Neither after a pass of which no sampler says that it has ended.
    options = {"wrappers": {kind: dict(of) for kind, of in one.wrappers.items()}}
    with torch.no_grad():
        one.model.apply_model(noise(), torch.tensor([0.5]), c_crossattn=text(), transformer_options=options)
    blocks = model.model.diffusion_model.blocks
    assert not any(module._forward_pre_hooks for module in blocks.modules())
    assert not any("to_gate" in name for name in model.model.state_dict())


def test_a_sampling_that_fails_leaves_nothing_behind(file, model):
    clone, _ = applied(model, file)

    def stop(func, *args, **kwargs):
        raise RuntimeError("stopped")

    clone.model_options["transformer_options"]["optimized_attention_override"] = stop
    with pytest.raises(RuntimeError, match="stopped"):
        sample(clone)
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_two_prompts_in_one_batch_are_those_of_two_batches(file, model, monkeypatch):
    clone, _ = applied(model, file)
    together = sample(clone, cfg=3.0)
    monkeypatch.setattr(management, "get_free_memory", lambda *args, **kwargs: 0)  # each prompt by itself
    apart = sample(clone, cfg=3.0)
    assert distance(apart, together) < 1e-4 < distance(together, sample(clone))
    videos = torch.cat([noise(), noise(1)])
    assert (
        distance(sample(clone, start=videos, sigmas=[1.0, 0.0])[1:], sample(clone, start=noise(1), sigmas=[1.0, 0.0]))
        < 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_other_dtypes(file, model, dtype):
    """weight_dtype of *Load Diffusion Model*: gates have the dtype that the model computes in."""
    loaded = load(file, dtype=dtype)
    clone, _ = applied(loaded, file)
    (patcher,) = clone.get_nested_additional_models()
    computes_in = loaded.model.get_dtype_inference()
    assert {x.dtype for x in patcher.model.state_dict().values()} == {computes_in} and computes_in.itemsize > 1
    made, exact = sample(clone), sample(applied(model, file)[0])
    # The file is in bfloat16, and a CPU computes in float32.
    assert made.equal(exact) if dtype == torch.bfloat16 else 0.01 < distance(made, exact) < 0.6


def test_gates_are_loaded_with_the_model_and_cast_as_they_are_needed(file, model, monkeypatch):
    clone, _ = applied(model, file)
    expected = sample(clone)
    (patcher,) = clone.get_nested_additional_models()
    seen, load_models = [], management.load_models_gpu
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, *a, **k: (seen.extend(models), load_models(models, *a, **k))[1]
    )
    sample(clone.clone())
    assert any(each.model is patcher.model for each in seen) and patcher.load_device == model.load_device
    patcher.model.to(torch.bfloat16)  # the numbers in the file are of that dtype, so it loses nothing
    assert sample(clone).equal(expected)


def test_a_model_on_each_gpu(file, model):
    """The second has gates of its own, and hooks that the end of a pass of the first leaves alone."""
    clone, session = applied(model, file)
    (patcher,) = clone.get_nested_additional_models()
    if hasattr(patcher, "deepclone_multigpu"):
        other = patcher.deepclone_multigpu(torch.device("cpu"))
        assert other.model is not patcher.model
        for name, value in patcher.model.state_dict().items():
            assert other.model.state_dict()[name].equal(value)
    one, two = model.model.diffusion_model, load(file).model.diffusion_model
    session.gates.watch(one)
    session.gates.watch(two)
    session.gates.release(one)
    hooks = [[len(block.self_attn._forward_pre_hooks) for block in each.blocks] for each in (one, two)]
    assert hooks == [[0, 0], [1, 1]]
    session.end()
    assert not any(module._forward_pre_hooks for module in two.modules())


@pytest.mark.parametrize("first", ["lora", "vsa"])
def test_beside_a_lora(file, model, first):
    lora = {}
    for name, shape in (("lora_A", (2, WIDTH)), ("lora_B", (WIDTH, 2))):
        lora[f"diffusion_model.blocks.0.self_attn.v.{name}.weight"] = noise(len(name), shape)

    def with_lora(one):
        return comfy.sd.load_lora_for_models(one, None, lora, 0.5, 0.0)[0]

    import comfy.sd

    made = applied(with_lora(model), file)[0] if first == "lora" else with_lora(applied(model, file)[0])
    expected = with_lora(model)
    expected, _ = applied(expected, file)
    assert sample(made).equal(sample(expected)) and not sample(made).equal(sample(applied(model, file)[0]))


def test_what_another_node_makes_of_a_layer_is_followed(file, model):
    """KJNodes and others replace `self_attn.forward`, before or after."""

    def replaced(one, factor: float):
        clone = one.clone()
        key = "diffusion_model.blocks.1.self_attn.forward"
        inner = clone.get_model_object(key)
        clone.add_object_patch(key, lambda *args, **kwargs: factor * inner(*args, **kwargs))
        return clone

    expected = sample(applied(model, file)[0])
    for factor in (1.0, 0.5):
        after, before = replaced(applied(model, file)[0], factor), applied(replaced(model, factor), file)[0]
        assert sample(after).equal(sample(before))
        assert sample(after).equal(expected) == (factor == 1.0)


def test_a_layer_that_cannot_be_followed_is_an_error(file, model):
    clone, _ = applied(model, file)
    block = model.model.diffusion_model.blocks[1]

    def around(*args, **kwargs):
        return type(block.self_attn).forward(block.self_attn, *args, **kwargs)

    class Bypass(torch.nn.Module):
        def __call__(self, *args, **kwargs):  # no hook of the layer is called
            return around(*args, **kwargs)

    clone.add_object_patch("diffusion_model.blocks.1", _with_attention(block, Bypass()))
    with pytest.raises(
        ValueError, match=r"Sparse Attention \(VSA\): block 1 computes its self-attention in a way that"
    ):
        sample(clone)


def _with_attention(block, attention):
    """A block of the same weights with another self-attention, where hooks of the former are not called."""
    made = object.__new__(type(block))
    made.__dict__.update(block.__dict__)
    made._modules = {**block._modules, "self_attn": attention}
    return made


def test_a_compiled_model(file, model):
    clone, session = applied(model, file)
    eager = sample(clone, sigmas=[1.0, 0.5, 0.0])
    compiled = clone.clone()
    compiled.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    torch.testing.assert_close(sample(compiled, sigmas=[1.0, 0.5, 0.0]), eager, rtol=1e-3, atol=1e-3)
    assert not session.report().notes or "no attention call" not in " ".join(session.report().notes)


def test_training_with_blocks_that_run_twice(file, monkeypatch):
    monkeypatch.setattr(management, "in_training", True, raising=False)
    found = []
    for twice in (False, True):
        clone, session = applied(load(file), file)
        blocks = clone.model.diffusion_model.blocks
        clone.model.diffusion_model.requires_grad_(True)
        for block in blocks if twice else ():
            block.forward = _checkpointed(block.forward)
        options = {"wrappers": {kind: dict(of) for kind, of in clone.wrappers.items()}}
        out = clone.model.apply_model(noise(), torch.tensor([0.5]), c_crossattn=text(), transformer_options=options)
        out.square().mean().backward()
        found.append([block.self_attn.q.weight.grad for block in blocks])
        session.end()
        assert not any(module._forward_pre_hooks for module in blocks.modules())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_one_method_a_model(file, model):
    clone, _ = applied(model, file)
    with pytest.raises(ValueError, match="this MODEL has sparse attention already"):
        patched(clone, SVG2(density=0.5))
    with pytest.raises(ValueError, match="this MODEL has sparse attention already"):
        applied(patched(model, SVG2(density=0.5))[0], file)


def test_room_for_the_gates_is_announced(file, model):
    clone, session = applied(model, file)
    sample(clone)
    (told,) = [note for note in session.report().notes if "announced" in note]
    size = 420 * WIDTH * model.model.get_dtype_inference().itemsize
    assert f"{size / 2**20:.1f} MiB, for {LAYERS} sparse layers" in told
    assert "VSA: gates fastwan.safetensors, density 0.2" in report_text(session.news())


def test_what_does_not_fit(file, model, published, tmp_path):
    with pytest.raises(InputError, match="gates: choose the file that Load Diffusion Model has, or give the path"):
        applied(model, "")
    with pytest.raises(InputError, match="gates is gone.safetensors: it is no longer there; there are"):
        applied(model, "", gates="gone.safetensors")
    with pytest.raises(InputError, match="gates: .*nowhere is neither a file nor a folder here"):
        applied(model, tmp_path / "nowhere")
    with pytest.raises(InputError, match="density is 1.5: it lies between 0 and 1, and 0 is that of the training"):
        applied(model, file, density=1.5)
    with pytest.raises(InputError, match="model is empty: connect the MODEL output"):
        applied(None, file)
    more = write_fastwan(tmp_path / "more", num_attention_heads=3)
    with pytest.raises(
        InputError, match="gates: more has gates for 2 layers of 384 channels, and this model has 2 of 256"
    ):
        applied(model, more)
    plain = convert_fastwan(write_fastwan(tmp_path / "plain", gated=False), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match=r"gates: .*plain.safetensors has no gates \(to_gate_compress\)"):
        applied(model, plain)
    _, camera, _ = tiny("wan_camera")
    with pytest.raises(
        InputError, match=r"model is a CameraWanModel: fastwan.safetensors is for Wan 2.1 or 2.2 \(text"
    ):
        applied(camera, file)
