"""What tells a pass from the others at its noise level, where another node makes further ones of the same prompt.

Guidance such as LTX-2's STG and Modality Guidance calls the model once more with the prompt's own id, and only its
options say that blocks or modalities work in another way there; Reference Audio takes the reference out of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# In `transformer_options`: what belongs to a batch, a context window or a block, and not to what is asked of the model.
_PLACES = {"cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "context_window", "block_index", "block_type"}


class Passes:
    """The first pass at the noise level that a sampling is at, with which the others are compared.

    Not with those of other levels: options may have a count of steps in them.
    """

    def __init__(self) -> None:
        self._sigma: float | None = None
        self._first: dict[str, str] = {}
        self._given: dict[Any, frozenset[str]] = {}
        self._alike: dict[str, list[str]] = {}  # passes that differ from one another in fractions alone

    def beside(self, options: Mapping[str, Any], sigma: float, given: Iterable[str] = ()) -> str:
        """In what a pass differs from the first one, such as "stg_self_attn_blocks 29"; empty for the first.

        Blocks that are replaced are not among it, see `replaced_blocks`; nor are fractions, such as a strength that
        falls from step to step: a pass has the same words at each level. The second with the same ones is "#2".

        Args:
            options: `transformer_options` of the pass. sigma: its noise level.
            given: names of what the model is given with the prompt, compared with the first pass of the same prompt.
        """
        values = dict(_asked(options))
        facts = {name: _text(value, fractions=True) for name, value in values.items()}
        if sigma != self._sigma:
            self._sigma, self._first, self._given, self._alike = sigma, facts, {}, {}
        names = sorted(name for name in facts.keys() | self._first.keys() if facts.get(name) != self._first.get(name))
        words = [f"{name} {_text(values[name])}".rstrip() if name in facts else f"no {name}" for name in names]
        mine = frozenset(given)
        for prompt in options.get("uuids") or ():
            firsts = self._given.setdefault(prompt, mine)
            words += [f"no {name}" for name in sorted(firsts - mine)] + [
                f"with {name}" for name in sorted(mine - firsts)
            ]
        return self._numbered(", ".join(dict.fromkeys(words)), str([(name, facts.get(name)) for name in names]))

    def _numbered(self, words: str, exactly: str) -> str:
        alike = self._alike.setdefault(words, [])
        if exactly not in alike:
            alike.append(exactly)
        place = alike.index(exactly)
        return f"{words} #{place + 1}" if place else words


def _asked(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in options.items():
        if name == "patches_replace":
            value = {place: patches for place, patches in value.items() if place != "dit"}
        if isinstance(name, str) and name not in _PLACES and not (isinstance(value, Mapping) and not value):
            yield name, value


def _text(value: Any, fractions: bool = False) -> str:
    """A value in a word or some. Of functions, tensors and other objects the kind: each GPU may have its own ones.

    Args:
        fractions: with them; else they are left out.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return str(value) if fractions else ""
    if isinstance(value, (int, str)):
        return str(value)
    if isinstance(value, Mapping):
        return " ".join(sorted(f"{key} {_text(inner, fractions)}".rstrip() for key, inner in value.items()))
    if isinstance(value, (set, frozenset, list, tuple)):
        words = [word for word in (_text(inner, fractions) for inner in value) if word]
        ordered = isinstance(value, (list, tuple))
        return " ".join(words if ordered else sorted(words, key=lambda word: (len(word), word)))
    return type(value).__name__
