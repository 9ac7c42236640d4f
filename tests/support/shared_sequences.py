"""Transformers whose sequences processes can share, and what is run on them, in one process and in several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ContextParallelConfig
from tiny_families import others
from tiny_wan import generate, make_pipe, make_transformer
from torch.distributed.device_mesh import init_device_mesh

from vidaccel import SVG, SVG2, VSA, DenseSchedule, Radial, Tangent, accelerate
from vidaccel.attention import Method, RandomBlocks, Sparge
from vidaccel.pipelines.acceleration.vsa_gates import GATE

FEW = {"q_clusters": 6, "k_clusters": 12, "init_iterations": 4}
FIRST_LAYER = DenseSchedule(first_layers=1)
METHODS: dict[str, Method] = {
    "radial": Radial(8, min_window=0.1, near=0.2, sink=False),
    "random": RandomBlocks(),
    "random, fixed": RandomBlocks(redraw=False),
    "svg": SVG(density=0.6, tile=8),
    "sparge": Sparge(topk=0.4, block=(16, 8)),
    "svg2": SVG2(top_p=0.6, **FEW),
    "svg2, density": SVG2(density=0.4, **FEW),
    "svg2, error": SVG2(density=0.3, route="error", **FEW),
    "svg2, ear": SVG2(density=0.4, route="error", compensate=True, **FEW),
    "vsa": VSA(density=0.4, cube=(2, 2, 2)),
    "tangent": Tangent(density=0.4, probe=False, **FEW),
    "tangent, probe": Tangent(density=0.4, probe=True, **FEW),
    "tangent, tolerance": Tangent(tolerance=0.2, probe=True, **FEW),
}


@dataclass
class Shared:
    """A transformer and the arguments of its passes, one for each step; or the pipeline that it is in."""

    model: torch.nn.Module
    steps: list[dict[str, Any]]
    pipe: Any = None

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        if self.pipe is not None:
            return [generate(self.pipe, steps=3)]
        return [self.model(**given, return_dict=False)[0].clone() for given in self.steps]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def wan(heads: int = 4, grid: tuple[int, int, int] = (6, 4, 4)) -> Shared:
    """A grid of tokens, and heads of 16 channels, the first of which attend to less than the last."""
    model = make_transformer(num_attention_heads=heads, attention_head_dim=16, num_layers=2)
    for block in model.blocks:
        sharpness = torch.linspace(4, 1, heads).repeat_interleave(16)
        block.attn1.norm_q.weight = torch.nn.Parameter(block.attn1.norm_q.weight * sharpness)
    frames, height, width = grid
    given = {"hidden_states": noise(2, 4, frames, 2 * height, 2 * width), "encoder_hidden_states": noise(2, 5, 16)}
    return Shared(model, [{**given, "timestep": torch.tensor([time, time])} for time in (900, 500, 300)])


def gated() -> Shared:
    """With gates for VSA; the schedule leaves the first layer dense."""
    shared = wan()
    for block in shared.model.blocks:
        block.attn1.add_module(GATE, torch.nn.Linear(64, 64))
    return shared


def wan_pipeline() -> Shared:
    """Two branches of guidance, whose heads take different numbers of pairs."""
    pipe = make_pipe(transformer=wan().model)
    return Shared(pipe.transformer, [], pipe)


def ltx() -> Shared:
    """Packed latents, split before the transformer runs; text without a mask, which diffusers cannot share."""
    config = {**others.LTX, "num_attention_heads": 4, "cross_attention_dim": 64}
    model = diffusers.LTXVideoTransformer3DModel(**config, num_layers=2)
    given = {**others.SIZE, "hidden_states": noise(1, 72, 8), "encoder_hidden_states": noise(1, 8, 16)}
    given["encoder_attention_mask"] = None
    return Shared(model, [{**given, "timestep": torch.tensor([time])} for time in (900, 500)])


def minimax_h3() -> Shared:
    """Text and sound beside the video in one sequence."""
    tiny = others.minimax_h3(2)
    text, sound, total = (x if isinstance(x, int) else len(x) for x in (6, 6, torch.arange(84)))
    given = {**tiny.given, "encoder_hidden_states": noise(1, text, 16)}
    tags = torch.cat([torch.ones(text), torch.zeros(72), torch.full((sound,), 2)]).long()
    given |= {"token_tags": tags, "timestep_indices": (tags != 1).long(), "text_indices": torch.arange(text)}
    given |= {"video_indices": torch.arange(text, text + 72), "audio_indices": torch.arange(text + 72, total)}
    given["position_ids"] = torch.cat([tiny.given["position_ids"][:1], tiny.given["position_ids"]])
    return Shared(tiny.model, [{**given, "timestep": torch.tensor([0.0, level])} for level in (0.1, 0.5)])


BUILDERS: dict[str, Callable[[], Shared]] = {
    "wan": wan,
    "wan pipeline": wan_pipeline,
    "ltx": ltx,
    "minimax_h3": minimax_h3,
    "wan, 3 heads": lambda: wan(heads=3),
    "wan, gated": gated,
}


def build(name: str) -> Shared:
    torch.manual_seed(0)
    shared = BUILDERS[name]()
    shared.model.eval().requires_grad_(False)
    return shared


CASES = [("wan, gated" if method == "vsa" else "wan", method) for method in METHODS]
CASES += [("wan pipeline", "tangent, probe")]
CASES += [("ltx", "radial"), ("ltx", "tangent, probe"), ("minimax_h3", "radial"), ("minimax_h3", "tangent, probe")]
CASES += [("wan, 3 heads", "radial"), ("wan, 3 heads", "random"), ("wan, 3 heads", "tangent, probe")]


def share(shared: Shared, ranks: int, anything: bool = False) -> None:
    """Let processes share the sequences of a model."""
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=ranks, mesh=mesh, ulysses_anything=anything)
    shared.model.enable_parallelism(config=config)


def gradient(shared: Shared, method: str) -> torch.Tensor:
    """Of the sum of a pass, for the queries' weights in the sparse layer, as far as this process's tokens make it."""
    weight = shared.model.blocks[1].attn1.to_q.weight.requires_grad_()
    with accelerate(shared.model, METHODS[method], schedule=FIRST_LAYER):
        out = shared.model(**shared.steps[0], return_dict=False)[0]
    return torch.autograd.grad(out.square().sum(), weight)[0]


def run_sparse(shared: Shared, method: str) -> dict[str, Any]:
    """What a model makes of its steps under a method, and what the report says."""
    target = shared.pipe or shared.model
    with accelerate(target, METHODS[method], schedule=FIRST_LAYER, measure_error=16) as handle:
        outs = shared.run()
        report = handle.report()
    keys = ("layer", "step", "reason", "density", "error")
    records = [{key: getattr(record, key) for key in keys} | {"details": record.details} for record in report.records]
    return {"outs": outs, "records": records, "notes": report.notes}
