"""What lies where in the folder of a training: results, checkpoints, and which adapter is meant by the folder itself.

The trainer writes by these names. It is not imported here: who uses an adapter needs nothing of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .plain_content import object_in

logger = logging.getLogger(__name__)

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "adapter"
"""The folder of what a pipeline loads, in that of a run that is finished and in that of each checkpoint."""
CHECKPOINTS = "checkpoints"
CHECKPOINT = "step_"
"""Begins the names of checkpoints."""
CHECKPOINT_FACTS = "checkpoint.json"
"""In a checkpoint that is whole."""
SETTINGS = "config.yaml"
OTHER_RESULTS = {
    "pipeline": "a whole model: give {} as the model",
    "decoder": "a tiny decoder: give {} as the decoder",
    "autoencoder": "an autoencoder, {}",
}
"""Results that are no adapter, and what they are."""
RESULTS = (ADAPTER, *OTHER_RESULTS)
_WEIGHTS = (".safetensors", ".bin", ".pt")
_INDEX = "model_index.json"
_BASE_FACTS = "adapter.json"
"""Beside the weights that only `ae_adapt` makes, which are no LoRA for a model that stays as it is."""


class NoAdapter(ValueError):
    """A folder of a training that does not stand for one adapter; the message says why, and what to give."""


def order_of(checkpoint: Path) -> int | None:
    """The number of a checkpoint in the order in which those of its run were written; 0 where it has none, None where
    it cannot be read any more.

    Times of files do not tell: a copy has others.
    """
    try:
        order = object_in(checkpoint / CHECKPOINT_FACTS).get("order", 0)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        return None
    return order if isinstance(order, int) else None


def in_order(checkpoints: Iterable[Path]) -> list[Path]:
    """Checkpoints as they were written, which need not be by their steps. Those without a number come first."""
    return sorted(checkpoints, key=lambda path: (order_of(path) or 0, path.name))


def adapter_path(location: str | Path) -> Path:
    """The file of an adapter of ours, from it, its folder, a checkpoint, or the folder of the run that made it.

    Of a run it is the result; of one that is not finished, what its newest checkpoint has.

    Args:
        location: the file or folder.

    Returns:
        The file; the location itself where that is neither a folder that holds one nor one of a run.

    Raises:
        NoAdapter: a run that has written none yet or whose result is something else, or a folder with several results;
            what belongs to a model of `ae_adapt`, a file, too.
    """
    path = Path(location).expanduser()
    if not path.is_dir():
        if path.name == FILE and _is_model(path.parent):
            raise NoAdapter(f"{path} is a part of a model of ae_adapt: give {path.parent} as the model.")
        return path
    if _is_model(path):
        raise NoAdapter(f"{path} is a model of ae_adapt: give it as the model.")
    if (path / FILE).is_file():
        return path / FILE
    others = [name for name in OTHER_RESULTS if (path / name).is_dir() and not (path / _INDEX).is_file()]
    if _has_lora(path):
        if others:
            names = " and ".join(f"{name}/" for name in (ADAPTER, *others))
            raise NoAdapter(f"{path} holds the results of several recipes ({names}): give {path / ADAPTER}.")
        return path / ADAPTER / FILE
    began = (path / SETTINGS).is_file() or bool(_checkpoints(path))
    if others and (began or (path / ADAPTER).is_dir()):
        told = OTHER_RESULTS[others[0]].format(path / others[0])
        raise NoAdapter(f"{path} is the folder of a training whose result is {told}.")
    if saved := _newest(path, _has_lora):
        return saved / ADAPTER / FILE
    if _has_model(path) or _newest(path, _has_model):
        raise NoAdapter(f"{path} is the folder of a training of ae_adapt, whose result is a model: give it as that.")
    if any(each.suffix in _WEIGHTS for each in path.iterdir()):
        return path  # of another tool, which may have a config.yaml, too
    if began:
        raise NoAdapter(
            f"{path} is the folder of a training that has written no adapter yet: the first checkpoint has one "
            "(loop.save_every of its settings), unless it trains all weights."
        )
    runs = sorted(each.name for each in path.iterdir() if each.is_dir() and _holds_adapter(each))
    if runs:
        raise NoAdapter(f"{path} holds the folders of trainings: give one of them ({', '.join(runs)}).")
    return path


def model_path(location: str | Path) -> Path:
    """The folder of a model, from it, a checkpoint, or the folder of the run that made it.

    Of a run it is the result; of one of `ae_adapt` that is not finished, the adapter that its newest checkpoint has.

    Args:
        location: the folder.

    Returns:
        The folder; the location itself where that is a model, or none of a run.

    Raises:
        NoAdapter: a run that makes no model, or has none yet.
    """
    path = Path(location).expanduser()
    if not path.is_dir() or (path / _INDEX).is_file() or _is_model(path):
        return path
    saved = bool(_checkpoints(path))
    if not ((path / SETTINGS).is_file() or saved or (path / ADAPTER).is_dir()):
        return path
    if (path / "pipeline" / _INDEX).is_file():
        return path / "pipeline"
    if made := path if _has_model(path) else _newest(path, _has_model):
        return made / ADAPTER
    if _has_lora(path):
        raise NoAdapter(
            f"{path} is the folder of a training whose result is an adapter, {path / ADAPTER}: give that beside the "
            "model that it was trained on."
        )
    if saved or ((path / SETTINGS).is_file() and (path / CHECKPOINTS).is_dir()):
        raise NoAdapter(f"{path} is the folder of a training that has written no model (no pipeline/ in it).")
    return path


def autoencoder_path(location: str | Path) -> Path:
    """The folder of an autoencoder, from it or the folder of the run that made it; the location itself otherwise.

    Raises:
        NoAdapter: a run that makes none, or has made none yet.
    """
    path = Path(location).expanduser()
    if (path / "config.json").is_file():
        return path
    if (path / "autoencoder" / "config.json").is_file():
        return path / "autoencoder"
    if (path / SETTINGS).is_file() and (path / CHECKPOINTS).is_dir():
        raise NoAdapter(f"{path} is the folder of a training that has written no autoencoder (no autoencoder/ in it).")
    return path


def _newest(run: Path, has: Callable[[Path], bool]) -> Path | None:
    """Of the checkpoints of a run, or of the folder that they are in, the last one that has something.

    Raises:
        NoAdapter: one of them is damaged, so that it may be the last one.
    """
    found = in_order(filter(has, _checkpoints(run)))
    for checkpoint in found:
        if order_of(checkpoint) is None:
            raise NoAdapter(
                f"{checkpoint} is damaged ({CHECKPOINT_FACTS} cannot be read) and may be the newest of the training in "
                f"{run}: give {ADAPTER}/ of a checkpoint."
            )
    return found[-1] if found else None


def _checkpoints(run: Path) -> list[Path]:
    """Of a run, or of the folder that they are in. Other tools have folders of that name, which alone says nothing."""
    for folder in (run / CHECKPOINTS, *([run] if run.name == CHECKPOINTS else [])):
        if found := [each for each in folder.glob(f"{CHECKPOINT}*") if _is_checkpoint(each)]:
            return found
    return []


def _is_checkpoint(folder: Path) -> bool:
    """Whether it is one, or what is left of it: its adapter alone."""
    return (folder / CHECKPOINT_FACTS).is_file() or (folder / ADAPTER).is_dir()


def _is_model(folder: Path) -> bool:
    """Whether a folder holds an adapter of `ae_adapt`, of which the LoRA is for the transformer that it changes."""
    return (folder / _BASE_FACTS).is_file()


def _has_lora(folder: Path) -> bool:
    """Whether the result in the folder of a run, or of a checkpoint, is an adapter for a model that stays as it is."""
    return (folder / ADAPTER / FILE).is_file() and not _is_model(folder / ADAPTER)


def _has_model(folder: Path) -> bool:
    """Whether it is one of `ae_adapt`."""
    return _is_model(folder / ADAPTER)


def _holds_adapter(folder: Path) -> bool:
    return _has_lora(folder) or _newest(folder, _has_lora) is not None


def taken(location: str | Path, path: Path) -> str:
    """What to say of the file or folder that was taken of a place; "" where the place itself names it.

    Args:
        location: as it was given.
        path: what `adapter_path` made of it, or the folder of that; or what `model_path` did.
    """
    given = Path(location).expanduser()
    if path in (given, given / FILE):
        return ""
    path = path / FILE if path.name == ADAPTER and not _is_model(path) else path
    return f"{given} is the folder of a training: its {path.relative_to(given).as_posix()} is used."


def chosen_adapter(location: str | Path) -> Path:
    """`adapter_path`, which is logged where the location does not name it."""
    path = adapter_path(location)
    if told := taken(location, path):
        logger.info("%s", told)
    return path


def chosen_model(location: str | os.PathLike) -> str | os.PathLike:
    """`model_path`, which is logged where the location does not name it; what is no folder here, such as a hub id, is
    what it was."""
    path = model_path(os.fspath(location))
    if not path.is_dir():
        return location
    if told := taken(os.fspath(location), path):
        logger.info("%s", told)
    return path
