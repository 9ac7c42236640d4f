"""Videos: the frames of the picture stream, when each is shown, and clips of them in the right shape and colours.

PyAV reads them: unlike the output of an ffmpeg program it has the exact time stamp of each frame.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .files import Cut, Media, Undecodable

if TYPE_CHECKING:
    import av

_MOST_THREADS = 8
_SCALING = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
"""As exact as swscale can be, and the same on every kind of CPU."""

_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
"""Of RGB to YCbCr: number in the stream -> name of the scale filter."""
_UNTOLD = 2
_HDR = (16, 18)
"""Numbers of the transfer functions PQ and HLG."""

_NEWER_KINDS = 16
"""How many kinds of side data FFmpeg may have beyond those that PyAV knows."""

_TURNS = {
    (1, 0, 0, 1): (),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (0, -1, 1, 0): (("transpose", "cclock"),),
    (0, 1, -1, 0): (("transpose", "clock"),),
    (0, 1, 1, 0): (("transpose", "cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "clock_flip"),),
}
"""Signs of the display matrix (a, b, c, d), which takes x to ax + cy and y to bx + dy -> filters that do so."""


def probe_video(path: Path) -> Media:
    """What the picture stream of a file holds. The file is read to its end, and its first frame is decoded.

    Raises:
        Undecodable: it has no picture stream, or one that cannot be decoded.
    """
    with _opened(path) as (container, stream):
        times, last = _times(container, stream)
        declared = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
        unit, sar = stream.time_base, stream.sample_aspect_ratio or Fraction(1)
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("it holds no frame")
        height, width = frame.height, max(1, round(frame.width * sar))
        if any(name == "transpose" for name, _ in _turned(frame)):
            height, width = width, height
        flags = {"hdr": frame.color_trc in _HDR, "interlaced": frame.interlaced_frame}
    count, first = len(times), frame.pts
    if None in times or first is None:
        first, fps = None, declared[0] if declared else Fraction(1)
    else:
        # A recording that begins within a group of pictures has frames that cannot be decoded before its first one.
        times = _in_order(times, first)
        count, fps = len(times), _even_rate(times, unit, declared)
    if fps is not None:
        return Media(height, width, count, fps, count / fps, first, **flags)
    span = (times[-1] - times[0]) * unit
    seconds = span + (last * unit if last else span / (count - 1))
    return Media(height, width, count, count / seconds, seconds, first, variable=True, **flags)


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """A whole video as it is shown: frames `[F, H, W, 3]` of bytes in RGB, and frames per second.

    Raises:
        Undecodable: it is missing, no video, or damaged.
    """
    media = probe_video(Path(path))
    whole = Cut(0, media.frames, None, media.height, media.width)
    return read_frames(Path(path), media, whole), float(media.fps)


def read_frames(path: Path, media: Media, cut: Cut) -> np.ndarray:
    """A clip `[T, H, W, 3]` of bytes, in RGB.

    Raises:
        Undecodable: a damaged file, or one with fewer frames than the clip has.
    """
    clock = _Clock(path, media)
    chosen = clock.numbers(cut)
    there = sum(number < media.frames for number in chosen)
    if there < cut.frames:
        raise Undecodable(f"{path} cannot be decoded: it ends after {there} of the {cut.frames} frames of a clip")
    made: dict[int, np.ndarray] = {}
    graphs: dict[tuple, av.filter.Graph] = {}
    wanted = set(chosen)
    for number, frame in _decoded(path, clock, chosen[0]):
        if number in wanted and number not in made:
            if frame.is_corrupt:
                raise Undecodable(f"{path} cannot be decoded: its frame {number} is damaged")
            made[number] = _converted(frame, media, cut, graphs)
        if number >= chosen[-1]:
            break
    missing = sorted(wanted - set(made))
    if missing:
        raise Undecodable(
            f"{path} cannot be decoded: {len(missing)} of the {len(wanted)} frames of a clip are not there, the first "
            f"of them frame {missing[0]}"
        )
    return np.stack([made[number] for number in chosen])


# -- which frames ------------------------------------------------------------------------------------------------------


class _Clock:
    """The numbers of the frames of a video, from 0, and their time stamps.

    Args:
        path: of the video; read to its end where the rate is variable.
        media: what it holds.
    """

    def __init__(self, path: Path, media: Media) -> None:
        self.media = media
        self.times: list[int] | None = None
        with _opened(path) as (container, stream):
            self.unit = stream.time_base
            if media.variable:
                self.times = _in_order(_times(container, stream)[0], media.first)

    def numbers(self, cut: Cut) -> list[int]:
        """The frames of a clip; `Media.frames` for those behind the end."""
        wanted = range(cut.start, cut.start + cut.frames)
        if cut.fps is None:
            return [min(number, self.media.frames) for number in wanted]
        there, last = self.media.frames_at(cut.fps), self.media.frames - 1
        return [min(self._nearest(n / Fraction(cut.fps)), last) if n < there else self.media.frames for n in wanted]

    def _nearest(self, seconds: Fraction) -> int:
        """The frame to show at a time after the first one."""
        if self.times is None:
            return math.floor(seconds * self.media.fps + Fraction(1, 2))
        # One that stays for long is shown until the next one comes. Half a unit is the rounding of time stamps.
        return bisect.bisect_right(self.times, self.times[0] + seconds / self.unit + Fraction(1, 2)) - 1

    def number(self, stamp: int) -> int:
        """The number of the frame with a time stamp."""
        if self.times is not None:
            return bisect.bisect_left(self.times, stamp)
        return round((stamp - self.media.first) * self.unit * self.media.fps)

    def stamp(self, number: int) -> int:
        """A time stamp at which the frame is shown, or shortly before."""
        if self.times is not None:
            return self.times[number]
        return self.media.first + math.floor(number / self.media.fps / self.unit)


def _times(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[int | None], int]:
    """The time stamps of all frames that are shown, in the order of the file, and how long the last of them lasts.

    AVI has none, only an order of storage; from that libav guesses, wrongly where frames are stored out of order. They
    are None then.
    """
    times, last, reordered = [], 0, False
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
            last = packet.duration or last
            reordered |= packet.pts != packet.dts
    if not times:
        raise ValueError("it holds no frame")
    return ([None] * len(times) if reordered and container.format.name == "avi" else times), last


def _in_order(times: Sequence[int], first: int) -> list[int]:
    """The time stamps as they are shown, from the first frame that can be decoded on."""
    return sorted({time for time in times if time >= first})


def _even_rate(times: Sequence[int], unit: Fraction, declared: Sequence[Fraction]) -> Fraction | None:
    """The rate at which every frame lies within a quarter of its duration of where it should be; None without any."""
    if len(times) == 1:
        return declared[0] if declared else Fraction(1)
    measured = (len(times) - 1) / ((times[-1] - times[0]) * unit)
    offsets = [(time - times[0]) * float(unit) for time in times]
    for rate in (*declared, measured):
        if all(abs(offset * float(rate) - number) < 0.25 for number, offset in enumerate(offsets)):
            return rate
    return None


def _decoded(path: Path, clock: _Clock, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their numbers, from `first` or from before it on."""
    import av

    if clock.media.first is None:
        with _opened(path) as (container, stream):
            yield from enumerate(container.decode(stream))
        return
    for jump in (True, False) if first else (False,):
        with _opened(path) as (container, stream):
            if jump:
                try:
                    container.seek(clock.stamp(first), stream=stream)
                except av.FFmpegError:
                    continue  # a file without an index: from its start
            missed = jump  # where it leads behind the last frame
            for place, frame in enumerate(container.decode(stream)):
                number = clock.number(frame.pts) if frame.pts is not None else place
                # An index that is not exact, or frames that can only be counted: from the start.
                missed = jump and (frame.pts is None or (place == 0 and number > first))
                if missed:
                    break
                yield number, frame
            if not missed:
                return


# -- their pixels ------------------------------------------------------------------------------------------------------


def _converted(frame: av.VideoFrame, media: Media, cut: Cut, graphs: dict[tuple, av.filter.Graph]) -> np.ndarray:
    """The part of a frame that a clip shows, `[H, W, 3]`.

    Args:
        frame: as decoded.
        media, cut: of the clip.
        graphs: those made so far; in some files the size or the colours change.
    """
    shape, colours = (frame.width, frame.height), (frame.colorspace, frame.color_range, frame.color_trc)
    key = (shape, frame.format.name, colours, _turned(frame))
    if key not in graphs:
        graphs[key] = _graph(frame, media, cut)
    graphs[key].vpush(frame)
    pixels = graphs[key].vpull().to_ndarray()
    if pixels.shape[2] == 3:
        return pixels
    # What is transparent, in a GIF, lies on white, as in pictures.
    shown, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    return (shown * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def _graph(frame: av.VideoFrame, media: Media, cut: Cut) -> av.filter.Graph:
    height, width = cut.scaled(media)
    top, left = cut.corner((height, width))
    matrix = _MATRICES.get(frame.colorspace)
    if frame.colorspace == _UNTOLD and not frame.format.is_rgb:
        # What players assume: only in standard definition it is that of old television.
        matrix = "bt709" if frame.width >= 1280 or frame.height > 576 else "bt601"
    scale = f"{width}:{height}:flags={_SCALING}"
    if matrix is not None:
        scale += f":in_color_matrix={matrix}"
    if frame.color_trc in _HDR:
        scale += ":out_primaries=bt709:out_transfer=bt709"
    clear = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    steps = (*_turned(frame), ("scale", scale), ("format", "rgba" if clear else "rgb24"))
    steps += (("crop", f"{cut.width}:{cut.height}:{left}:{top}:exact=1"), ("buffersink", ""))
    return _linked(frame, steps)


def _linked(frame: av.VideoFrame, steps: Sequence[tuple[str, str]]) -> av.filter.Graph:
    """Filters in a row that take frames such as this one: names with their options."""
    import av

    graph = av.filter.Graph()
    graph.threads = 1  # else it takes all of the machine in each of the processes that prepare clips
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(frame.time_base),
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(source, *(graph.add(name, options or None) for name, options in steps)).configure()
    return graph


def _turned(frame: av.VideoFrame) -> tuple[tuple[str, str], ...]:
    """The filters that show a frame as its file says.

    Raises:
        ValueError: it is to be turned by less than a quarter.
    """
    side: Any = _side_data(frame).get("DISPLAYMATRIX")
    if side is None:
        return ()
    a, b, _, c, d = np.frombuffer(side, np.int32)[:5].tolist()
    largest = max(map(abs, (a, b, c, d)))
    signs = tuple(0 if abs(value) < largest / 100 else 1 if value > 0 else -1 for value in (a, b, c, d))
    if signs not in _TURNS:
        raise ValueError(f"it is to be shown turned by {frame.rotation} degrees: turn it by quarters")
    return _TURNS[signs]


def _side_data(frame: av.VideoFrame) -> Any:
    """What a frame carries beside its picture, of the kinds that PyAV has names for.

    It refuses all of it where one kind is newer, such as EXIF, which FFmpeg 8 hands on from the pictures of cameras.
    `frame.rotation` would still be there, but takes mirrored pictures for turned ones.
    """
    from av.sidedata.sidedata import Type

    try:
        return frame.side_data
    except ValueError:
        kinds: Any = Type  # by PyAV's stubs it is no enumeration
        newer = 1 + max(kind.value for kind in kinds)
        deleted = [("sidedata", f"mode=delete:type={kind}") for kind in range(newer, newer + _NEWER_KINDS)]
        graph = _linked(frame, (*deleted, ("buffersink", "")))
        graph.vpush(frame)
        return graph.vpull().side_data


def _lenient(version: str) -> dict[str, Any]:
    """What PyAV must be told so that it opens files whose titles are not in UTF-8; from 19 on it does so by itself."""
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file and its picture stream; what is wrong with it is `Undecodable`."""
    import av

    try:
        # Absolute, or a name with a colon would be a protocol.
        with av.open(str(path.absolute()), **_lenient(av.__version__)) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise ValueError("it has no picture stream that can be decoded here")
            stream.codec_context.thread_type = "AUTO"
            stream.codec_context.thread_count = min(_MOST_THREADS, torch.get_num_threads())
            yield container, stream
    except Undecodable:
        raise
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:  # the last: a stream that damage seems to add
        reason = getattr(error, "strerror", None) or error
        raise Undecodable(f"{path} cannot be decoded: {reason}") from error
