"""What the options of the commands mean, checked before anything is loaded."""

from __future__ import annotations

import ast
import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..generation.errors import BadInput
from ..generation.request import MIN_SPARSE_TOKENS

DENSE = "dense"
DEFAULT_METHOD = "svg2"
DEFAULT_COMPARED = ("svg2", "radial", "svg")


# -- files -------------------------------------------------------------------------------------------------------------


def check_file(option: str, path: Path, suffix: str) -> None:
    """Raise BadInput unless a file with this suffix can be written there."""
    if path.suffix.lower() != suffix:
        raise BadInput(f"{option} {path}: the name must end in {suffix}, the only format written.")
    if path.is_dir():
        raise BadInput(f"{option} {path} is a folder: give the name of a file in it.")
    if not path.parent.is_dir():
        raise BadInput(f"{option} {path}: there is no folder {path.parent}; create it first.")
    check_writable(f"{option} {path}", path.parent)


def check_writable(label: str, folder: Path) -> None:
    """Raise BadInput unless files can be made in a folder, or in the nearest one above it that is there."""
    while not folder.is_dir() and folder != folder.parent:
        if folder.exists():
            raise BadInput(f"{label}: {folder} is a file, so nothing can be written below it; give another folder.")
        folder = folder.parent
    try:
        # Asking the system for its permission bits misses read-only file systems; a file says it for certain.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"{label}: the folder {folder} is not writable (the system says: {error.strerror}); give another folder."
        ) from error


# -- values ------------------------------------------------------------------------------------------------------------


def amount(option: str, text: str | None) -> int | float | None:
    """A count ("4") or a fraction ("0.2"); BadInput for anything else."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
        if (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1):
            return value
    raise BadInput(f"{option} is {text}: give a count (a whole number from 0) or a fraction (0.0 to 1.0).")


def method_settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`["svg2.top_p=0.8"]` -> `{"svg2": {"top_p": 0.8}}`; BadInput for what has another form."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        method, dot, field = target.strip().partition(".")
        if not (equals and dot and method and field):
            raise BadInput(f"--set {text}: write METHOD.SETTING=VALUE, such as svg2.top_p=0.85.")
        try:
            found.setdefault(method, {})[field] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            # A bare word, as in rule=published.
            found.setdefault(method, {})[field] = value.strip()
    return found


def refuse_given(given: Mapping[str, bool], reason: str) -> None:
    """Raise BadInput when an option was given that has no effect here: nothing is ignored in silence.

    Args:
        given: option -> whether it was given.
        reason: how the message goes on; it ends with "leave it out".
    """
    useless = [option for option, is_given in given.items() if is_given]
    if useless:
        raise BadInput(f"{', '.join(useless)}: {reason} leave {'it' if len(useless) == 1 else 'them'} out.")


# -- methods -----------------------------------------------------------------------------------------------------------


def check_methods(asked: list[str], compare: bool) -> None:
    """Raise BadInput for a method that there is not, and for a comparison of dense with itself."""
    from ..attention import METHODS

    for name in asked:
        if name != DENSE and name not in METHODS:
            raise BadInput(f"--method {name} is unknown; known: {', '.join([DENSE, *METHODS])}.")
    if compare and asked and set(asked) == {DENSE}:
        raise BadInput("--compare needs a method other than dense, which is always the reference.")


def choose_methods(asked: list[str], compare: bool, tokens: int) -> tuple[list[str], str]:
    """The runs in their order, and why these: dense first where it is the reference, every name once.

    Args:
        asked: methods that were given, checked; may be empty.
        compare: whether a comparison was asked for.
        tokens: length of the video's sequence in self-attention.
    """
    few = tokens < MIN_SPARSE_TOKENS
    if asked:
        names, why = list(dict.fromkeys(asked)), "as given"
    elif compare:
        names, why = list(DEFAULT_COMPARED), "what --compare takes without --method"
        if few:
            why += f" (the video has {tokens:,} tokens; below {MIN_SPARSE_TOKENS:,}, dense is the choice without it)"
    else:
        names = [DENSE if few else DEFAULT_METHOD]
        why = f"the video has {tokens:,} tokens, {'fewer than' if few else 'at least'} {MIN_SPARSE_TOKENS:,}"
        why += f"; --method {DEFAULT_METHOD if few else DENSE} for the other"
    if compare:
        names = [DENSE, *(name for name in names if name != DENSE)]
    return names, why


def check_sparse_options(names: list[str], was_asked: bool, given: Mapping[str, bool]) -> None:
    """Raise BadInput when an option of sparse attention was given and all runs are dense."""
    if set(names) == {DENSE}:
        why = "" if was_asked else f", and a video of fewer than {MIN_SPARSE_TOKENS:,} tokens is dense without --method"
        refuse_given(given, f"of use only with a sparse method{why}: add --method {DEFAULT_METHOD}, for example, or")
