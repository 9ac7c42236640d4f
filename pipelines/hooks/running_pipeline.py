"""Which pipeline calls a model, of those that may share it (as of `from_pipe`)."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline

from ..acceleration.copies import CopiedNotPickled


def running_pipeline(thread: int | None = None) -> Any | None:
    """The pipeline of diffusers whose call goes on here, the innermost one; None outside of calls.

    Args:
        thread: another one to look into, by its identifier.

    Read from the interpreter's stack, which alone knows: what a pipeline keeps of a call stays when that has failed,
    and one that shares a model may have come after the hooks on it.
    """
    frame: FrameType | None = sys._getframe(1) if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount:  # locals of others are not touched
            pipe = _first_argument(frame)
            if isinstance(pipe, DiffusionPipeline | ModularPipeline):
                return pipe
        frame = frame.f_back
    return None


def _first_argument(frame: FrameType) -> Any:
    """What a function that runs was called with first."""
    local = frame.f_locals
    found = local.get(frame.f_code.co_varnames[0])
    # Before Python 3.13 this is a dict that the frame keeps, and with it all that the function lets go of later. It is
    # left alone where a debugger is in the frame, or where somebody else has it, as by `locals()`: beside the frame,
    # this variable and the argument of `getrefcount`.
    if isinstance(local, dict) and frame.f_trace is None and sys.getrefcount(local) == 3:
        local.clear()
    return found


class PipelineOfPass(CopiedNotPickled):
    """The pipeline that a forward pass is of: whose call goes on, and outside of calls, as in a loop of one's own or in
    another thread, the one that was given.

    Args:
        given: the pipeline that hooks were put on. Of a copy it is the copy; None where a model was copied alone.
    """

    def __init__(self, given: Any) -> None:
        self.given = given

    def __call__(self) -> Any | None:
        running = running_pipeline()
        return self.given if running is None else running

    def table(self) -> object:
        """What is another object in each run: the scheduler's table; None where there is none."""
        return getattr(getattr(self(), "scheduler", None), "timesteps", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineOfPass:
        # A transformer that is copied alone must not bring a copy of its pipeline.
        return PipelineOfPass(memo.get(id(self.given)))
