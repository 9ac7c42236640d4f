"""The processes of a job at work: joined, each on its device, with a pipeline that they share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import first_line
from .errors import BadInput
from .processes import Process, Sharing

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch.distributed import Store
    from torch.distributed.device_mesh import DeviceMesh

    from .job import Job

WAIT = timedelta(hours=1)
"""For the first process, which alone decodes and writes, at the most."""
MEETING = timedelta(minutes=10)
"""For all processes to be there, at the most."""


class Crew:
    """The processes of a job, of which this is one; made by `joined`.

    Args:
        sharing: what they share. device: of this process.
        process: this one.
    """

    def __init__(self, sharing: Sharing, device: torch.device, process: Process) -> None:
        self.sharing, self.process = sharing, process
        self._mesh: DeviceMesh | None = None
        if sharing.sequence > 1:
            from torch.distributed.device_mesh import init_device_mesh

            sizes = (sharing.guidance, 1, sharing.sequence)
            self._mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("guidance", "ring", "ulysses"))

    def share_sequences(self, pipe: DiffusionPipeline) -> None:
        """Have diffusers share the sequences of a loaded pipeline's transformers, for good.

        Raises:
            BadInput: it refuses.
        """
        if self._mesh is None:
            return
        from ..pipelines.acceleration.families import find_transformers
        from ..pipelines.acceleration.ulysses import share_sequence

        for transformer, _ in find_transformers(pipe).values():
            try:
                share_sequence(transformer, self._mesh["ring", "ulysses"], self.sharing.anything)
            except (RuntimeError, ValueError) as error:
                raise BadInput("processes", str(error).rstrip("."), value=self.process.count) from error

    @contextlib.contextmanager
    def guidance(self, pipe: DiffusionPipeline) -> Iterator[list[str]]:
        """Within it, guidance is shared; the list says at the end what was, in words."""
        said: list[str] = []
        if self.sharing.guidance == 1:
            yield said
            return
        from ..pipelines.cfg_parallel.handle import cfg_parallel

        with cfg_parallel(pipe, None if self._mesh is None else self._mesh["guidance"].get_group()) as handle:
            yield said
            said.append(handle.note())


@contextlib.contextmanager
def joined(job: Job) -> Iterator[Crew | None]:
    """The processes of a job know of each other, and each has its device; None for one alone.

    Raises:
        BadInput: they do not come together.
    """
    import torch
    import torch.distributed as dist

    process, device = job.process, job.device
    if process.count == 1:
        yield None
        return
    own: dict[str, Any] = {}
    if device.type != "cpu":
        torch.accelerator.set_device_index(process.local)
        own["device_id"] = device
    group: dict[str, Any] = {
        "store": _meet(process),
        "rank": process.rank,
        "world_size": process.count,
        "timeout": WAIT,
    }
    dist.init_process_group(dist.get_default_backend_for_device(device), **group, **own)
    try:
        yield Crew(job.sharing, device, process)
        dist.barrier()  # nobody leaves while the first one still writes
    finally:
        dist.destroy_process_group()


def _meet(process: Process) -> Store:
    """What the processes know of each other by, once all of them are there.

    Torch looks at no signal while it waits for them: a thread does, and this one can be ended.

    Raises:
        BadInput: they do not come.
    """
    from torch.distributed.rendezvous import rendezvous

    met: list[Store] = []
    failed: list[Exception] = []

    def wait() -> None:
        try:
            met.append(next(rendezvous("env://", process.rank, process.count, timeout=MEETING))[0])
        except Exception as error:  # raised below: nobody sees it here
            failed.append(error)

    waiting = threading.Thread(target=wait, daemon=True)  # the process may end before it
    waiting.start()
    while waiting.is_alive():
        waiting.join(1)  # for good it takes no Ctrl-C on Windows
    if not failed:
        return met[0]
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    problem = f"they cannot meet at {address}, MASTER_ADDR and MASTER_PORT ({first_line(failed[0])})"
    fix = "Start all of them, with a RANK for each and one address at which the first can be reached."
    raise BadInput("WORLD_SIZE", problem, fix, value=process.count) from failed[0]
