"""Errors that a user can act on. They name a field of the request; each front end has its own word for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

_MENTION = re.compile(r"⟦(\w+)⟧")
_ABSENT = object()


def mention(field: str) -> str:
    """A field of the request inside a text, which a front end then names in its own way, with `worded`."""
    return f"⟦{field}⟧"


def worded(text: str, name: Callable[[str], str] = str) -> str:
    """A text with its fields named: by `name`, or else as Python names them."""
    return _MENTION.sub(lambda match: name(match[1]), text)


class BadInput(ValueError):
    """A request that cannot be met: the field, its value, the bound that it misses, and what to do.

    As text it is one line with the field's name in Python: "frames is 34: this model makes 4k+1 frames. Give 33 or 37."
    `worded` puts the names of another front end into it.

    Args:
        field: of the request, as Python names it ("frames"); several where they have the same fault.
        problem: with the bound, and without a full stop; it goes on after "FIELD is VALUE: ", or after "FIELD " where
            no value is given. Other fields are written with `mention`.
        fix: what to do, whole sentences.
        value: what the field has; leave it out where it has none, or where the problem says it.
    """

    def __init__(self, field: str | Sequence[str], problem: str, fix: str = "", *, value: object = _ABSENT) -> None:
        fields = [field] if isinstance(field, str) else list(field)
        self.field, self.problem, self.fix = fields[0], problem, fix
        self.value = None if value is _ABSENT else value
        named = ", ".join(map(mention, fields))
        self._head = f"{named} " if value is _ABSENT else f"{named} is {value}: "
        super().__init__(self.worded(str))

    def worded(self, name: Callable[[str], str]) -> str:
        """The message in the words of a front end: `name` gives its name of a field."""
        return worded(f"{self._head}{self.problem}.{f' {self.fix}' if self.fix else ''}", name)

    def with_problem(self, problem: str) -> BadInput:
        """The same with its problem in other words."""
        return _rebuilt({**self.__dict__, "problem": problem})

    def __reduce__(self) -> tuple[Callable[[dict], BadInput], tuple[dict]]:
        return _rebuilt, (self.__dict__,)  # through the pickle of a worker process


def refuse_given(given: Mapping[str, bool], reason: str, instead: str = "") -> None:
    """Raise BadInput when fields were given that have no effect: nothing is ignored in silence.

    Args:
        given: field -> whether it was given.
        reason: why they have none; it goes on after "is" or "are".
        instead: what else can be done about it ("Add ...").
    """
    useless = [field for field, is_given in given.items() if is_given]
    if useless:
        are, them = ("is", "it") if len(useless) == 1 else ("are", "them")
        fix = f"{instead}, or leave {them} out." if instead else f"Leave {them} out."
        raise BadInput(useless, f"{are} {reason}", fix)


def _rebuilt(state: dict) -> BadInput:
    error = BadInput.__new__(BadInput)
    error.__dict__.update(state)
    ValueError.__init__(error, error.worded(str))
    return error
