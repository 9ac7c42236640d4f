"""Started once a process, with its number, how many there are, and a folder: runs every case and saves what came."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import diffusers
from shared_sequences import CASES, FIRST_LAYER, METHODS, build, run_sparse, share, wan

from vidaccel import DenseSchedule, accelerate

ALL_DENSE = DenseSchedule(first_steps=10**6)


def text_of(error: type[Exception], call: Callable[[], object]) -> str:
    """What an error says that a call must raise."""
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"


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
        for block in later.model.blocks:  # only now: the hook of diffusers looks up signatures in its first pass
            block.compile(backend="eager", fullgraph=True)
        outs["sparse, compiled"] = later.run()
    return outs


def refusals(ranks: int) -> dict[str, str]:
    texts = {}
    for name, model, anything in (
        ("heads", wan(heads=3), False),
        ("tokens", build("wan, uneven"), False),
        ("heads, anything", wan(heads=1), True),
    ):
        share(model, ranks, anything)
        with accelerate(model.model, METHODS["radial"], schedule=FIRST_LAYER):
            texts[name] = text_of(ValueError, model.run)
    return texts


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    if not torch.accelerator.device_count():
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    made: dict = {"lifetime": lifetime(ranks), "refusals": refusals(ranks)}
    for name, method in CASES:
        shared = build(name)
        share(shared, ranks, anything="uneven" in name)
        made[name, method] = run_sparse(shared, method)
    torch.save(made, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
