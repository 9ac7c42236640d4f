"""`vidaccel generate` from a real, tiny Wan pipeline: the videos, the page, and the numbers."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vidaccel.generation.media.video import check_encoder
from vidaccel.generation.media.video_reader import read_video

SMALL = ("--frames", 9, "--height", 64, "--width", 64, "--steps", 2, "--device", "cpu")
PROMPT = "a <b>dot</b> & more"


@pytest.fixture(scope="module")
def compared(tiny_model, tmp_path_factory):
    """The folder of one run of `--compare` with the methods that it takes by itself."""
    from typer.testing import CliRunner

    from vidaccel.cli import app

    folder = tmp_path_factory.mktemp("compared")
    # Half of the two steps dense, so that there is something of both kinds; "gather", so that nothing is compiled.
    options = [
        PROMPT,
        "--model",
        tiny_model,
        "--compare",
        "--density",
        0.7,
        "--dense-steps",
        0.5,
        "--backend",
        "gather",
    ]
    options += [*SMALL, "--seed", 3, "--set", "radial.sink=0", "--out", folder / "clip.mp4"]
    result = CliRunner().invoke(app, ["generate", *map(str, options)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def test_one_video_a_method(compared):
    """--out is the first method; nothing half-written stays behind."""
    names = {"clip.mp4", "clip.dense.mp4", "clip.svg2.mp4", "clip.radial.mp4"}
    assert {f.name for f in compared.iterdir()} == names | {f"clip.report.{kind}" for kind in ("html", "json", "png")}
    for name in names:
        frames, fps = read_video(compared / name)
        assert frames.shape == (9, 64, 64, 3)
        assert fps == 16


def test_a_second_comparison_in_a_folder_keeps_the_page_of_the_first(compared, vidaccel, tiny_model):
    first = {file: file.read_bytes() for file in compared.iterdir()}
    options = ("--model", tiny_model, "--compare", "--method", "svg", "--backend", "gather", "--no-warm-up", *SMALL)
    result = vidaccel("generate", "a dot", *options, "--out", compared / "other.mp4")
    page = compared / "other.report.html"
    assert result.exit_code == 0 and f"comparison: {page} (" in result.stdout, (result.output, result.exception)
    assert {file: file.read_bytes() for file in first} == first
    for file in set(compared.iterdir()) - set(first):
        assert file.name.startswith("other.")
        file.unlink()


def test_what_is_cut_off_the_prompt_is_told_once(vidaccel, tiny_model, tmp_path):
    options = ("--model", tiny_model, "--method", "dense", *SMALL, "--pipeline-option", "max_sequence_length=4")
    result = vidaccel("generate", "dot one two three four", *options, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    said = 'PROMPT has 5 tokens, and the text encoder reads the first 4; cut off: "four"'
    assert said in " ".join(result.stderr.split()) and "cut off" not in result.stdout


def test_the_numbers(compared):
    numbers = json.loads((compared / "clip.report.json").read_text())
    assert numbers["prompt"] == PROMPT
    assert numbers["tokens"] == 3 * 4 * 4
    assert numbers["settings"]["seed"] == "3"
    by_name = {v["name"]: v for v in numbers["videos"]}
    assert list(by_name) == ["dense", "tangent", "svg2", "radial"]
    assert "attention" not in by_name["dense"]
    for name in ("tangent", "svg2", "radial"):
        video = by_name[name]
        assert video["file"] == ("clip.mp4" if name == "tangent" else f"clip.{name}.mp4")
        assert video["seconds"] > video["decode_seconds"] > 0
        assert video["warm_up_seconds"] > 0
        assert len(video["against_dense"]["psnr"]) == len(video["against_dense"]["ssim"]) == 9
        attention = video["attention"]
        density = np.array(attention["density_layers_x_steps"])
        assert density.shape == (2, 2)
        assert (density[:, 0] == 1).all()
        assert attention["dense_calls"]["first steps"] == 4  # 2 layers, with and without the prompt
        assert attention["backends"]["gather"] == attention["calls"] - sum(attention["dense_calls"].values())
        # In the sparse step attention skipped pairs, and so the video is another one.
        assert density[-1, 1] < 1
        assert video["against_dense"]["psnr_mean"] < 100
    assert by_name["tangent"]["attention"]["density_layers_x_steps"][1][1] == pytest.approx(0.7, abs=0.05)
    assert by_name["radial"]["attention"]["config"]["sink"] == 0
    assert len(by_name["svg2"]["attention"]["key_cluster_size_deciles"]) == 11


def test_the_page_is_complete_and_asks_nobody(compared):
    page = (compared / "clip.report.html").read_text()
    assert page.count('<video src="data:video/mp4;base64,') == 4
    assert page.count('class="sheet" src="data:image/png;base64,') == 1
    # PSNR, SSIM, a density map each for three methods, and cluster sizes.
    assert page.count("<svg") == page.count("</svg>") == 2 + 3 + 1
    for words in ("PSNR per frame", "SSIM per frame", "Density per layer and step", "Cluster sizes"):
        assert words in page
    assert "first steps (4)" in page
    assert "against the dense video of the same seed" in page
    # No address of anything: neither a link, nor a script, a style sheet, a font or a picture from elsewhere.
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|<link|<script[^>]+src|url\((?!#)", page)
    # The prompt is text, not markup.
    assert "a &lt;b&gt;dot&lt;/b&gt; &amp; more" in page
    assert "<b>" not in page
    # Every id is there once, and every reference inside a figure meets one.
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_dense_is_the_pipeline_as_it_is(tiny_model, compared):
    """The dense video of --compare is what diffusers alone makes from the seed."""
    from diffusers import WanPipeline

    from vidaccel.generation.media.video import write_mp4

    pipe = WanPipeline.from_pretrained(tiny_model)
    frames = pipe(
        prompt=PROMPT, negative_prompt="", num_frames=9, height=64, width=64, num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(3),
    ).frames[0]  # fmt: skip
    expected = write_mp4((frames * 255).round().astype(np.uint8), compared.parent / "expected.mp4")
    assert np.array_equal(read_video(expected)[0], read_video(compared / "clip.dense.mp4")[0])


def test_density_one_equals_dense(vidaccel, tiny_model, tmp_path):
    """Nothing is skipped at 100 %, and identical frames are called so."""
    options = ("--compare", "--method", "svg", "--density", 1, "--backend", "reference", "--no-warm-up")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options, *SMALL, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    numbers = json.loads((tmp_path / "out.report.json").read_text())
    svg = numbers["videos"][1]
    assert svg["warm_up_seconds"] is None
    assert svg["attention"]["mean_density"] == 1
    assert min(svg["against_dense"]["ssim"]) > 0.999
    assert svg["against_dense"]["psnr_mean"] is None or svg["against_dense"]["psnr_mean"] > 60


def test_measured_errors_are_told(vidaccel, tiny_model, tmp_path):
    options = ("--compare", "--method", "tangent", "--density", 0.8, "--dense-steps", 0.5, "--no-warm-up")
    more = ("--measure-error", 16, "--backend", "gather", "--out", tmp_path / "out.mp4")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options, *SMALL, *more)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "tangent: measured error of the output in 4 sparse calls: median" in " ".join(result.output.split())
    error = json.loads((tmp_path / "out.report.json").read_text())["videos"][1]["attention"]["error"]
    assert error["layers_x_steps"][0][0] is None and 0 < error["layers_x_steps"][0][1] < 1
    assert error["predicted_layers_x_steps"][0][1] is not None


def test_without_compare(vidaccel, tiny_model, tmp_path):
    """Several methods, no reference: a video each and no page; an existing file is replaced."""
    (tmp_path / "out.mp4").write_bytes(b"old")
    options = ("--method", "dense", "--method", "random", "--method", "dense", "--backend", "gather", "--fps", 8)
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options, *SMALL, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {f.name for f in tmp_path.iterdir()} == {"out.mp4", "out.random.mp4"}
    assert "100 %" in result.stdout
    frames, fps = read_video(tmp_path / "out.mp4")
    assert (frames.shape[0], fps) == (9, 8)


def test_without_a_method_a_short_video_stays_dense(vidaccel, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *SMALL, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    said = "method dense: the video has 48 tokens, fewer than 8,192; --method tangent for the other"
    assert said in result.stdout.splitlines()
    command = f"`vidaccel break-even --model {tiny_model} --device cpu --dtype float32 --threads 1`"
    hint = f"8,192 tokens are a fixed default: {command} measures it on this machine."
    assert hint in result.stdout.splitlines()
    # The table has one run, of the untouched pipeline.
    rows = [line.split() for line in result.stdout.splitlines() if line.rstrip().endswith("out.mp4")]
    assert len(rows) == 1 and rows[0][0] == "dense" and "100" in rows[0]


def test_without_a_method_a_long_video_is_sparse(vidaccel, tiny_model, tmp_path, monkeypatch):
    """48 tokens are many here."""
    monkeypatch.setattr("vidaccel.pipelines.default_method.MIN_SPARSE_TOKENS", 48)
    monkeypatch.setenv("COLUMNS", "400")
    options = (*SMALL, "--backend", "gather", "--density", 0.5, "--out", tmp_path / "out.mp4")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "method tangent: the video has 48 tokens, at least 48; --method dense for the other" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if line.rstrip().endswith("out.mp4")] == ["tangent"]


def test_the_report_says_why_these_methods(compared):
    methods = json.loads((compared / "clip.report.json").read_text())["settings"]["methods"]
    assert methods.startswith(
        "dense, tangent, svg2, radial: what --compare takes without --method (the video has 48 tokens"
    )
    assert methods in (compared / "clip.report.html").read_text()


def test_a_method_that_is_given_is_not_explained(vidaccel, tiny_model, tmp_path):
    """A run whose schedule leaves nothing sparse says so."""
    options = ("--method", "svg", "--backend", "gather", *SMALL, "--steps", 1, "--dense-steps", 1)
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "tokens" not in result.stdout
    said = "svg: every step stayed dense because of the schedule (first steps; this run has 1 step): give more --steps"
    assert said in result.stdout


def test_a_run_with_sparse_steps_has_no_such_line(vidaccel, tiny_model, tmp_path):
    options = ("--method", "svg", "--backend", "gather", *SMALL, "--dense-steps", 1)
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0 and "stayed dense" not in result.stdout


def test_defaults_of_a_real_model(tiny_configs):
    """Frames, size, steps and guidance come from the pipeline's own signature."""
    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.requests.settings import Settings

    settings = Settings("a dot", steps=7).checked(inspect_model(str(tiny_configs)))
    values = (settings.frames, settings.height, settings.width, settings.steps, settings.guidance_scale)
    assert values == (81, 480, 832, 7, 5.0)


def test_image_to_video(vidaccel, tiny_model, tmp_path):
    """The picture reaches the pipeline: another one, another video."""
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
    from PIL import Image

    parts = WanPipeline.from_pretrained(tiny_model).components
    # Noise, a mask of 4 and the picture's latents side by side.
    config = dict(parts.pop("transformer").config, in_channels=4 + 4 + 4)
    parts.update(transformer=WanTransformer3DModel.from_config(config), image_encoder=None, image_processor=None)
    WanImageToVideoPipeline(**parts).save_pretrained(tmp_path / "i2v")
    videos = []
    for colour in ("red", "blue"):
        Image.new("RGB", (50, 40), colour).save(tmp_path / "first.png")
        options = ("--image", tmp_path / "first.png", "--method", "random", "--backend", "gather", *SMALL)
        result = vidaccel("generate", "a dot", "--model", tmp_path / "i2v", *options, "--out", tmp_path / "out.mp4")
        assert result.exit_code == 0, (result.output, result.exception)
        videos.append(read_video(tmp_path / "out.mp4")[0])
    assert videos[0].shape == (9, 64, 64, 3)
    assert not np.array_equal(*videos)
    (tmp_path / "first.png").write_bytes(b"no picture")
    result = vidaccel("generate", "a dot", "--model", tmp_path / "i2v", *options, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 2
    assert "is no picture" in result.stderr


def test_an_encoder_that_fails_after_the_steps_is_one_line(vidaccel, tiny_model, tmp_path, monkeypatch):
    check_encoder()  # once a process: that of the command finds it well
    monkeypatch.setattr("vidaccel.generation.media.video.encoder", lambda: "false")
    options = ("--method", "dense", *SMALL, "--out", tmp_path / "out.mp4")
    result = vidaccel("generate", "a dot", "--model", tiny_model, *options)
    assert result.exit_code == 1
    assert "Error: ffmpeg could not write" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_leaves_the_others(vidaccel, tiny_model, tmp_path, monkeypatch):
    """The system says only that there is no space left, and not for what."""
    write = Path.write_bytes

    def full(path, data):
        if ".html." in path.name:
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    options = ("--method", "svg2", "--density", 0.7, "--backend", "gather", "--compare", "--no-warm-up", *SMALL)
    result = vidaccel("generate", "dot", "--model", tiny_model, *options, "--out", tmp_path / "clip.mp4")
    page = tmp_path / "clip.report.html"
    assert result.exit_code == 1, (result.output, result.exception)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {page} could not be written: [Errno 28] No space left on device. ")
    assert last.endswith(" MiB are free there. Files that were written before it are whole.")
    left = {"clip.mp4", "clip.dense.mp4", "clip.report.json", "clip.report.png"}
    assert {file.name for file in tmp_path.iterdir()} == left
    assert len(read_video(tmp_path / "clip.mp4")[0]) == 9 and json.loads((tmp_path / "clip.report.json").read_text())
