"""Where the video tokens of a sequence are: the grid, the text around it and the token orders methods use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class VideoLayout:
    """The arrangement of one attention sequence: `[text_before, video (frames, height, width), text_after]`.

    All sizes are in tokens (latent frames and latent patches, not pixels). Video tokens are stored frame-major: the
    token of frame `f`, row `y`, column `x` sits at `text_before + (f * height + y) * width + x`. Wan has no text in
    the sequence, HunyuanVideo puts it after the video, CogVideoX before.

    Args:
        frames: latent frames, at least 1.
        height: patch rows per frame, at least 1.
        width: patch columns per frame, at least 1.
        text_before: tokens in front of the video that are not video.
        text_after: tokens behind the video that are not video.
        beside: what these tokens are, for messages: "text", or "history" where a model reads earlier frames so.

    Raises:
        ValueError: a size is not a whole number, or below its bound.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0
    beside: str = field(default="text", compare=False, repr=False)  # two layouts are one where their tokens are

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_before", 0), ("text_after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"VideoLayout.{name} is {value!r}: it must be a whole number of at least {least}.")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width of the video, in tokens."""
        return self.frames, self.height, self.width

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens in one latent frame."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Video tokens in the sequence."""
        return self.frames * self.tokens_per_frame

    @property
    def text_tokens(self) -> int:
        """Tokens in the sequence that are not video."""
        return self.text_before + self.text_after

    @property
    def tokens(self) -> int:
        """Length N of the whole sequence."""
        return self.video_tokens + self.text_tokens

    @property
    def video(self) -> slice:
        """The slice of the sequence that holds the video."""
        return slice(self.text_before, self.text_before + self.video_tokens)

    def video_last_order(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Sequence positions `[N]` with every text token first (in sequence order), then the video frame-major."""
        positions = torch.arange(self.tokens, device=device)
        return torch.cat([positions[: self.text_before], positions[self.video.stop :], positions[self.video]])

    def token_major_order(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Sequence positions `[N]`: text first, then the video with all frames of a patch beside each other.

        Video token `patch * frames + frame` of this order is the token of that patch and frame: the order in which a
        *temporal* head is banded (Sparse VideoGen, arXiv 2502.01776, section 4.2).
        """
        order = self.video_last_order(device)
        video = order[self.text_tokens :].view(self.frames, self.tokens_per_frame)
        return torch.cat([order[: self.text_tokens], video.t().reshape(-1)])
