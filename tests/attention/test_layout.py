from __future__ import annotations

import pytest
import torch

from vidaccel import VideoLayout


def test_sizes_and_slices():
    layout = VideoLayout(3, 4, 5, text_before=2, text_after=7)
    assert (layout.tokens_per_frame, layout.video_tokens, layout.tokens) == (20, 60, 69)
    assert layout.video == slice(2, 62)


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 5), (3, 5)])
def test_token_major_order_puts_the_frames_of_a_patch_together(text):
    layout = VideoLayout(3, 2, 2, *text)
    order = layout.token_major_order()
    assert order.sort().values.equal(torch.arange(layout.tokens))
    video = order[layout.text_tokens :] - layout.text_before
    for patch in range(4):
        assert video[patch * 3 : patch * 3 + 3].tolist() == [patch, 4 + patch, 8 + patch]


def test_video_last_order_keeps_the_order_of_both_parts():
    layout = VideoLayout(1, 2, 2, text_before=1, text_after=2)
    assert layout.video_last_order().tolist() == [0, 5, 6, 1, 2, 3, 4]


@pytest.mark.parametrize(("field", "value"), [("frames", 0), ("height", -1), ("width", 2.5), ("text_after", -3)])
def test_bad_sizes_are_named(field, value):
    sizes = {"frames": 1, "height": 1, "width": 1, field: value}
    with pytest.raises(ValueError, match=rf"{field} is {value}.*at least"):
        VideoLayout(**sizes)
