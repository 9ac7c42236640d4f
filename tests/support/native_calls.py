"""The attention calls of ComfyUI's native models, recorded, and a stand-in for a forward pass that plays them.

`RECORDED` holds one forward pass of each of ComfyUI 0.33's models at tiny sizes: lengths, tensor layout, block index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from vidaccel import SVG2, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.nodes.native.override import OVERRIDE, NativeAttention
from vidaccel.nodes.native.sampling import DensePart

HEADS, HEAD_DIM = 2, 16


def model_of(name: str, **attributes: Any) -> Any:
    """Something with the class name and the attributes by which a native model is known."""
    return type(name, (), attributes)()


@dataclass
class Recorded:
    """Calls `(queries, keys, block_index, block_type)` of one forward pass; `video` are those over the video."""

    model: Any
    latent: tuple[int, int, int]
    layout: VideoLayout
    calls: list[tuple[int, int, int | None, str | None]]
    video: dict[int, int]
    heads_apart: bool = False
    text: int = 7
    conditions: dict[str, Any] = field(default_factory=dict)


WAN = {"patch_size": (1, 2, 2), "blocks": [None] * 2}
HUNYUAN = {
    "patch_size": [1, 2, 2],
    "double_blocks": [SimpleNamespace()] * 2,
    "single_blocks": [SimpleNamespace()] * 2,
}


def with_cross(tokens: int, indices: list[int | None], kind: str | None, cross: int = 1) -> list[tuple]:
    return [call for i in indices for call in [(tokens, tokens, i, kind)] + [(tokens, 7, i, kind)] * cross]


def _after(name: str, frames: int) -> dict[str, Any]:
    latent = torch.zeros(1, 16, frames, 8, 8)
    return {name: [latent] if name == "context_latents" else latent}


RECORDED = {
    "wan": Recorded(
        model_of("WanModel", **WAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        with_cross(80, [0, 1], "double"),
        {0: 0, 2: 1},
    ),
    "wan without block_index": Recorded(
        model_of("WanModel", **WAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        with_cross(80, [None, None], None),
        {0: 0, 2: 1},
    ),
    "wan i2v": Recorded(
        model_of("WanModel", **WAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        with_cross(80, [0, 1], "double", cross=2),
        {0: 0, 3: 1},
        conditions={"clip_fea": torch.zeros(1, 9, 4)},
    ),
    "wan odd size": Recorded(
        model_of("WanModel", **WAN), (5, 7, 9), VideoLayout(5, 4, 5), with_cross(100, [0, 1], "double"), {0: 0, 2: 1}
    ),
    "wan reference": Recorded(
        model_of("WanModel", **WAN, ref_conv=object()),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_before=16),
        with_cross(96, [0, 1], "double"),
        {0: 0, 2: 1},
        conditions={"reference_latent": torch.zeros(1, 16, 8, 8)},
    ),
    "wan subject": Recorded(
        model_of("WanModel", **WAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_after=32),
        with_cross(112, [0, 1], "double"),
        {0: 0, 2: 1},
        conditions=_after("time_dim_concat", 2),
    ),
    "wan context": Recorded(
        model_of("WanModel", **WAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_after=16),
        with_cross(96, [0, 1], "double"),
        {0: 0, 2: 1},
        conditions=_after("context_latents", 1),
    ),
    # Block 0 and 1 of the main model, each followed by a VACE block that runs under the same index.
    "wan vace": Recorded(
        model_of("VaceWanModel", **WAN, vace_blocks=[None] * 2, vace_layers_mapping={0: 0, 1: 1}),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        with_cross(80, [0, 0, 1, 1], "double"),
        {0: 0, 2: 2, 4: 1, 6: 3},
    ),
    "hunyuan": Recorded(
        model_of("HunyuanVideo", **HUNYUAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_before=7),
        [(7, 7, None, None)] * 2 + [(87, 87, i, kind) for kind in ("double", "single") for i in range(2)],
        {2: 0, 3: 1, 4: 2, 5: 3},
        heads_apart=True,
    ),
    "hunyuan reference": Recorded(
        model_of("HunyuanVideo", **HUNYUAN),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_before=23),
        [(7, 7, None, None)] * 2 + [(103, 103, i, kind) for kind in ("double", "single") for i in range(2)],
        {2: 0, 3: 1, 4: 2, 5: 3},
        heads_apart=True,
        conditions={"ref_latent": torch.zeros(1, 16, 1, 8, 8)},
    ),
    "mochi": Recorded(
        model_of("AsymmDiTJoint", patch_size=2, blocks=[None] * 2),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_after=6),
        [(86, 86, None, None)] * 2,
        {0: 0, 1: 1},
        heads_apart=True,
        conditions={"num_tokens": 6},
    ),
    "ltxv": Recorded(
        model_of("LTXVModel", transformer_blocks=[None] * 2),
        (5, 4, 4),
        VideoLayout(5, 4, 4),
        with_cross(80, [None, None], None),
        {0: 0, 2: 1},
    ),
    # In each block: the video, its text, the audio, its text, audio to video, video to audio.
    "ltx-2": Recorded(
        model_of("LTXAVModel", transformer_blocks=[None] * 2),
        (5, 4, 4),
        VideoLayout(5, 4, 4),
        [(q, k, None, None) for q, k in [(80, 80), (80, 7), (6, 6), (6, 7), (80, 6), (6, 80)] * 2],
        {0: 0, 6: 1},
        conditions={"latent_shapes": [(1, 16, 5, 4, 4), (1, 8, 6, 16)]},
    ),
    "kandinsky": Recorded(
        model_of("Kandinsky5", patch_size=(1, 2, 2), visual_transformer_blocks=[None] * 2),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        [(7, 7, None, None)] * 2 + with_cross(80, [0, 1], "double"),
        {2: 0, 4: 1},
        heads_apart=True,
    ),
    "cogvideox 1.5": Recorded(
        model_of("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=2, blocks=[None] * 2),
        (5, 8, 8),
        VideoLayout(3, 4, 4, text_before=7),
        [(55, 55, None, None)] * 2,
        {0: 0, 1: 1},
    ),
    "minimax": Recorded(
        model_of("MiniMaxH3Model", patch_size=(1, 2, 2), blocks=[None] * 2),
        (5, 8, 8),
        VideoLayout(5, 4, 4, text_before=7 + 16 + 12),
        [(115, 115, None, None)] * 2,
        {0: 0, 1: 1},
        heads_apart=True,
        conditions={
            "latent_shapes": [(1, 24, 5, 8, 8), (1, 32, 2, 6)],
            "minimax_payload": {"layout": SimpleNamespace(segments=[(0, 7, "text"), (7, 23, "cond")])},
        },
    ),
    "cosmos predict2": Recorded(
        model_of("MiniTrainDIT", patch_spatial=2, patch_temporal=1, blocks=[None] * 2),
        (5, 8, 8),
        VideoLayout(5, 4, 4),
        with_cross(80, [0, 1], None),
        {0: 0, 2: 1},
        heads_apart=True,
    ),
}


def dense(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **rest):
    """Attention with the signature and the layouts of ComfyUI's functions."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Executor:
    """Plays the recorded calls of a model in place of its forward pass and keeps inputs, outputs and what was asked.

    Args:
        recorded: the calls. batch: entries of the latent batch times conditions. seeds: of the inputs of each entry.
        extra: further keyword arguments of every call.
    """

    def __init__(self, recorded: Recorded, batch: int = 1, seeds: list[int] | None = None, **extra: Any) -> None:
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
        self.class_obj = SimpleNamespace(diffusion_model=recorded.model, model_sampling=sampling)
        self.recorded, self.seeds, self.extra = recorded, seeds or list(range(batch)), extra
        self.inputs, self.outputs, self.asked = [], [], []

    def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **conditions):
        def func(q, k, v, heads, *args, **kwargs):
            self.asked.append(len(self.inputs) - 1)
            return dense(q, k, v, heads, *args, **kwargs)

        for place, (n_q, n_k, index, kind) in enumerate(self.recorded.calls):
            options = dict(transformer_options)
            if index is not None:
                options |= {"block_index": index}
            if kind is not None:
                options |= {"block_type": kind}
            q, k, v = (self._tensor(n, place * 3 + i) for i, n in enumerate((n_q, n_k, n_k)))
            self.inputs.append((q, k, v))
            if not self.recorded.heads_apart:
                q, k, v = (y.transpose(1, 2).flatten(2) for y in (q, k, v))
            kwargs = {"transformer_options": options, **self.extra}
            if self.recorded.heads_apart:
                kwargs["skip_reshape"] = True
            self.outputs.append(options[OVERRIDE](func, q, k, v, HEADS, **kwargs))
        return x

    def _tensor(self, tokens: int, number: int) -> torch.Tensor:
        parts = [torch.Generator().manual_seed(1000 * seed + number) for seed in self.seeds]
        return torch.stack([torch.randn(HEADS, tokens, HEAD_DIM, generator=g) for g in parts])


SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def session_of(method=None, **options: Any) -> NativeAttention:
    method = method or SVG2(density=0.6)
    return NativeAttention(
        method if callable(method) else lambda layout: method,
        name="test",
        settings={"compensate": None, "key_clusters": None},
        **{"dense": DensePart(), **options},
    )


def step(session: NativeAttention, executor: Executor, sigma: float = 0.5, **options: Any) -> Executor:
    """One forward pass."""
    recorded = executor.recorded
    x = torch.zeros(len(executor.seeds), 16, *recorded.latent)
    text = torch.zeros(len(executor.seeds), recorded.text, 8)
    given = {"sigmas": torch.tensor([sigma]), "sample_sigmas": SIGMAS, "cond_or_uncond": [0], **options}
    session.forward(executor, x, torch.tensor([sigma]), None, text, None, given, **recorded.conditions)
    return executor


def expected(method, q, k, v, layout, flat: bool) -> torch.Tensor:
    """What the override must give: `sparse_attention` with the method's plan, each batch entry on its own."""
    outs = []
    for one in zip(*(x.split(1) for x in (q, k, v)), strict=True):
        outs.append(sparse_attention(*one, method.plan(*one, layout, PlanMemory())))
    out = torch.cat(outs)
    return out.transpose(1, 2).flatten(2) if flat else out


def run(session: NativeAttention, recorded: Recorded, passes: list[dict[str, Any]]) -> dict[tuple, torch.Tensor]:
    """A run of four steps; the last self-attention output of each step and batch entry, by seed."""
    session.begin()
    outputs = {}
    for sigma in SIGMAS[:-1].tolist():
        for one in passes:
            seeds = [round(10 * sigma) + seed * 100 for seed in one["seeds"]]
            played = step(session, Executor(recorded, seeds=seeds), sigma, **one["options"])
            for entry, seed in enumerate(one["seeds"]):
                outputs[sigma, seed] = played.outputs[list(recorded.video)[-1]][entry]
    session.end()
    return outputs


BATCHED = [{"seeds": [1, 2], "options": {"cond_or_uncond": [1, 0], "uuids": ["n", "p"]}}]


SEPARATE = [
    {"seeds": [2], "options": {"cond_or_uncond": [0], "uuids": ["p"]}},
    {"seeds": [1], "options": {"cond_or_uncond": [1], "uuids": ["n"]}},
]
