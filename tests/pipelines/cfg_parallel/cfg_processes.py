"""Started with a number of processes, a folder and what to run: each of them saves what came of it."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
sys.path.insert(1, str(Path(__file__).parents[1] / "acceleration"))

import diffusers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import cogvideo
from launched import start, text_of
from no_torchvision import without_torchvision
from test_family_pipelines import CASES, built, latents
from tiny_wan import generate, make_pipe, make_transformer
from torch.distributed.device_mesh import init_device_mesh

import vidaccel
from vidaccel import DenseSchedule, Preset, Radial, Tangent, accelerate, cfg_parallel, restore
from vidaccel.pipelines.hooks.diffusers_hooks import hooks_of
from vidaccel.pipelines.presets.errors import PresetError
from vidaccel.pipelines.presets.levers import Cache

FEW = Tangent(density=0.4, q_clusters=6, k_clusters=12)
NEVER_DENSE = DenseSchedule()
MOCHI = next(case for case in CASES if case.runs == "MochiPipeline")


def family(case: Any) -> dict[str, Any]:
    """A family's pipeline in one process, in two, and in one again."""
    pipe = built(case)
    alone = latents(pipe, case, case.sizes[0])
    try:
        handle = cfg_parallel(pipe)
    except TypeError as refused:
        return {"refused": str(refused)}
    with handle:
        shared, note = latents(pipe, case, case.sizes[0]), handle.note()
        other, again = latents(pipe, case, case.sizes[1]), latents(pipe, case, case.sizes[0])
    made = {"alone": alone, "shared": shared, "again": again, "after": latents(pipe, case, case.sizes[0]), "note": note}
    return made | {"other size": other, "other size, alone": latents(pipe, case, case.sizes[1])}


def sparse() -> dict[str, Any]:
    """Sparse attention before and after, in one pass each and in a batch."""
    made: dict[str, Any] = {}
    for name, pipe, run in (("two passes", make_pipe(), generate), ("a batch", built(MOCHI), None)):
        run = run or (lambda pipe: latents(pipe, MOCHI, MOCHI.sizes[0]))
        with accelerate(pipe, FEW, schedule=NEVER_DENSE) as handle:
            made[name, "alone"] = run(pipe)
            with cfg_parallel(pipe):
                handle.reset()
                made[name, "accelerated before"] = run(pipe)
                made[name, "records"] = [(r.step, r.branch, r.layer) for r in handle.report().records]
                made[name, "notes"] = handle.report().notes
        with cfg_parallel(pipe), accelerate(pipe, FEW, schedule=NEVER_DENSE):
            made[name, "accelerated after"] = run(pipe)
    return made


def beside_others() -> dict[Any, Any]:
    """What else is done to pipelines, alone and in two processes."""
    made: dict[Any, Any] = {}

    def both(name: str, pipe: Any, **more: Any) -> None:
        made[name, "alone"] = generate(pipe, **more)
        with cfg_parallel(pipe):
            made[name, "shared"] = generate(pipe, **more)

    cached = make_pipe()
    cached.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))
    both("first-block cache", cached, steps=6)
    for cache in (Cache("seacache"), Cache("taylorseer"), Cache("forecast", 1e3)):
        pipe = make_pipe()
        with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
            both(cache.name, pipe, steps=6)
            counts = handle.report().last().counts()
            assert cache.name != "forecast" or counts["skipped"]
            # Six steps: of the two passes of each, one is the other process's, but for the first pair.
            assert counts["forwards"] in (6, 7)
    made |= near_forecasts()
    made |= beside_offloading() | offloaded_whole() | cache_gone_first()
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 0.5))):
        both("forecast, no guidance", pipe, steps=12, guidance_scale=1.0)
    both("bfloat16", make_pipe().to(torch.bfloat16))
    made |= in_and_out_of_autocast()
    both("no guidance", make_pipe(), guidance_scale=1.0)
    both("two transformers", make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9), steps=6)
    compiled = make_pipe()
    for block in compiled.transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    both("compiled blocks", compiled)
    pipe = make_pipe()
    made["copied", "alone"] = made["restored", "alone"] = generate(pipe)
    cfg_parallel(pipe)
    made["copied", "shared"] = generate(copy.deepcopy(pipe))
    restore(type(pipe).from_pipe(pipe))  # which shares the transformer
    made["restored", "shared"] = generate(pipe)
    made["restored", "hooks"] = list(hooks_of(pipe.transformer))
    made |= {("own loop", called): own_loop(called) for called in (True, False)}
    return made | of_from_pipe()


def guidance_that_goes() -> dict[Any, Any]:
    """Guidance that a callback switches off, and on again, beside what keeps a state of each branch."""
    made: dict[Any, Any] = {}
    for name, more in (("tangent", {"method": FEW}), ("taylorseer", {"cache": Cache("taylorseer")})):
        for last, kind in ((9, "gone"), (4, "gone and back")):

            def scale(pipe: Any, step: int, timestep: Any, tensors: dict, last: int = last) -> dict:
                pipe._guidance_scale = 1.0 if 2 <= step < last else 5.0
                return {}

            pipe = make_pipe()
            with vidaccel.apply(pipe, Preset(**more)):
                made[kind, name, "alone"] = generate(pipe, steps=9, callback_on_step_end=scale)
                with cfg_parallel(pipe):
                    made[kind, name, "shared"] = generate(pipe, steps=9, callback_on_step_end=scale)
    return made


def in_and_out_of_autocast() -> dict[Any, Any]:
    """Passes of the same inputs that give another dtype, in either order."""
    made: dict[Any, Any] = {}
    for first in (True, False):
        pipe = make_pipe()
        runs: dict[str, list] = {"alone": [], "shared": []}
        for key in runs:
            with cfg_parallel(pipe) if key == "shared" else contextlib.nullcontext():
                for enabled in (first, not first):
                    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                        runs[key].append(generate(pipe))
        made |= {(f"autocast {'first' if first else 'last'}", key): torch.stack(each) for key, each in runs.items()}
    return made


def near_forecasts() -> dict[Any, Any]:
    """Forecasts at tolerances that one branch meets in steps in which the other does not; and of half a batch."""
    made: dict[Any, Any] = {}
    batch = lambda pipe: latents(pipe, MOCHI, MOCHI.sizes[0], num_inference_steps=12)  # noqa: E731
    for name, pipe, run in (
        ("two passes", make_pipe(), lambda pipe: generate(pipe, steps=20)),
        ("a batch", built(MOCHI), batch),
    ):
        for tolerance in (0.1, 0.15, 0.2, 0.3, 0.5, 1.0):
            with vidaccel.apply(pipe, Preset(cache=Cache("forecast", tolerance))) as handle:
                for how in ("alone", "shared"):
                    with cfg_parallel(pipe) if how == "shared" else contextlib.nullcontext():
                        made[name, tolerance, how] = run(pipe)
                    steps = handle.report().last().steps
                    made[name, tolerance, how, "skipped"] = [step.step for step in steps if step.skipped]
                assert run(pipe).equal(made[name, tolerance, "alone"])  # decides alone again
    return {("near forecasts", key): value for key, value in made.items()}


def of_from_pipe() -> dict[Any, Any]:
    """A pipeline that shares the transformer says itself whether it guides; the first one never ran."""
    pipe, other = make_pipe(), make_pipe()
    other.register_modules(transformer=pipe.transformer)
    made: dict[Any, Any] = {}
    for name, scale in (("from_pipe", 5.0), ("from_pipe, no guidance", 1.0)):
        made[name, "alone"] = generate(other, guidance_scale=scale)
    with cfg_parallel(pipe) as handle:
        made["from_pipe", "shared"] = generate(other)
        made["from_pipe", "note"] = handle.note()
        generate(pipe)
        made["from_pipe, no guidance", "shared"] = generate(other, guidance_scale=1.0)
        generate(other)
        made["from_pipe", "seeds"] = text_of(RuntimeError, lambda: generate(other, seed=dist.get_rank()))
    return made


def own_loop(called: bool) -> str:
    """The note after two steps of a loop of one's own.

    Args:
        called: the pipeline was, before.
    """
    pipe = make_pipe()
    if called:
        generate(pipe)
    with cfg_parallel(pipe) as handle, torch.no_grad():
        for step in (9.0, 9.0, 5.0, 5.0):
            pipe.transformer(torch.ones(1, 4, 2, 8, 8), torch.tensor([step]), torch.ones(1, 6, 16))
        return handle.note()


class Counting(ModelHook):
    """What accelerate's offloading is to a module."""

    passes = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return args, kwargs


def beside_offloading() -> dict[Any, Any]:
    """A hook of accelerate's that comes later stays when the handle goes."""
    pipe, hook = make_pipe(), Counting()
    made: dict[Any, Any] = {("hooked", "alone"): generate(pipe)}
    handle = cfg_parallel(pipe)
    add_hook_to_module(pipe.transformer, hook)
    made["hooked", "shared"] = generate(pipe)
    handle.remove()
    before, made["hook stayed", "alone"] = hook.passes, made["hooked", "alone"]
    made["hook stayed", "shared"] = generate(pipe)
    assert hook.passes == before + 8
    remove_hook_from_module(pipe.transformer)
    assert generate(pipe).equal(made["hooked", "alone"]) and hook.passes == before + 8
    return made


def offloaded_whole() -> dict[Any, Any]:
    """Each call of a pipeline takes the offloading off and puts it on again."""
    made: dict[Any, Any] = {}
    for order in ("offloaded before", "offloaded after"):
        pipe = make_pipe()
        made[order, "alone"] = generate(pipe)
        if order == "offloaded before":
            pipe.enable_model_cpu_offload(device="cpu")
        with cfg_parallel(pipe) as handle:
            if order == "offloaded after":
                pipe.enable_model_cpu_offload(device="cpu")
            generate(pipe)
            made[order, "shared"] = generate(pipe)
            made[order, "note"] = handle.note()
        assert generate(pipe).equal(made[order, "alone"])
        pipe.remove_all_hooks()
        assert generate(pipe).equal(made[order, "alone"])
    return made


def cache_gone_first() -> dict[Any, Any]:
    """A cache that came before the handle, on the same module, is taken out from beneath it."""
    pipe = make_pipe()
    made: dict[Any, Any] = {("cache gone", "alone"): generate(pipe)}
    preset = vidaccel.apply(pipe, Preset(cache=Cache("seacache", 1e3)))
    with cfg_parallel(pipe) as handle:
        preset.remove()
        generate(pipe)
        made["cache gone", "shared"] = generate(pipe)
        made["cache gone", "note"] = handle.note()
    assert generate(pipe).equal(made["cache gone", "alone"])
    return made


def refusals(rank: int, ranks: int) -> dict[str, str]:
    """In words, before a process waits for one that never comes."""
    texts = {}
    pipe = make_pipe()
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    texts["one process"] = text_of(ValueError, lambda: cfg_parallel(pipe, alone))
    with cfg_parallel(pipe):
        texts["twice"] = text_of(RuntimeError, lambda: cfg_parallel(pipe))
        both = make_pipe(transformer_2=pipe.transformer, boundary_ratio=0.9)
        texts["shared twice"] = text_of(RuntimeError, lambda: cfg_parallel(both))
        texts["shared, then left out"] = text_of(RuntimeError, lambda: vidaccel.guidance_cache(both))
        assert not hooks_of(both.transformer)
        forecast = Preset(cache=Cache("forecast"))
        texts["cache after"] = text_of(PresetError, lambda: vidaccel.apply(pipe, forecast))
        texts["seeds"] = text_of(RuntimeError, lambda: generate(pipe, seed=rank))
        texts["scales"] = text_of(RuntimeError, lambda: generate(pipe, guidance_scale=5.0 + rank))
        texts["steps"] = text_of(RuntimeError, lambda: generate(pipe, steps=4 + rank))
        texts["and goes on"] = str(generate(pipe).equal(generate(pipe)))

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            raise KeyboardInterrupt("stopped")

        texts["stopped"] = text_of(KeyboardInterrupt, lambda: generate(pipe, callback_on_step_end=stop))
        texts["and goes on again"] = str(generate(pipe).equal(generate(pipe)))
        batch, case = built(MOCHI), MOCHI.sizes[0]
        with cfg_parallel(batch):
            latents(batch, MOCHI, case)
            seeded = torch.Generator().manual_seed(rank)
            texts["seeds of a batch"] = text_of(RuntimeError, lambda: latents(batch, MOCHI, case, generator=seeded))
        _, hook = pipe._vidaccel_cfg_parallel._hooked["transformer"]
        guided, hook._guided = hook._guided, lambda: True  # a pipeline that makes one pass a step all the same
        texts["one pass"] = text_of(RuntimeError, lambda: generate(pipe, guidance_scale=1.0))
        hook._guided = guided
        pipe.transformer.enable_cache(diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500))
        texts["hooked after"] = text_of(RuntimeError, lambda: generate(pipe))
    with vidaccel.guidance_cache(pipe):
        texts["left out, then shared"] = text_of(RuntimeError, lambda: cfg_parallel(pipe))
    whole = make_pipe()
    whole.transformer.compile(backend="eager")
    texts["compiled"] = text_of(RuntimeError, lambda: cfg_parallel(whole))
    return texts


def beside_ulysses(rank: int) -> dict[str, torch.Tensor]:
    """Four processes: two branches, the sequence of each of which two processes share."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("cfg", "ring", "ulysses"))
    pipe = make_pipe()
    method = Radial(8, min_window=0.1, near=0.2, sink=False)
    with accelerate(pipe, method, schedule=NEVER_DENSE):
        made = {"alone": generate(pipe)}
        config = diffusers.ContextParallelConfig(ulysses_degree=2, mesh=mesh["ring", "ulysses"])
        pipe.transformer.enable_parallelism(config=config)
        with cfg_parallel(pipe, mesh["cfg"].get_group()) as handle:
            return made | {"shared": generate(pipe), "branch": handle.rank, "note": handle.note()}


def main(rank: int, ranks: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    texts = {"no processes": text_of(RuntimeError, lambda: cfg_parallel(make_pipe()))}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=ranks)
    if what == "ulysses":
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
        made = beside_ulysses(rank)
    else:
        patches = pytest.MonkeyPatch()
        without_torchvision(patches)
        cogvideo.without_opencv(patches)
        wanted = what.split(",")
        made = {"families": {str(case): family(case) for case in CASES if what == "all" or case.runs in wanted}}
        if what != "all":
            made |= {
                "sparse": sparse(),
                "goes": guidance_that_goes(),
                "beside": beside_others(),
                "refusals": texts | refusals(rank, ranks),
            }
    torch.save(made, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
