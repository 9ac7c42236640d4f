"""Prodigy, an optimiser of a package of its own, which finds the learning rate."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from lora_runs import write
from safetensors.torch import load_file
from torch import nn

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.optim import make_optimizer
from vidaccel.lora.settings import PhaseSettings
from vidaccel.lora.trainer import Stopped

has_prodigy = pytest.mark.skipif(importlib.util.find_spec("prodigyopt") is None, reason="needs prodigyopt")


def test_the_rate_of_another_optimiser_is_refused(tmp_path, text_base):
    with pytest.raises(ConfigError, match="learning_rate is 0.0001, .* prodigy .*: set it to 1"):
        run("lora", write(tmp_path, text_base), ["train.optimizer=prodigy", "train.learning_rate=1e-4"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["prodigy", "muon"])
def test_one_rate_for_all_parameters(optimizer):
    settings = PhaseSettings(steps=1, optimizer=optimizer, learning_rate=1.0)
    parameters = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("a", "b")}
    with pytest.raises(ConfigError, match=f"{optimizer} has one learning rate"):
        make_optimizer(settings, parameters, lambda name: 10.0 if name == "a" else 1.0)


@has_prodigy
def test_it_finds_a_rate_and_a_stopped_run_ends_alike(tmp_path, text_base, stop_after):
    file = write(tmp_path, text_base, train={"optimizer": "prodigy", "learning_rate": 1.0, "steps": 12})
    straight = run("lora", file, [f"out={tmp_path / 'straight'}"])
    stop_after(10)
    with pytest.raises(Stopped):
        run("lora", file)
    resumed = run("lora", file, resume="latest")
    first, second = (load_file(result["lora"]) for result in (straight, resumed))
    assert any(value.any() for name, value in first.items() if "lora_B" in name)
    assert all(second[name].equal(value) for name, value in first.items())
    lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == sorted(rates) and 0 < rates[0] < rates[-1]
