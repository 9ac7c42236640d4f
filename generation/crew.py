"""The processes of a job at work: joined, each on its device, with a pipeline that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .processes import Process, Sharing

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh

    from .job import Job

WAIT = timedelta(hours=1)
"""For the first process, which alone decodes and writes, at the most."""


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
    """The processes of a job know of each other, and each has its device; None for one alone."""
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
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=WAIT, **own)
    try:
        yield Crew(job.sharing, device, process)
        dist.barrier()  # nobody leaves while the first one still writes
    finally:
        dist.destroy_process_group()
