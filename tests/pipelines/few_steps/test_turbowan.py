"""TurboDiffusion checkpoints: every layout, the keys of the published sizes, round trips of tiny models, refusals."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from families import wan_kin
from PIL import Image
from safetensors.torch import load_file, save_file
from turbowan_files import LAYOUTS, SIZES, in_layout, own_weights, published_shapes, quantised

from vidaccel import RCMScheduler, accelerate
from vidaccel.autoencoders.checkpoint_file import CheckpointError
from vidaccel.generation.models.inspected import DEFAULTS_FILE
from vidaccel.pipelines.acceleration.sla_weights import read_config, read_projections
from vidaccel.pipelines.deep_compression.published_files import LayoutError
from vidaccel.pipelines.few_steps import turbowan
from vidaccel.pipelines.few_steps.turbowan import BASES, convert_turbowan
from vidaccel.pipelines.few_steps.turbowan_checkpoint import checked, dequantised, read_checkpoint

DIFFUSERS = {
    "TurboWan2.1-T2V-1.3B-480P": {"num_attention_heads": 12, "num_layers": 30, "in_channels": 16, "ffn_dim": 8960},
    "TurboWan2.1-T2V-14B-720P": {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16, "ffn_dim": 13824},
    "TurboWan2.2-I2V-A14B-high-720P": {
        "num_attention_heads": 40,
        "num_layers": 40,
        "in_channels": 36,
        "ffn_dim": 13824,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Wan pipeline whose components the tiny models need; its transformer is not used."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "wan"
    wan_kin.wan().save_pretrained(folder)
    return folder


def transformer(seed: int = 1, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    made = WanTransformer3DModel(**{**wan_kin.TRANSFORMER, "num_layers": 3, **changes}).eval()
    for parameter in made.parameters():  # norms and tables too: nothing is equal to something else
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def outputs(model: WanTransformer3DModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    video = torch.randn(1, model.config.in_channels, 3, 6, 8, generator=draw)
    text = torch.randn(1, 5, wan_kin.WIDTH, generator=draw)
    with torch.no_grad():
        return model(video, torch.tensor([852.9]), text, return_dict=False)[0]


def assert_same(made: WanTransformer3DModel, wanted: WanTransformer3DModel) -> None:
    """The same weights to the bit, and the same outputs but for sums in another order."""
    ours, theirs = made.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(outputs(made), outputs(wanted), rtol=1e-4, atol=1e-4)


# -- the keys of the published files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eight_bits", (False, True))
@pytest.mark.parametrize("name", SIZES)
def test_the_keys_of_a_published_file(name, eight_bits):
    """Every key is used once, and what comes out has the keys and shapes of diffusers' model of that size."""
    state = published_shapes(name, eight_bits)
    made = checked(state, name)
    for key, value in {**DIFFUSERS[name], "attention_head_dim": 128, "out_channels": 16, "text_dim": 4096}.items():
        assert made.config[key] == value, key
    with torch.device("meta"):
        model = WanTransformer3DModel(**DIFFUSERS[name])
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert {key: shape for key, shape in made.shapes.items() if "proj_l" not in key} == wanted
    assert len(made.shapes) == 15 + 29 * DIFFUSERS[name]["num_layers"]
    assert made.shapes["blocks.29.attn1.proj_l.weight"] == [128, 128]
    kinds = {made.dtypes[key] for key in made.shapes}
    assert kinds == {torch.bfloat16, torch.float32} and made.dtypes["blocks.0.attn1.proj_l.bias"] == torch.float32


def test_names_are_those_of_diffusers_own_conversion():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state = published_shapes("TurboWan2.1-T2V-1.3B-480P")
    made = checked(state, "file")
    theirs = convert_wan_transformer_to_diffusers({key: key for key in state})
    ours = {own: place for own, place in made.places.items() if "proj_l" not in own}
    assert ours == {own: place for own, place in theirs.items() if "proj_l" not in own}


# -- tiny models, whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout, base, tmp_path):
    """The dense model that was put in comes out, and its projections beside it, with what they were trained for."""
    model = transformer()
    state = own_weights(model)
    if layout in ("original", "LightX2V"):
        source = tmp_path / "TurboWan-tiny.pth"
        torch.save(in_layout(state, layout), source)
    else:  # a folder of diffusers, in two files
        source = tmp_path / "tiny"
        source.mkdir()
        parts, names = [{}, {}], {}
        for number, (key, value) in enumerate(in_layout(state, layout).items()):
            parts[number % 2][key] = value.contiguous()
            names[key] = f"diffusion_pytorch_model-{number % 2 + 1:05d}-of-00002.safetensors"
        for part in parts:
            save_file(part, source / names[next(iter(part))])
        index = {"metadata": {}, "weight_map": names}
        (source / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    folder = convert_turbowan(source, tmp_path / "made", base=base)

    loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert_same(loaded, model)
    layers = [f"blocks.{number}.attn1" for number in range(3)]
    projections = read_projections(str(folder), layers)
    assert len(projections) == 6
    assert all(torch.equal(value, state[key]) for key, value in projections.items())
    trained = read_config(str(folder))
    method = trained.method()
    assert (method.linear_scope, method.feature_map, method.topk, method.block) == ("all", "softmax", 0.1, (64, 64))
    assert not list(tmp_path.glob(".*.part"))


def test_the_folder_is_a_pipeline(base, tmp_path):
    """All components, the sampler, and what `generate` takes by default."""
    source = tmp_path / "TurboWan2.1-T2V-tiny-720P.pth"
    torch.save(in_layout(own_weights(transformer())), source)
    folder = convert_turbowan(source, tmp_path / "made", base=base, link=True)
    assert (folder / "vae").is_symlink()
    stated = json.loads((folder / DEFAULTS_FILE).read_text())
    assert stated == {"frames": 81, "height": 720, "width": 1280, "steps": 4, "guidance_scale": 1.0}
    for cls in (WanPipeline, DiffusionPipeline):
        pipe = cls.from_pretrained(folder)
        assert type(pipe) is WanPipeline and type(pipe.scheduler) is RCMScheduler
        assert pipe.scheduler.config.sigma_max == 80 and not pipe.scheduler.config.ode
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    frames = [pipe("a dot", **call, generator=torch.Generator().manual_seed(s)).frames[0] for s in (0, 0, 1)]
    assert frames[0].shape == (9, 64, 64, 3) and (frames[0] == frames[1]).all() and (frames[0] != frames[2]).any()


def test_both_stages_of_wan_2_2(base, tmp_path):
    """High and low noise are two transformers, with the boundary and the start of image to video."""
    models = [transformer(seed, in_channels=12) for seed in (1, 2)]
    for name, model in zip(("high", "low"), models, strict=True):
        torch.save(in_layout(own_weights(model)), tmp_path / f"I2V-{name}.pth")
    high, low = tmp_path / "I2V-high.pth", tmp_path / "I2V-low.pth"
    folder = convert_turbowan(high, tmp_path / "made", low_noise=low, base=base, ode=True)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is WanImageToVideoPipeline and pipe.config.boundary_ratio == 0.9
    assert pipe.scheduler.config.sigma_max == 200 and pipe.scheduler.config.ode
    assert_same(pipe.transformer, models[0])
    assert_same(pipe.transformer_2, models[1])
    assert read_config(str(folder), "transformer_2") == read_config(str(folder)) is not None
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    with accelerate(pipe, "sla", backend="gather") as handle:
        frames = pipe(Image.new("RGB", (64, 64)), "a dot", **call, generator=torch.Generator().manual_seed(0)).frames[0]
        records = handle.report().records
    assert frames.shape == (17, 64, 64, 3) and not any(record.reason for record in records)
    assert [(r.step, r.model) for r in records if r.layer == 0] == [
        (0, "transformer"), (1, "transformer"), (2, "transformer_2"), (3, "transformer_2")
    ]  # fmt: skip
    # A whole folder brings both stages, and its own components.
    again = convert_turbowan(_as_sglang(folder, tmp_path / "sglang"), tmp_path / "again")
    assert_same(WanTransformer3DModel.from_pretrained(again / "transformer_2"), models[1])

    for arguments, message in (
        ({"source": high}, "is one of the two models of Wan 2.2 I2V: give the other as low_noise="),
        ({"source": low, "low_noise": high}, "I2V-low.pth is given for high noise, and I2V-high.pth for low"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_turbowan(**arguments, target=tmp_path / "other", base=base)
    torch.save(in_layout(own_weights(transformer(in_channels=12, ffn_dim=48))), low)
    with pytest.raises(CheckpointError, match="ffn_dim 48, and .* 32: they are not of one model"):
        convert_turbowan(high, tmp_path / "other", low_noise=low, base=base)
    text = tmp_path / "text.pth"
    torch.save(in_layout(own_weights(transformer())), text)
    with pytest.raises(CheckpointError, match="makes videos of texts with one model"):
        convert_turbowan(text, tmp_path / "other", low_noise=text, base=base)


def _as_sglang(folder, target):
    """A converted pipeline under the names of sglang's repositories."""
    import shutil

    shutil.copytree(folder, target)
    for file in target.glob("transformer*/*.safetensors"):
        state = load_file(file)
        save_file({key.replace("proj_l", "attn_op.local_attn.proj_l"): value for key, value in state.items()}, file)
    return target


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_eight_bits_are_undone(dtype, base, tmp_path):
    """The weights that the 8 bits stand for, with blocks of 128 that end before 128 (heads of 80, 160 wide)."""
    model = transformer(attention_head_dim=80, ffn_dim=288)
    state = {key: value.to(dtype) for key, value in in_layout(own_weights(model)).items()}
    bits, meant = quantised({key: value.float() for key, value in state.items()})
    for key, value in bits.items():
        if not key.endswith(("int8_weight", "scale")):
            bits[key] = value.to(dtype)
    assert bits["blocks.0.ffn.2.scale"].shape == (2, 3)
    source = tmp_path / "quant.pth"
    torch.save(bits, source)
    made = read_checkpoint(source)
    for own, place in made.places.items():
        value = made.tensor(own)
        assert value.dtype == dtype, own
        torch.testing.assert_close(value.flatten(), meant[place].flatten().to(dtype), rtol=0, atol=0)
    folder = convert_turbowan(source, tmp_path / "made", base=base)
    loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
    change = (outputs(loaded) - outputs(model)).norm() / outputs(model).norm()
    assert 0 < change < 0.05


def test_dequantised_by_hand():
    weight = torch.full((130, 129), 2, dtype=torch.int8)
    made = dequantised(weight, torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), torch.float32)
    assert made[127, 127] == 2 and made[127, 128] == 20 and made[128, 127] == 200 and made[129, 128] == 2000


def test_what_may_stand_round_the_weights(base, tmp_path):
    """`state_dict`, `net.`, averages, and the wrapper of checkpointed activations."""
    own, averaged = (own_weights(transformer(seed)) for seed in (1, 2))
    wrapped = {
        "net." + re.sub(r"^(blocks\.\d+|head)\.", r"\1._checkpoint_wrapped_module.", key): value
        for key, value in in_layout(own).items()
    }
    made = checked(wrapped, "file")
    assert all(torch.equal(made.tensor(key), own[key]) for key in made.places)
    source = tmp_path / "training.pth"
    torch.save({"state_dict": wrapped, "iteration": 500}, source)
    assert read_checkpoint(source).config == made.config

    both = wrapped | {f"net_ema.{key}": value for key, value in in_layout(averaged).items()}
    with pytest.raises(CheckpointError, match="has net and net_ema: choose one with weights="):
        checked(both, "file")
    for weights, state in (("net", own), ("net_ema", averaged)):
        made = checked(both, "file", weights)
        assert all(torch.equal(made.tensor(key), state[key]) for key in made.places)
    with pytest.raises(CheckpointError, match="has net, so weights= cannot be net_ema"):
        checked(wrapped, "file", "net_ema")
    with pytest.raises(CheckpointError, match="key net_fake_score.a beside those of net: it is no"):
        checked(wrapped | {"net_fake_score.a": torch.ones(1)}, "file")


def test_a_folder_whose_files_have_other_names(tmp_path):
    state = in_layout(own_weights(transformer()), "FastVideo")
    state["patch_embedding.proj.weight"] = state.pop("patch_embedding.weight")
    names = sorted(state)
    for number, part in enumerate((names[:40], names[40:])):
        save_file({name: state[name].contiguous() for name in part}, tmp_path / f"model-{number}.safetensors")
    assert read_checkpoint(tmp_path).config["num_layers"] == 3
    save_file({names[0]: state[names[0]].contiguous()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"has {names[0]} in two of its files"):
        read_checkpoint(tmp_path)


def test_large_models_are_written_in_parts(base, tmp_path, monkeypatch):
    monkeypatch.setattr(turbowan, "SHARD", "40KB")
    model = transformer()
    source = tmp_path / "file.pth"
    torch.save(in_layout(own_weights(model)), source)
    folder = convert_turbowan(source, tmp_path / "made", base=base)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)
    assert_same(WanTransformer3DModel.from_pretrained(folder / "transformer"), model)
    assert len(read_projections(str(folder), ["blocks.0.attn1", "blocks.2.attn1"])) == 4


# -- what is refused ---------------------------------------------------------------------------------------------------

P = "blocks.1.self_attn.attn_op.local_attn.proj_l"


def _without(*names):
    return lambda state: [state.pop(name) for name in names]


def _with(**changes):
    return lambda state: state.update({name.replace("__", "."): value for name, value in changes.items()})


def _renamed(old, new):
    return lambda state: state.update({key.replace(old, new): state.pop(key) for key in list(state) if old in key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(f"{P}.bias"), f"lacks {P}.bias: it was not written as a whole"),
        (_without("blocks.0.self_attn.attn_op.local_attn.proj_l.weight"), "lacks blocks.0.*proj_l.weight"),
        (_renamed("attn_op.local_attn.proj_l", "attn_op.proj_l"), "proj_l is known as blocks.N. and one of"),
        (_renamed(P, "blocks.1.self_attn.proj_l"), r"mixes layouts: .*\(original\) and .*\(LightX2V\)"),
        (_without("blocks.2.ffn.2.weight"), "lacks blocks.2.ffn.2.weight"),
        (_without("head.modulation"), "lacks head.modulation"),
        (_renamed("blocks.1.", "blocks.7."), "has blocks.7 and lacks blocks.1: it was not"),
        (_with(blocks__999999999__modulation=torch.ones(1)), "has blocks.999999999 and lacks blocks.3"),
        (_with(img_emb__proj__0__weight=torch.ones(3)), "has a key .* does not have, such as img_emb.proj.0.weight"),
        (_with(blocks__0__norm1__weight=torch.ones(32)), "such as blocks.0.norm1.weight"),
        (
            _with(blocks__1__ffn__0__weight=torch.ones(32, 31)),
            r"blocks.1.ffn.0.weight is \[32, 31\] in .* it is \[32, 32",
        ),
        (_with(patch_embedding__weight=torch.ones(32, 16, 1)), r"patch_embedding.weight is \[32, 16, 1\]"),
        (_with(patch_embedding__weight=torch.ones(32, 18)), r"is \[32, 18\]"),
        (_with(blocks__0__ffn__0__int8_weight=torch.ones(32, 32)), "has both blocks.0.ffn.0.weight and"),
        (_with(blocks__0__self_attn__q__weight=torch.ones(32, 32).int()), "is int32 in .*, but must be a floating"),
        (_with(condition_embedder__text_embedder__fc_in__weight=torch.ones(1)), "mixes the names of original and Fast"),
        (_with(step=500), "has the key step, which is a int and no parameter"),
        (
            lambda state: state.clear() or state.update(a=torch.ones(1)),
            "is no checkpoint of a Wan model: .*begin with a",
        ),
        (lambda state: [state.pop(key) for key in list(state) if "proj_l" in key], "has no proj_l, the trained part"),
        (
            _with(**{"blocks__0___checkpoint_wrapped_module__modulation": torch.ones(1)}),
            "has blocks.0.modulation twice",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole(change, message, tmp_path):
    state = in_layout(own_weights(transformer()))
    change(state)
    source = tmp_path / "file.pth"
    torch.save(state, source)
    with pytest.raises(CheckpointError, match=message):
        convert_turbowan(source, tmp_path / "made", base="no/such")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth"]


def test_a_published_size_without_its_last_blocks():
    state = published_shapes("TurboWan2.1-T2V-1.3B-480P")
    cut = {key: value for key, value in state.items() if not key.startswith("blocks.29.")}
    with pytest.raises(CheckpointError, match="has 29 blocks, and the published model of width 1536 has 30"):
        checked(cut, "file")
    with pytest.raises(CheckpointError, match=r"blocks.3.ffn.0.scale is \[70, 11\] in file, .* it is \[70, 12\]"):
        checked(
            published_shapes("TurboWan2.1-T2V-1.3B-480P", True) | {"blocks.3.ffn.0.scale": torch.ones(70, 11)}, "file"
        )


def test_a_base_that_does_not_fit(base, tmp_path):
    source = tmp_path / "file.pth"
    torch.save(in_layout(own_weights(transformer())), source)
    for given, error, message in (
        (None, CheckpointError, "of no published size: give the Wan pipeline that has the rest with base="),
        (tmp_path, CheckpointError, "lacks text_encoder, tokenizer, vae: give a whole Wan pipeline"),
        ("no/such", LayoutError, "no/such cannot be had from the hub"),
    ):
        with pytest.raises(error, match=message):
            convert_turbowan(source, tmp_path / "made", base=given)
    torch.save(in_layout(own_weights(transformer(text_dim=24))), source)
    with pytest.raises(CheckpointError, match="has 16 channels of text .d_model., and .* needs 24"):
        convert_turbowan(source, tmp_path / "made", base=base)
    torch.save(in_layout(own_weights(transformer(in_channels=8, out_channels=8))), source)
    with pytest.raises(CheckpointError, match="has 4 latent channels .z_dim., and .* needs 8"):
        convert_turbowan(source, tmp_path / "made", base=base)
    torch.save(in_layout(own_weights(transformer(in_channels=8))), source)
    with pytest.raises(CheckpointError, match="takes 8 channels and makes 4: text to video takes 4, image to video 12"):
        convert_turbowan(source, tmp_path / "made", base=base)
    assert not (tmp_path / "made").exists()


def test_the_published_sizes_have_a_base():
    sizes = {(size[0], size[3] == 36) for size in SIZES.values()}
    assert sizes == set(BASES)


def test_files_that_hold_something_else(tmp_path):
    """Nothing in a file is run, and a damaged one is named."""
    import os

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    source = tmp_path / "file.pth"
    torch.save({"a": Runs()}, source)
    said = r"file\.pth holds something other than weights \((posix|nt)\.mkdir\), or is damaged: take a file of weights"
    with pytest.raises(CheckpointError, match=said) as refused:
        read_checkpoint(source)
    assert not (tmp_path / "run").exists() and "weights_only" not in str(refused.value)
    source.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="holds something other than weights, or is damaged: take a file"):
        read_checkpoint(source)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(
        CheckpointError, match=r"notes\.txt is no checkpoint by its name, which ends in \.txt: a TurboD"
    ):
        read_checkpoint(tmp_path / "notes.txt")
    torch.save(in_layout(own_weights(transformer())), source)
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_checkpoint(source)
