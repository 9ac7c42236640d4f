"""What of a prompt a text encoder does not read is told, by what the pipeline really does with it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from diffusers import WanPipeline

import vidaccel
from vidaccel import demo
from vidaccel.generation.request import Settings
from vidaccel.generation.text_limit import cut_notes, text_limit

PROMPT = "a red circle moves left on a grey background"
OPTIONS = {"frames": 9, "height": 64, "width": 64, "steps": 2, "method": "dense", "progress": False}
SIX = {"pipeline_options": {"max_sequence_length": 6}}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_cut_off_is_told_and_changes_nothing(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        made = vidaccel.generate(pipe, PROMPT, **OPTIONS, **SIX)
    note = 'prompt has 10 tokens, and the text encoder reads the first 6; cut off: "on a grey background"'
    assert note in made.notes and [r.getMessage() for r in caplog.records].count(note) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        other = vidaccel.generate(pipe, "a red circle moves left", **OPTIONS, **SIX)
    assert np.array_equal(made.frames, other.frames) and other.notes == () and not caplog.records


def test_a_comparison_says_it_once(pipe, caplog, tmp_path):
    more = {"method": "svg", "backend": "gather", "compare": True, "warm_up": False, "report": tmp_path / "page.html"}
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        made = vidaccel.generate(pipe, PROMPT, **{**OPTIONS, **more}, **SIX)
    (note,) = [note for note in made.notes if "cut off" in note]
    assert sum("cut off" in record.getMessage() for record in caplog.records) == 1
    assert note.replace('"', "&#34;") in (tmp_path / "page.html").read_text()


def test_the_usual_limit_and_a_negative_prompt(pipe):
    settings = Settings("circle " * 600, "square " * 700, 9, 64, 64, 2)
    assert text_limit(pipe, settings) == 512
    first, second = cut_notes(pipe, settings)
    assert "has 601 tokens, and the text encoder reads the first 512" in first and first.endswith(' circle ..."')
    assert first.count("circle") == 17  # of 89
    assert "has 701 tokens" in second
    assert cut_notes(pipe, Settings("circle " * 511, "", 9, 64, 64, 2)) == []


def test_what_is_not_known_is_not_told(pipe):
    settings = Settings("circle " * 600, "", 9, 64, 64, 2)
    tokenizer = pipe.tokenizer
    try:
        tokenizer.chat_template = "{{ messages }}"
        assert text_limit(pipe, settings) is None and cut_notes(pipe, settings) == []
    finally:
        tokenizer.chat_template = None
