"""Work that waits for disks and decoders, done by threads ahead of whoever asks for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def readers() -> int:
    """Threads that read files at a time."""
    return min(8, os.cpu_count() or 1)


def ahead(make: Callable[[S], T], items: Iterable[S], threads: int, most: int) -> Iterator[T]:
    """What `make` returns for each item, in their order.

    Args:
        make: called in threads; reading files and decoding leave the others room.
        items: taken no earlier than they are worked on.
        threads: how many; 0 makes each when it is asked for.
        most: results that are made and not taken yet, or in work: what may be in memory at a time.
    """
    if not threads:
        yield from map(make, items)
        return
    pool, pending = ThreadPoolExecutor(threads), deque[Future[T]]()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) >= most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Whoever was stopped waits for no more than what is in work.
        pool.shutdown(wait=False, cancel_futures=True)
