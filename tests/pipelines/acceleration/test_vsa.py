"""VSA in real Wan pipelines at tiny sizes: gates are found, attached, refused and taken away again."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanPipeline, WanTransformer3DModel
from sla_models import demo_parts
from tiny_wan import make_pipe, make_transformer
from vsa_models import TRAINED, gates, same, write_gates

import vidaccel
from vidaccel import VSA, DenseSchedule, SparseAttention
from vidaccel.pipelines.acceleration.vsa_gates import CONFIG, GATE, TrainedVSA, VSAError
from vidaccel.pipelines.files import json_files, weight_files

METHOD = TRAINED.method()
DEMO = {"in_channels": 8, "out_channels": 8, "text_dim": 64}  # as its autoencoder and its text encoder make them


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    WanPipeline(**demo_parts(), transformer=make_transformer(**DEMO)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory, base):
    """As FastVideo publishes it: gates in the blocks, and nothing says what they were trained for."""
    return write_gates(tmp_path_factory.mktemp("published") / "model", base)


@pytest.fixture(scope="module")
def stated(tmp_path_factory, base):
    return write_gates(tmp_path_factory.mktemp("stated") / "model", base, trained=TRAINED)


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    latents = torch.randn(1, config.in_channels, 3, 8, 12, generator=generator)
    text = torch.randn(1, 5, config.text_dim, generator=generator)
    return transformer(hidden_states=latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text).sample


def test_each_layer_gates_with_its_own_weights(published, monkeypatch):
    """What the engine gets in each layer is what the linear layer in the file makes of the attention's input."""
    pipe = WanPipeline.from_pretrained(published)
    inputs, given, call = {}, {}, SparseAttention.__call__

    def spy(self, q, k, v, layer, **options):
        given[layer] = options["weights"]
        return call(self, q, k, v, layer, **options)

    monkeypatch.setattr(SparseAttention, "__call__", spy)
    for number, block in enumerate(pipe.transformer.blocks):
        block.attn1.register_forward_pre_hook(lambda m, args, number=number: inputs.update({number: args[0]}))
    with vidaccel.accelerate(pipe, METHOD) as handle:
        velocity(pipe.transformer)
    assert all(record.density < 0.4 for record in handle.report().records)
    tensors = gates(pipe.transformer)
    for number, gate in given.items():
        weight, bias = (tensors[f"blocks.{number}.{GATE}.{kind}"] for kind in ("weight", "bias"))
        torch.testing.assert_close(gate.transpose(1, 2).flatten(2), inputs[number] @ weight.T + bias)
    assert len(given) == len(pipe.transformer.blocks) > 1


def test_gates_change_the_output_and_go_away_again(published):
    pipe = WanPipeline.from_pretrained(published)
    names, before = set(pipe.transformer.state_dict()), velocity(pipe.transformer)
    with vidaccel.accelerate(pipe, VSA(density=0.3, cube=(1, 2, 2), gated=False)):
        bare = velocity(pipe.transformer)
        assert set(pipe.transformer.state_dict()) == names
    handle = vidaccel.accelerate(pipe, METHOD)
    gated = velocity(pipe.transformer)
    assert (gated - bare).abs().max() > 1e-3
    with handle.dense():  # dense attention, and the branch that was trained beside it
        assert (velocity(pipe.transformer) - before).abs().max() > 1e-3
    handle.remove()
    assert set(pipe.transformer.state_dict()) == names and velocity(pipe.transformer).equal(before)
    handle.remove()


def test_gates_that_lie_in_the_attention(base, published, tmp_path):
    within = WanPipeline.from_pretrained(write_gates(tmp_path / "within", base, within="attn1."))
    blocks = WanPipeline.from_pretrained(published)
    with vidaccel.accelerate(within, METHOD), vidaccel.accelerate(blocks, METHOD):
        assert velocity(within.transformer).equal(velocity(blocks.transformer))


def test_it_is_the_choice_for_a_model_that_states_it(stated, published):
    with vidaccel.accelerate(WanPipeline.from_pretrained(stated)) as handle:
        assert handle.method == METHOD
        assert "no method was given: vsa, which the model was trained for" in handle.report().notes
    with vidaccel.accelerate(WanPipeline.from_pretrained(stated), "vsa") as handle:
        assert handle.method == METHOD
    with vidaccel.accelerate(WanPipeline.from_pretrained(stated), "vsa", density=0.5) as handle:
        assert handle.method == VSA(density=0.5, cube=TRAINED.cube)
    with vidaccel.accelerate(WanPipeline.from_pretrained(published), "vsa") as handle:
        assert handle.method == VSA()


def test_a_transformer_alone_and_one_that_does_not_know_its_folder(published):
    alone = WanTransformer3DModel.from_pretrained(published / "transformer")
    made = make_pipe(transformer=make_transformer(**DEMO))
    made.transformer.load_state_dict(alone.state_dict())
    with pytest.raises(VSAError, match=r"transformer has no gates .*: its files are not known\. Load .* or give its"):
        vidaccel.accelerate(made, METHOD)
    with vidaccel.accelerate(alone, METHOD), vidaccel.accelerate(made, METHOD, base=published):
        same(velocity(alone), velocity(made.transformer))


def test_two_transformers(base, tmp_path):
    folder = tmp_path / "two"
    models = {name: make_transformer(seed, **DEMO) for seed, name in enumerate(("transformer", "transformer_2"))}
    WanPipeline(**demo_parts(), **models, boundary_ratio=0.5).save_pretrained(folder)
    for part in ("transformer", "transformer_2"):
        write_gates(folder, folder, part, trained=TRAINED)
    pipe = WanPipeline.from_pretrained(folder)
    with vidaccel.accelerate(pipe) as handle:
        assert handle.method == METHOD
        assert all(hasattr(t.blocks[1].attn1, GATE) for t in (pipe.transformer, pipe.transformer_2))
    write_gates(folder, folder, "transformer_2", trained=TrainedVSA(density=0.5, cube=(1, 2, 2)))
    with pytest.raises(VSAError, match="trained with different settings of VSA"):
        vidaccel.accelerate(WanPipeline.from_pretrained(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks_1_to_gate_compress_bias": None}, r"gate of blocks.1.attn1 \(to_gate_compress.bias\) is missing"),
        (
            {"blocks_0_to_gate_compress_weight": torch.ones(3, 3)},
            r"blocks.0.attn1 .* is \[3, 3\], and this model needs",
        ),
    ],
)
def test_gates_that_are_not_whole(base, tmp_path, changes, message):
    pipe = WanPipeline.from_pretrained(write_gates(tmp_path / "model", base, **changes))
    with pytest.raises(VSAError, match=message):
        vidaccel.accelerate(pipe, METHOD)
    assert not any(GATE in name for name in pipe.transformer.state_dict())
    vidaccel.accelerate(pipe, "radial").remove()  # nothing of it stayed behind


def test_a_model_without_gates_and_a_file_that_cannot_be_read(base, tmp_path):
    pipe = WanPipeline.from_pretrained(base)
    with pytest.raises(VSAError, match=r"no gates for VSA .*/transformer has none\. .*VSA\(gated=False\) needs no"):
        vidaccel.accelerate(pipe, "vsa")
    folder = write_gates(tmp_path / "model", base)
    (folder / "transformer" / CONFIG).write_text('{"density": 7, "cube": [4, 4, 4]}')
    with pytest.raises(VSAError, match=r"vsa_config.json does not say what its VSA was trained for: VSA density is 7"):
        vidaccel.accelerate(WanPipeline.from_pretrained(folder))


def test_compiled_blocks_and_copies_gate_as_they_are(stated):
    pipe = WanPipeline.from_pretrained(stated)
    with vidaccel.accelerate(pipe, METHOD, schedule=DenseSchedule(first_layers=1)):
        eager = velocity(pipe.transformer)
        copied = copy.deepcopy(pipe)
        same(velocity(copied.transformer), eager)
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(velocity(pipe.transformer), eager, atol=1e-6, rtol=0.0)


def test_no_file_is_looked_for_where_another_method_is_named(stated, monkeypatch):
    """Of a model of the hub that would be a request."""
    pipe = WanPipeline.from_pretrained(stated)
    for module in (weight_files, json_files):
        monkeypatch.setattr(module, "transformer_file", lambda *place: pytest.fail(f"{place} was looked for"))
    vidaccel.accelerate(pipe, "radial").remove()


def test_gates_that_are_there_already_stay(published):
    transformer = WanTransformer3DModel.from_pretrained(published / "transformer")
    with vidaccel.accelerate(transformer, METHOD):
        wanted = velocity(transformer)
    for number, block in enumerate(transformer.blocks):
        gate = torch.nn.Linear(64, 64)
        names = {kind: f"blocks.{number}.{GATE}.{kind}" for kind in ("weight", "bias")}
        gate.load_state_dict({kind: gates(transformer)[name] for kind, name in names.items()})
        block.attn1.add_module(GATE, gate)
    with vidaccel.accelerate(transformer, METHOD):
        assert velocity(transformer).equal(wanted)
    assert hasattr(transformer.blocks[0].attn1, GATE)


def test_half_precision_keeps_gates_in_it(published):
    pipe = WanPipeline.from_pretrained(published, dtype=torch.bfloat16)
    with vidaccel.accelerate(pipe, METHOD):
        assert pipe.transformer.blocks[0].attn1.get_submodule(GATE).weight.dtype == torch.bfloat16


def test_weights_that_are_stored_in_8_bits_or_offloaded(published):
    pipe = WanPipeline.from_pretrained(published)
    with vidaccel.accelerate(pipe, METHOD):
        wanted = velocity(pipe.transformer)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with vidaccel.accelerate(pipe, METHOD):
        assert pipe.transformer.blocks[0].attn1.get_submodule(GATE).weight.dtype == torch.float32
        assert velocity(pipe.transformer).isfinite().all()
    pipe = WanPipeline.from_pretrained(published)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
    with vidaccel.accelerate(pipe, METHOD):
        assert velocity(pipe.transformer).equal(wanted)
