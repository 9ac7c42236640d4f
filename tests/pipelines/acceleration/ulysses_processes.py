"""Started with a number of processes and a folder: each of them runs every case and saves what came."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import diffusers
from launched import start, text_of
from shared_sequences import CASES, FIRST_LAYER, METHODS, build, gradient, run_sparse, share, wan

from vidaccel import DenseSchedule, accelerate
from vidaccel.pipelines.acceleration.rank_heads import RankHeads
from vidaccel.pipelines.acceleration.ulysses import Ulysses

ALL_DENSE = DenseSchedule(first_steps=10**6)


def lifetime(ranks: int) -> dict:
    """Parallelism before and after `accelerate`, dense calls, and what is left behind."""
    stock = build("wan")
    share(stock, ranks)
    outs = {"stock": stock.run()}
    with accelerate(stock.model, METHODS["radial"], schedule=ALL_DENSE):
        outs["dense, shared before"] = stock.run()
    outs["removed, shared before"] = stock.run()
    later = build("wan")
    handle = accelerate(later.model, METHODS["radial"], schedule=FIRST_LAYER)
    share(later, ranks)
    outs["sparse, shared after"] = later.run()
    handle.remove()
    outs["removed, shared after"] = later.run()
    with accelerate(later.model, METHODS["radial"], schedule=FIRST_LAYER):
        outs["sparse, shared before"] = later.run()
        outs["sparse, copied"] = replace(later, model=copy.deepcopy(later.model)).run()
        for block in later.model.blocks:  # only now: the hook of diffusers looks up signatures in its first pass
            block.compile(backend="eager", fullgraph=True)
        outs["sparse, compiled"] = later.run()
    return outs


def exchanged(ranks: int) -> bool:
    """Whether tokens and heads that two processes cannot share evenly come together, and apart again.

    Not in a model: gloo cannot gather its output then, as NCCL does.
    """
    shared = wan(heads=3)
    share(shared, ranks, anything=True)
    ulysses = Ulysses.of(shared.model, "transformer")
    x = torch.randn(2, 3, 75, 8, generator=torch.Generator().manual_seed(0))
    mine = x.tensor_split(ranks, 2)[dist.get_rank()]
    whole = True
    for heads in (ulysses.heads(3, 3), RankHeads(ulysses.group, 3, [2, 0, 1])):
        gathered = ulysses.gather(mine, heads)
        whole &= gathered.equal(heads.mine(x)) and heads.gather(gathered).equal(x)
        whole &= ulysses.scatter(gathered, heads, mine.shape[2]).equal(mine)
    return whole and ulysses.tokens(mine.shape[2]) == 75


def refusals(ranks: int) -> dict[str, str]:
    texts = {}
    for name, model, anything in (
        ("heads", wan(heads=3), False),
        ("tokens", wan(grid=(5, 3, 5)), False),
        ("heads, anything", wan(heads=1), True),
    ):
        share(model, ranks, anything)
        with accelerate(model.model, METHODS["radial"], schedule=FIRST_LAYER):
            texts[name] = text_of(ValueError, model.run)
    broken = build("wan")
    share(broken, ranks)
    weight = broken.model.blocks[1].attn1.norm_q.weight
    weight[-1] = torch.inf  # in the last head, which the last process has
    with accelerate(broken.model, METHODS["radial"], schedule=FIRST_LAYER):
        texts["nan in one head"] = text_of(ValueError, broken.run)
    trained = build("wan, 3 heads")
    share(trained, ranks, anything=True)
    texts["gradient, anything"] = text_of(RuntimeError, lambda: gradient(trained, "radial"))
    return texts


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    if not torch.accelerator.device_count():
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    trained = build("wan")
    share(trained, ranks)
    made: dict = {"gradient": gradient(trained, "radial")}
    made |= {"lifetime": lifetime(ranks), "refusals": refusals(ranks), "exchanged": exchanged(ranks)}
    for name, method in CASES:
        shared = build(name)
        share(shared, ranks, anything="3 heads" in name)
        made[name, method] = run_sparse(shared, method)
    torch.save(made, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
