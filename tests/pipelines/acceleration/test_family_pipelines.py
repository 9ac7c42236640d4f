"""Every family in whole pipelines of diffusers: all steps are seen, runs are their own, nothing stays behind."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import cogvideo
from fast_set import fast
from no_torchvision import without_torchvision
from PIL import Image

from vidaccel import SVG2, DenseSchedule, Radial, SparseAttention, accelerate
from vidaccel.generation.calls import as_class, call_arguments, row_of
from vidaccel.generation.models.inspected import inspect_pipeline
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.rows import NOT_RUN as NOT_GENERATED
from vidaccel.pipelines import FAMILIES, supported_pipelines

METHOD, NEVER_DENSE = SVG2(top_p=0.5), DenseSchedule()
SIZES = ((64, 96, 9), (96, 64, 5))  # height, width and frames in pixels
TWO, ONE, ALL = ("cond", "uncond"), ("cond",), ("all",)

NOT_RUN = {  # pipelines of families that are not run here, and why; others of the same transformer are
    **{name: why for name, why in NOT_GENERATED.items() if name in supported_pipelines()},
    "DCVideoGenPipeline": "ours, with tests of its own",
    "DCVideoGenImageToVideoPipeline": "ours, with tests of its own",
    "WanVideoToVideoPipeline": "in test_composition.py",
}
WITHOUT_PIPELINE = {"MiniMax-H3": "diffusers has modular blocks for it and no pipeline"}


@dataclass(frozen=True)
class Case:
    """One pipeline of a family.

    Args:
        build: file and function of tests/support/families.
        runs: the class that runs, where it is not the one that is built.
        branches: of each step.
        sizes: of two videos: height, width and frames.
        request: what `generate` is asked for beside.
        options: of the pipeline's call.
        times: how often a layer is called in a pass.
        steps: the steps of each run in order.
        asked: the size that `generate` would have, where the pipeline itself takes smaller ones.
    """

    build: str
    runs: str
    branches: tuple[str, ...] = TWO
    sizes: tuple[tuple[int, int, int], tuple[int, int, int]] = SIZES
    request: dict[str, Any] = field(default_factory=dict, hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    times: int = 1
    steps: tuple[int, ...] = (4,)
    asked: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        return f"{self.runs.removesuffix('Pipeline')}-{self.build.partition('.')[2]}"


def picture(value: int = 200) -> Image.Image:
    return Image.new("RGB", (96, 64), (value, 40, 90))


def clip(frames: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, size, size, 3), np.uint8)


IMAGE = {"image": picture()}
BOTH = {**IMAGE, "last_image": picture(20)}
LTX, COG = ((128, 192, 17), (192, 128, 9)), ((64, 96, 9), (64, 96, 17))
THREE, STG = ("all", "pass 1", "pass 2"), {"spatio_temporal_guidance_blocks": [1]}
HELIOS = {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 2]}
EMBEDDED = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": torch.ones(1, 7, 20),
    "negative_prompt_embeds": torch.zeros(1, 7, 20),
}
CASES = [
    Case("wan_kin.wan", "WanPipeline"),
    Case("wan_kin.wan_5b", "WanImageToVideoPipeline", request=IMAGE),
    Case("wan_kin.lucy", "LucyEditPipeline", request={"video": clip(9)}),
    Case("wan_kin.vace", "WanVACEPipeline", request=IMAGE),
    Case("wan_kin.animate", "WanAnimatePipeline", ONE, ((64, 96, 9), (96, 64, 9)),
         request={**IMAGE, "video": clip(9), "face_video": clip(9, 16)}, options={"segment_frame_length": 9}),
    Case("wan_kin.chronoedit", "ChronoEditPipeline", sizes=((64, 96, 5), (96, 64, 5)), request=IMAGE),
    Case("wan_kin.skyreels", "SkyReelsV2Pipeline"),
    Case("wan_kin.skyreels_image", "SkyReelsV2ImageToVideoPipeline", request=IMAGE),
    Case("wan_kin.skyreels_forcing", "SkyReelsV2DiffusionForcingPipeline"),
    Case("wan_kin.skyreels_forcing", "SkyReelsV2DiffusionForcingImageToVideoPipeline", request=IMAGE),
    Case("wan_kin.skyreels_forcing", "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
         sizes=((64, 96, 33), (96, 64, 33)), request={"video": clip(17)}),
    Case("wan_kin.anyflow", "AnyFlowPipeline", ALL),
    Case("wan_kin.helios", "HeliosPipeline", sizes=((64, 96, 18), (96, 64, 9)), asked=(64, 96, 33), steps=(4, 4),
         options=HELIOS),
    Case("wan_kin.helios_pyramid", "HeliosPyramidPipeline", sizes=((128, 192, 9), (192, 128, 9)), asked=(128, 192, 33),
         steps=(2, 1, 1), options=HELIOS),
    Case("hunyuan.hunyuan", "HunyuanVideoPipeline", ONE),
    Case("hunyuan.hunyuan", "HunyuanVideoPipeline",
         request={"negative_prompt": "a", "pipeline_options": {"true_cfg_scale": 4.0}}),
    Case("hunyuan.hunyuan_image", "HunyuanVideoImageToVideoPipeline", ONE, request=IMAGE),
    Case("hunyuan.skyreels_v1", "HunyuanSkyreelsImageToVideoPipeline", request=IMAGE),
    Case("hunyuan.framepack", "HunyuanVideoFramepackPipeline", ONE, ((64, 96, 37), (96, 64, 37)), request=IMAGE),
    Case("hunyuan.hunyuan_15", "HunyuanVideo15Pipeline"),
    Case("hunyuan.hunyuan_15_image", "HunyuanVideo15ImageToVideoPipeline", sizes=((64, 64, 9), (64, 64, 5)),
         request=IMAGE),
    Case("cogvideo.cogvideox_5b", "CogVideoXPipeline", ALL, COG),
    Case("cogvideo.cogvideox_15_image", "CogVideoXImageToVideoPipeline", ALL, ((64, 64, 17), (64, 64, 9)),
         request=IMAGE),
    Case("cogvideo.cogvideox_video", "CogVideoXVideoToVideoPipeline", ALL, COG,
         request={"video": clip(17), "strength": 0.5}, steps=(2,)),
    Case("cogvideo.cogvideox_control", "CogVideoXFunControlPipeline", ALL, COG, request={"video": clip(17)}),
    Case("cogvideo.consisid", "ConsisIDPipeline", ALL, COG, request=IMAGE),
    Case("cogvideo.easyanimate", "EasyAnimatePipeline", ALL),
    Case("cogvideo.easyanimate_inpaint", "EasyAnimateInpaintPipeline", ALL, request=IMAGE),
    Case("ltx.ltx", "LTXPipeline", ALL, LTX),
    Case("ltx.ltx", "LTXImageToVideoPipeline", ALL, LTX, request=IMAGE),
    Case("ltx.ltx_condition", "LTXConditionPipeline", ALL, LTX, request=BOTH),
    Case("ltx.ltx2", "LTX2Pipeline", THREE, LTX, options=STG),
    Case("ltx.ltx2", "LTX2ImageToVideoPipeline", THREE, LTX, request=IMAGE, options=STG),
    Case("ltx.ltx2", "LTX2ConditionPipeline", THREE, LTX, request=BOTH, options=STG),
    Case("cosmos.text_to_world", "CosmosTextToWorldPipeline", sizes=((64, 96, 17), (96, 64, 9))),
    Case("cosmos.video_to_world", "CosmosVideoToWorldPipeline", sizes=((64, 96, 17), (96, 64, 9)), request=IMAGE),
    Case("cosmos.predict_2", "Cosmos2VideoToWorldPipeline", request=IMAGE),
    Case("cosmos.predict_25", "Cosmos2_5_PredictBasePipeline", options=EMBEDDED),
    Case("cosmos.cosmos_3", "Cosmos3OmniPipeline"),
    Case("kandinsky.kandinsky_5", "Kandinsky5T2VPipeline"),
    Case("kandinsky.kandinsky_5_image", "Kandinsky5I2VPipeline", sizes=((64, 96, 17), (96, 64, 17)), request=IMAGE),
    Case("kandinsky.kandinsky_6", "Kandinsky6TI2VAPipeline"),
    Case("others.allegro", "AllegroPipeline", ALL, ((64, 96, 12), (96, 64, 6)), asked=(320, 320, 24)),
    Case("others.mochi", "MochiPipeline", ALL, ((64, 96, 13), (96, 64, 7)), times=2),
    Case("others.motif", "MotifVideoPipeline"),
    Case("others.motif", "MotifVideoImage2VideoPipeline", request=IMAGE),
]  # fmt: skip
FIRST = [next((case for case in CASES if case.runs in family.pipelines), None) for family in FAMILIES]
"""A pipeline of each family; the others differ in what they condition on."""


def built(case: Case) -> Any:
    torch.manual_seed(0)
    group, name = case.build.split(".")
    pipe = as_class(getattr(importlib.import_module(f"families.{group}"), name)(), case.runs)
    pipe.set_progress_bar_config(disable=True)
    if group == "kandinsky":  # its modulation starts at zero: then attention would not matter
        for parameter in pipe.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return pipe


def latents(pipe: Any, case: Case, size: tuple[int, int, int], **more: Any) -> torch.Tensor:
    """What a run of 4 steps gives, before it is decoded."""
    height, width, frames = case.asked or size
    settings = Settings("a dot moves", height=height, width=width, frames=frames, steps=4, **case.request)
    row = row_of(pipe)
    arguments = call_arguments(pipe, row, settings.checked(inspect_pipeline(pipe))) | case.options
    arguments |= dict(zip(("height", "width", "num_frames"), size, strict=True)) if case.asked else {}
    arguments |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | more
    made = getattr(pipe(**arguments), row.result)
    return torch.cat(list(made)) if isinstance(made, list) else torch.as_tensor(made)


@pytest.fixture(autouse=True)
def _without_packages(monkeypatch):
    without_torchvision(monkeypatch)
    cogvideo.without_opencv(monkeypatch)


def test_every_pipeline_is_run_or_says_why_not():
    run = {case.runs for case in CASES}
    assert run | set(NOT_RUN) == set(supported_pipelines()) and not run & set(NOT_RUN)
    assert [f.name for f in FAMILIES if not run & set(f.pipelines)] == list(WITHOUT_PIPELINE)


@pytest.mark.parametrize("case", fast(FIRST, CASES), ids=str)
def test_steps_are_seen_and_runs_are_their_own(case):
    pipe = built(case)
    first, second = case.sizes
    before = latents(pipe, case, first)
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE) as handle:
        sparse = latents(pipe, case, first)
        report = handle.report()
        another = latents(pipe, case, second)
        layers = len(handle._installed[0]._sites)
        assert sum(r.run >= len(case.steps) for r in handle.report().records) > 0
    expected = {
        (run, step, branch, layer): case.times
        for run, steps in enumerate(case.steps)
        for step in range(steps)
        for branch in case.branches
        for layer in range(layers)
    }
    assert Counter((r.run, r.step, r.branch, r.layer) for r in report.records) == expected
    assert [{r.num_steps for r in report.records if r.run == n} for n in range(len(case.steps))] == [
        {steps} for steps in case.steps
    ]
    assert not any(r.reason for r in report.records) and not [n for n in report.notes if "backend auto" not in n]
    assert sparse.isfinite().all() and not sparse.equal(before)
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE):
        assert latents(pipe, case, second).equal(another)
    assert latents(pipe, case, first).equal(before)


def case_of(pipeline: str) -> Case:
    return next(case for case in CASES if case.runs == pipeline)


@pytest.mark.parametrize("pipeline", ["WanPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline"])
def test_half_precision(pipeline, monkeypatch):
    case = case_of(pipeline)
    pipe = built(case).to(torch.bfloat16)
    before = latents(pipe, case, case.sizes[0])
    dtypes, call = set(), SparseAttention.__call__

    def spy(self, q, k, v, layer, **more):
        out = call(self, q, k, v, layer, **more)
        dtypes.update(x.dtype for x in (q, k, v, out))
        return out

    monkeypatch.setattr(SparseAttention, "__call__", spy)
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE) as handle:
        sparse = latents(pipe, case, case.sizes[0])
        assert {r.reason for r in handle.report().records} == {""}
    assert dtypes == {torch.bfloat16} and sparse.dtype == before.dtype and not sparse.equal(before)
    with accelerate(pipe, SVG2(top_p=1.0), schedule=NEVER_DENSE):
        full = latents(pipe, case, case.sizes[0]).float()
    assert (full - before.float()).abs().mean() < 0.02 * before.float().abs().mean()
    assert latents(pipe, case, case.sizes[0]).equal(before)


SEVERAL = ("WanPipeline", "HunyuanVideoPipeline", "LTXPipeline", "MochiPipeline")
BATCHES = [
    *((name, {"prompt": ["a dot moves", "a dot"]}) for name in (*SEVERAL, "CogVideoXPipeline")),
    # CogVideoX makes one video of a prompt whatever is asked; Kandinsky 5 lets a video see the padding of its prompt.
    *((name, {"num_videos_per_prompt": 2}) for name in (*SEVERAL, "Kandinsky5T2VPipeline")),
]


@pytest.mark.parametrize(("pipeline", "given"), BATCHES)
def test_two_videos_in_one_run_are_those_of_two_runs(pipeline, given):
    case = case_of(pipeline)
    pipe = built(case)
    size = case.sizes[0]
    with accelerate(pipe, Radial(decay=0.05, block_size=8, near=0.25, min_window=0.0), schedule=NEVER_DENSE) as handle:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        both = latents(pipe, case, size, generator=generators, **given)
        assert {r.step for r in handle.report().records} == {0, 1, 2, 3}
        prompts = given.get("prompt", ["a dot moves"] * 2)
        alone = [
            latents(pipe, case, size, generator=torch.Generator().manual_seed(seed), prompt=prompt)
            for seed, prompt in enumerate(prompts)
        ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(both[:1], latents(pipe, case, size), atol=1e-4)


@pytest.mark.parametrize(
    "pipeline",
    [*SEVERAL[::2], "MochiPipeline", "CogVideoXPipeline", "Kandinsky5T2VPipeline", "CosmosTextToWorldPipeline"],
)
def test_without_guidance_there_is_one_branch(pipeline):
    case = case_of(pipeline)
    pipe, off = built(case), {"guidance_scale": 1.0}
    before = latents(pipe, case, case.sizes[0], **off)
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE) as handle:
        assert not latents(pipe, case, case.sizes[0], **off).equal(before)
        records = handle.report().records
    layers = len({r.layer for r in records})
    assert Counter((r.step, r.branch) for r in records) == {(step, case.branches[0]): layers for step in range(4)}
    assert latents(pipe, case, case.sizes[0], **off).equal(before)


def test_a_guidance_pass_that_leaves_out_attention():
    """LTX-2.3's spatio-temporal guidance: the layers that it perturbs make no call in its pass, which is no fault."""
    case = case_of("LTX2Pipeline")
    pipe = built(case)
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    pipe.transformer = type(pipe.transformer)(**config | {"perturbed_attn": True}).eval()
    before = latents(pipe, case, case.sizes[0])
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE) as handle:
        assert not latents(pipe, case, case.sizes[0]).equal(before)
        report = handle.report()
    expected = {("all", 0), ("all", 1), ("pass 1", 0), ("pass 2", 0), ("pass 2", 1)}
    assert {(r.branch, r.layer) for r in report.records} == expected
    assert len(report.records) == 4 * len(expected) and not [n for n in report.notes if "backend auto" not in n]
    assert latents(pipe, case, case.sizes[0]).equal(before)
    with accelerate(pipe, METHOD, schedule=DenseSchedule(last_steps=1)) as handle:  # nor is it a cache's
        latents(pipe, case, case.sizes[0])
        assert not [n for n in handle.report().notes if "a cache" in n]


def test_a_history_that_is_nearly_all_of_the_video_leaves_nothing_to_gain():
    """Nor is a density advised with which nothing would be left out."""
    case = case_of("HeliosPyramidPipeline")
    pipe = built(case)
    with accelerate(pipe, min_tokens=0) as handle:
        latents(pipe, case, case.sizes[0])
        notes = [note for note in handle.report().notes if "all calls of a forward pass stay dense" in note]
    assert any(note.endswith("sparse attention has nothing to gain here") for note in notes)
    assert not any("density=1)" in note for note in notes)


def test_a_cache_that_leaves_out_a_branch_of_the_batch():
    """FasterCache computes only the conditional branch in every second step, whose text is longer."""
    case = case_of("MochiPipeline")
    pipe = built(case)
    every_step = {"unconditional_batch_skip_range": 2, "unconditional_batch_timestep_skip_range": (-1, 10**4)}
    config = diffusers.FasterCacheConfig(
        **every_step,
        spatial_attention_timestep_skip_range=(-2, -1),  # never
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: 500,
    )
    pipe.transformer.enable_cache(config)
    with accelerate(pipe, METHOD, schedule=NEVER_DENSE) as handle:
        latents(pipe, case, case.sizes[0])
        report = handle.report()
    assert Counter(r.step for r in report.records) == {0: 2, 1: 1, 2: 2, 3: 1}
    assert {r.reason for r in report.records} == {""} and not [n for n in report.notes if "backend auto" not in n]
