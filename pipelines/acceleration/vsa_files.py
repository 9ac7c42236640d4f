"""Gates for VSA in the files that people have of a transformer, without the transformer.

These are the folder of a pipeline or of a transformer alone, in shards or not, and one file: with diffusers' names, as
`vidaccel convert fastwan` writes it for ComfyUI, or with the gates among the names of Wan's own files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...attention import VSA
from ...attention.methods.vsa import CUBE
from ..files.adapter_header import facts_of
from ..files.weight_files import weights_of
from .vsa_gates import GATE, TrainedVSA, VSAError, density_of_width, read_config

_GATE = re.compile(rf"(?:.*\.)?blocks\.(\d+)\.(?:attn1\.|self_attn\.)?{GATE}\.(weight|bias)")


@dataclass(frozen=True)
class GateFiles:
    """Gates that were found, before they are read.

    Args:
        path: what was given.
        places: number of a block and kind of tensor -> the file and the name that it has there.
        shapes: likewise.
        trained: what they were trained for.
        stated: whether the files say so; otherwise it is as FastVideo's scripts have it.
    """

    path: Path
    places: Mapping[tuple[int, str], tuple[Path, str]]
    shapes: Mapping[tuple[int, str], tuple[int, ...]]
    trained: TrainedVSA
    stated: bool

    def check_fits(self, layers: int, width: int) -> None:
        """Raise VSAError unless they are those of a transformer.

        Args:
            layers: its blocks. width: its channels.
        """
        own = 1 + max(layer for layer, _ in self.shapes)
        of = max(shape[0] for shape in self.shapes.values())
        if (own, of) != (layers, width):
            raise VSAError(
                f"{self.path.name} has gates for {own} layers of {of} channels, and this model has {layers} of "
                f"{width}: give the files that its weights are from."
            )
        for layer in range(layers):
            for kind, wanted in (("weight", (width, width)), ("bias", (width,))):
                found = self.shapes.get((layer, kind))
                if found != wanted:
                    what = "is missing" if found is None else f"is {list(found)}"
                    raise VSAError(
                        f"{self.path.name}: the gate of block {layer} ({GATE}.{kind}) {what}, and it must be "
                        f"{list(wanted)}: the file was not written as a whole. Download or convert it again."
                    )

    def tensors(self) -> dict[int, dict[str, torch.Tensor]]:
        """The weight `[D, D]` and the bias `[D]` of each block, as they lie there."""
        from safetensors import safe_open

        made: dict[int, dict[str, torch.Tensor]] = {}
        for file in sorted({file for file, _ in self.places.values()}):
            with safe_open(file, "pt") as opened:
                for (layer, kind), (where, name) in self.places.items():
                    if where == file:
                        made.setdefault(layer, {})[kind] = opened.get_tensor(name)
        return made


def find_gates(location: str | Path) -> GateFiles:
    """The gates in a file, or in the folder of a pipeline or a transformer; only headers are read.

    Raises:
        VSAError: there is no such place, it has none, or cannot be read.
    """
    path = Path(location).expanduser()
    part = "transformer" if (path / "transformer").is_dir() else ""
    files = _files(path, part)
    places: dict[tuple[int, str], tuple[Path, str]] = {}
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for file in files:
        for name, shape in _shapes(file).items():
            if match := _GATE.fullmatch(name):
                place = int(match[1]), match[2]
                if place in places:
                    raise VSAError(f"{path} has two gates for block {place[0]}: {places[place][1]} and {name}.")
                places[place], shapes[place] = (file, name), tuple(shape)
    if not places:
        raise VSAError(
            f"{path} has no gates ({GATE}): its model was not trained for VSA, or they were left out when it was "
            "converted. Give FastVideo's own folder, or what `vidaccel convert fastwan` made of it."
        )
    told = _stated(path, part)
    return GateFiles(path, places, shapes, told or _published(shapes), told is not None)


def _files(path: Path, part: str) -> list[Path]:
    """The safetensors files of a place."""
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise VSAError(f"{path.name} ends in {path.suffix or 'nothing'}: gates are read from .safetensors alone.")
        return [path]
    if not path.is_dir():
        raise VSAError(f"{path} is neither a file nor a folder here: give where the model's files are.")
    files = weights_of(str(path), part)
    if not files:
        raise VSAError(
            f"{path} holds no transformer in diffusers' layout (transformer/*.safetensors): give its folder, or one "
            "file."
        )
    return files


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise VSAError(f"{file} cannot be read as safetensors ({error}): download it again.") from error


def _stated(path: Path, part: str) -> TrainedVSA | None:
    """What the files say that they were trained for."""
    if path.is_dir():
        return read_config(str(path), part)
    told = facts_of(path).get(VSA.name)
    return None if told is None else TrainedVSA.read(told, str(path))


def _published(shapes: Mapping[tuple[int, str], tuple[int, ...]]) -> TrainedVSA:
    return TrainedVSA(density=density_of_width(max(shape[0] for shape in shapes.values())), cube=CUBE)
