"""Pictures and videos of a validation in tensorboard."""

from __future__ import annotations

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
    from tensorboard.compat.proto.summary_pb2 import Summary

    try:
        if file.suffix == ".png":
            encoded = file.read_bytes()
            width, height = Image.open(file).size
        else:
            encoded, (width, height) = _gif(file)
    except OSError as error:
        logger.error("%s cannot be shown in tensorboard: %s. The run goes on.", file, error)
        return
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _gif(file: Path) -> tuple[bytes, tuple[int, int]]:
    """A video as an animated GIF, and its width and height."""
    from PIL import Image

    from ..generation.video_reader import read_video

    pixels, fps = read_video(file)
    frames = [Image.fromarray(frame) for frame in pixels]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return data.getvalue(), frames[0].size
