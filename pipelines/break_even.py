"""From how many tokens sparse attention pays on this machine: what was measured, in the cache folder, and what follows.

`vidaccel break-even` measures it (`generation/tuning/`); whatever chooses by length reads it here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import default_method
from .default_method import DEFAULT_METHOD
from .device_names import device_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
COMMAND = "vidaccel break-even"


@dataclass(frozen=True)
class BreakEven:
    """Where sparse attention begins to pay.

    Args:
        tokens: the shortest length at which it did; None where it did at none that was measured.
        dense_until: the longest length below that at which dense was as fast; 0 where there was none.
        points: `(tokens, seconds of a dense call, seconds of a sparse call)`, in the order of measuring.
    """

    tokens: int | None
    dense_until: int
    points: tuple[tuple[int, float, float], ...] = ()

    def in_words(self) -> str:
        """What was found, in one sentence."""
        if self.tokens is None:
            return f"No gain here: dense is faster up to {self.dense_until:,} tokens, the longest that was measured."
        if not self.dense_until:
            return f"Sparse attention pays from {self.tokens:,} tokens, the shortest that was measured."
        return f"Sparse attention pays from {self.tokens:,} tokens; dense is as fast up to {self.dense_until:,}."

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {"tokens": self.tokens, "dense_until": self.dense_until, "points": [list(p) for p in self.points]}

    @classmethod
    def from_dict(cls, content: Any) -> BreakEven:
        """What `to_dict` made; raises a `ValueError`, `KeyError` or `TypeError` for anything else."""
        tokens, until = content["tokens"], content["dense_until"]
        for value in (until, *(() if tokens is None else (tokens,))):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{value!r} is no number of tokens")
        return cls(tokens, until, tuple((int(n), float(a), float(b)) for n, a, b in content["points"]))


@dataclass(frozen=True)
class Key:
    """What a break-even is of; with another value of any of these, it is measured anew.

    Args:
        machine: name of the GPU, or of the CPU with its threads.
        device: its type. dtype: of q, k and v.
        heads, head_dim: of self-attention.
        torch_version, vidaccel_version: where it was measured.
        method: that was held against dense.
    """

    machine: str
    device: str
    dtype: str
    heads: int
    head_dim: int
    torch_version: str
    vidaccel_version: str
    method: str = DEFAULT_METHOD

    @classmethod
    def here(
        cls,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        method: str = DEFAULT_METHOD,
    ) -> Key:
        """Of this machine."""
        from torch import __version__ as torch_version

        from .. import __version__

        name = str(dtype).removeprefix("torch.")
        versions = (torch_version, __version__)
        return cls(
            f"{device_name(device)} ({platform.machine()})", device.type, name, heads, head_dim, *versions, method
        )

    @property
    def file(self) -> Path:
        """Where it is kept."""
        digest = hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:16]
        return folder() / f"{digest}.json"


@dataclass(frozen=True)
class Limit:
    """From how many tokens a video is made sparse without being asked.

    Args:
        tokens: the least number.
        why: it is that, in a sentence.
        measured: on this machine.
    """

    tokens: int
    why: str
    measured: bool = False


def folder() -> Path:
    """The folder of break-evens: where the hub's library keeps what other libraries cache (`HF_ASSETS_CACHE`)."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "vidaccel" / "break_even"


def stored(key: Key) -> BreakEven | None:
    """What was measured; None where nothing was, or where its file cannot be read, which is logged."""
    try:
        content = json.loads(key.file.read_text(encoding="utf-8"))
        if content["key"] != vars(key):
            raise ValueError("it is of another machine")
        return BreakEven.from_dict(content["break_even"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        command = _command(key, "")
        logger.warning("The break-even in %s cannot be read (%s): `%s` measures it anew.", key.file, error, command)
        return None


def fixed() -> Limit:
    """What holds where nothing is known of a machine and a model."""
    return Limit(default_method.MIN_SPARSE_TOKENS, f"{default_method.MIN_SPARSE_TOKENS:,} tokens are a fixed default.")


def limit(key: Key, model: str = "") -> Limit:
    """From how many tokens sparse attention is the choice: what was measured, otherwise the fixed default.

    Args:
        key: of the machine and the heads.
        model: that the command would measure for; "" where it has no name that the command knows.
    """
    found, usual = stored(key), default_method.MIN_SPARSE_TOKENS
    if found is None:
        command = _command(key, model)
        return Limit(usual, f"{usual:,} tokens are a fixed default: `{command}` measures it on this machine.")
    if found.tokens is None:
        least = max(usual, found.dense_until + 1)
        return Limit(
            least, f"Up to {found.dense_until:,} tokens, dense was measured to be faster on this machine.", True
        )
    why = f"On this machine, sparse attention was measured to pay from {found.tokens:,} tokens."
    return Limit(found.tokens, why, True)


def _command(key: Key, model: str) -> str:
    """What measures a key: with all that is in it, or what is found would be kept where nobody looks for it."""
    words = ["--model", model] if model else ["--heads", str(key.heads), "--head-dim", str(key.head_dim)]
    words += ["--device", key.device, "--dtype", key.dtype]
    if key.method != DEFAULT_METHOD:
        words += ["--method", key.method]
    if key.device == "cpu":  # the name of a CPU has the threads in it
        import torch

        words += ["--threads", str(torch.get_num_threads())]
    return f"{COMMAND} {shlex.join(words)}"
