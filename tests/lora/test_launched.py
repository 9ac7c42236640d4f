"""What `accelerate launch` asks for, and compiled models, which are trained as any other; refusals in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from lora_runs import write
from safetensors.torch import load_file

from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.distributed.launched import check_accelerator
from vidaccel.lora.phase_checks import check_compiler
from vidaccel.lora.trainer import make_accelerator


@pytest.fixture
def afresh() -> Iterator[None]:
    """accelerate keeps what it was told once in a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch._dynamo.reset()


def test_a_compiled_model_has_the_names_of_a_plain_one(tiny_settings, run_tiny, monkeypatch, afresh, stop_after):
    """They began with `_orig_mod.`: the second phase knew nothing of the first, and the result had no weight of it."""
    plain = run_tiny(tiny_settings("plain"))
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = run_tiny(tiny_settings("compiled"))
    assert make_accelerator(tiny_settings()).state.dynamo_plugin.backend == "EAGER"
    assert compiled.trained.keys() == plain.trained.keys()
    for name, value in plain.trained.items():
        torch.testing.assert_close(compiled.trained[name], value)


def test_the_lora_of_a_compiled_model_can_be_read(tmp_path, text_base, monkeypatch, afresh):
    from diffusers import WanPipeline

    file = write(tmp_path, text_base, lora={"targets": ["to_q"]}, validation={"clips": 0, "prompts": []})
    plain = load_file(run("lora", file)["lora"])
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    result = run("lora", file, [f"out={tmp_path / 'compiled'}"])["lora"]
    compiled = load_file(result)
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
    pipe = WanPipeline.from_pretrained(text_base)
    pipe.load_lora_weights(Path(result).parent)
    assert "default_0" in pipe.transformer.peft_config


@pytest.fixture
def eager(monkeypatch) -> Iterator[list[str]]:
    """Compiled into graphs, and no further; the names of the classes of which there are graphs."""
    compiled, original = [], torch.nn.Module.compile

    def compile(self, *_, **options):
        compiled.append(type(self).__name__)
        original(self, backend="eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["lora", pytest.param("gft", marks=pytest.mark.slow)])
def test_the_blocks_alone_are_compiled(tmp_path, text_base, eager, recipe):
    """The result is that of a plain training, with its names, and one may be resumed as the other."""
    more = {"gft": {"max_scale": 4}} if recipe == "gft" else {}
    file = write(tmp_path, text_base, recipe=recipe, validation={"clips": 1, "prompts": []}, **more)
    plain = load_file(run(recipe, file)["lora"])
    assert not eager
    made = torch._dynamo.utils.counters["frames"]["ok"]
    compiled = load_file(run(recipe, file, ["loop.compile=true", f"out={tmp_path / 'compiled'}"])["lora"])
    assert eager == ["WanTransformerBlock"] * 2 and torch._dynamo.utils.counters["frames"]["ok"] > made
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
    run(recipe, file, [f"out={tmp_path / 'compiled'}", "train.steps=3"], "latest")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.offload_blocks=1", "model.offload_blocks is 1 and loop.compile true"),
        ("attention.method=radial", "loop.compile is true and attention.method radial, which has no gradients in comp"),
        ("loop.compile=true", "loop.compile is true, but torch's compiler needs something"),
    ],
)
def test_blocks_that_cannot_be_compiled(tmp_path, text_base, monkeypatch, override, words):
    monkeypatch.setattr("vidaccel.lora.phase_checks.missing", lambda device: "needs something")
    with pytest.raises(ConfigError, match=words):
        run("lora", write(tmp_path, text_base, loop={"compile": True, "gradient_checkpointing": True}), [override])
    with pytest.raises(ConfigError, match="loop.compile is true, and this recipe trains with SLA, which has no"):
        run("sla", write(tmp_path, text_base, recipe="sla", loop={"compile": True}, lora={"rank": 32, "alpha": None}))
    assert not (tmp_path / "run").exists()


def test_what_has_no_blocks_is_not_compiled(tiny_settings, run_tiny, tiny_phase, monkeypatch):
    monkeypatch.setattr(tiny_phase, "outline", lambda self: torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="loop.compile is true, but what is trained has no repeated blocks"):
        run_tiny(tiny_settings(loop={"compile": True}))
    with pytest.raises(ConfigError, match="loop.compile is true under FSDP"):
        check_compiler(torch.device("cpu"), True)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed .*, not supported: .*--use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"},
            "regional compilation, .* set dynamo_use_regional_compilation to false",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_words(tiny_settings, run_tiny, monkeypatch, afresh, variables, words):
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(ConfigError, match=words):
            make_accelerator(tiny_settings())
    assert len(run_tiny(tiny_settings()).seen) == 6


def test_half_precision_that_a_cpu_does_not_have_is_refused(tiny_settings, run_tiny, afresh):
    """accelerate has none there, and says nothing; the next run in the process is none the worse."""
    with pytest.raises(ConfigError, match="loop.mixed_precision is fp16, and the run is on the CPU"):
        make_accelerator(tiny_settings(loop={"mixed_precision": "fp16"}))
    assert len(run_tiny(tiny_settings()).seen) == 6


@pytest.mark.parametrize(
    ("kind", "parallel", "backend", "words"),
    [
        ("DEEPSPEED", None, "NO", "asks for DEEPSPEED, not supported"),
        ("XLA", None, "NO", "asks for XLA, not supported"),
        ("FSDP", SimpleNamespace(cp_enabled=True), "NO", "asks for context parallelism, not supported"),
        ("FSDP", None, "INDUCTOR", "dynamo backend inductor under FSDP"),
    ],
)
def test_other_ways_to_use_devices_are_refused(kind, parallel, backend, words):
    dynamo = SimpleNamespace(backend=backend, use_regional_compilation=False)
    plugin = object() if kind == "FSDP" else None
    state = SimpleNamespace(dynamo_plugin=dynamo, parallelism_config=parallel, fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=kind, state=state)
    with pytest.raises(ConfigError, match=words):
        check_accelerator(accelerator)
    dynamo.backend, state.parallelism_config, accelerator.distributed_type = "NO", None, "MULTI_GPU"
    check_accelerator(accelerator, sparse=True)
    dynamo.backend, state.fsdp_plugin = "EAGER", None
    check_accelerator(accelerator)
    with pytest.raises(ConfigError, match="dynamo backend eager, and the run trains with sparse attention"):
        check_accelerator(accelerator, sparse=True)
