"""Several processes: sharded tensors, and a run of two processes against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vidaccel.lora import run
from vidaccel.lora.sharding import copy_whole, optimizer_state, whole

SCRIPT = Path(__file__).with_name("two_processes.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def test_sharded_weights_and_optimizer_states_come_back(mesh):
    """As FSDP 2 shards them."""
    from torch.distributed.fsdp import fully_shard

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    nets = [fully_shard(nn.Linear(4, 3), mesh=mesh) for _ in range(2)]
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


def settings(folder: Path, out: str, batch_size: int) -> Path:
    """Settings of three steps."""
    content = {
        "recipe": "autoencoder",
        "out": str(folder / out),
        "model": {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8, 8, 8, 8, 8],
            "layers_per_block": [0, 1, 1, 1, 1, 1, 1],
            "chunk_size": 8,
        },
        "data": {"kind": "demo", "clips": 9, "sizes": [{"frames": 8, "height": 32, "width": 32}]},
        "phases": [{"name": "train", "steps": 3, "learning_rate": 1e-3, "batch_size": batch_size, "ema_decay": 0.9}],
        "validation": {"clips": 1},
        "statistics_clips": 1,
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
    }
    file = folder / f"{out}.yaml"
    file.write_text(json.dumps(content))
    return file


def launch(folder: Path, file: Path, out: str) -> list[dict[str, torch.Tensor]]:
    """Run in two processes; the result as each of them has it."""
    (folder / "path").mkdir()
    (folder / "path" / "vidaccel").symlink_to(Path(__file__).parents[2], target_is_directory=True)
    (folder / out).mkdir()
    # accelerate starts several processes on a CPU under the name of --multi_gpu, too; the settings say that it is one.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--mixed_precision", "no", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), str(SCRIPT), "autoencoder", str(file), str(folder / out)]
    environment = {**os.environ, "PYTHONPATH": str(folder / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / out / f"rank{number}.pt") for number in range(2)]


def test_two_processes_do_what_one_does_with_the_same_clips(tmp_path):
    first, second = launch(tmp_path, settings(tmp_path, "two", batch_size=1), "two")
    run("autoencoder", settings(tmp_path, "one", batch_size=2))
    one = load_file(tmp_path / "one" / "phases" / "train.safetensors")
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("one", "two")]
    rows = [[json.loads(line) for line in lines] for lines in logs]
    for alone, together in zip(*([row for row in side if "loss" in row] for side in rows), strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-4)
