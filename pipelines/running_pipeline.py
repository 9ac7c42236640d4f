"""Which pipeline calls a model, of those that may share it (as of `from_pipe`)."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline


def running_pipeline() -> Any | None:
    """The pipeline of diffusers whose call goes on here, the innermost one; None outside of calls.

    Read from the interpreter's stack, which alone knows: what a pipeline keeps of a call stays when that has failed,
    and one that shares a model may have come after the hooks on it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount:  # locals of others are not touched
            pipe = frame.f_locals.get(code.co_varnames[0])
            if isinstance(pipe, DiffusionPipeline | ModularPipeline):
                return pipe
        frame = frame.f_back
    return None


def table_of_run() -> object:
    """What is another object in each run of the pipeline whose call goes on: its scheduler's table; None outside."""
    return getattr(getattr(running_pipeline(), "scheduler", None), "timesteps", None)
