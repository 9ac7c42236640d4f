"""Recipe `sla`: what is trained and written, on real Wan pipelines at tiny sizes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from lora_runs import recipe, write
from safetensors.torch import load_file, safe_open
from torch import nn

import vidaccel
from vidaccel import SLA
from vidaccel.generation.errors import BadInput
from vidaccel.generation.levers.adapter_places import model_note
from vidaccel.generation.models.inspected import DEFAULTS_FILE, inspect_model
from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.recipes.sla import SparseLinear
from vidaccel.lora.trainer import Diverged, Stopped
from vidaccel.pipelines.acceleration.sla_weights import TrainedSLA, names_in, read_config
from vidaccel.pipelines.files.run_folder import FILE

TOKENS = 12  # of the clips: 3 key blocks, of which one is read
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")


def settings(folder: Path, base: Path, weights: str = "full", **sections) -> Path:
    sla = {"train": weights, "topk": 0.34, "block_q": 4, "block_k": 4, **sections.pop("sla", {})}
    file = write(folder, base, recipe="sla", sla=sla, **sections)
    content = json.loads(file.read_text())
    if weights == "full":
        del content["lora"]
    file.write_text(json.dumps(content))
    return file


def places(count: int) -> list[Place]:
    return [Place(0, number, count, number) for number in range(count)]


def batch(count: int = 2) -> dict:
    return {"latents": torch.randn(count, 8, 2, 4, 6), "caption": ["a red circle"] * count}


def given() -> dict:
    """What a transformer is called with."""
    shapes = {"hidden_states": (1, 8, 2, 4, 6), "encoder_hidden_states": (1, 5, 64)}
    return {"timestep": torch.full((1,), 500.0), **{name: torch.randn(shape) for name, shape in shapes.items()}}


def trained_model(folder: Path):
    """The transformer of a finished run with its projections, as the trainer had it, and its method at work."""
    made = recipe(folder / "a.yaml")
    return made.phases()[0].setup(load_file(folder / "run" / "phases" / "train.safetensors")).eval()


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request, tmp_path_factory, text_base) -> tuple[str, Path, dict]:
    folder, told = tmp_path_factory.mktemp("finished"), []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(listener)
    result = run("sla", settings(folder, text_base, request.param))
    logging.getLogger("diffusers").removeHandler(listener)
    assert not [text for text in told if "cannot be saved" in text]  # it is copied
    return request.param, folder, result


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("loss", ["white_box", "flow"])
def test_the_loss_is_against_the_dense_base_or_the_flow(tmp_path, text_base, monkeypatch, train, loss):
    made = recipe(settings(tmp_path, text_base, train, sla={"loss": loss}, flow={"caption_dropout": 0.0}))
    phase: SparseLinear = made.phases()[0]
    model, seen = phase.setup({}), []
    start = made.backbone.transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # as after some steps
                parameter.add_(0.1 * torch.randn_like(parameter))
    own = made.backbone.velocity

    def velocity(model, shown, sigma, texts, conditions):
        out = own(model, shown, sigma, texts, conditions)
        seen.append((out.requires_grad, shown, sigma, texts, out))
        return out

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    noise = torch.ones(2, 8, 2, 4, 6)
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: noise)
    clips = batch()
    value, numbers = phase.loss(model, clips, Generators(places(2)))
    assert not numbers  # the log has the loss once
    assert [entry[0] for entry in seen] == ([False, True] if loss == "white_box" else [True])
    _, shown, sigma, texts, out = seen[-1]
    wanted = noise - clips["latents"]
    if loss == "white_box":
        with torch.no_grad():  # of the files, dense: for the same text, clip and level
            wanted = own(start.eval(), shown, sigma, texts, {})
        torch.testing.assert_close(seen[0][-1], wanted)
    torch.testing.assert_close(value, (out - wanted).square().mean())
    value.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(names_in(LAYERS)) <= trained
    assert ("blocks.0.ffn.net.0.proj.weight" in trained) == (train == "full")
    assert any(".lora_A." in name for name in trained) == (train == "lora")
    phase.close()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_is_trained_and_how_fast(tmp_path, text_base, train):
    made = recipe(settings(tmp_path, text_base, train, sla={"projection_rate": 7.0}))
    phase = made.phases()[0]
    model = phase.setup({})
    for name, parameter in model.named_parameters():
        projection = name in names_in(LAYERS)
        assert parameter.requires_grad == (train == "full" or projection or ".lora_" in name), name
        assert phase.learning_rate_scale(name) == (7.0 if projection else 1.0)
        if projection:
            assert not parameter.any() and parameter.dtype == torch.float32
    phase.close()


def test_layers_that_stay_dense_learn_nothing(tmp_path, text_base):
    result = run("sla", settings(tmp_path, text_base, sla={"dense_layers": 1}))
    names = load_file(Path(result["pipeline"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert [name for name in names if "proj_l" in name] == names_in(LAYERS[1:])[::-1]
    wanted, inputs = trained_model(tmp_path), given()
    pipe = WanPipeline.from_pretrained(result["pipeline"])
    with vidaccel.accelerate(pipe, "sla") as handle, torch.no_grad():
        torch.testing.assert_close(pipe.transformer(**inputs).sample, wanted(**inputs).sample, rtol=1e-4, atol=1e-5)
        assert [record.reason for record in handle.report().records] == ["first layers", ""]


def test_block_sparse_attention_alone_has_no_projections(tmp_path, text_base):
    result = run("sla", settings(tmp_path, text_base, sla={"linear_scope": "none"}))
    names = load_file(Path(result["pipeline"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("proj_l" in name for name in names)
    pipe = WanPipeline.from_pretrained(result["pipeline"])
    with vidaccel.accelerate(pipe, "sla") as handle:
        assert handle.method == SLA(topk=0.34, block=(4, 4), linear_scope="none", eps=0.0)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_checkpointed_blocks_have_the_same_gradients(tmp_path, text_base, train):
    """They run again for the gradients, after the dense pass of the teacher, and must be sparse then."""
    found = []
    for checkpointed in (False, True):
        made = recipe(settings(tmp_path, text_base, train, loop={"gradient_checkpointing": checkpointed}))
        phase = made.phases()[0]
        torch.manual_seed(0)
        model = phase.setup({}).train()
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(1)
        loss, _ = phase.loss(model, batch(), Generators(places(2)))
        phase._dense(model, *(torch.zeros(1, 8, 2, 4, 6), torch.ones(1)), [phase.nothing()], {})
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        phase.close()
    assert found[0].keys() == found[1].keys() and set(names_in(LAYERS)) <= found[0].keys()
    assert all(torch.allclose(found[1][name], value, atol=1e-7) for name, value in found[0].items())


def test_training_comes_nearer_to_the_dense_model(tmp_path):
    """On the built-in model, with 1 of 4 key blocks: what `off_dense` says before and after."""
    more = {
        "model": {"base": "demo", "merge_text_padding": True},
        "data": {"sizes": [{"frames": 5, "height": 64, "width": 64}], "clips": 24},
        "validation": {"clips": 4, "prompts": []},
        "train": {"steps": 12, "learning_rate": 3e-4, "batch_size": 4},
        "sla": {"topk": 0.25, "block_q": 8, "block_k": 8},
    }
    file = settings(tmp_path, Path("demo"), **more)
    start = recipe(file).phases()[0]
    start.clips()
    before = start.validate(start.setup({}).eval(), tmp_path, 0)["off_dense"]
    start.close()
    run("sla", file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    after = next(line["validation_off_dense"] for line in reversed(lines) if "validation_off_dense" in line)
    assert 0 < after < 0.95 * before


# -- runs --------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_bit_equal(finished, tmp_path, text_base, stop_after):
    train, folder, _ = finished
    file = settings(tmp_path, text_base, train)
    stop_after(1)
    with pytest.raises(Stopped):
        run("sla", file)
    run("sla", file, resume="latest")
    straight, resumed = (load_file(f / "run" / "phases" / "train.safetensors") for f in (folder, tmp_path))
    assert straight.keys() == resumed.keys() and straight[names_in(LAYERS)[0]].any()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_weights_of_an_ema_are_the_result(tmp_path, text_base):
    result = run("sla", settings(tmp_path, text_base), ["train.ema_decay=0.5"])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    ema, weights = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "weights"))
    written = load_file(Path(result["pipeline"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert ema.keys() == weights.keys() == written.keys()
    name = names_in(LAYERS)[0]
    assert torch.equal(written[name], ema[name]) and not torch.equal(written[name], weights[name])


def test_half_precision_keeps_what_is_trained_in_float32(tmp_path, text_base):
    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    more = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    result = run("sla", settings(tmp_path, text_base, model=half, loop=more))
    written = load_file(Path(result["pipeline"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written[names_in(LAYERS)[0]].dtype == torch.float32
    assert written["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, text_base):
    with pytest.raises(Diverged, match="the loss of phase train is nan|a weight of phase train is NaN or infinite"):
        run("sla", settings(tmp_path, text_base), ["train.learning_rate=1e30", "train.steps=4"])


# -- the result --------------------------------------------------------------------------------------------------------


def test_the_result_is_what_was_trained(finished, text_base):
    """To the velocity, in stock diffusers' class with `accelerate`; and gone without a trace."""
    train, folder, result = finished
    wanted = trained_model(folder)
    if train == "full":
        pipe, adapter = WanPipeline.from_pretrained(result["pipeline"]), ()
        assert read_config(result["pipeline"]).blocks == {TOKENS: 1}
    else:
        pipe, adapter = WanPipeline.from_pretrained(text_base), result["lora"]
        with safe_open(result["lora"], "pt") as file:
            facts = json.loads(file.metadata()["vidaccel"])
        assert facts["recipe"] == "sla" and TrainedSLA.stated(facts["sla"], "").blocks == {TOKENS: 1}
    inputs = given()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with torch.no_grad():
        plain = pipe.transformer(**inputs).sample
        handle = vidaccel.accelerate(pipe, "sla", adapter=adapter)
        made = pipe.transformer(**inputs).sample
        torch.testing.assert_close(made, wanted(**inputs).sample, rtol=1e-4, atol=1e-5)
        assert (made - plain).abs().max() > 1e-4
        assert handle.report().mean_density() == pytest.approx(1 / 3)
        handle.remove()
        assert torch.equal(pipe.transformer(**inputs).sample, plain)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_the_folder_of_a_run_is_its_model_with_the_size_of_the_training(finished):
    train, folder, result = finished
    if train == "lora":
        with pytest.raises(BadInput, match=r"whose result is an adapter, .*run/adapter: give that beside the model"):
            inspect_model(str(folder / "run"))
        return
    facts = inspect_model(str(folder / "run"))
    assert facts.location == result["pipeline"] == str(folder / "run" / "pipeline")
    assert model_note(facts) == f"{folder / 'run'} is the folder of a training: its pipeline is used."
    made = facts.call_defaults()
    assert [made[name] for name in ("frames", "height", "width", "guidance_scale")] == [5, 32, 48, 2]


def test_what_the_base_states_of_steps_and_guidance_stays(tmp_path, text_base):
    """A model that was distilled to few steps stays one."""
    base = shutil.copytree(text_base, tmp_path / "base")
    (base / DEFAULTS_FILE).write_text(json.dumps({"frames": 81, "steps": 4, "guidance_scale": 1.0}))
    sizes = [{"frames": 5, "height": 32, "width": 48}, {"frames": 1, "height": 64, "width": 64}]
    made = recipe(settings(tmp_path, base, data={"sizes": sizes}))
    made.write_defaults(tmp_path)
    written = json.loads((tmp_path / DEFAULTS_FILE).read_text())
    assert written == {"frames": 5, "height": 32, "width": 48, "steps": 4, "guidance_scale": 1.0}


def test_a_lora_is_gone_on_from(tmp_path, text_base):
    first = run("sla", settings(tmp_path, text_base, "lora"))
    start = {"start": first["lora"], "rank": 2}
    model = recipe(settings(tmp_path, text_base, "lora", lora=start)).transformer()
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    named = dict(model.named_parameters())
    assert all(torch.allclose(named[name], value, atol=1e-6) for name, value in trained.items())


def test_the_folder_of_a_run_stands_for_its_model(tmp_path, text_base, trained_and_other, caplog):
    """As the page says; of one that trains an adapter it is refused with what to give."""
    folder = str(Path(trained_and_other[0]).parent)
    with caplog.at_level("INFO"):
        made = recipe(settings(tmp_path, text_base, sla={"start": folder}))
        plain = recipe(write(tmp_path / "plain", Path(folder)))
    assert made.transformer() is not None
    assert made.inputs()["sla.start"] == plain.base_hash
    assert caplog.messages.count(f"{folder} is the folder of a training: its pipeline is used.") == 2
    assert plain.backbone.base == trained_and_other[0] and plain.facts()["base"] == Path(folder).name
    (tmp_path / "other" / "adapter").mkdir(parents=True)
    (tmp_path / "other" / "adapter" / FILE).touch()
    with pytest.raises(ConfigError, match="model.base: .*whose result is an adapter, .*give that beside the model"):
        run("lora", write(tmp_path / "b", tmp_path / "other"))


def test_all_weights_are_gone_on_from_at_another_density(tmp_path, text_base):
    first = run("sla", settings(tmp_path, text_base))["pipeline"]
    further = settings(tmp_path / "further", text_base, sla={"start": first, "topk": 0.67})
    named = dict(recipe(further).transformer().named_parameters())
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert all(torch.equal(named[name], value) for name, value in trained.items())
    teacher = recipe(further).backbone.transformer().state_dict()
    base = WanPipeline.from_pretrained(text_base).transformer.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in base.items())
    result = read_config(run("sla", further)["pipeline"])
    assert (result.blocks, result.base) == ({TOKENS: 2}, read_config(first).base)


@pytest.fixture(scope="module")
def trained_and_other(tmp_path_factory, text_base) -> tuple[str, str]:
    """A model that was trained for SLA, and its base with other weights."""
    folder = tmp_path_factory.mktemp("trained")
    other = WanPipeline.from_pretrained(text_base)
    torch.nn.init.normal_(other.transformer.proj_out.weight)
    other.save_pretrained(folder / "other")
    return run("sla", settings(folder, text_base))["pipeline"], str(folder / "other")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sla": {"linear_scope": "none"}},
            "sla.start was trained with linear_scope all, and sla.linear_scope is none",
        ),
        ({"sla": {"feature_map": "elu"}}, "sla.start was trained with feature_map softmax"),
        ({"sla": {"start": "BASE"}}, "was not trained for SLA: leave it out, or give another"),
        ({"sla": {"start": "nowhere at all"}}, "sla.start: nowhere at all is no folder here"),
        ({"sla": {"start": None}, "model": {"base": "TRAINED"}}, "was trained for SLA, and has no dense attention"),
        ({"model": {"base": "OTHER"}}, "has other weights: give the base that it was trained from"),
    ],
)
def test_what_cannot_be_gone_on_from(tmp_path, text_base, trained_and_other, changes, words):
    first, other = trained_and_other
    places = {"BASE": str(text_base), "TRAINED": first, "OTHER": other}
    file = settings(tmp_path / "further", text_base, sla={"start": first})
    content = json.loads(file.read_text())
    for section, values in changes.items():
        content[section] |= {name: places.get(value, value) for name, value in values.items()}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        run("sla", file)
    assert not (tmp_path / "further" / "run").exists()


def test_a_lora_with_another_feature_map_is_not_gone_on_from(tmp_path, text_base):
    first = run("sla", settings(tmp_path, text_base, "lora"))
    start = {"start": first["lora"], "rank": 2}
    with pytest.raises(
        ConfigError, match=r"lora\.start was trained with feature_map softmax, and sla\.feature_map is elu"
    ):
        run("sla", settings(tmp_path / "further", text_base, "lora", lora=start, sla={"feature_map": "elu"}))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sla.start=runs/other\nsla.train=lora", 'start is runs/other, of use only with train "full"'),
        ("sla.topk=0", "topk is 0.0: it must be above 0"),
        ("sla.topk=0.3", r"sla.topk is 0.3, of the 3 key blocks of 12 tokens less than one: give 0.3333 or more"),
        ("sla.block_k=0", "block_k is 0: it must be at least 1"),
        ("sla.linear_scope=some", "linear_scope is"),
        ("sla.skip=0.1", 'skip is 0.1, of use only with linear_scope "marginal"'),
        ("sla.dense_layers=2", "sla.dense_layers is 2, all 2 of the model"),
        ("sla.backend=fast", "sla: unknown backend 'fast'"),
        ("attention.method=radial", "attention.method is radial: this recipe trains with SLA"),
        ("lora.rank=8", 'lora is of use only with sla.train "lora"'),
        ("model.quantise=int8", 'model.quantise is int8, whose weights stay frozen: set sla.train to "lora"'),
        ("train.optimizer=muon", "train.optimizer is muon: with a sla.projection_rate of its own, use adamw"),
        ("flow.guidance_preserving=3", "guidance_preserving is of use only with sla.loss flow"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, text_base, override, words):
    with pytest.raises(ConfigError, match=words):
        run("sla", settings(tmp_path, text_base), override.split("\n"))
    assert not (tmp_path / "run").exists()
