"""Prompts with a seed each, of which videos are made and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import BadInput
from ..models.places import DEMOS
from .values import check_seed, text, whole_number

_SHOWN = 8
"""Words that are shown of those that a model does not know."""


def prompts_with_seeds(
    prompts: str | Sequence[str], seeds: int | Sequence[int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """One seed for each prompt.

    Args:
        prompts: one, or several.
        seeds: one each, or the first of as many.

    Raises:
        BadInput: no prompt, an empty one, another number of seeds, or one out of its bounds.
    """
    if not isinstance(prompts, Iterable):
        raise BadInput("prompts", "they must be texts, one or several in a list", value=repr(prompts))
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not given:
        raise BadInput("prompts", "there are none", "Give at least one.")
    texts = tuple(text("prompts", prompt) for prompt in given)
    if any(not prompt.strip() for prompt in texts):
        raise BadInput("prompts", "one of them is empty", "Say what each video shows, or leave it out.")
    if isinstance(seeds, Iterable) and not isinstance(seeds, str):
        numbers = tuple(whole_number("seeds", seed) for seed in seeds)
    else:
        first = whole_number("seeds", seeds)
        numbers = tuple(first + i for i in range(len(texts)))
    if len(numbers) != len(texts):
        raise BadInput("seeds", f"there are {len(numbers)}, for {len(texts)} prompts", "Give one each, or the first.")
    for seed in numbers:
        check_seed("seeds", seed)
    return texts, numbers


def unknown_note(model: str, *prompts: str) -> str:
    """What to say of the words of prompts that a built-in model was not trained with; "" for none, and other models.

    Args:
        model: its name, as `ModelFacts` has it.
    """
    if model not in DEMOS:
        return ""
    from ...demo import HELD_OUT_PROMPTS
    from ...demo.tokenizer import unknown_words

    words = unknown_words(" ".join(prompts))
    if not words:
        return ""
    shown = ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
    return (
        f'The built-in model does not know {shown}: it makes videos of prompts such as "{HELD_OUT_PROMPTS[0]}" alone.'
    )


def in_words(prompts: Sequence[str], seeds: Sequence[int], rounds: int | None = None) -> str:
    """ "4 prompts, 2 rounds, seeds 0, 1, 2, 3", for a reader; of many seeds the first few."""
    told = [counted(len(prompts), "prompt")]
    told += [] if rounds is None else [counted(rounds, "round")]
    more = ", ..." if len(seeds) > 8 else ""
    return f"{', '.join(told)}, seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds[:8]))}{more}"


def counted(number: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{number} {noun}{'s' * (number != 1)}"
