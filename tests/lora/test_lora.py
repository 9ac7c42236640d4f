"""Recipe `lora` on real Wan pipelines of every kind, at tiny sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from lora_runs import SIZE, recipe, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidaccel.attention import METHODS
from vidaccel.attention.methods.description import described
from vidaccel.lora import run
from vidaccel.lora.adapters.adapter import layers_named
from vidaccel.lora.backbones.wan_encoding import WanParts, WanTextEncoder
from vidaccel.lora.checkpoints.checkpoint import CheckpointError
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.trainer import Diverged, Stopped
from vidaccel.pipelines.acceleration.handle import Handle

KINDS = {
    "text": {},
    "first frame": {},
    "two stages": {"stage": "low_noise"},
    "two stages, first frame": {"stage": "high_noise"},
    "timestep for each token": {"first_frame": True},
}
"""Kind of Wan pipeline -> what settings say of it."""


def inputs(made, batch: int = 1) -> dict:
    """What the transformer of a recipe is called with."""
    config = made.backbone.config
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], 2, 4, 6),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 5, 64),
        "encoder_hidden_states_image": None if config.get("image_dim") is None else torch.randn(batch, 5, 16),
    }


def places(count: int) -> list[Place]:
    return [Place(0, number, count, number) for number in range(count)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_base) -> tuple[Path, dict]:
    """A run with an alpha that is not the rank."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("lora", write(folder, text_base))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_loads_what_was_trained(tmp_path, wan_bases, kind):
    """Of every kind of Wan, and with a sample on the way. The file has no alpha, which is in its numbers."""
    file = write(tmp_path, wan_bases[kind], model=KINDS[kind])
    result = run("lora", file)
    made = recipe(file)
    trained = made.transformer()
    parameters = dict(trained.named_parameters())
    weights = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert weights and all(".lora_" in name for name in weights)
    for name, value in weights.items():
        parameters[name].data.copy_(value)
    starts = made.backbone.image and not made.backbone.per_token  # of which the folder holds the other pipeline
    pipe = (WanImageToVideoPipeline if starts else WanPipeline).from_pretrained(wan_bases[kind])
    pipe.load_lora_weights(Path(result["lora"]).parent, load_into_transformer_2=made.backbone.part == "transformer_2")
    given = inputs(made)
    with torch.no_grad():
        wanted, loaded = trained(**given).sample, getattr(pipe, made.backbone.part)(**given).sample
        plain = made.backbone.transformer()(**given).sample
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    assert (loaded - plain).abs().max() > 1e-3
    assert (tmp_path / "run" / "validation" / "00000002_0.mp4").is_file()


def test_the_file_says_what_it_belongs_to(finished, text_base):
    with safe_open(finished[1]["lora"], "pt") as file:
        facts, names = json.loads(file.metadata()["vidaccel"]), set(file.keys())
    assert (facts["recipe"], facts["part"], facts["levels"]) == ("lora", "transformer", [0.0, 1.0])
    assert facts["base"] == text_base.name and facts["base_hash"] and facts["size"] == SIZE
    assert "diffusion_model.blocks.1.self_attn.o.lora_A.weight" in names
    assert "diffusion_model.blocks.0.cross_attn.k.lora_B.weight" in names
    assert {name.rpartition(".lora_")[0].partition("blocks.0.")[2] for name in names if ".0." in name[:27]} == {
        *(f"{kind}_attn.{matrix}" for kind in ("self", "cross") for matrix in "qkvo"),
        "ffn.0",
        "ffn.2",
    }


def test_the_last_checkpoint_has_the_adapter_of_the_result(finished):
    checkpoint = finished[0] / "run" / "checkpoints" / "step_00000002" / "adapter" / "pytorch_lora_weights.safetensors"
    # Not their bytes: safetensors writes the entries of a header in any order.
    held = []
    for path in (checkpoint, finished[1]["lora"]):
        with safe_open(path, "pt") as file:
            held.append((file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}))  # noqa: SIM118
    assert held[0] == held[1]


def test_other_layers_get_a_lora_and_load(tmp_path, text_base):
    """Those outside the blocks, too."""
    targets = ["attn1.to_q", "time_proj", "linear_1", "time_embedder.linear_2", "proj_out"]
    file = write(tmp_path, text_base, lora={"targets": targets})
    result = run("lora", file, ["validation.prompts=[]"])
    pipe = WanPipeline.from_pretrained(text_base)
    pipe.load_lora_weights(Path(result["lora"]).parent)
    layers = {name.partition(".lora_")[0] for name, _ in pipe.transformer.named_parameters() if ".lora_" in name}
    assert layers == set(recipe(file).layers) and len(layers) == 2 + 4 + 1


def test_a_rank_above_the_smaller_side_of_a_layer_is_told(tmp_path, text_base, caplog):
    layers = {"targets": ["attn1.to_q", "time_embedder.linear_1"]}
    skeleton = recipe(write(tmp_path, text_base, lora=layers)).backbone.skeleton()
    least = "condition_embedder.time_embedder.linear_1"
    side, most = skeleton.get_submodule(least).in_features, skeleton.blocks[0].attn1.to_q.in_features
    assert side < most and "lora.rank" not in caplog.text
    recipe(write(tmp_path, text_base, lora={**layers, "rank": side}))
    assert "lora.rank" not in caplog.text
    recipe(write(tmp_path, text_base, lora={**layers, "rank": side + 1}))
    assert f"lora.rank is {side + 1}, and 1 of 3 layers are smaller: {least} has a side of {side}, above" in caplog.text
    assert f"The largest that is of use to any of the layers is {most}." in caplog.text


@pytest.mark.parametrize("kind", ["first frame", "timestep for each token"])
def test_half_precision(tmp_path, wan_bases, kind):
    """Frozen weights and autoencoder in bfloat16, as on a GPU, with a sample; what is trained stays float32."""
    loop = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    half = {"dtype": "bfloat16", "autoencoder_dtype": "bfloat16"}
    run("lora", write(tmp_path, wan_bases[kind], loop=loop, model={**half, **KINDS[kind]}))
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert any(value.any() for name, value in trained.items() if ".lora_B." in name)
    assert (tmp_path / "run" / "validation" / "00000002_0.mp4").is_file()


def test_half_precision_files(tmp_path, text_base):
    result = run("lora", write(tmp_path, text_base, lora={"file_dtype": "bfloat16"}), ["validation.prompts=[]"])
    assert {value.dtype for value in load_file(result["lora"]).values()} == {torch.bfloat16}


def test_an_interrupted_run_ends_bit_equal(finished, tmp_path, text_base, stop_after):
    """The EMA, the optimiser and what is drawn go on where they were."""
    file = write(tmp_path, text_base)
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", file)
    assert not (tmp_path / "run" / "adapter").exists()
    run("lora", file, resume="latest")
    straight, resumed = (load_file(f / "run" / "phases" / "train.safetensors") for f in (finished[0], tmp_path))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_another_base_is_refused_on_a_resume(tmp_path, text_base, stop_after):
    base = shutil.copytree(text_base, tmp_path / "base")
    file = write(tmp_path, base)
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", file)
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"may be moved, but not changed\): model.base\."):
        run("lora", file, resume="latest")


def test_a_lora_is_gone_on_from(finished, tmp_path, text_base, wan_bases):
    """With its own scale, whatever the new alpha is; one of another base, rank or other layers is refused."""
    adapter = Path(finished[1]["lora"]).parent
    more = {"start": str(adapter), "alpha": 1}
    made = recipe(write(tmp_path, text_base, lora=more))
    given, first = inputs(made), recipe(write(tmp_path, text_base))
    trained = first.transformer()
    parameters = dict(trained.named_parameters())
    for name, value in load_file(finished[0] / "run" / "phases" / "train.safetensors").items():
        parameters[name].data.copy_(value)
    with torch.no_grad():
        torch.testing.assert_close(made.transformer()(**given).sample, trained(**given).sample, rtol=1e-4, atol=1e-5)
    other = {"base": str(wan_bases["timestep for each token"])}
    for sections, words in (
        ({"model": other}, "was trained on .*, and .*timestep for each token has other weights"),
        ({"lora": {"rank": 4}}, "lora.rank is 4, but the LoRA in lora.start has 2"),
        ({"lora": {"targets": ["to_q"]}}, "has 32 matrices more than lora.targets takes"),
        ({"lora": {"targets": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2", "ffn.net.0.proj", "proj_out"]}},
         "has nothing for the layer proj_out"),
    ):  # fmt: skip
        sections = {**sections, "lora": {"start": str(adapter), **sections.get("lora", {})}}
        with pytest.raises(ConfigError, match=words):
            recipe(write(tmp_path, text_base, **sections))
    plain = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    for file, words in ((plain, "is no plain LoRA: it has parts such as a"), (tmp_path / "gone", "no LoRA that can")):
        with pytest.raises(ConfigError, match=words):
            recipe(write(tmp_path, text_base, lora={"start": str(file)}))


def test_the_folder_of_a_run_is_looked_into_once(finished, tmp_path, text_base, caplog):
    """And told of once; what its training writes meanwhile is not what was read."""
    earlier = tmp_path / "earlier"
    shutil.copytree(finished[0] / "run" / "checkpoints", earlier / "checkpoints")
    file = Path(finished[1]["lora"])
    with caplog.at_level("INFO"):
        made = recipe(write(tmp_path, text_base, lora={"start": str(earlier)}))
        before = made.inputs()
        (earlier / "adapter").mkdir()
        save_file({"a": torch.zeros(1)}, earlier / "adapter" / file.name)
        assert made.inputs() == before
    assert len([told for told in caplog.messages if "is the folder of a training: its checkpoints/" in told]) == 1


def test_a_part_of_the_noise_levels(tmp_path, wan_bases):
    for kind, change, wanted in (
        ("text", "flow={min_level: 0.2, max_level: 0.4}", (0.2, 0.4)),
        ("two stages", "flow.max_level=0.5", (0.0, 0.5)),
    ):
        made = recipe(write(tmp_path, wan_bases[kind], model=KINDS[kind]), [change])
        levels = made.phases()[0].levels(Generators(places(500)), torch.zeros(500, 1, 1, 1, 1))
        assert wanted[0] <= levels.min() < wanted[0] + 0.1 and wanted[1] - 0.1 < levels.max() <= wanted[1]
    with pytest.raises(ConfigError, match="0.95 and 1, and .* for the levels 0 to 0.* alone"):
        recipe(write(tmp_path, wan_bases["two stages"], model=KINDS["two stages"]), ["flow.min_level=0.95"])


# -- noise levels, prompts, the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "low", "high"), [("high_noise", 0.875, 1.0), ("low_noise", 0.0, 0.875)])
def test_a_stage_trains_its_own_transformer_on_its_own_levels(tmp_path, wan_bases, stage, low, high):
    made = recipe(write(tmp_path, wan_bases["two stages"], model={"stage": stage}))
    levels = made.phases()[0].levels(Generators(places(256)), torch.empty(256, 8, 1, 2, 2))
    assert levels.min() >= low and levels.max() <= high and levels.max() - levels.min() > 0.8 * (high - low)
    folder = {"high_noise": "transformer", "low_noise": "transformer_2"}[stage]
    weights = load_file(wan_bases["two stages"] / folder / "diffusion_pytorch_model.safetensors")
    assert torch.equal(made.backbone.transformer().proj_out.weight, weights["proj_out.weight"])
    assert made.facts()["part"] == folder


def test_the_first_frame_of_a_model_with_a_timestep_for_each_token(tmp_path, wan_bases, monkeypatch):
    """It is shown clean, told to be, and no part of the loss; as `WanImageToVideoPipeline` samples it."""
    made = recipe(write(tmp_path, wan_bases["timestep for each token"], model={"first_frame": True}))
    phase, seen = made.phases()[0], {}
    model = phase.setup({})

    def forward(hidden_states, timestep, **_):
        seen.update(x=hidden_states, t=timestep)
        wrong = torch.zeros_like(hidden_states)
        wrong[:, :, 0] = 1e6
        return (wrong,)

    monkeypatch.setattr(model, "forward", forward)
    latents = torch.randn(2, 8, 2, 4, 6)
    batch = {"latents": latents, "caption": ["a red circle"] * 2}
    loss, _ = phase.loss(model, batch, Generators(places(2)))
    assert torch.equal(seen["x"][:, :, 0], latents[:, :, 0]) and not torch.equal(seen["x"][:, :, 1], latents[:, :, 1])
    assert seen["t"].shape == (2, 2 * 2 * 3) and not seen["t"][:, :6].any() and (seen["t"][:, 6:] > 0).all()
    assert loss < 100


def test_captions_are_left_out_for_the_unconditional_text(tmp_path, text_base, monkeypatch):
    made = recipe(write(tmp_path, text_base, flow={"caption_dropout": 0.5, "unconditional": "blurry"}))
    phase, seen = made.phases()[0], []
    monkeypatch.setattr(made.backbone, "velocity", lambda m, x, s, texts, b: seen.extend(texts) or torch.zeros_like(x))
    batch = {"latents": torch.zeros(64, 8, 1, 2, 2), "caption": ["a red circle"] * 64}
    phase.loss(None, batch, Generators(places(64)))
    blurry, circle = (text["states"] for text in made.flowing.texts(["blurry", "a red circle"]))
    alike = [text["states"].shape == blurry.shape and torch.equal(text["states"], blurry) for text in seen]
    assert 20 <= sum(alike) <= 44
    assert all(torch.equal(text["states"], circle) for text, is_one in zip(seen, alike, strict=True) if not is_one)


def test_the_unconditional_text_is_encoded_beforehand(tmp_path, text_base, monkeypatch):
    """With --encode-only, so that training needs no text encoder."""
    from vidaccel.lora.backbones.wan_encoding import WanTextEncoder

    file = write(tmp_path, text_base, flow={"unconditional": "blurry", "guidance_preserving": 3})
    run("lora", file, encode_only=True)
    monkeypatch.setattr(WanTextEncoder, "encode", lambda *_: pytest.fail("a text was encoded again"))
    run("lora", file)


def test_guidance_is_preserved_as_gft_has_it(tmp_path, text_base, monkeypatch):
    """loss = (v / s + (1 - 1 / s) u - flow)^2, u without gradients, at the same noise and levels."""
    scale = 4.0
    made = recipe(write(tmp_path, text_base, flow={"guidance_preserving": scale, "caption_dropout": 0}))
    phase = made.phases()[0]
    nothing = phase.nothing()["states"]
    weight, calls = torch.tensor(0.7, requires_grad=True), []

    def velocity(model, shown, sigma, texts, conditions):
        conditional = not all(torch.equal(text["states"], nothing) for text in texts)
        calls.append((conditional, torch.is_grad_enabled(), shown, sigma))
        return (weight if conditional else 0.5 * weight) * torch.ones_like(shown)

    monkeypatch.setattr(made.backbone, "velocity", velocity)
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: torch.ones(len(self), *shape))
    batch = {"latents": torch.zeros(2, 8, 1, 2, 2), "caption": ["a red circle"] * 2}
    loss, _ = phase.loss(torch.nn.Identity(), batch, Generators(places(2)))
    loss.backward()
    off = 0.7 / scale + (1 - 1 / scale) * 0.35 - 1
    assert loss.item() == pytest.approx(off**2) and weight.grad.item() == pytest.approx(2 * off / scale)
    assert [(conditional, grad) for conditional, grad, *_ in calls] == [(False, False), (True, True)]
    assert all(torch.equal(a, b) for a, b in zip(calls[0][2:], calls[1][2:], strict=True))


# -- sparse attention in training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("random", "sla", "vsa")])
def test_any_method_is_attention_in_training(tmp_path, text_base, name):
    """What it computes is the density, its gradients reach the LoRA, and nothing of it stays in the transformer."""
    frames = 9 if name == "lvsa" else 3  # of latents; of three, each is near each
    size = {"frames": 4 * frames - 3, "height": 128, "width": 128}
    attention = {"method": name, "density": 0.6, "dense_layers": 1}
    file = write(tmp_path, text_base, attention=attention, data={"sizes": [size]}, flow={"guidance_preserving": 2})
    made = recipe(file)
    assert described(json.loads(json.dumps(made.facts()["attention"]))) == made.method
    phase = made.phases()[0]
    model = phase.setup({})
    batch = {"latents": torch.randn(1, 8, frames, 16, 16), "caption": ["a red circle"]}
    loss, _ = phase.loss(model, batch, Generators(places(1)))
    loss.backward()
    records = phase._handle.report().records
    sparse = [record for record in records if record.layer == 1]
    assert sparse and all(record.density < 0.9 for record in sparse)
    assert {record.layer for record in records if record.density == 1} == {0}
    named = dict(model.named_parameters())
    assert named["blocks.1.attn1.to_q.lora_B.default.weight"].grad.abs().max() > 0
    phase.close()
    assert "WanAttnProcessor" in type(model.blocks[1].attn1.processor).__name__


def test_a_method_that_learns_has_a_recipe_of_its_own(tmp_path, text_base):
    with pytest.raises(ConfigError, match="attention.method is sla, which learns weights of its own: use"):
        run("lora", write(tmp_path, text_base, attention={"method": "sla"}))


@pytest.mark.parametrize(
    ("method", "flow"),
    [
        ("svg2", {"guidance_preserving": 2}),  # a pass without gradients, for which it could remember the step before
        ("svg", {}),  # counts its calls
    ],
)
def test_a_sparse_run_that_was_interrupted_ends_bit_equal(method, flow, tmp_path, text_base, stop_after, monkeypatch):
    begun = []
    begin = Handle.begin_anew
    monkeypatch.setattr(Handle, "begin_anew", lambda self, turn=0: begun.append(turn) or begin(self, turn))
    sections = {
        "attention": {"method": method, "density": 0.7, "dense_layers": 0},
        "flow": flow,
        "loop": {"validate_every": 1},  # with samples, which go through the method as well
    }
    run("lora", write(tmp_path, text_base, **sections), [f"out={tmp_path / 'straight'}"])
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", tmp_path / "a.yaml")
    run("lora", tmp_path / "a.yaml", resume="latest")
    straight, resumed = (load_file(tmp_path / n / "phases" / "train.safetensors") for n in ("straight", "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert {0, 1} <= set(begun)  # the number of the step, however its noise level compares with that of the last


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("text", "data.sizes.0.frames=8", "clips of 8 frames do not fit: Wan takes 4k [+] 1; give 5 or 9"),
        ("text", "data.sizes.0.width=40", "32x40 must be a multiple of 16"),
        ("text", "model.dtype=bfloat16", "set loop.mixed_precision"),
        ("text", "model.stage=low_noise", "model.stage is low_noise, but .* has one transformer"),
        ("two stages", "model.base=BASE", "model.stage is missing: .* Give high_noise .noise levels from 0.875 up."),
        ("text", "model.first_frame=true", "model.first_frame is true, but .* takes no first frames"),
        ("first frame", "model.first_frame=false", "model.first_frame is false, but .* starts from first frames"),
        ("first frame", "model.merge_text_padding=true", "for models without an image encoder"),
        ("text", "model.guidance=3.5", "model.guidance is 3.5, but .* is not told any"),
        ("text", "lora.rank=0", "lora.rank is 0: it must be at least 1"),
        ("text", "lora.targets=[]", "targets is empty"),
        ("text", "lora.targets=[to_q, to_query]", 'no layer is called to_query: did you mean "attn1.to_k"|to_query'),
        ("text", "lora.targets=[proj_out]", "proj_out alone is a LoRA that diffusers cannot load"),
        ("text", "lora.targets=[to_q, patch_embedding]", "patch_embedding is a convolution"),
        ("text", "train.steps=0", "train.steps is 0"),
        ("text", "attention.density=0.5", "density is of use only with a sparse method"),
        ("text", "attention.backend=gather", "attention.backend is gather, of use only with a sparse method"),
        ("text", "flow={density: uniform, logit_std: 2}", 'logit_std is of use only with "logit_normal"'),
        ("text", "attention.method=best", "attention.method is best: there is none of that name"),
        ("text", "flow.guidance_preserving=1", "guidance_preserving is 1.0: it must be above 1"),
        ("text", "validation.clips=6", "only 6 clips"),
        ("text", "flow={min_level: 0.5, max_level: 0.5}", "min_level is 0.5, and max_level 0.5: it must be below that"),
        ("text", "model.base=./gone", r"model\.base: \./gone is no folder here"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, wan_bases, kind, override, words):
    """Before anything is written."""
    with pytest.raises(ConfigError, match=words):
        run("lora", write(tmp_path, wan_bases[kind]), [override.replace("BASE", str(wan_bases[kind]))])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"in_channels": 12}, "takes 12 channels; .* a text-to-video model takes 8"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "has a FluxTransformer2DModel"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "first and last frame"),
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "correct _class_name in its model_index"),
        ("model_index.json", {"_class_name": "MochiPipeline"}, "is a MochiPipeline; lora takes WanPipeline"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "boundary_ratio None"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, text_base, file, values, words):
    base = shutil.copytree(text_base, tmp_path / "base")
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **values}))
    with pytest.raises(ConfigError, match=words):
        recipe(write(tmp_path, base))


def test_targets_are_ends_of_names():
    net = torch.nn.ModuleDict(
        {"a": torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1), "into_q": torch.nn.Linear(1, 1)})}
    )
    assert layers_named(net, ["to_q"], "targets") == layers_named(net, ["a.to_q"], "targets") == ["a.to_q"]
    with pytest.raises(ConfigError, match="targets: no layer is called o_q"):
        layers_named(net, ["o_q"], "targets")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, text_base):
    """With the words of every recipe, and without a result."""
    with pytest.raises(Diverged, match="the loss of phase train is nan|a weight of phase train is NaN or infinite"):
        run("lora", write(tmp_path, text_base), ["train.learning_rate=1e30", "train.steps=4"])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_full_disk_while_the_result_is_written(tmp_path, text_base, capsys, monkeypatch):
    """One error with the path, nothing half written, and a resume writes it."""
    import resource

    from vidaccel.lora.__main__ import main
    from vidaccel.lora.recipes.lora import TrainLora

    file = write(tmp_path, text_base, validation={"prompts": []})
    finish, limits = TrainLora.finish, resource.getrlimit(resource.RLIMIT_FSIZE)

    def finish_on_a_full_disk(self, trained):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        try:
            return finish(self, trained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLora, "finish", finish_on_a_full_disk)
        assert main(["lora", "--config", str(file)]) == 1
    said = capsys.readouterr().err
    adapter = tmp_path / "run" / "adapter"
    assert said.count("Error:") == 1 and "Traceback" not in said
    assert f"Error: {adapter / 'pytorch_lora_weights.safetensors'} could not be written: " in said
    assert not list(adapter.iterdir())
    assert main(["lora", "--config", str(file), "--resume", "latest"]) == 0
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("base", ["text_base", "image_base"])
def test_no_encoder_is_loaded_where_everything_is_kept(tmp_path, request, base, monkeypatch):
    """They were at every start, to be named: 11 GB of text encoder, in each process."""
    loaded = []
    for cls in (WanTextEncoder, WanParts):
        for name in ("_loaded", "loaded_own", "loaded_eye"):
            if (original := getattr(cls, name, None)) is not None:
                monkeypatch.setattr(cls, name, lambda self, n=name, o=original: loaded.append(n) or o(self))
    file = write(tmp_path, request.getfixturevalue(base), validation={"prompts": []})
    first = recipe(file)
    first.ready(first.flowing)
    assert {"_loaded", "loaded_own"} <= set(loaded)
    loaded.clear()
    again = recipe(file)
    again.ready(again.flowing)
    assert loaded == [] and again.inputs() == first.inputs()
    [one, two] = [r.measured(r.flowing)._clips[0][1]["latents"] for r in (first, again)]
    assert torch.equal(one, two)


def test_large_clips_are_encoded_in_tiles(tmp_path, text_base, monkeypatch):
    """Which may be other latents, so they are kept under another name; small ones stay as they are."""
    file = write(tmp_path, text_base)
    whole, tiled = (recipe(file, [f"model.autoencoder_tiling={on}"]).flowing._encoder for on in ("false", "true"))
    assert whole.identities != tiled.identities
    small, large = torch.rand(1, 3, 5, 32, 48), torch.rand(1, 3, 5, 32, 320)
    assert torch.equal(whole.encode(small)["latents"], tiled.encode(small)["latents"])
    calls = []
    for name, encoder in (("whole", whole), ("tiled", tiled)):
        own, original = encoder.loaded_own(), encoder.loaded_own().tiled_encode
        monkeypatch.setattr(own, "tiled_encode", lambda x, n=name, o=original: calls.append(n) or o(x))
    assert whole.encode(large)["latents"].shape == tiled.encode(large)["latents"].shape and calls == ["tiled"]


TILED = ["model.autoencoder_tiling=true"]
