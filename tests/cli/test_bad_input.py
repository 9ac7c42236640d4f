"""Requests that cannot be met: one line that names value, bound and fix, exit code 2, and no weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from vidaccel import demo
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.pipelines.deep_compression.adapter_folder import AdapterError, read_facts


@pytest.fixture
def refused(vidaccel, tiny_configs, tmp_path, monkeypatch):
    """`refused(*options)` -> the message. Weights are missing *and* loading them is an error of the test."""
    from vidaccel.generation import api

    def load(*_, **__):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(api, "load", load)

    def run(*options, code=2):
        given = [str(o) for o in options]
        for name, value in (("--model", tiny_configs), ("--out", tmp_path / "out.mp4")):
            if name not in given:
                given += [name, str(value)]
        prompt = [] if given[0] == "" else ["a dot"]
        result = vidaccel("generate", *prompt, *given)
        assert result.exit_code == code, (result.output, result.exception)
        assert result.stderr.count("\n") == 1, result.stderr
        assert not list(tmp_path.glob("*.mp4"))
        return result.stderr

    return run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "sgv"], ["--method is sgv: ", "; did you mean svg? There are dense, radial, svg, svg2"]),
        (
            ["--backend", "cuda"],
            ["--backend is cuda", "auto, flex, gather, masked, reference, sdpa", "`vidaccel info`"],
        ),
        (["--backend", "sdpa"], ["--backend is sdpa", "computes dense attention only", "Give auto"]),
        (["--density", "0"], ["--density is 0.0", "above 0 and at most 1"]),
        (["--density", "1.5"], ["--density is 1.5", "above 0 and at most 1"]),
        (
            ["--precision", "fp8", "--method", "svg"],
            ["--precision is fp8", 'choose "int8"', "720 instructions for 64 keys"],
        ),
        (
            ["--precision", "int8", "--method", "svg", "--backend", "gather"],
            ["--precision is int8", "'gather' does not compute with", "Leave it out."],
        ),
        (["--precision", "int8", "--method", "dense"], ["--precision is of use only with a sparse method"]),
        (
            ["--set", "sparge.pv_threshold=8", "--method", "sparge", "--backend", "gather"],
            ["--method is sparge", "its pv_threshold cannot be had here", "Leave pv_threshold out."],
        ),
        (["--measure-error", "-1"], ["--measure-error is -1", "0 or more"]),
        (["--measure-error", "64", "--method", "dense"], ["--measure-error is of use only with a sparse method"]),
        (["--density", "nan"], ["--density is nan"]),
        (["--compare", "--out", "."], ["--out is .: the name must end in .mp4"]),
        (["--cache", "taylorseer=2.5"], ["cache cannot be used: 2.5: it must be a whole number.\n"]),
        (["--cache", "forecast=nan"], ["cache cannot be used: nan: it must be a number.\n"]),
        (["--no-warm-up"], ["Error: --no-warm-up is of --compare alone. Leave it out."]),
        (["--processes", "0"], ["--processes is 0: it must be at least 1"]),
        (["--share", "guidance"], ["--share is of no use: one process has nothing to share. Give --processes"]),
        (["--density", "0.5", "--method", "dense"], ["--density is of use only with a sparse method"]),
        # A video that is dense without --method; none of these would do anything.
        (
            ["--density", "0.5", "--frames", "9"],
            ["--density is of use only with a sparse method, and a video of fewer than 8,192 tokens is dense without"],
        ),
        (
            ["--dense-steps", "2", "--method", "dense"],
            ["--dense-steps is of use only with a sparse method. Add --method"],
        ),
        (["--dense-layers", "2", "--method", "dense"], ["--dense-layers is of use only with a sparse method"]),
        (["--set", "svg2.top_p=0.5", "--method", "dense"], ["--set is of use only with a sparse method"]),
        (
            ["--backend", "gather", "--density", "0.5", "--method", "dense"],
            ["--density, --backend are of use only", "or leave them out."],
        ),
        (["--density", "0.001", "--method", "svg"], ["--method is svg", "density 0.001 is below", "raise density"]),
        (["--density", "0.01", "--method", "radial"], ["--method is radial", "0.01", "is possible"]),
        (["--set", "tangent.tolerance=1.5"], ["--method is tangent", "tolerance is 1.5", "at most 1"]),
        (["--set", "svg2.top_p=1.5", "--method", "svg2"], ["--method is svg2", "top_p is 1.5", "at most 1"]),
        (["--set", "radial.decay=-1", "--method", "radial"], ["--method is radial", "decay is -1", "above 0"]),
        (
            ["--method", "sparge", "--density", "0.4", "--set", "sparge.cdf=0.9"],
            ["--set is sparge.cdf: --density 0.4 decides it. Give one of the two."],
        ),
        (["--set", "svg2.topp=0.5", "--method", "svg2"], ["svg2 has no such setting", "top_p"]),
        (["--set", "svg2.top_p=0.9", "--set", "svg2.top_p=0.5"], ["--set is svg2.top_p: it is given twice"]),
        (
            ["--pipeline-option", "a=1", "--pipeline-option", "a=2"],
            ["--pipeline-option is a: it is given twice, and one of the two would count for nothing"],
        ),
        (["--set", "svg2.top_p"], ["METHOD.SETTING=VALUE"]),
        (["--set", "radial.decay=1"], ["--set is radial.decay", "not among those to run (tangent)"]),
        (["--set", "svg2.top_p=0.5"], ["--set is svg2.top_p", "not among those to run (tangent)"]),
        # Before weights are read, as everything here, although only the first sparse call would need it.
        (
            ["--backend", "flex"],
            [
                "--backend is flex: flex cannot compute what stands for the keys that tangent skips on cpu",
                "Give auto, gather, masked, reference, or another --method.",
            ],
        ),
        (
            ["--backend", "flex", "--method", "svg2", "--set", "svg2.compensate=true"],
            ["--backend is flex: flex cannot compute what stands for the keys that svg2 skips on cpu"],
        ),
        (
            ["--set", "svg2.compensate=yes", "--method", "svg2"],
            ["--method is svg2", "compensate is 'yes'", "True or False"],
        ),
        (["--method", "xyz"], ["there is none of that name; there are dense, "]),
        (["--method", "SVG2"], ["did you mean svg2? There are "]),
        (["--method", "svg2", "--set", "svg2.topp=1"], ["--set is svg2.topp", "; did you mean top_p? There are "]),
        (["--backend", "tritn"], ["--backend is tritn", "did you mean triton? There are "]),
        (["--rope", "rifle"], ["--rope is rifle", "did you mean riflex? There are "]),
        (
            ["--preset", "nowhere.yaml"],
            ["--preset cannot be used: there is no preset nowhere.yaml", "or a file (.yaml"],
        ),
        (["--density", "0.005"], ["--method is tangent: Tangent density is 0.005", "one stand-in", "raise density to"]),
        (["--dense-steps", "1.5"], ["--dense-steps is 1.5", "a count", "a fraction (0.0 to 1.0)"]),
        (["--dense-layers", "few"], ["--dense-layers is 'few'", "a count"]),
        (["--dense-steps", "-1"], ["--dense-steps is -1"]),
        (["--compare", "--method", "dense"], ["--compare needs a --method other than dense"]),
        (["--report", "page.html"], ["--compare"]),
        (["--steps", "0"], ["--steps is 0", "at least 1"]),
        (["--seed", "-1"], ["--seed is -1", "between 0 and"]),
        (["--seed", 2**63], ["--seed is 9223372036854775808", "between 0 and 9223372036854775807"]),
        (
            ["--guidance-scale", "1", "--negative-prompt", "blur"],
            ["--negative-prompt is of no use: --guidance-scale is 1", "or give --guidance-scale above 1."],
        ),
        (["--guidance-scale", "0.5"], ["--guidance-scale is 0.5", "at least 1"]),
        (["--fps", "0"], ["--fps is 0", "at least 1 and at most 240"]),
        (["--fps", "0.1"], ["--fps is 0.1", "at least 1 and at most 240"]),
        (["--threads", "0"], ["--threads is 0"]),
        (["--dtype", "int8"], ["--dtype is int8", "auto, float32, bfloat16, float16"]),
        (["--device", "gpu"], ["--device is gpu", "torch knows no such device", "Give auto, cpu"]),
        (["--device", "meta"], ["--device is meta", "no meta device here", "Give auto, cpu"]),
        (["--device", "cpu", "--offload"], ["Error: --offload moves parts", "cpu"]),
        (["--device", "cpu", "--offload-blocks"], ["Error: --offload-blocks moves parts", "cpu"]),
        (["--image", "missing.png"], ["--image is missing.png", "no such file"]),
        (["--guidance-free", "missing"], ["--guidance-free cannot be used", "missing is no adapter that can be read"]),
        (["--guidance-free"], ["--guidance-free has no adapter to use", "(transformer/guidance_free.safetensors)"]),
        (["--guidance-free", "--steps", "2"], ["--guidance-free has no adapter to use", "Give the file or folder"]),
        (["--frames", "0"], ["--frames is 0", "at least 1"]),
        # diffusers computes 34 // 4 * 4 + 1 = 33 and 36 // 4 * 4 + 1 = 37.
        (["--frames", "34"], ["--frames is 34", "4k+1", "round it to 33", "33 or 37"]),
        (["--frames", "36"], ["--frames is 36", "round it to 37", "33 or 37"]),
        (["--height", "100"], ["--height is 100", "multiple of 16", "96 or 112"]),
        (["--width", "8"], ["--width is 8", "multiple of 16", "Give 16."]),
        # 1040 pixels are 65 tokens; the tiny model has 64 positions.
        (["--width", "1040"], ["65 tokens along an axis", "64 positions"]),
        (["--model", "no/such/folder"], ["--model is no/such/folder", "owner/name"]),
    ],
)
def test_options(refused, options, words):
    message = refused(*options)
    for word in words:
        assert word in message


def test_words_of_settings():
    from vidaccel.cli.options import method_settings

    words = ["svg2.compensate=true", "svg2.route=error", "tangent.probe=false", "radial.sink=none", "svg.sink=True"]
    assert method_settings([*words, "tangent.tolerance=0.1", "sparge.block=[64, 64]"]) == {
        "svg2": {"compensate": True, "route": "error"},
        "tangent": {"probe": False, "tolerance": 0.1},
        "radial": {"sink": None},
        "sparge": {"block": (64, 64)},
        "svg": {"sink": True},
    }


def test_words_of_arguments_of_a_pipeline():
    """Lists stay lists, for which diffusers' pipelines ask."""
    from vidaccel.cli.options import pipeline_arguments

    assert pipeline_arguments(["conditioning_scale=[0.5]", "true_cfg_scale=6", "rate=none"]) == {
        "conditioning_scale": [0.5],
        "true_cfg_scale": 6,
        "rate": None,
    }


def test_empty_prompt(vidaccel, tmp_path):
    result = vidaccel("generate", "  ", "--out", tmp_path / "out.mp4")
    assert result.exit_code == 2
    assert "PROMPT is empty. Say what the video shows." in result.stderr


def test_out_in_a_missing_folder(refused, tmp_path):
    message = refused("--out", tmp_path / "missing" / "out.mp4")
    assert f"no folder {tmp_path / 'missing'}" in message


def test_out_with_another_extension(refused, tmp_path):
    assert "must end in .mp4" in refused("--out", tmp_path / "out.gif")
    assert "must end in .mp4" in refused("--out", tmp_path)


def test_out_that_is_a_folder(vidaccel, tmp_path):
    folder = tmp_path / "sub.mp4"
    folder.mkdir()
    result = vidaccel("generate", "a dot", "--out", folder)
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_out_in_an_unwritable_folder(refused):
    # Permission bits do not stop root, who runs the tests in containers; /proc stops everybody.
    assert "the folder /proc is not writable" in refused("--out", "/proc/out.mp4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(refused):
    message = refused("--device", "cuda")
    assert "no CUDA device" in message
    assert "Give auto, cpu" in message


def test_a_folder_that_is_no_pipeline(refused, tiny_configs):
    (tiny_configs / "model_index.json").unlink()
    assert "it is no diffusers pipeline: it has no model_index.json" in refused("--model", tiny_configs)


def test_a_published_folder_is_to_be_converted_first(refused, tmp_path):
    (tmp_path / "transformer_t2v").mkdir()
    (tmp_path / "transformer_t2v" / "config.json").write_text("{}")
    assert f'Convert it once with "vidaccel convert {tmp_path} NEW_FOLDER"' in refused("--model", tmp_path)


def test_a_pipeline_without_a_spec(refused, tiny_configs, edit_json):
    edit_json(tiny_configs / "model_index.json", _class_name="StableDiffusionPipeline")
    message = refused("--model", tiny_configs)
    assert "it is a StableDiffusionPipeline, which is not supported; supported:" in message
    assert "WanPipeline" in message


def test_video_to_video_needs_a_video(refused, tiny_configs, edit_json, tmp_path):
    assert "--strength is of use only with --video" in refused("--strength", 0.5)
    (tmp_path / "no_video.mov").write_bytes(b"")
    assert "--video cannot be used: " in refused("--video", tmp_path / "no_video.mov")
    edit_json(tiny_configs / "model_index.json", _class_name="WanVideoToVideoPipeline")
    assert "--video is missing: this WanVideoToVideoPipeline needs a video" in refused("--model", tiny_configs)


def test_a_broken_model_index(refused, tiny_configs):
    for text, told in (
        ("{", "model_index.json cannot be read as JSON"),
        ("[]", "model_index.json cannot be read as JSON (it must be an object, and is a list)"),
        ("[" * 100_000, "model_index.json cannot be read as JSON (it is nested too deeply)"),
    ):
        (tiny_configs / "model_index.json").write_text(text)
        assert told in refused("--model", tiny_configs)


def test_a_config_of_an_editor_that_marks_the_order_of_bytes(tiny_configs):
    file = tiny_configs / "vae" / "config.json"
    known = inspect_model(str(tiny_configs))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert inspect_model(str(tiny_configs)) == known


def test_facts_of_an_adapter_of_another_kind(refused, tmp_path):
    folder = shutil.copytree(demo.path(demo.DC), tmp_path / "adapter")
    facts = json.loads((folder / "adapter.json").read_text())
    for name, value in {"transformer": 3, "base": 3, "autoencoder": [1], "lora": "x"}.items():
        (folder / "adapter.json").write_text(json.dumps(facts | {name: value}))
        assert f"in adapter.json {name} is {value!r}, and must be" in refused("--model", folder)
        with pytest.raises(AdapterError, match=rf"adapter\.json cannot be read: {name} is"):
            read_facts(folder)


def test_an_incomplete_pipeline(refused, tiny_configs):
    (tiny_configs / "vae" / "config.json").unlink()
    assert "needs vae/config.json" in refused("--model", tiny_configs)


def test_what_the_model_needs_is_read_from_it(refused, tiny_configs, edit_json):
    """Wan 2.2's 5B model: an autoencoder of 16x."""
    edit_json(tiny_configs / "vae" / "config.json", scale_factor_spatial=16, scale_factor_temporal=8)
    assert "multiple of 32 (autoencoder 16x, patches of 2). Give 32 or 64." in refused(
        "--height", "48", "--frames", "9"
    )
    assert "makes 8k+1 frames" in refused("--frames", "13")


def test_image_to_video_needs_an_image(refused, tiny_configs, edit_json, tmp_path):
    picture = tmp_path / "first.png"
    picture.write_bytes(b"")
    assert "this WanPipeline takes no picture" in refused("--image", picture)
    assert "this WanPipeline takes no picture to end with" in refused("--last-image", picture)
    edit_json(tiny_configs / "model_index.json", _class_name="WanImageToVideoPipeline")
    assert "--image is missing: this WanImageToVideoPipeline needs a picture to start from" in refused()
    assert f"--image cannot be used: {picture}" in refused("--image", picture)


def test_a_hub_model_that_is_not_there(refused, monkeypatch, tmp_path):
    """Offline, an id of the hub ends in one line as well."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("--model", "nobody/no-such-model")
    assert "--model is nobody/no-such-model" in message
    assert "hub" in message


@pytest.mark.parametrize("broken", [False, True])
def test_missing_weights(vidaccel, tiny_configs, tmp_path, broken):
    """What only loading can find out is one line as well."""
    if broken:
        for part in ("transformer", "vae", "text_encoder"):
            (tiny_configs / part / "model.safetensors").write_bytes(b"not weights")
    size = ("--frames", 9, "--height", 64, "--width", 64, "--method", "dense")
    result = vidaccel("generate", "a dot", "--model", tiny_configs, "--out", tmp_path / "out.mp4", *size)
    assert result.exit_code == 2
    assert ("is cut off, or no file of weights" if broken else "has no weights beside its config.json") in result.stderr
    assert not list(tmp_path.glob("*.mp4"))


def test_values_of_the_wrong_type(vidaccel, tmp_path):
    result = vidaccel("generate", "a dot", "--steps", "many", "--out", tmp_path / "out.mp4")
    assert result.exit_code == 2
    assert "--steps" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "Error: out of GPU memory: try --offload, "),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            ),
            "Error: out of main memory: try --dtype bfloat16, ",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), "Error: out of main memory: try "),
        (MemoryError("Unable to allocate 1. TiB for an array"), "Error: out of main memory: try --dtype bfloat16, "),
    ],
    ids=["GPU", "CPU", "Windows", "Python"],
)
def test_out_of_memory_is_one_line(vidaccel, tiny_configs, tmp_path, monkeypatch, error, words):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("vidaccel.generation.api.load", load)
    result = vidaccel("generate", "a dot", "--model", tiny_configs, "--out", tmp_path / "a.mp4", "--device", "cpu")
    told = result.stderr.splitlines()[-1]  # after the bar
    assert result.exit_code == 1 and told.startswith(words), (result.output, result.exception)
    assert "Traceback" not in result.stderr and ("offload" in told) == ("GPU" in words)


def test_a_fault_of_the_program_keeps_its_traceback(vidaccel, tiny_configs, tmp_path, monkeypatch):
    monkeypatch.setattr("vidaccel.generation.api.load", lambda *_, **__: [][0])
    result = vidaccel("generate", "a dot", "--model", tiny_configs, "--out", tmp_path / "a.mp4", "--device", "cpu")
    assert isinstance(result.exception, IndexError) and "Error" not in result.stderr


def test_what_holds_a_part_of_a_pipeline_is_told(refused, tmp_path):
    for name, config, words in (
        ("wan", {"_class_name": "WanModel"}, "is published, and no diffusers pipeline. Give .* ends in -Diffusers"),
        (
            "alone",
            {"_class_name": "WanTransformer3DModel"},
            "it is a transformer alone. Give the folder of the pipeline",
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert re.search(words, refused("--model", tmp_path / name))
    part = tmp_path / "part" / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    assert "it has no model_index.json beside its transformer. Give a whole one" in refused(
        "--model", tmp_path / "part"
    )


@pytest.mark.parametrize("more", [(), ("--compare",)])
def test_a_name_that_is_too_long_is_refused_by_its_option(refused, tmp_path, more):
    name = "x" * (249 if more else 256) + ".mp4"
    told = refused("--out", tmp_path / name, *more)
    assert "--out" in told and "too long for this system" in told
