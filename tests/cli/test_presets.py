"""`vidaccel presets`, `vidaccel waterfall`, and presets in `vidaccel generate`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vidaccel import Preset
from vidaccel.pipelines.presets import load_preset, shipped_presets

PAGE = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
SIZE = ("--frames", 9, "--height", 64, "--width", 64, "--device", "cpu")


def commands() -> list[list[str]]:
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_of_the_page_run(vidaccel, command, tmp_path, monkeypatch):
    """The videos of them smaller than there."""
    monkeypatch.chdir(tmp_path)
    assert command[0] == "vidaccel"
    small = SIZE if command[1] in ("generate", "waterfall") else ()
    result = vidaccel(*command[1:], *small)
    assert result.exit_code == 0, (result.output, result.exception)
    if "--out" in command:
        assert (tmp_path / command[command.index("--out") + 1]).stat().st_size > 1000


def test_the_example_of_the_page_is_a_preset():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    preset = Preset.from_dict(yaml.safe_load(text))
    assert list(preset.levers()) == [
        "scheduler",
        "loras",
        "guidance_free",
        "quantize",
        "compile",
        "method",
        "cache",
        "decoder",
    ]


def test_the_list_and_one_of_them(vidaccel):
    listed = vidaccel("presets").stdout
    assert all(name in listed for name in shipped_presets())
    printed = vidaccel("presets", "demo-dc-fast").stdout
    assert Preset.from_dict(yaml.safe_load(printed)) == load_preset("demo-dc-fast")
    result = vidaccel("presets", "demo-slow")
    assert result.exit_code == 2 and "there is no preset demo-slow; there are demo-cache, " in result.stderr


def test_what_a_waterfall_is_of_is_an_argument(vidaccel, tmp_path):
    result = vidaccel("waterfall", "demo-dc-fst", "--out", tmp_path / "w.html")
    said = "Error: PRESET cannot be used: there is no preset demo-dc-fst; did you mean demo-dc-fast? There are "
    assert result.exit_code == 2 and said in result.stderr, result.output
    result = vidaccel("waterfall", "demo-dc-fast", "--prompts", tmp_path / "none.txt", "--out", tmp_path / "w.html")
    assert "none.txt: it cannot be read (No such file or directory). Give a text" in result.stderr, result.output


def test_one_is_printed_with_paths_that_hold_anywhere(vidaccel, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    text = "version: 1\nloras: a.safetensors\nguidance_free: g.safetensors\n"
    text += "attention: {method: sla, adapters: ../s.safetensors}\n"
    (tmp_path / "mine" / "a.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "printed.yaml").write_text(vidaccel("presets", "mine/a.yaml").stdout)
    preset = load_preset("printed.yaml")
    assert preset == load_preset(tmp_path / "mine" / "a.yaml")
    assert preset.loras[0].path == tmp_path / "mine" / "a.safetensors" and preset.sla == (
        str(tmp_path / "s.safetensors"),
    )


def test_one_is_printed_whole_where_the_output_cannot_show_all(tmp_path, child_environment):
    """What is printed may be kept as a file: escapes, not question marks."""
    (tmp_path / "a.yaml").write_text("version: 1\nname: 日本\ncache: forecast\n", encoding="utf-8")
    command = [sys.executable, "-m", "vidaccel", "presets", tmp_path / "a.yaml"]
    for encoding, kept in (("cp1252", r"\u65E5\u672C"), ("utf-8", "日本")):
        environment = {**child_environment, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        text = done.stdout.decode(encoding)
        assert kept in text and Preset.from_dict(yaml.safe_load(text)) == load_preset(tmp_path / "a.yaml")


def test_a_cache_says_what_it_skipped(vidaccel, tiny_model, tmp_path):
    result = vidaccel(
        "generate", "a dot", "--model", tiny_model, "--cache", "first_block=1000", "--steps", 4, *SIZE,
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert "dense: 4 steps: 8 forwards, 2 computed and 6 skipped." in result.stdout
    assert "skipped no pass" not in result.stdout
    result = vidaccel(
        "generate", "a dot", "--model", tiny_model, "--cache", "first_block=0", "--steps", 4, *SIZE,
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    said = "dense: the cache first_block, with a threshold of 0, skipped no pass: raise the threshold."
    assert result.exit_code == 0 and said in " ".join(result.stdout.split()), (result.output, result.exception)


def test_the_model_is_that_of_the_preset(vidaccel, tiny_model, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"version: 1\nname: a\nmodel: {tiny_model}\nattention: radial\nnum_inference_steps: 2\n")
    result = vidaccel("generate", "a dot", "--preset", file, *SIZE, "--out", tmp_path / "a.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "radial" in result.stdout
    other = vidaccel("generate", "a dot", "--preset", file, "--model", tmp_path / "gone", "--out", tmp_path / "b.mp4")
    assert other.exit_code == 2 and "gone" in other.stderr


def test_the_folder_of_a_tune_and_a_model_beside_its_preset(vidaccel, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "mine").symlink_to(tiny_model, target_is_directory=True)
    text = "version: 1\nname: a\nmodel: mine\nloras: gone.safetensors\nattention: radial\nmeasured: {prompts: 4}\n"
    (tmp_path / "tuned" / "preset.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = vidaccel("generate", "a dot", "--preset", "tuned", "--steps", 2, *SIZE, "--out", "a.mp4")
    said = "Error: --preset cannot be used: loras is tuned/gone.safetensors: there is no such file or folder."
    assert result.exit_code == 2 and said in result.stderr, result.output
    options = ("--preset", "tuned", "--lora", "none", "--steps", 2, *SIZE, "--out", "a.mp4")
    result = vidaccel("generate", "a dot", *options)
    assert result.exit_code == 0 and "radial" in result.stdout, (result.output, result.exception)
    assert "was measured with" not in result.stdout
    result = vidaccel("generate", "a dot", *options, "--model", "demo")
    assert "The preset a was measured with tuned/mine; with demo, its gain" in " ".join(result.stdout.split())


def test_a_waterfall_of_another_model(vidaccel, tiny_model, tmp_path):
    preset = tmp_path / "a.yaml"
    preset.write_text("version: 1\nname: mine\nattention: radial\ncache: {name: first_block, threshold: 1000}\n")
    (tmp_path / "prompts.txt").write_text("\ufeffa dot\n\ndot dot\n", encoding="utf-8")  # as Windows' editors do
    page = tmp_path / "w.html"
    result = vidaccel(
        "waterfall", preset, "--model", tiny_model, "--prompts", tmp_path / "prompts.txt", "--steps", 4, *SIZE,
        "--rounds", 1, "--out", page,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["prompts"] == ["a dot", "dot dot"] and numbers["seeds"] == [0, 1]
    assert [row["lever"] for row in numbers["rows"]] == ["base", "method", "cache"]
    assert all(row["accuracy"] is None for row in numbers["rows"])
    for text in ("+ method: radial", "2 of 8", "mine: ", "at a PSNR of", "page: "):
        assert text in " ".join(result.stdout.split()), text


def test_a_waterfall_of_a_cache_that_skips_nothing(vidaccel, tiny_model, tmp_path):
    preset, page = tmp_path / "a.yaml", tmp_path / "w.html"
    preset.write_text("version: 1\nname: mine\ncache: {name: first_block, threshold: 0.0}\n")
    options = ("--model", tiny_model, "--prompt", "a dot", "--steps", 4, *SIZE, "--rounds", 1, "--out", page)
    result = vidaccel("waterfall", preset, *options)
    said = "the cache first_block, with a threshold of 0, skipped no pass: raise the threshold"
    assert f"+ cache: {said}." in " ".join(result.stdout.split()), (result.output, result.exception)
    assert page.read_text().count(f"</strong>: {said}") == 1


def test_a_waterfall_does_not_replace_what_it_reads(vidaccel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vidaccel.generation.waterfall.models.load", lambda *_, **__: pytest.fail("weights were read"))
    text = '{"version": 1, "name": "mine", "model": "demo", "cache": {"name": "forecast"}}'
    Path("mine.json").write_text(text)
    result = vidaccel("waterfall", "mine.json", "--prompt", "a dot", *SIZE, "--out", "mine.html")
    said = "Error: --out is mine.html: mine.json, which is written for it, is the file that PRESET reads. Give another "
    assert result.exit_code == 2 and said in result.stderr, (result.output, result.exception)
    assert Path("mine.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "x/y"), "--prompt is needed for this model. Give one, or several."),
        (("--model", "demo", "--out", "w.htm"), "--out is w.htm: the name must end in .html"),
        (("--model", "demo", "--prompts", "gone.txt"), "--prompts is gone.txt: it cannot be read"),
        (("--model", "demo", "--rounds", "0"), "--rounds is 0"),
        (("--model", "demo", "--prompts", "empty.txt"), "--prompts is empty.txt: there is no prompt in it"),
        (("--model", "demo", "--threads", "0"), "--threads is 0: it must be at least 1"),
        (("--model", "demo", "--frames", "10"), "--frames is 10"),
    ],
)
def test_a_waterfall_that_cannot_be(vidaccel, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr("vidaccel.generation.waterfall.models.load", lambda *_, **__: pytest.fail("weights were read"))
    result = vidaccel("waterfall", "demo-cache", *options)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_waterfall_of_what_the_built_in_models_do_not_know(vidaccel, tmp_path):
    """It is said before all is measured, and is on the page."""
    options = ("--prompt", "a cat", "--rounds", 1, "--steps", 2, *SIZE, "--out", tmp_path / "w.html")
    result = vidaccel("waterfall", "demo-cache", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    said = "The built-in model does not know cat: "
    assert said in result.stderr and said not in result.stdout
    assert said in (tmp_path / "w.html").read_text()
