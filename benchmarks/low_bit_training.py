"""Training in low bits on the built-in Wan model: memory, loss and time of each setting beside float32 and bfloat16.

    pip install torchao
    python benchmarks/low_bit_training.py

Each arm trains from the same weights with the same clips, noise and levels, and all go on in turn, a step each: with
the ready settings `demo_sla` (all weights, then LoRAs on a frozen base), whose error against dense attention falls from
the first step on. Told are the bytes of weights and of the optimiser's state, the mean loss of the last steps, the
error on held-out clips, and CPU-seconds of a step. Results go to `benchmarks/results/low_bit_training*`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, environment_line, write_markdown

HALF = {"loop.mixed_precision": "bf16"}
LORA = {**HALF, "sla.train": "lora", "lora.rank": 16, "train.learning_rate": 1e-3}
ARMS: dict[str, dict[str, Any]] = {
    "float32, AdamW": {},
    "bf16, AdamW": HALF,
    "bf16, int8 linears": {**HALF, "train.low_bit_linears": "int8"},
    "bf16, fp8 linears, a scale a tensor": {**HALF, "train.low_bit_linears": "fp8_tensorwise"},
    "bf16, fp8 linears, a scale a row": {**HALF, "train.low_bit_linears": "fp8_rowwise"},
    "bf16, fp8 linears, a scale a row, weight gradients in full": {
        **HALF,
        "train.low_bit_linears": "fp8_rowwise_with_gw_hp",
    },
    "bf16, AdamW of 8 bits": {**HALF, "train.optimizer": "adamw_8bit_torchao"},
    "bf16, AdamW of fp8": {**HALF, "train.optimizer": "adamw_fp8_torchao"},
    "bf16, AdamW of 4 bits": {**HALF, "train.optimizer": "adamw_4bit_torchao"},
    "LoRA, bf16, base in bfloat16": {**LORA, "model.dtype": "bfloat16"},
    "LoRA, bf16, base in int8": {**LORA, "model.dtype": "bfloat16", "model.quantise": "int8"},
    "LoRA, bf16, base in fp8": {**LORA, "model.dtype": "bfloat16", "model.quantise": "fp8"},
}
"""Name -> what differs from `demo_sla`."""


@dataclass
class Arm:
    """One way to train, and what was seen of it."""

    phase: Any
    model: Any
    optimizer: Any
    half: bool
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def precision(self) -> Any:
        import torch

        return torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext()

    def step(self, number: int, places: list[Any], batch: dict[str, Any]) -> None:
        """A step as `lora/phase_run.py` does it."""
        import torch

        from vidaccel.lora.distributed.generators import Generators
        from vidaccel.lora.optim import learning_rate, set_learning_rate

        began, settings = time.thread_time(), self.phase.settings
        set_learning_rate(self.optimizer, learning_rate(settings, number))
        with self.precision():
            loss, _ = self.phase.loss(self.model, dict(batch), Generators(places, torch.device("cpu")))
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.seconds.append(time.thread_time() - began)

    def off_dense(self) -> float:
        """The error of the velocity on held-out clips, as a share of the dense model's square."""
        import torch

        self.model.eval()
        with torch.no_grad(), self.precision(), tempfile.TemporaryDirectory() as folder:
            found = self.phase.validate(self.model, Path(folder), 0)["off_dense"]
        self.model.train()
        return found


def opened(changes: dict[str, Any], clips: int, held_out: int, batch_size: int, work: Path) -> Arm:
    """An arm before its first step."""
    import torch

    from vidaccel.lora import config_folder
    from vidaccel.lora.config import build, read
    from vidaccel.lora.footprint.low_bit import in_low_bits
    from vidaccel.lora.optim import make_optimizer
    from vidaccel.lora.recipes.base import Process
    from vidaccel.lora.recipes.sla import TrainSLA

    fixed = {
        "out": work / "none",
        "data.cache": work / "cache",
        "data.clips": clips + held_out,
        "validation.clips": held_out,
        "train.batch_size": batch_size,
        "train.ema_decay": 0,
        "train.lr_warmup_steps": 2,
        **changes,
    }
    settings = read(config_folder() / "demo_sla.yaml", [f"{name}={value}" for name, value in fixed.items()])
    recipe = TrainSLA(build(TrainSLA.Config, settings), Process(torch.device("cpu")))
    recipe.prepare()
    [phase] = recipe.phases()
    phase.clips()
    torch.manual_seed(0)
    model = phase.setup({}).train()
    if phase.settings.low_bit_linears != "none":
        in_low_bits(model, phase.settings.low_bit_linears, phase.name)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(phase.settings, named, phase.learning_rate_scale)
    return Arm(phase, model, optimizer, recipe.config.loop.mixed_precision == "bf16")


def stored(value: Any) -> int:
    """Bytes of all tensors in a value; those of torchao hold others."""
    import torch

    if isinstance(value, dict):
        return sum(stored(each) for each in value.values())
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(stored(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def run(steps: int, held_out: int, batch_size: int, only: str, work: Path) -> tuple[float, list[dict]]:
    """The error on held-out clips before the training, and a row for each arm; all of them go on in turn."""
    from vidaccel.lora.data.dataloader import batches
    from vidaccel.lora.data.sampler import ClipSampler

    arms = {}
    for name, changes in ARMS.items():
        if only in name:
            arms[name] = opened(changes, steps * batch_size, held_out, batch_size, work)
            print(name, flush=True)
    if not arms:
        raise typer.BadParameter(f"no arm has {only!r} in its name; there are: {'; '.join(ARMS)}.")
    first = next(iter(arms.values()))
    before, clips = first.off_dense(), first.phase.recipe.flowing
    sampler = ClipSampler(clips.sizes, clips.members, batch_size)
    for number, (places, batch) in enumerate(batches(clips, sampler, 0, steps, 0, workers=0)):
        for arm in arms.values():
            arm.step(number, places, batch)
        told = "  ".join(f"{arm.losses[-1]:.4f}" for arm in arms.values())
        print(f"step {number + 1} of {steps}: {told}", flush=True)
    rows = []
    for name, arm in arms.items():
        weights = sum(stored(parameter.data) for parameter in arm.model.parameters())
        state = sum(stored(dict(each)) for each in arm.optimizer.state.values())
        last = arm.losses[-max(1, steps // 4) :]
        rows.append(
            {
                "training": name,
                "trained": f"{sum(p.numel() for p in arm.model.parameters() if p.requires_grad):,}",
                "weights, MB": f"{weights / 1e6:.2f}",
                "optimiser state, MB": f"{state / 1e6:.2f}",
                f"loss, mean of the last {len(last)} steps": f"{statistics.fmean(last):.4f}",
                "error on held-out clips": f"{arm.off_dense():.4f}",
                # The first ones compile.
                "CPU-s a step": f"{statistics.median(arm.seconds[min(2, steps - 1) :]):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return before, rows


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of each arm.")] = 80,
    held_out: Annotated[int, typer.Option(min=1, help="Clips that are measured.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 2,
    only: Annotated[str, typer.Option(help="Part of the names of the arms to train.")] = "",
    work: Annotated[Path, typer.Option(help="Folder of the encoded clips, used again where it is there.")] = Path(
        "runs/low_bit_training"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure, and write low_bit_training.json and low_bit_training.md."""
    import importlib.metadata

    import torch

    torch.set_num_threads(1)
    before, rows = run(steps, held_out, batch_size, only, work)
    environment = f"{environment_line()}, torchao {importlib.metadata.version('torchao')}"
    facts = {
        "environment": environment,
        "steps": steps,
        "batch_size": batch_size,
        "held_out": held_out,
        "before": round(before, 4),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "low_bit_training.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    text = (
        f"{environment}, one thread, on a machine with other work. Made by `python benchmarks/low_bit_training.py`.\n\n"
        f"The built-in Wan model learns to do with 1 of 18 key blocks (settings `demo_sla`, the loss is the error "
        f"against dense attention) in {steps} steps of {batch_size} clips, the same clips, noise and levels in each "
        f"row, all rows in turn and in one process; the error on {held_out} held-out clips is a share of the square of "
        f"the dense velocity, and {before:.4f} before the training. *bf16* is the mixed precision, in which trained "
        "weights stay float32. Weights are those of the model that is trained, without the frozen copy that the loss "
        "compares with; gradients and what is kept for the backward pass come on top of both. CPU-seconds are the "
        "median of a step. On a CPU, low bits are computed operation by operation, so these seconds say what they cost "
        "there, and nothing of a GPU."
    )
    write_markdown(out / "low_bit_training.md", "Training in low bits on the built-in model", text, rows)


if __name__ == "__main__":
    typer.run(main)
