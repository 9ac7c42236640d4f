"""A method as plain data, and in words."""

from __future__ import annotations

import json

import pytest

from vidaccel import LVSA, SVG2, DenseSchedule, Radial, Sparge, Tangent, VideoLayout
from vidaccel.attention.methods import METHODS
from vidaccel.attention.methods.description import describe, described, in_words

LAYOUT = VideoLayout(frames=9, height=32, width=32)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_described_is_the_method_again(name):
    method = METHODS[name](schedule=DenseSchedule(first_steps=1, first_layers=2))
    assert described(json.loads(json.dumps(describe(method)))) == method


@pytest.mark.parametrize(
    "method, words",
    [
        (Tangent(), "tangent density 0.2"),
        (Tangent(tolerance=0.05), "tangent tolerance 0.05"),
        (SVG2(), "svg2 top_p 0.9"),
        (SVG2.for_density(LAYOUT, 0.25), "svg2 density 0.25"),
        (Sparge(cdf=0.97), "sparge cdf 0.97"),
        (Radial(decay=0.001), "radial decay 0.001"),
        (LVSA(), "lvsa"),
    ],
)
def test_words_tell_the_amount_of_work(method, words):
    assert in_words(method) == words
