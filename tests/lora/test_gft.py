"""Recipe `gft`: what is trained, on real Wan pipelines at tiny sizes, and against closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanPipeline
from lora_runs import recipe, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import vidaccel
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.recipes.gft import mixture, shares
from vidaccel.lora.trainer import Stopped
from vidaccel.pipelines.guidance_free import GuidanceFreeError
from vidaccel.pipelines.guidance_free.beta import BetaSlot

KEY = "beta_embedder.linear.weight"


def settings(folder: Path, base: Path, **sections) -> Path:
    gft = {"max_scale": 4, **sections.pop("gft", {})}  # gated, as by default
    return write(folder, base, recipe="gft", gft=gft, **sections)


def places(count: int) -> list[Place]:
    return [Place(0, number, count, number) for number in range(count)]


def batch(count: int = 2) -> dict:
    return {"latents": torch.randn(count, 8, 2, 4, 6), "caption": ["a red circle"] * count}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_base) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("gft", settings(folder, text_base))


# -- the loss against closed forms -------------------------------------------------------------------------------------

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5]])
SPREAD = 0.5


def velocities(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E[noise - x0] of a mixture of two Gaussians `MEANS` at x_t, given the component, and not; `[N, 2]`, `[N, 1]`."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    away = x[:, None] - (1 - t)[:, None] * MEANS  # [N, component, 2]
    of_each = ((t - (1 - t) * SPREAD**2) / variance)[:, None] * away - MEANS
    chance = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=-1)
    return of_each[torch.arange(len(x)), c], (chance[..., None] * of_each).sum(1)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize(("loss", "most"), [("white_box", 1e-6), ("data", 0.01)])
def test_the_minimiser_is_the_guided_velocity_of_a_gaussian_mixture(loss, most, scale):
    """At each beta, among all that is linear in x, 1 and both velocities; the error as a share of what 2 changes."""
    generator = torch.Generator().manual_seed(0)
    count = 100_000
    c = torch.randint(2, (count,), generator=generator)
    t, noise = torch.rand(count, 1, generator=generator) * 0.8 + 0.1, torch.randn(count, 2, generator=generator)
    clean = MEANS[c] + SPREAD * torch.randn(count, 2, generator=generator)
    x, flow = (1 - t) * clean + t * noise, noise - clean
    own, without = velocities(x, t, c)
    features = torch.stack([own, without, x, torch.ones_like(x)])
    weights = torch.zeros(4, requires_grad=True)
    beta = torch.full((count,), 1 / scale)
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def error() -> torch.Tensor:
        optimizer.zero_grad()
        made = torch.einsum("f,fnd->nd", weights, features)
        value = (mixture(made, without, beta) - (own if loss == "white_box" else flow)).square().mean()
        value.backward()
        return value

    optimizer.step(error)
    made = torch.einsum("f,fnd->nd", weights.detach(), features)
    guided = without + scale * (own - without)
    assert (made - guided).square().mean() < most * (own - without).square().mean()


@pytest.mark.parametrize("loss", ["white_box", "data"])
def test_the_loss_is_that_of_gft(tmp_path, text_base, monkeypatch, loss):
    """(beta f + (1 - beta) u - v)^2: u and v of the frozen base, or u of the model at beta 1 and v the flow."""
    made = recipe(settings(tmp_path, text_base, gft={"loss": loss, "unguided": 0.0}, flow={"caption_dropout": 0.1}))
    phase, seen = made.phases()[0], []
    model = phase.setup({})
    nothing = phase.nothing()["states"]
    weight = torch.tensor(0.7, requires_grad=True)

    def velocity(model, shown, sigma, texts, conditions):
        off = all(layer.disable_adapters for layer in model.modules() if hasattr(layer, "disable_adapters"))
        conditional = not all(torch.equal(text["states"], nothing) for text in texts)
        seen.append((off, conditional, torch.is_grad_enabled(), phase._told))
        value = (2.0 if conditional else 0.25) if off else weight * (1.0 if conditional else 0.5)
        return value * torch.ones_like(shown)

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: torch.ones(len(self), *shape))
    monkeypatch.setattr(phase, "caption_dropout", 0.0)
    one = {"latents": torch.zeros(1, 8, 1, 2, 2), "caption": ["a red circle"]}
    value, _ = phase.loss(model, one, Generators(places(1)))
    value.backward()
    beta = seen[-1][3].item()
    assert 0.25 <= beta < 1
    without, wanted = (0.25, 2.0) if loss == "white_box" else (0.35, 1.0)
    off = 0.7 * beta + (1 - beta) * without - wanted
    assert value.item() == pytest.approx(off**2, rel=1e-5)
    assert weight.grad.item() == pytest.approx(2 * off * beta, rel=1e-5)
    assert [told is None for *_, told in seen[:-1]] == ([True, True] if loss == "white_box" else [False])
    assert loss == "white_box" or seen[0][3].item() == 1
    assert [entry[:3] for entry in seen] == (
        [(True, True, False), (True, False, False), (False, True, True)]
        if loss == "white_box"
        else [(False, False, False), (False, True, True)]
    )


@pytest.mark.parametrize("gft", [{"gated": False}, {"train": "full"}, {}])
def test_clips_without_a_caption_are_told_beta_1_and_weigh_the_drawn_one(tmp_path, text_base, monkeypatch, gft):
    """As in the published loss, in which they alone teach what guidance turns away from; gated, that is the base."""
    full = {"lora": {"rank": 32, "alpha": None}} if gft.get("train") == "full" else {}
    made = recipe(settings(tmp_path, text_base, gft={"loss": "data", **gft}, flow={"caption_dropout": 0.5}, **full))
    phase, told, drawn = made.phases()[0], [], []
    model, loss = phase.setup({}), phase.flow_loss
    nothing = phase.nothing()["states"]
    weight = torch.tensor(0.7, requires_grad=True)

    def velocity(model, shown, sigma, texts, conditions):
        told.append((phase._told, torch.tensor([torch.equal(text["states"], nothing) for text in texts])))
        return weight * torch.where(told[-1][1], 0.5, 1.0).view(-1, 1, 1, 1, 1) * torch.ones_like(shown)

    def flow_loss(model, batch, *args):
        drawn.append(batch["beta"])
        return loss(model, batch, *args)

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    monkeypatch.setattr(phase, "flow_loss", flow_loss)
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: torch.ones(len(self), *shape))
    eight = {"latents": torch.zeros(8, 8, 1, 2, 2), "caption": ["a red circle"] * 8}
    value, _ = phase.loss(model, eight, Generators(places(8)))
    value.backward()
    (beta_of_u, _), (beta_of_f, dropped) = told
    assert dropped.any() and not dropped.all() and (beta_of_u == 1).all()
    [beta], share = drawn, torch.where(dropped, 0.5, 1.0)
    torch.testing.assert_close(beta_of_f, torch.where(dropped, 1.0, beta) if gft else beta)
    off = beta * 0.7 * share + (1 - beta) * 0.35 - 1
    assert value.item() == pytest.approx(off.square().mean().item(), rel=1e-5)
    assert weight.grad.item() == pytest.approx((2 * off * beta * share).mean().item(), rel=1e-5)


def test_scales_of_the_training(tmp_path, text_base, monkeypatch):
    made = recipe(settings(tmp_path, text_base, gft={"max_scale": 4, "unguided": 0.2}))
    phase = made.phases()[0]
    monkeypatch.setattr(phase, "flow_loss", lambda model, batch, *_: (batch["beta"], {}))
    several = {"latents": torch.zeros(400, 8, 1, 1, 1), "caption": ["a red circle"] * 400}
    scales = 1 / phase.loss(None, several, Generators(places(400)))[0]
    assert 0.15 < (scales == 1).float().mean() < 0.25
    guided = scales[scales > 1]
    assert guided.max() <= 4.001 and 2.4 < guided.mean() < 2.6


def test_shares():
    found = shares({"error_1": 0.1, "gap_1": 0.0, "error_2": 0.5, "gap_2": 2.0})
    assert found == {"explained_2": 0.75, "off_1": 0.05}
    assert shares({"error_1": 0.1, "gap_1": 0.0, "error_2": 0.0, "gap_2": 0.0}) == {}


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "first frame", "two stages", "timestep for each token"])
def test_it_starts_as_the_base_at_every_beta(tmp_path, wan_bases, kind):
    """To the bit, of every kind of Wan; and each clip of a batch has its own beta once the embedder is not zero."""
    more = {"two stages": {"stage": "high_noise"}, "timestep for each token": {"first_frame": True}}.get(kind, {})
    made = recipe(settings(tmp_path, wan_bases[kind], model=more))
    phase = made.phases()[0]
    model = phase.setup({}).eval()
    config = made.backbone.config
    timestep = torch.full((2, 12) if kind == "timestep for each token" else (2,), 500.0)
    given = {
        "hidden_states": torch.randn(2, config["in_channels"], 2, 4, 6),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(2, 5, 64),
        "encoder_hidden_states_image": None if config.get("image_dim") is None else torch.randn(2, 5, 16),
    }

    def told(beta):
        phase._told = beta
        with torch.no_grad():
            return model(**given).sample

    with torch.no_grad():
        plain = made.backbone.transformer().eval()(**given).sample
    assert all(torch.equal(told(beta), plain) for beta in (None, torch.tensor([0.2, 1.0])))
    nn.init.normal_(model.beta_embedder.linear.weight, std=0.1)
    both = told(torch.tensor([0.2, 0.9]))
    assert not torch.equal(both, plain)
    torch.testing.assert_close(both[1], told(torch.tensor([0.9]))[1])
    assert (both[0] - told(torch.tensor([0.9]))[0]).abs().max() > 1e-4
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    assert torch.equal(told(torch.tensor([1.0, 1.0])), plain)  # gated
    phase.close()
    assert not model.condition_embedder.time_embedder._forward_hooks


def test_a_gate_is_the_share_of_the_guidance(tmp_path, text_base):
    """Of LoRA and embedding, for each clip: those of a plain adapter times (scale - 1) / (max_scale - 1)."""
    made = recipe(settings(tmp_path, text_base))
    model = made.transformer().eval()
    layer = model.blocks[0].attn1.to_q
    nn.init.normal_(layer.lora_B["default"].weight)
    nn.init.normal_(model.beta_embedder.linear.weight)
    beta, x = torch.tensor([0.25, 0.5, 1.0]), torch.randn(3, 5, layer.in_features)
    found = {}
    for highest in (None, 4.0):
        slot = BetaSlot(model, model.beta_embedder, lambda: beta, "default", highest)
        time_embedder = model.condition_embedder.time_embedder
        with torch.no_grad():
            time = torch.ones(3, time_embedder.linear_1.in_features)
            found[highest] = layer(x) - layer.base_layer(x), time_embedder(time) - time_embedder.forward(time)
        slot.remove()
    for plain, gated in zip(found[None], found[4.0], strict=True):
        gates = torch.tensor([1.0, 1 / 3, 0.0]).view(-1, *[1] * (plain.ndim - 1))
        torch.testing.assert_close(gated, gates * plain, rtol=1e-3, atol=1e-4)


def test_checkpointed_blocks_have_the_same_gradients(tmp_path, text_base):
    """They run again for the gradients, at the same beta."""
    found = []
    for checkpointed in (False, True):
        made = recipe(settings(tmp_path, text_base, loop={"gradient_checkpointing": checkpointed}))
        phase = made.phases()[0]
        torch.manual_seed(0)
        model = phase.setup({}).train()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(1)
        loss, _ = phase.loss(model, batch(), Generators(places(2)))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None and torch.allclose(found[1][name], value) for name, value in found[0].items())
    assert found[0][KEY].any()


def test_training_explains_the_guidance(tmp_path):
    """The shares that a run of the built-in model writes: 0 at the start, then more of what guidance changes."""
    more = {
        "model": {"base": "demo", "merge_text_padding": True},
        "data": {"sizes": [{"frames": 5, "height": 64, "width": 64}], "clips": 24},
        "lora": {"rank": 16, "alpha": 16},
        "validation": {"clips": 4, "prompts": []},
        "train": {"steps": 30, "learning_rate": 1e-3, "lr_scheduler": "cosine", "batch_size": 4},
    }
    file = settings(tmp_path, Path("demo"), **more)
    start = recipe(file).phases()[0]
    start.clips()
    before = start.validate(start.setup({}).eval(), tmp_path, 0)
    run("gft", file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    after = next(line for line in reversed(lines) if any("explained" in key for key in line))
    after = {key.removeprefix("validation_"): value for key, value in after.items()}
    scales = ("1.5", "2", "3", "4")
    assert all(abs(before[f"explained_{scale}"]) < 1e-5 for scale in scales), before
    assert all(after[f"explained_{scale}"] > 0.05 for scale in scales), after
    assert after["off_1"] < 1e-9


def test_an_interrupted_run_ends_bit_equal(finished, tmp_path, text_base, stop_after):
    file = settings(tmp_path, text_base)
    stop_after(1)
    with pytest.raises(Stopped):
        run("gft", file)
    run("gft", file, resume="latest")
    straight, resumed = (load_file(f / "run" / "phases" / "train.safetensors") for f in (finished[0], tmp_path))
    assert straight.keys() == resumed.keys() and straight[KEY].any()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_base_that_teaches_is_dense(tmp_path, text_base):
    size = {"frames": 9, "height": 64, "width": 64}
    attention = {"method": "radial", "density": 0.6, "dense_layers": 0, "block_size": 8}
    made = recipe(settings(tmp_path, text_base, attention=attention, data={"sizes": [size]}))
    phase = made.phases()[0]
    model = phase.setup({})
    shown, sigma, texts = torch.randn(1, 8, 3, 8, 8), torch.tensor([0.5]), [phase.nothing()]
    taught = phase.of_base(model, shown, sigma, texts, {})
    with torch.no_grad():
        dense = made.backbone.velocity(made.backbone.transformer().eval(), shown, sigma, texts, {})
    torch.testing.assert_close(taught, dense.float())
    student = phase.guided(model, shown, sigma, texts, {}, torch.ones(1), gradients=False)
    assert not torch.allclose(student, taught, atol=1e-4)
    phase.close()


def test_sparse_attention_and_the_data_loss(tmp_path, text_base):
    size = {"frames": 9, "height": 128, "width": 128}
    attention = {"method": "radial", "density": 0.6, "dense_layers": 1}
    file = settings(
        tmp_path, text_base, attention=attention, data={"sizes": [size]}, gft={"loss": "data"}, validation={"clips": 1}
    )
    run("gft", file, ["validation.prompts=[]", "train.steps=1", "train.batch_size=1"])
    assert load_file(tmp_path / "run" / "phases" / "train.safetensors")[KEY].any()


def test_half_precision(tmp_path, text_base):
    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    file = settings(
        tmp_path, text_base, loop={"mixed_precision": "bf16", "gradient_checkpointing": True}, model=half,
        lora={"file_dtype": "bfloat16"},
    )  # fmt: skip
    weights = load_file(run("gft", file)["lora"])
    assert weights.pop(KEY).dtype == torch.float32
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_loaded_as_it_was_trained(finished, text_base):
    """By `guidance_free`, through diffusers' loader of LoRAs, to the model of the training at each beta."""
    folder, result = finished
    made = recipe(folder / "a.yaml")
    phase = made.phases()[0]
    trained = phase.setup(load_file(folder / "run" / "phases" / "train.safetensors")).eval()
    pipe = WanPipeline.from_pretrained(text_base)
    with safe_open(result["lora"], "pt") as file:
        facts = json.loads(file.metadata()["vidaccel"])
    assert facts["recipe"] == "gft" and facts["guidance_free"] == {"loss": "white_box", "max_scale": 4.0, "gated": True}
    given = {
        "hidden_states": torch.randn(1, 8, 2, 4, 6),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    }
    with torch.no_grad():
        plain = pipe.transformer(**given).sample
    with vidaccel.guidance_free(pipe, Path(result["lora"]).parent), torch.no_grad():
        for scale in (1.0, 2.0, 4.0):
            phase._told, pipe._guidance_scale = torch.tensor([1 / scale]), scale
            torch.testing.assert_close(pipe.transformer(**given).sample, trained(**given).sample, rtol=1e-4, atol=1e-5)
        assert (pipe.transformer(**given).sample - plain).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**given).sample, plain)


def test_an_adapter_is_gone_on_from(finished, tmp_path, text_base):
    start = str(Path(finished[1]["lora"]).parent)
    made = recipe(settings(tmp_path, text_base, lora={"start": start}))
    trained = load_file(finished[0] / "run" / "phases" / "train.safetensors")
    named = dict(made.transformer().named_parameters())
    assert all(torch.allclose(named[name], value, atol=1e-6) for name, value in trained.items())
    with pytest.raises(ConfigError, match="is of the recipe gft: give one of lora"):
        recipe(write(tmp_path, text_base, lora={"start": start}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"gft": {"max_scale": 8}},
            r"gft.max_scale is 8, and .* in lora.start is gated and counts fully at 4",
        ),
        ({"gft": {"gated": False}}, r"gft.gated is false, and .* in lora.start was trained with true: set that"),
        ({"flow": {"unconditional": "blurry"}}, r'unconditional is "blurry", and .* turns away from "": set that'),
    ],
)
def test_an_adapter_is_gone_on_from_as_what_it_was(finished, tmp_path, text_base, changes, words):
    """Under another gate it would count otherwise from the first step on, and the header would not say so."""
    with pytest.raises(ConfigError, match=words):
        recipe(settings(tmp_path, text_base, lora={"start": finished[1]["lora"]}, **changes))


def test_one_without_a_gate_may_learn_of_higher_scales(tmp_path, text_base):
    start = run("gft", settings(tmp_path, text_base, gft={"gated": False}, validation={"prompts": []}))["lora"]
    file = settings(tmp_path / "more", text_base, gft={"gated": False, "max_scale": 8}, lora={"start": start})
    assert recipe(file).start


@pytest.mark.parametrize("loss", ["white_box", "data"])
def test_all_weights(tmp_path, text_base, loss):
    """A pipeline folder with the embedder in it, which needs no adapter, and in which every weight moved."""
    file = settings(tmp_path, text_base, gft={"train": "full", "loss": loss}, lora={"rank": 32, "alpha": None})
    result = run("gft", file)
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    before = dict(WanPipeline.from_pretrained(text_base).transformer.named_parameters())
    assert trained.keys() == before.keys() | {KEY} and trained[KEY].any()
    moved = [name for name, value in before.items() if not torch.equal(trained[name], value)]
    assert len(moved) > 0.9 * len(before)
    pipe = WanPipeline.from_pretrained(result["pipeline"])
    for name, value in pipe.transformer.named_parameters():
        assert torch.equal(value, trained[name])
    phase = recipe(file).phases()[0]
    student = phase.setup(trained).eval()
    given = {
        "hidden_states": torch.randn(1, 8, 2, 4, 6),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    }
    with vidaccel.guidance_free(pipe) as handle, torch.no_grad():
        for scale in (1.0, 3.0):
            phase._told, pipe._guidance_scale = torch.tensor([1 / scale]), scale
            torch.testing.assert_close(pipe.transformer(**given).sample, student(**given).sample, rtol=1e-4, atol=1e-5)
        assert "all weights were trained" in handle.notes()[0]
    stated = inspect_model(str(tmp_path / "run")).call_defaults()
    assert (stated["frames"], stated["height"], stated["width"]) == (5, 32, 48)
    # That of the validation may be higher where it makes no videos.
    made = recipe(file, ["validation.prompts=[]", "validation.guidance_scale=9", "gft.max_scale=4"])
    made.write_defaults(tmp_path, made.config.gft.max_scale)
    assert json.loads((tmp_path / "generation_defaults.json").read_text())["guidance_scale"] == 4
    with pytest.raises(GuidanceFreeError, match=r"has no guidance-free adapter of its own: .* Give an adapter"):
        vidaccel.guidance_free(WanPipeline.from_pretrained(text_base))
    phase.close()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gft.train=full", "lora is of use only with gft.train"),
        ("gft={train: full, gated: true}", "gated is true, which is for LoRAs"),
        ("gft.max_scale=1", "max_scale is 1.0: it must be above 1"),
        ("gft.unguided=1", "unguided is 1.0: it must be below 1"),
        ("gft.loss=black_box", "loss is"),
        ("flow.guidance_preserving=3", "guidance_preserving is for models that need no gft"),
        ("validation.negative_prompt=blurry", "set flow.unconditional to it"),
        ("validation.guidance_scale=5", "guidance_scale is 5, above gft.max_scale 4"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, text_base, override, words):
    with pytest.raises(ConfigError, match=words):
        run("gft", settings(tmp_path, text_base), [override])
    assert not (tmp_path / "run").exists()


def test_the_data_loss_without_dropped_captions_is_refused(tmp_path, text_base):
    with pytest.raises(ConfigError, match="caption_dropout is 0: with gft.loss data and gft.gated false"):
        run("gft", settings(tmp_path, text_base), ["gft.loss=data", "gft.gated=false", "flow.caption_dropout=0"])


def test_a_base_without_a_slot_for_beta(tmp_path, text_base):
    made = recipe(settings(tmp_path, text_base))
    with torch.device("meta"):
        other = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError, match="model.base: a FluxTransformer2DModel has no free slot for beta"):
        made.check_transformer(other)
