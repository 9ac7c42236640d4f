"""What a copy of a model takes along that is accelerated or guidance-free."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self


class CopiedNotPickled:
    """Copies deeply, as models do, and refuses to be pickled.

    A pickle of a transformer would hold the whole pipeline, whose scheduler tells the steps, and what methods remember.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"a shallow copy of {type(self).__name__} would share what is remembered of calls with the original: "
            "use copy.deepcopy with the model or the pipeline, or call handle.remove() (or vidaccel.restore(pipe)) "
            "first."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a model that is accelerated or guidance-free cannot be pickled or saved whole: call handle.remove() (or "
            "vidaccel.restore(pipe)), save it, and do it again. state_dict() works as it is, and save_pretrained() "
            "does or says what is in its way."
        )
