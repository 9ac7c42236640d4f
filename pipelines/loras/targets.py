"""Which of two transformers a LoRA is for: what is said, what its file says, and what it is called.

Wan 2.2 A14B has one for the noisy part of the steps and one for the rest, and LoRAs of others come in pairs whose files
say nothing of it but in their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..files.run_folder import FILE
from .files import TRANSFORMERS, LoraError, LoraFile, check_part, trained_for

_NAMED = dict(zip(("high", "low"), TRANSFORMERS, strict=True))
"""Noise -> the transformer that removes it."""
_WORD = re.compile(r"(?:^|[^a-z])(high|low)(?:[^a-z]|$)|(high|low)[-_. ]?noise", re.IGNORECASE)


class ContradictedTarget(LoraError):
    """A LoRA that is said to be for another transformer than its file says.

    Args:
        name: of the file. target: what is said. known: what the file says.
    """

    def __init__(self, name: str, target: str, known: str) -> None:
        told = f"{name} is said to be for {target}, and its header says that it was trained for {known}"
        super().__init__(f"{told}. Leave the target out.")
        self.name, self.target, self.known = name, target, known


class UnclearTarget(LoraError):
    """A LoRA that nothing but its name says to be for one of two transformers.

    Args:
        path: of the file or folder. likely: the transformer that its name tells of.
    """

    def __init__(self, path: Path, likely: str) -> None:
        told = f"{path.name} is by its name for one of the two transformers alone, and it is not said which"
        fix = f"Write {likely}:{path} (all:{path} for both), in a preset target: {likely}"
        super().__init__(f"{told}. {fix}.")
        self.name, self.likely = path.name, likely


def check_target(lora: LoraFile, parts: Sequence[str]) -> str:
    """Check where a LoRA goes in a pipeline.

    Args:
        lora: with a file that is there.
        parts: the transformers of the pipeline by name.

    Returns:
        What a user should know of it, a sentence; "" for nothing.

    Raises:
        ContradictedTarget: it is said to be for another transformer than its file says.
        WrongTransformer: it is for one that the pipeline does not have.
        UnclearTarget: it is said to be for neither of two, though its name tells that it is for one.
    """
    known, name = trained_for(lora.path), lora.path.name
    agree = (None, known) if len(parts) > 1 else (None, known, "all")
    if known is not None and lora.target not in agree:
        raise ContradictedTarget(name, lora.target, known)
    check_part(lora, parts)
    if len(parts) < 2 or lora.target is not None or known is not None:
        return ""
    if likely := named_for(lora):
        raise UnclearTarget(lora.path, likely)
    return f"{name} goes into both transformers: neither its header nor its target says that it is for one."


def named_for(lora: LoraFile) -> str:
    """The transformer that a file's name tells of ("..._high_noise.safetensors"); "" where it tells none, or both."""
    name = lora.path.parent.name if lora.path.name == FILE else lora.path.stem if lora.path.suffix else lora.path.name
    found = {(a or b).lower() for a, b in _WORD.findall(name)}
    return _NAMED[found.pop()] if len(found) == 1 else ""
