"""The processes of a run: which one this is, and how they wait for one another and agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ..logs.progress import Progress
from ..stopping import StopRequested, StopSignals

K = TypeVar("K")
T = TypeVar("T")

WAIT = timedelta(hours=12)
"""How long processes wait for one another: while one encodes clips or writes results, the others may wait for hours."""

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
"""In errors of gloo and NCCL, where the other end of a connection is gone."""


class ProcessLost(ConnectionError):
    """Another process of the run has ended; the message says how to go on."""


@dataclass(frozen=True)
class Process:
    """One of the processes of a run.

    Args:
        device: on which it computes.
        index, count: its number, and how many there are.
        group: of `torch.distributed`, by which they wait and agree (`host_group`); None for the default one.
        stop: whether this process was asked to stop.
        progress: what shows the user how far it is.
        sharded: the weights are spread over the processes (FSDP).
    """

    device: torch.device
    index: int = 0
    count: int = 1
    group: Any = None
    stop: StopSignals = field(default_factory=StopSignals)
    progress: Progress = field(default_factory=Progress)
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def is_lost(self, error: RuntimeError) -> bool:
        """Whether an error says that the connection to another process was lost, within whatever was exchanged."""
        if self.count == 1:
            return False
        return isinstance(error, torch.distributed.DistNetworkError) or any(text in str(error) for text in _LOST)

    def wait(self) -> None:
        """Wait until every process is here. A signal is taken meanwhile, which a plain barrier would keep waiting."""
        if self.count == 1:
            return
        work, pause = torch.distributed.barrier(group=self.group, async_op=True), 0.001
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        work.wait()  # raises where another process is gone

    def main_first(self, make: Callable[[], T]) -> T:
        """What `make` returns, which the main process does before the others, who find in a cache what it left there;
        every process must call this."""
        try:
            made = make() if self.is_main else None
        finally:
            self.wait()
        return made if self.is_main else make()  # type: ignore[return-value]

    def decided(self, make: Callable[[], T], refusal: type[Exception]) -> T:
        """What `make` returns in the main process; every process must call this. Each asking the disk itself, they
        could come to different answers, where it is not one disk or one of them sees a file later.

        Args:
            make: called in the main process alone.
            refusal: what is raised in the others where it raises.
        """
        if self.count == 1:
            return make()
        refused: Exception | None = None
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = make()
            except Exception as error:  # whatever it is, the others must not wait for what never comes
                refused, told[1] = error, str(error)
        self.wait()  # it may take hours, in which a signal is taken
        torch.distributed.broadcast_object_list(told, 0, group=self.group)
        if told[1] is not None:
            raise refused or refusal(told[1])
        return told[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; every process must call this."""
        if self.count == 1:
            return flag
        flags = torch.tensor([int(flag)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def gathered(self, items: Sequence[T]) -> list[T]:
        """The items of all processes; every process must call this."""
        if self.count == 1:
            return list(items)
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, list(items), group=self.group)
        return [item for each in found for item in each]

    def merged(self, own: dict[K, T]) -> dict[K, T]:
        """The entries of all processes; every process must call this."""
        return {key: value for part in self.gathered([own]) for key, value in part.items()}

    def of_main(self, number: float) -> float:
        """The number that the main process has; every process must call this."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number], dtype=torch.float64)
        torch.distributed.broadcast(numbers, 0, group=self.group)
        return numbers.item()

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        return self.any(self.stop.requested)

    def check_stop(self) -> None:
        """A point where a run may end, the same in every process; every process must call this.

        Raises:
            StopRequested: any of them was asked to stop.
        """
        if self.asked_to_stop():
            raise StopRequested

    def shared(self, count: int, make: Callable[[int], T], what: str, everywhere: bool = False) -> list[T]:
        """What `make` returns for the numbers below `count`, in their order; every process must call this.

        Each process makes a share, and the main one has all in the end. Where weights are spread over the processes, a
        model is called in all of them at once, so each makes all.

        Args:
            count: of what is made.
            make: of one number. It may raise StopRequested where this process was asked to stop; while shares are made,
                no process may wait in it for others.
            what: is made, for the user.
            everywhere: all processes have all in the end; what is made is small.

        Returns:
            In the other processes, unless it is `everywhere`, an empty list.

        Raises:
            StopRequested: any of them was asked to stop; between two rounds at the latest.
            OSError: in the others, where `make` raised something else in one process.
        """
        together = self.count == 1 or self.sharded
        each = 1 if together else self.count
        rounds, made = range(0, count, each), {}
        for first in self.track(rounds, what, len(rounds)):
            number, stops, failed = first if together else first + self.index, False, None
            try:
                if number < count:
                    made[number] = make(number)
            except StopRequested:
                stops = True
            except Exception as error:
                if together:
                    raise
                failed = error
            self._check_round(stops or self.stop.requested, failed)
        if together:
            return list(made.values())
        if everywhere:
            whole = self.merged(made)
        else:
            parts: list[Any] = [{}] * self.count
            torch.distributed.gather_object(made, parts if self.is_main else None, 0, group=self.group)
            whole = {number: value for part in parts for number, value in part.items()}
        return [whole[number] for number in sorted(whole)]

    def _check_round(self, stops: bool, failed: Exception | None) -> None:
        """What became of a round of `shared` in all processes: they go on, or end, together.

        Args:
            stops: this process was asked to stop. failed: what went wrong in it.
        """
        told = self.gathered([(stops, failed and f"process {self.index}: {failed}")])
        if failed is not None:
            raise failed
        if texts := [text for _, text in told if text]:
            raise OSError(f"another process of the run has failed ({texts[0]}).")
        if any(each for each, _ in told):
            raise StopRequested

    def check_own_stop(self) -> None:
        """A point within `make` of `shared` where this process may end its work.

        Raises:
            StopRequested: it was asked to stop; of processes that must go on together, any of them.
        """
        if self.asked_to_stop() if self.sharded else self.stop.requested:
            raise StopRequested

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """The items, with progress shown in the main process."""
        if not self.is_main:
            yield from items
            return
        with self.progress.task(what, total) as advance:
            for item in items:
                yield item
                advance()


def host_group(count: int) -> Any:
    """A group of all processes that communicates on the CPU, so that a question costs the GPU no wait."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT) if count > 1 else None
