"""The guidance cache of a request."""

from __future__ import annotations

import pytest

import vidaccel
from vidaccel import GuidanceCache, Preset
from vidaccel.generation.errors import BadInput
from vidaccel.generation.levers.presets import with_levers
from vidaccel.generation.waterfall.stages import stages

SMALL = {"frames": 9, "height": 64, "width": 64, "seed": 0, "progress": False}
PROMPT = "a red circle moves left on a grey background"


def test_what_a_request_says_goes_before_its_preset():
    preset = Preset(name="a", guidance_cache=GuidanceCache(4))
    assert preset.guidance_cache == GuidanceCache(4)
    assert with_levers(preset, guidance_cache=2).guidance_cache == GuidanceCache(2)
    assert with_levers(preset, guidance_cache=0).guidance_cache is None
    assert with_levers(None, guidance_cache=GuidanceCache(5)).guidance_cache == GuidanceCache(5)


def test_a_video_with_it():
    plain = vidaccel.generate("demo", PROMPT, steps=6, **SMALL)
    made = vidaccel.generate("demo", PROMPT, steps=6, guidance_cache=2, **SMALL)
    assert made.account.counts()["computed"] == 6 + 4
    assert any("made 4 of 6 second passes" in note for note in made.account.notes)
    assert not (made.frames == plain.frames).all()


def test_a_row_of_its_own_in_the_waterfall():
    rows = stages(Preset(name="a", model="demo", guidance_cache=GuidanceCache(2)))
    assert [row.name for row in rows] == ["base", "guidance_cache"]
    assert rows[1].text == "one second pass in 2"


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"guidance_cache": 1}, "guidance_cache", "every is 1"),
        ({"guidance_cache": 2, "guidance_scale": 1.0}, "guidance_cache", "guidance_scale 1"),
        ({"guidance_cache": 2, "steps": 2}, "guidance_cache", "both passes in all 2 steps"),
        ({"guidance_cache": 2, "model": "demo-dc", "guidance_free": True}, "guidance_cache", "one pass a step"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(more, field, words):
    more = dict(more)
    with pytest.raises(BadInput, match=words) as refused:
        vidaccel.generate(more.pop("model", "demo"), PROMPT, **SMALL, **more)
    assert refused.value.field == field
