"""Prompts that are longer than what the text encoder reads: diffusers cuts them off, some pipelines without a word.

Pipelines put prompts into templates, clean them, and have several text encoders. So what is read is heard from their
tokenizers while they are at work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import mention

if TYPE_CHECKING:
    from .settings import Settings

_SHOWN = 120
"""Characters of what is cut off that are shown."""


@dataclass
class _Texts:
    """What one tokenizer was given.

    Args:
        count: text -> tokens of it.
        whole: as it was given. kept: what was read of it; empty where it was never asked to cut.
    """

    count: Callable[[str], int]
    whole: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class Reading:
    """What the tokenizers of a pipeline were given, and how much of it text encoders read. Made by `reading`."""

    def __init__(self) -> None:
        self._texts: dict[int, _Texts] = {}

    def notes(self, settings: Settings) -> list[str]:
        """What of the prompts no text encoder reads, a sentence for each; to be `worded`.

        Args:
            settings: of the call.
        """
        fields = ("prompt", "negative_prompt")
        return [note for field in fields if (note := self._cut(field, getattr(settings, field)))]

    def hear(self, tokenizer: Any, encode: Callable[..., Any], text: Any, options: Mapping[str, Any]) -> None:
        """Note a call of a tokenizer.

        Args:
            tokenizer: that was called, by `encode`.
            text: one, or several; what is none is not looked at.
            options: of the call.
        """
        for each in [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else ():
            if not isinstance(each, str):
                continue

            def count(text: str) -> int:
                return len(encode(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"])

            texts = self._texts.setdefault(id(tokenizer), _Texts(count))
            texts.whole.append(each)
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                texts.kept.append(_kept(tokenizer, encode, each, options))

    def _cut(self, field: str, prompt: str) -> str:
        """The sentence for one prompt; "" where all of it is read, or it is not known."""
        places = [place for place, character in enumerate(prompt) if character.isalnum()]
        told, heard = _letters(prompt), list(self._texts.values())
        if not told or not any(told in _letters(text) for texts in heard for text in texts.whole):
            return ""
        read = [max(_reach(told, text) for text in texts.kept or texts.whole) for texts in heard]
        if (most := max(read)) == len(told):
            return ""
        count, cut = heard[read.index(most)].count, places[most]
        rest = prompt[cut:].strip()
        shown = rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN].rsplit(' ', 1)[0]} ..."
        lengths = f"has {count(prompt)} tokens, and the text encoder reads the first {count(prompt[:cut].rstrip())}"
        return f'{mention(field)} {lengths}; cut off: "{shown}"'


@contextlib.contextmanager
def reading(pipe: Any) -> Iterator[Reading]:
    """Hear a pipeline's tokenizers while this lasts; what they give stays the same.

    Each is of a class of its own then, which does what its class does: not only pipelines call it, also its own methods
    and processors that it is a part of.
    """
    from transformers import PreTrainedTokenizerBase

    heard = Reading()
    parts = getattr(pipe, "components", {}).values()
    found = {id(each): each for part in parts for each in (part, getattr(part, "tokenizer", None))}
    tokenizers = [each for each in found.values() if isinstance(each, PreTrainedTokenizerBase)]
    with contextlib.ExitStack() as stack:
        for tokenizer in tokenizers:
            stack.callback(object.__setattr__, tokenizer, "__class__", type(tokenizer))
            object.__setattr__(tokenizer, "__class__", _heard_by(heard, type(tokenizer)))
        yield heard


def _heard_by(heard: Reading, cls: Any) -> type:
    """A class that tells of its calls and is otherwise `cls`."""

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        made = cls.__call__(self, text, *args, **options)
        heard.hear(self, cls.__call__, text, options)
        return made

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _kept(tokenizer: Any, encode: Callable[..., Any], text: str, options: Mapping[str, Any]) -> str:
    """What is left of a text where a tokenizer cuts it."""
    own = {name: options[name] for name in ("truncation", "max_length", "add_special_tokens") if name in options}
    if tokenizer.is_fast:
        places = encode(tokenizer, text, return_offsets_mapping=True, **own)["offset_mapping"]
        return text[: max((end for _, end in places), default=0)]
    return tokenizer.decode(encode(tokenizer, text, **own)["input_ids"], skip_special_tokens=True)


def _letters(text: str) -> str:
    """Letters and digits alone: pipelines clean spaces and signs before they read a prompt."""
    return "".join(character for character in text if character.isalnum())


def _reach(told: str, text: str) -> int:
    """How many of the letters of a prompt, from its first, are somewhere in a text."""
    there = _letters(text)
    low, high = 0, len(told)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if told[:middle] in there else (low, middle - 1)
    return low
