"""What accelerate's tracker does not do in tensorboard: pictures and videos, and steps that come again."""

from __future__ import annotations

import importlib
import io
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def add_file(writer: Any, tag: str, file: Path, step: int) -> None:
    """Add a PNG, or an MP4 as an animated GIF, which is how tensorboard shows videos.

    `SummaryWriter.add_video` does the same with moviepy, which is not needed for anything else.

    Args:
        writer: a `SummaryWriter`.
        tag: under which it is shown.
        file: to add; others than these two kinds are left out.
        step: of the validation.
    """
    if file.suffix not in (".png", ".mp4"):
        return
    from PIL import Image

    try:
        if file.suffix == ".png":
            encoded = file.read_bytes()
            width, height = Image.open(file).size
        else:
            encoded, (width, height) = _gif(file)
    except OSError as error:
        logger.error("%s cannot be shown in tensorboard: %s. The run goes on.", file, error)
        return
    summary = _messages(writer, "summary_pb2").Summary
    image = summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    writer.file_writer.add_summary(summary(value=[summary.Value(tag=tag, image=image)]), step)


def forget_from(writer: Any, step: int) -> None:
    """Let tensorboard show nothing of earlier runs from this step on: it comes again.

    `SummaryWriter(purge_step=)` says the same, but as soon as it is made.
    """
    events = _messages(writer, "event_pb2")
    begin = events.SessionLog(status=events.SessionLog.START)
    writer.file_writer.add_event(events.Event(session_log=begin), step)


def _messages(writer: Any, module: str) -> Any:
    """The kinds of messages that a writer takes: accelerate has it from tensorboardX where tensorboard is missing."""
    other = type(writer).__module__.startswith("tensorboardX")
    return importlib.import_module(f"{'tensorboardX' if other else 'tensorboard.compat'}.proto.{module}")


def _gif(file: Path) -> tuple[bytes, tuple[int, int]]:
    """A video as an animated GIF, and its width and height."""
    from PIL import Image

    from ...generation.media.video_reader import read_video

    pixels, fps = read_video(file)
    frames = [Image.fromarray(frame) for frame in pixels]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return data.getvalue(), frames[0].size
