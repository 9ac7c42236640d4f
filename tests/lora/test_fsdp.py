"""FSDP 2 on a mesh of one process on the CPU: precision, layers, ema, and the way into a checkpoint and back."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from lora_runs import recipe, write
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.integrations import is_fsdp_enabled

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.lora.adapters.adapter import add_lora
from vidaccel.lora.backbones.wan import WanBackbone
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.fsdp import autocast_forward, check_plugin, layers_of, split
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.distributed.sharding import all_finite, copy_whole, optimizer_state, whole
from vidaccel.lora.ema import EMA
from vidaccel.lora.optim import clip_gradients
from vidaccel.lora.reconstruction import LossSettings, Reconstruction


@pytest.fixture(scope="module", autouse=True)
def mesh():
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(listener.getsockname()[1]))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def halves(plugin: FullyShardedDataParallelPlugin) -> SimpleNamespace:
    """An accelerator in bf16. accelerate has no FSDP on a CPU, but the part of it that shards runs there."""
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=None,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )


def prepared(module: nn.Module, plugin: FullyShardedDataParallelPlugin) -> nn.Module:
    """As `PhaseRun` prepares it."""
    accelerator = halves(plugin)
    autocast_forward(accelerator, module)
    with layers_of(plugin, module):
        return fsdp2_prepare_model(accelerator, module)


@pytest.fixture
def plugin(monkeypatch) -> FullyShardedDataParallelPlugin:
    """Of the command in the settings of Wan2.1 14B, made from what `accelerate launch` sets for it."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "WanTransformerBlock")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    made = FullyShardedDataParallelPlugin()
    assert made.fsdp_version == 2 and made.cpu_ram_efficient_loading
    check_plugin(made, "bf16")
    return made


def test_phases_without_the_named_layers(plugin, text_base, autoencoder_folder):
    """Alignment has no transformer; the phases behind it are split by its blocks all the same."""
    backbone = WanBackbone(str(text_base), str(autoencoder_folder))
    aligner = prepared(backbone.aligner(), plugin)
    tokens = aligner({"latents": torch.randn(1, 4, 2, 2, 2)})
    assert tokens.shape == (1, 24, 2, 2, 2)
    assert plugin.transformer_cls_names_to_wrap == ["WanTransformerBlock"]
    student = prepared(backbone.student(), plugin)
    assert all(isinstance(block, FSDPModule) for block in student.blocks)


def test_in_half_precision_the_model_is_given_the_timestep_of_its_noise(plugin, text_base, autoencoder_folder):
    """901.3 would be 900 in bfloat16. Gradients are float32, and ema take the place of sharded weights."""
    backbone = WanBackbone(str(text_base), str(autoencoder_folder), dtype=torch.bfloat16)
    student = backbone.student()
    add_lora(student, backbone.lora_targets, 2, 2.0)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(backbone.trained_fully))
    seen = []
    student.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    student = prepared(student, plugin)
    texts = [{"states": torch.randn(3, 64)}]
    made = backbone.velocity(student, torch.randn(1, 4, 2, 2, 2), torch.tensor([0.9013]), texts, {})
    assert seen[0].dtype == torch.float32 and seen[0].item() == pytest.approx(901.3, abs=1e-3)
    (made.float() - 1).square().mean().backward()
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {p.grad.dtype for p in named.values()} == {torch.float32}
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    ema = EMA(named, 0.5)
    before = whole(named)
    ema.update()
    with torch.no_grad():
        named["proj_out.bias"].add_(1.0)
    ema.update()
    with ema.in_place():
        inside = whole(named)["proj_out.bias"]
    assert torch.equal(inside, ema.whole()["proj_out.bias"])
    assert ((inside > before["proj_out.bias"]) & (inside < before["proj_out.bias"] + 1)).all()
    assert torch.equal(whole(named)["proj_out.bias"], before["proj_out.bias"] + 1)


def test_a_sharded_lora_learns_with_sparse_attention(plugin, tmp_path, text_base):
    """As the recipe `lora` sets it up: the pass without gradients first, then the one with them."""
    sections = {
        "model": {"dtype": "bfloat16"},
        "loop": {"mixed_precision": "bf16", "gradient_checkpointing": True},
        "attention": {"method": "radial", "density": 0.6, "dense_layers": 0},
        "flow": {"guidance_preserving": 2},
    }
    made = recipe(write(tmp_path, text_base, data={"sizes": [{"frames": 9, "height": 64, "width": 64}]}, **sections))
    phase = made.phases()[0]
    transformer = prepared(phase.setup({}), plugin)
    assert all(isinstance(block, FSDPModule) for block in transformer.blocks)
    batch = {"latents": torch.randn(1, 8, 3, 8, 8), "caption": ["a red circle"]}
    loss, _ = phase.loss(transformer, batch, Generators([Place(0, 0, 1, 0)]))
    loss.backward()
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert named and all(".lora_" in name for name in named)
    assert {p.grad.dtype for p in named.values()} == {torch.float32}
    gradients = whole({name: p.grad for name, p in named.items()})
    assert all(gradients[name].any() for name in gradients if ".lora_B." in name)
    assert any(not record.reason for record in phase._handle.report().records)
    phase.close()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_sharded_model_learns_sparse_linear_attention(plugin, tmp_path, text_base, train):
    """As the recipe `sla` sets it up: the projections are split with their blocks, and a second model that teaches is
    split, too, with nothing changed by that."""
    sections = {
        "model": {"dtype": "bfloat16"},
        "loop": {"mixed_precision": "bf16", "gradient_checkpointing": True},
        "sla": {"train": train, "topk": 0.25, "block_q": 12, "block_k": 12},
        "lora": {"rank": 32, "alpha": None} if train == "full" else {},
        "flow": {"caption_dropout": 0},
    }
    size = {"frames": 9, "height": 64, "width": 64}
    made = recipe(write(tmp_path, text_base, recipe="sla", data={"sizes": [size]}, **sections))
    phase = made.phases()[0]
    transformer = prepared(phase.setup({}), plugin)
    batch = {"latents": torch.randn(1, 8, 3, 8, 8), "caption": ["a red circle"]}
    loss, _ = phase.loss(transformer, batch, Generators([Place(0, 0, 1, 0)]))
    if train == "full":
        teacher = split(halves(plugin), phase.teacher)
        assert all(isinstance(block, FSDPModule) for block in teacher.blocks)
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        again, _ = phase.loss(transformer, batch, Generators([Place(0, 0, 1, 0)]))
        torch.testing.assert_close(again, loss, rtol=2e-2, atol=0)  # of the order of operations in bf16
        loss = again
    else:
        assert phase.teacher is None
    loss.backward()
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    gradients = whole({name: p.grad for name, p in named.items()})
    assert all(gradients[name].any() and gradients[name].dtype == torch.float32 for name in made.beside)
    assert ("patch_embedding.weight" in named) == (train == "full")
    assert any(not record.reason for record in phase._handle.report().records)
    phase.close()


@pytest.mark.parametrize("kind", ["gft", "consistency", "sla"])
def test_a_pass_without_the_lora_comes_first(plugin, tmp_path, text_base, kind):
    """FSDP looks for what is trained in the very first pass, and sums gradients in its precision for good."""
    sections = {"model": {"dtype": "bfloat16"}, "loop": {"mixed_precision": "bf16", "gradient_checkpointing": True}}
    if kind == "sla":
        sections["sla"] = {"train": "lora", "topk": 0.25, "block_q": 12, "block_k": 12, "dense_layers": 1}
    if kind == "consistency":
        sections |= {"validation": {"steps": 4, "guidance_scale": 5}}
    size = {"frames": 9, "height": 64, "width": 64}
    made = recipe(write(tmp_path, text_base, recipe=kind, data={"sizes": [size]}, **sections))
    phase = made.phases()[0]
    transformer = prepared(phase.setup({}), plugin)
    batch = {"latents": torch.randn(1, 8, 3, 8, 8), "caption": ["a red circle"]}
    loss, _ = phase.loss(transformer, batch, Generators([Place(0, 0, 1, 0)]))
    loss.backward()
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert any(".lora_" in name for name in named)
    assert {p.grad.dtype for p in named.values() if p.grad is not None} == {torch.float32}
    phase.close()


def test_a_sharded_autoencoder_reconstructs(plugin):
    """Asked past its root, it would find weights that are not gathered."""
    model = {"latent_channels": 4, "block_out_channels": (8,) * 7, "layers_per_block": (0, 1, 1, 1, 1, 1, 1)}
    module = prepared(Reconstruction(AutoencoderDCV(**model, chunk_size=8), LossSettings()), plugin).eval()
    with torch.no_grad():
        made = module(torch.rand(1, 3, 8, 32, 32), reconstruct=True)
    assert made.shape == (1, 3, 8, 32, 32) and made.isfinite().all()


def test_sharded_parts_are_clipped_apart():
    """As the autoencoder and its discriminator are."""
    net = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)))
    named = dict(
        zip(
            ("autoencoder.weight", "autoencoder.bias", "discriminator.weight", "discriminator.bias"),
            net.parameters(),
            strict=True,
        )
    )
    for name, parameter in named.items():
        parameter.grad = torch.full_like(parameter, 100.0 if name.startswith("discriminator") else 10.0)
    accelerator = SimpleNamespace(unscale_gradients=lambda: None)
    norms = clip_gradients(accelerator, named, lambda name: name.partition(".")[0], 1.0)
    whole_norms = {name: float(whole(norm)) for name, norm in norms.items()}
    assert whole_norms == pytest.approx(
        {"gradient_norm_autoencoder": 10 * 15**0.5, "gradient_norm_discriminator": 100 * 15**0.5}
    )
    for gradient in whole({name: parameter.grad for name, parameter in named.items()}).values():
        torch.testing.assert_close(gradient, torch.full_like(gradient, 15**-0.5), rtol=1e-4, atol=1e-5)


def test_sharded_weights_and_optimizer_states_come_back():
    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    nets = [fully_shard(nn.Linear(4, 3)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
    train(nets[0], optimizers[0])
    weights, state = whole(dict(nets[0].named_parameters())), whole(optimizers[0].state_dict())
    assert all(type(value) is torch.Tensor for value in weights.values())
    assert type(state["state"][0]["exp_avg"]) is torch.Tensor
    for name, parameter in nets[1].named_parameters():
        copy_whole(parameter, weights[name])
    optimizers[1].load_state_dict(optimizer_state(state, list(nets[1].parameters())))
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    first, second = (whole(dict(net.named_parameters())) for net in nets)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole(dict(nets[0].named_parameters()), keep=False) == {"weight": None, "bias": None}
    assert all_finite(nets[0].parameters())
    with torch.no_grad():
        nets[0].weight.to_local()[0, 0] = float("nan")
    assert not all_finite(nets[0].parameters())


def test_every_process_reads_its_encoders_whole(monkeypatch):
    """`accelerate launch --use_fsdp` asks transformers to load weights in the first process alone."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert is_fsdp_enabled()
    check_plugin(FullyShardedDataParallelPlugin(fsdp_version=2), "bf16")
    assert not is_fsdp_enabled()


def test_fsdp_1_is_refused():
    with pytest.raises(ConfigError, match="set fsdp_version: 2"):
        check_plugin(SimpleNamespace(fsdp_version=1), "no")


def test_activation_checkpointing_of_accelerate_is_refused(monkeypatch):
    """It renames the blocks: files of LoRAs had names that nothing takes, and lacked what lies beside the LoRA."""
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    asked = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ConfigError, match=r"fsdp_activation_checkpointing is true.*loop.gradient_checkpointing"):
        check_plugin(asked, "no")
