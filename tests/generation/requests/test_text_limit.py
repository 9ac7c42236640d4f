"""What of a prompt a text encoder does not read is told, by what the pipeline really does with it."""

from __future__ import annotations

import importlib
import logging
import re

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel import demo
from vidaccel.generation.models.inspected import inspect_pipeline
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.requests.text_limit import reading
from vidaccel.generation.run import run

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
    note = 'prompt has 9 tokens, and the text encoder reads the first 5; cut off: "on a grey background"'
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
    def cut(*prompts: str) -> tuple[str, ...]:
        settings = Settings(*prompts, 9, 64, 64, 1, pipeline_options={"max_sequence_length": 512})
        return run(pipe, settings.checked(inspect_pipeline(pipe)), decode=False).cut

    first, second = cut("circle " * 600, "square " * 700)
    assert "has 600 tokens, and the text encoder reads the first 511" in first and first.endswith(' circle ..."')
    assert first.count("circle") == 17  # of 89
    assert "has 700 tokens" in second
    assert cut("circle " * 511, "") == ()


def built(name: str):
    torch.manual_seed(0)
    group, name = name.split(".")
    pipe = getattr(importlib.import_module(f"families.{group}"), name)()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(pipe, words: list[str], negative: str = "", size=(5, 32), **options) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The latents of two steps, and what is told."""
    settings = Settings(" ".join(words), negative, size[0], size[1], size[1], 2, pipeline_options=options)
    latents: list[torch.Tensor] = []
    made = run(
        pipe,
        settings.checked(inspect_pipeline(pipe)),
        decode=False,
        on_step=lambda *now: latents.append(now[-1].clone()),
    )
    return latents[-1], made.cut


WORDS = [("a", "dot", "moves")[number * number % 11 % 3] for number in range(1200)]


def count_and_read(note: str) -> tuple[int, int]:
    found = re.search(r"has (\d+) tokens, and the text encoder reads the first (\d+)", note)
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("hunyuan.hunyuan", (5, 32), {}),
        ("hunyuan.hunyuan_15", (5, 32), {}),
        ("cogvideo.cogvideox_2b", (9, 32), {}),
        ("cogvideo.easyanimate", (5, 32), {}),
        ("kandinsky.kandinsky_6", (5, 32), {}),
        ("ltx.ltx2", (9, 64), {"max_sequence_length": 64}),
        ("others.mochi", (7, 32), {}),
        ("others.motif", (5, 32), {}),
    ],
)
def test_what_is_told_is_what_is_read_within_a_template_too(name, size, options):
    """The rest changes nothing, and what comes before it does. Each word of these tokenizers is a token."""
    pipe = built(name)
    latents, (note,) = told(pipe, WORDS, size=size, **options)
    count, read = count_and_read(note)
    assert count == 1200 and 20 < read < count
    assert note.startswith("⟦prompt⟧") and f'cut off: "{" ".join(WORDS[read : read + 5])}' in note
    same, nothing = told(pipe, WORDS[:read], size=size, **options)
    assert same.equal(latents) and nothing == ()
    other = WORDS[: read - 1] + ["a" if WORDS[read - 1] != "a" else "dot"]
    assert not told(pipe, other, size=size, **options)[0].equal(latents)


def test_a_pipeline_that_cuts_prompts_itself():
    """Kandinsky 5 does so before its tokenizer could, which is a part of a processor."""
    pipe = built("kandinsky.kandinsky_5")
    _, (note,) = told(pipe, WORDS, "a dot")
    count, read = count_and_read(note)
    assert count == 1200 and 100 < read < 512
    assert told(pipe, WORDS[:100], "a dot")[1] == ()


def test_an_encoder_that_reads_less_than_another_is_no_cut():
    """CLIP reads 77 tokens of HunyuanVideo's prompts, and Llama the rest."""
    assert told(built("hunyuan.hunyuan"), ["dot"] * 150)[1] == ()


def test_spaces_and_signs_that_a_pipeline_cleans_are_no_cut(pipe):
    prompt = "a  red circle\nmoves &amp; left , on a grey background"
    settings = Settings(prompt, "", 9, 64, 64, 1).checked(inspect_pipeline(pipe))
    assert run(pipe, settings, decode=False).cut == ()


def test_what_is_told_comes_after_the_first_step(pipe):
    said = []
    settings = Settings(PROMPT, "", 9, 64, 64, 3, pipeline_options={"max_sequence_length": 6})
    made = run(
        pipe, settings.checked(inspect_pipeline(pipe)), decode=False,
        on_note=said.append, on_step=lambda done, *_: said.append(done),
    )  # fmt: skip
    assert said == [*made.cut, 1, 2, 3] and len(made.cut) == 1


def test_tokenizers_are_as_they_were(pipe):
    """Also where a run ends early; and what is not cut by any is not told."""
    tokenizer, cls = pipe.tokenizer, type(pipe.tokenizer)
    with pytest.raises(RuntimeError, match="early"), reading(pipe) as heard:
        assert type(tokenizer) is not cls and isinstance(tokenizer, cls)
        assert tokenizer(PROMPT, return_tensors="pt").input_ids.shape == (1, 10)
        assert heard.notes(Settings(PROMPT)) == []
        raise RuntimeError("early")
    assert type(tokenizer) is cls
