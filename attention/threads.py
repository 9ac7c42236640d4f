"""Work in many small pieces on the CPU: threads that each compute a piece on one core.

torch cuts every operation for all cores and waits for the slowest, which for an operation of a millisecond costs about
what it saves. Whole pieces side by side have nothing to wait for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_MOST_POOLS = 2
_pools: dict[int, ThreadPoolExecutor] = {}
"""By how many threads they have, the last used one last: another thread of the user's may have set torch to another
number."""
_starting = threading.Lock()


def each(work: Callable[[Piece], Result], pieces: Sequence[Piece], *, small: bool = False) -> list[Result]:
    """`[work(piece) for piece in pieces]`, on as many threads as torch would use for one operation.

    For pieces whose work does not need a gradient and writes nothing that another one reads. It stays on the calling
    thread where that is the only one, where gradients are recorded, and under what belongs to a thread alone: autocast,
    a mode such as that of a flop counter, tracing.

    Args:
        small: a piece takes about what Python needs to begin it, for which threads would wait for one another. One
            thread then works on all of them, on its one core.

    Raises:
        Whatever `work` raises, of the piece that comes first; others may have been worked on by then.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2 or not _may_leave_thread():
        return [work(piece) for piece in pieces]
    results: list[Result | None] = [None] * len(pieces)
    places, lock = iter(range(len(pieces))), threading.Lock()
    inference = torch.is_inference_mode_enabled()

    def some() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                results[place] = work(pieces[place])

    with _starting:  # the threads may not go before they have it
        pool = _threads(torch.get_num_threads())
        jobs = [pool.submit(some) for _ in range(1 if small else threads)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        raise errors[0]
    return results


def _may_leave_thread() -> bool:
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or modes or torch.compiler.is_compiling())


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads of which each has one core for its operations. To be called, and given work, with `_starting` held."""
    if (pool := _pools.pop(count, None)) is None:
        if len(_pools) == _MOST_POOLS:
            _pools.pop(next(iter(_pools))).shutdown(wait=False)  # what they have is still worked on
        pool = _begun(count)
    _pools[count] = pool
    return pool


def _begun(count: int) -> ThreadPoolExecutor:
    """New threads, once each of them has set itself to one core."""
    ready = threading.Barrier(count + 1)

    def one_core() -> None:
        # The first call sets what torch is set to, so the second one counts. It also sets what threads to come
        # begin with, hence the third, below.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    executor = ThreadPoolExecutor(count, "vidaccel")
    for _ in range(count):
        executor.submit(one_core)
    ready.wait()
    torch.set_num_threads(count)
    return executor


def _forget() -> None:
    """A forked process has none of the threads, and may have the lock in any state."""
    global _starting
    _pools.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
