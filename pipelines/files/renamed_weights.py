"""Safetensors files written as one, under other names, byte for byte: at no time are weights in memory.

safetensors' own writer takes all tensors at once, 28 GB for a model of 14B. The format is a length of 8 bytes, a JSON
header of that length, and the bytes that it lists.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_AT_ONCE = 16 * 2**20  # bytes
_ALIGNMENT = 8  # of the first tensor, as safetensors itself has it


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file: its entry in the header, and where its bytes begin in the file."""

    file: Path
    entry: Mapping[str, Any]
    start: int

    @property
    def size(self) -> int:
        first, last = self.entry["data_offsets"]
        return last - first


def write_renamed(
    files: Iterable[Path], target: Path, rename: Callable[[str], str], metadata: Mapping[str, str]
) -> Path:
    """Write one file with the tensors of several; it appears at the end, whole.

    Args:
        files: whole safetensors files.
        target: is replaced where it is there; its folder is made where there is none.
        rename: name of a tensor -> its name in the new file.
        metadata: of the new file.

    Raises:
        ValueError: two tensors would have one name.
        OSError: it cannot be written.
    """
    found: dict[str, _Tensor] = {}
    for file in files:
        for name, tensor in _tensors(file).items():
            if (new := rename(name)) in found:
                raise ValueError(f"two tensors of {file.parent} would be called {new}.")
            found[new] = tensor
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # As safetensors orders them: the largest numbers first, so that each tensor begins at a multiple of its own.
    ordered = sorted(found.items(), key=lambda item: (-_width(item[1]), item[0]))
    for name, tensor in ordered:
        header[name] = {**tensor.entry, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                with open(tensor.file, "rb") as source:
                    source.seek(tensor.start)
                    _copy(source, out, tensor.size)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def _tensors(file: Path) -> dict[str, _Tensor]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: _Tensor(file, entry, 8 + length + entry["data_offsets"][0]) for name, entry in header.items()}


def _width(tensor: _Tensor) -> int:
    """Bits of a number, as the name of its dtype has them ("BF16", "F8_E4M3"); BOOL has a byte."""
    bits = re.search(r"\d+", tensor.entry["dtype"])
    return int(bits[0]) if bits else 8


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        part = source.read(min(size, _AT_ONCE))
        if not part:
            raise OSError(f"{source.name} ends too early: it was not written as a whole.")
        out.write(part)
        size -= len(part)
