"""Options of several commands, and what their texts mean, checked before anything is loaded."""

from __future__ import annotations

import ast
import contextlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..generation.errors import BadInput
from ..generation.machine import MOST_THREADS
from ..generation.requests.values import count_or_share

Device = Annotated[str, typer.Option(help="auto (an accelerator, if any), cpu, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 but on a CPU.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep only the part at work on the device.")]
OffloadBlocks = Annotated[
    bool,
    typer.Option(
        "--offload-blocks", help="Also of a transformer that is larger than the device: one block of it at a time."
    ),
]
Components = Annotated[
    str | None,
    typer.Option(
        help="With --model FILE.safetensors, a transformer alone: folder or hub id of the pipeline with all else."
    ),
]
Tiling = Annotated[bool, typer.Option("--vae-tiling", help="Encode and decode in tiles: less memory for large frames.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. (default: torch's)")]

TWICE = "it is given twice, and one of the two would count for nothing"
_CONSTANTS = {"true": True, "false": False, "none": None}


def amount(field: str, text: str | None) -> int | float | None:
    """A count ("4") or a fraction ("0.2"); BadInput for anything else."""
    if text is None:
        return None
    value: Any = text
    with contextlib.suppress(ValueError):
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    return count_or_share(field, value)


def method_settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`["svg2.top_p=0.8"]` -> `{"svg2": {"top_p": 0.8}}`; BadInput for what has another form, or stands twice."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        method, dot, field = target.strip().partition(".")
        if not (equals and dot and method and field):
            raise BadInput(
                "settings", "it has the form METHOD.SETTING=VALUE, such as tangent.tolerance=0.02", value=text
            )
        if field in found.setdefault(method, {}):
            raise BadInput("settings", TWICE, value=f"{method}.{field}")
        found[method][field] = tuple(read) if isinstance(read := _value(value.strip()), list) else read
    return found


def pipeline_arguments(texts: list[str]) -> dict[str, Any]:
    """`["true_cfg_scale=6"]` -> `{"true_cfg_scale": 6}`; BadInput for what has another form, or stands twice."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.strip().isidentifier()):
            raise BadInput("pipeline_options", "it has the form ARGUMENT=VALUE, such as true_cfg_scale=6", value=text)
        if name.strip() in found:
            raise BadInput("pipeline_options", TWICE, value=name.strip())
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    """A number, tuple, list, True, False or None as Python writes them or in small letters; else a bare word."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # as in rule=published


def offloading(parts: bool, blocks: bool) -> bool | str:
    """What `--offload` and `--offload-blocks` mean to `vidaccel.generate`; the second goes further than the first."""
    from ..pipelines.loading import BLOCKS

    return BLOCKS if blocks else parts


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads on the CPU; BadInput for fewer than one or too many. None leaves it to torch."""
    if threads is None:
        return
    if threads < 1:
        raise BadInput("threads", "it must be at least 1", value=threads)
    if threads > MOST_THREADS:
        fix = "More than there are cores are slower."
        raise BadInput("threads", f"it must be at most {MOST_THREADS}", fix, value=threads)
    import torch

    torch.set_num_threads(threads)


OWN = "own"
"""What stands for an option's value that was left out."""


class ValuesMayBeLeftOut(TyperCommand):
    """A command with options whose value may be left out, which click does not have for repeatable ones: then it is
    `OWN`. A value that does not begin with a dash counts as one, so such an option comes last, or before another.
    """

    options = ("--guidance-free",)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for number, word in enumerate(args):
            given.append(word)
            if word in self.options and (args[number + 1 : number + 2] or ["-"])[0].startswith("-"):
                given.append(OWN)
        return super().parse_args(ctx, given)
