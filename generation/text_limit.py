"""Prompts that are longer than what the text encoder reads: diffusers cuts them off, some pipelines without a word."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .errors import mention

if TYPE_CHECKING:
    from .request import Settings

_SHOWN = 120
"""Characters of what is cut off that are shown."""


def cut_notes(pipe: Any, settings: Settings) -> list[str]:
    """What of the prompts no text encoder reads, a sentence for each; to be `worded`.

    Args:
        pipe: loaded.
        settings: checked.
    """
    limit, tokenizer = text_limit(pipe, settings), getattr(pipe, "tokenizer", None)
    if limit is None:
        return []
    fields = ("prompt", "negative_prompt")
    return [note for field in fields if (note := _cut(field, getattr(settings, field), tokenizer, limit))]


def text_limit(pipe: Any, settings: Settings) -> int | None:
    """Tokens of a prompt that a pipeline reads; None where that is not known for certain.

    It is where the prompt as it is goes through one tokenizer, up to `max_sequence_length`. Not so with several text
    encoders, of which another may read on, nor with one of a language model, which reads the prompt within a template.
    """
    tokenizers = [name for name in getattr(pipe, "components", {}) if "tokenizer" in name]
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizers != ["tokenizer"] or tokenizer is None or getattr(tokenizer, "chat_template", None):
        return None
    # Pipelines of this package hand what they are called with on to the class of diffusers that they are made from.
    for cls in type(pipe).__mro__:
        call = vars(cls).get("__call__")
        parameter = None if call is None else inspect.signature(call).parameters.get("max_sequence_length")
        if parameter is not None:
            limit = settings.pipeline_options.get("max_sequence_length", parameter.default)
            return limit if isinstance(limit, int) else None
    return None


def _cut(field: str, text: str, tokenizer: Any, limit: int) -> str:
    """The sentence for one prompt; "" where all of it is read."""
    try:
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return ""
        rest = _rest(text, tokenizer, max(limit - tokenizer.num_special_tokens_to_add(), 0), ids)
    except (TypeError, KeyError, AttributeError, NotImplementedError):
        return ""  # no tokenizer as transformers has them: nothing is known
    shown = rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN].rsplit(' ', 1)[0]} ..."
    return f'{mention(field)} has {len(ids)} tokens, and the text encoder reads the first {limit}; cut off: "{shown}"'


def _rest(text: str, tokenizer: Any, kept: int, ids: list[int]) -> str:
    """The text from its first token that is not read."""
    if getattr(tokenizer, "is_fast", False):
        places = tokenizer(text, truncation=False, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
        return text[places["offset_mapping"][kept][0] :].strip()
    return tokenizer.decode(ids[kept:], skip_special_tokens=True)
