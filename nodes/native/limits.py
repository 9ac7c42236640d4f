"""From how many tokens a video is sparse: `min_tokens`, or at its default what was measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...pipelines.break_even import Key, Limit, limit
from ...pipelines.default_method import MIN_SPARSE_TOKENS

if TYPE_CHECKING:
    import torch

    from ...attention import VideoLayout


def chosen_limit(min_tokens: int, find: Callable[[], Limit]) -> tuple[int, str]:
    """The tokens that count, and what a report should say of them; "" for nothing.

    Args:
        min_tokens: the input; any number but its default counts itself.
        find: what was measured on this machine.
    """
    if min_tokens != MIN_SPARSE_TOKENS:
        return min_tokens, ""
    found = find()
    if not found.measured:
        return min_tokens, found.why
    return found.tokens, f"min_tokens {found.tokens}: {found.why}"


def too_short(min_tokens: int, layout: VideoLayout) -> str:
    """Why a video stays dense as a whole, empty when it may be sparse."""
    if layout.video_tokens >= min_tokens:
        return ""
    return f"min_tokens {min_tokens}, above the video's {layout.video_tokens} tokens"


class Least:
    """The tokens from which a native MODEL is sparse, which may depend on its heads: its first attention call has them.

    Args:
        min_tokens: the input.
        method: whose break-even counts where that is the default; "" where none can be measured.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, min_tokens: int, method: str) -> None:
        if min_tokens < 0:
            raise ValueError(f"min_tokens is {min_tokens}: it must be 0 or more.")
        self.min_tokens, self._method = min_tokens, method
        self._found: dict[tuple, tuple[int, str]] = {}

    @property
    def needs_heads(self) -> bool:
        """Whether a call must be seen before it is known."""
        return self.min_tokens == MIN_SPARSE_TOKENS and self._method != ""

    def forget(self) -> None:
        """A sampler starts: what was measured since the last one counts."""
        self._found = {}

    def of(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
        """See `chosen_limit`; all of it of the queries of a call."""
        key = (heads, head_dim, device, dtype)
        if key not in self._found:
            self._found[key] = chosen_limit(self.min_tokens, lambda: limit(Key.here(*key, self._method)))
        return self._found[key]
