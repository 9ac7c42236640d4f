"""`vidaccel.generate` on the built-in model: a video, a comparison, a loaded pipeline, pictures and videos as input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

import vidaccel
from vidaccel import SVG2, Radial, demo
from vidaccel.generation.errors import BadInput, worded
from vidaccel.generation.forecast import decoding_note, memory_to_decode
from vidaccel.generation.media.sound import Sound
from vidaccel.generation.media.video_reader import read_video
from vidaccel.generation.report.comparison import Comparison, GeneratedVideo
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.run import GenerationError
from vidaccel.pipelines.loading import load_pipeline

PROMPT = "a red circle moves left on a grey background"
SMALL = {"frames": 9, "height": 64, "width": 64, "steps": 3, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dense(pipe) -> GeneratedVideo:
    return vidaccel.generate(pipe, PROMPT, **{**SMALL, "device": "auto"})


def test_a_name_and_a_loaded_pipeline_give_the_same_video(pipe, dense, tmp_path):
    named = vidaccel.generate("demo", PROMPT, out=tmp_path / "video.mp4", **SMALL)
    assert named.report is None and named.name == "dense"  # a short video
    assert np.array_equal(named.frames, dense.frames)
    assert read_video(tmp_path / "video.mp4")[0].shape == (9, 64, 64, 3)
    assert {type(p).__name__ for p in pipe.transformer.attn_processors.values()} == {"WanAttnProcessor"}


def test_a_method_by_its_config_and_by_its_name(pipe):
    chosen = {**SMALL, "device": "auto"}
    config = vidaccel.generate(pipe, PROMPT, method=SVG2(density=0.5, q_clusters=4), **chosen)
    named = vidaccel.generate(pipe, PROMPT, method="svg2", density=0.5, settings={"svg2": {"q_clusters": 4}}, **chosen)
    assert np.array_equal(config.frames, named.frames)
    assert config.report.method == "svg2" and config.report.mean_density() < 1
    measured = vidaccel.generate(pipe, PROMPT, method=SVG2(density=0.5, q_clusters=4), measure_error=8, **chosen)
    assert np.array_equal(measured.frames, named.frames) and measured.report.error_in_words()
    assert not named.report.error_in_words()


def test_a_comparison_and_its_page(pipe, dense, tmp_path):
    made = vidaccel.generate(
        pipe,
        PROMPT,
        method=[Radial(), "svg"],
        compare=True,
        report=tmp_path / "page.html",
        **{**SMALL, "device": "auto"},
    )
    assert isinstance(made, Comparison)
    assert [video.name for video in made.videos] == ["dense", "radial", "svg"]
    assert np.array_equal(made.reference.frames, dense.frames)
    assert made.metrics["svg"].mean_psnr > 10
    names = {"page.html", "page.json", "page.png", *(f"page.{name}.mp4" for name in ("dense", "radial", "svg"))}
    assert {file.name for file in tmp_path.iterdir()} == names
    numbers = json.loads((tmp_path / "page.json").read_text())
    assert numbers["settings"]["methods"] == "dense, radial, svg: as given"
    assert (numbers["frames"], numbers["height"], numbers["width"]) == (9, 64, 64)
    call = "vidaccel.generate(<WanPipeline>, 'a red circle moves left on a grey background', method=[Radial(), 'svg'], "
    assert numbers["command"].startswith(call + "compare=True, frames=9, "), numbers["command"]


def test_a_stop_in_the_last_run_keeps_the_videos_before_it(pipe, tmp_path, monkeypatch):
    """Also where only a page is asked for, beside which they will lie."""
    from vidaccel.generation import run as module

    def stopped(pipe, settings, name, *rest, **options):
        if name == "svg":
            raise KeyboardInterrupt
        return make(pipe, settings, name, *rest, **options)

    make = module.make_video
    monkeypatch.setattr(module, "make_video", stopped)
    given = {"method": ["radial", "svg"], "compare": True, "report": tmp_path / "page.html", "warm_up": False}
    with pytest.raises(KeyboardInterrupt):
        vidaccel.generate(pipe, PROMPT, **given, **{**SMALL, "device": "auto"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.dense.mp4", "page.radial.mp4"]


def test_a_pipeline_that_was_loaded_draws_no_bars_of_its_own_and_keeps_its_wish(pipe, capsys):
    for wish in ({"desc": "mine"}, {"disable": True}):
        pipe.set_progress_bar_config(**wish)
        vidaccel.generate(pipe, PROMPT, **{**SMALL, "device": "auto"})
        assert "%|" not in capsys.readouterr().err and pipe._progress_bar_config == wish


def test_a_default_method_that_cannot_do_it_is_left_out(tmp_path):
    """Radial and the stand-ins of Tangent cannot go down to this density on so few tokens; SVG2 can."""
    made = vidaccel.generate("demo", PROMPT, compare=True, density=0.2, **{**SMALL, "frames": 5})
    names = [video.name for video in made.videos]
    assert names == ["dense", "svg2"]
    for name in ("tangent", "radial"):
        assert any(note.startswith(f"{name} is left out: ") for note in made.notes)
    with pytest.raises(BadInput, match=r"^method is radial: "):
        vidaccel.generate("demo", PROMPT, method="radial", density=0.2, **{**SMALL, "frames": 5})


@pytest.mark.parametrize(("dtype", "others"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_nan_is_no_video(dtype, others):
    """Also of a pipeline whose transformer is the one for low noise; the dtype in use is not recommended."""
    parts = WanPipeline.from_pretrained(demo.path()).to(dtype).components
    low = parts.pop("transformer")
    low.proj_out.bias.data.fill_(torch.nan)
    pipe = WanPipeline(**{**parts, "transformer": None, "transformer_2": low}, boundary_ratio=1.0)
    told = rf"NaN or infinite values instead of a video in {dtype}: another dtype may help \({others}\)\.$"
    with pytest.raises(GenerationError, match=told):
        vidaccel.generate(pipe, PROMPT, **{**SMALL, "frames": 5, "steps": 2, "device": "auto"})


def test_nan_is_no_sound(pipe, monkeypatch):
    from vidaccel.generation import run as module

    heard = Sound(np.array([[0.5], [np.nan]], np.float32), 800)
    monkeypatch.setattr(module, "sound_of", lambda *_: heard)
    with pytest.raises(GenerationError, match="NaN or infinite values instead of a sound in torch.float32: another "):
        vidaccel.generate(pipe, PROMPT, **{**SMALL, "frames": 5, "steps": 2, "device": "auto"})


def test_video_to_video(pipe, dense, tmp_path):
    video = dense.save(tmp_path / "input.mp4")
    for name, message in (("input.gif", r"must end in \.mp4"), ("no/input.mp4", "there is no folder")):
        with pytest.raises(BadInput, match=message):
            dense.save(tmp_path / name)
    chosen = {**SMALL, "frames": None, "steps": 4}
    made = [
        vidaccel.generate("demo", PROMPT, video=given, strength=strength, method=method, **chosen)
        for given, strength, method in (
            (video, 0.5, None),
            (dense.frames, 0.5, "svg"),
            (np.concatenate([dense.frames, dense.frames[:2]]), 0.25, None),
        )
    ]
    assert [v.frames.shape for v in made] == [(9, 64, 64, 3)] * 3
    assert made[1].report.records[-1].num_steps == 2
    assert made[2].notes == ("video: of its 11 frames, the first 9 are used.",)
    loaded = vidaccel.generate(pipe, PROMPT, video=video, strength=0.5, **{**chosen, "device": "auto"})
    assert np.array_equal(loaded.frames, made[0].frames)
    assert type(pipe).__name__ == "WanPipeline" and pipe.transformer.dtype == torch.float32
    # The less noise, the nearer to the input.
    off = [np.abs(v.frames.astype(int) - dense.frames).mean() for v in (made[0], made[2])]
    assert 0 < off[1] < off[0]
    assert made[0].notes == ("video: the result has its 16 frames per second.",)
    with pytest.raises(BadInput, match="frames is 13: the input video has 9"):
        vidaccel.generate("demo", PROMPT, video=video, **{**chosen, "frames": 13})


def test_first_and_last_picture(tmp_path):
    parts = WanPipeline.from_pretrained(demo.path()).components
    config = {**parts["transformer"].config, "in_channels": 8 + 4 + 8, "num_layers": 1}
    parts["transformer"] = WanTransformer3DModel.from_config(config)
    pipe = WanImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    chosen = {**SMALL, "device": "auto"}
    first, last = (Image.new("RGB", (80, 40), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "first.png")
    one = vidaccel.generate(pipe, PROMPT, image=tmp_path / "first.png", **chosen)
    two = vidaccel.generate(pipe, PROMPT, image=first, last_image=last, **chosen)
    assert not np.array_equal(one.frames, two.frames)
    assert one.notes[0].startswith("image: 80x40 is scaled to 128x64; cut off: ")
    assert [note.partition(":")[0] for note in two.notes] == ["image", "last_image"]
    with pytest.raises(BadInput, match="^image is missing"):
        vidaccel.generate(pipe, PROMPT, last_image=last, **chosen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "caf\udce9"}, r"^prompt is 'caf\\udce9': it holds bytes that are no text in UTF-8\. Write it in "),
        ({"negative_prompt": "\ud800"}, r"^negative_prompt is '\\ud800': it holds bytes that are no text in UTF-8"),
        ({"frames": 34}, r"^frames is 34: .* Give 33 or 37\.$"),
        ({"method": "sgv"}, r"^method is sgv: "),
        ({"method": ["svg", "svg2"]}, r"^method can have several only in a comparison\. Add compare=True, or call"),
        ({"negative_prompt": "a", "guidance_scale": 1}, r"^negative_prompt is of no use: guidance_scale is 1, and"),
        ({"method": SVG2(), "density": 0.2}, r"^density is for a method's name, and SVG2 came with its settings"),
        ({"method": "dense", "density": 0.2}, r"^density is of use only with a sparse method"),
        ({"method": "svg", "measure_error": -1}, r"^measure_error is -1: it must be a whole number"),
        ({"method": "svg", "precision": "int4"}, r'^precision is int4: choose "int8", or None'),
        ({"method": "svg", "precision": "int8", "backend": "flex"}, r"^precision is int8: backend 'flex' does not"),
        ({"method": "svg", "measure_error": 0.5}, r"^measure_error is 0\.5: it must be a whole number"),
        ({"report": "page.html"}, r"^report is the page of compare\. Give both\.$"),
        ({"out": "/no/such/folder/x.mp4"}, r"^out is .*: there is no folder /no/such/folder\. Create it first\.$"),
        ({"image": "missing.png"}, r"^image is missing\.png: there is no such file\.$"),
        ({"strength": 0.5}, r"^strength is of use only with video\. Leave it out\.$"),
        ({"settings": {"svg2": {"topp": 1}}, "method": "svg2"}, r"^settings is svg2\.topp: svg2 has no such setting"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(loads_nothing, given, message):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate("demo", **{"prompt": PROMPT, **SMALL, "frames": 9, **given})


def test_a_comparison_of_tiny_frames_is_refused_before_weights_are_read(loads_nothing):
    with pytest.raises(BadInput, match=r"^height is 8: frames to compare have at least 11x11 pixels"):
        vidaccel.generate("demo-dc", PROMPT, compare=True, **{**SMALL, "height": 8})


def test_a_loaded_pipeline_is_not_placed(pipe):
    with pytest.raises(BadInput, match=r"^device, offload are for a model that is yet to be loaded"):
        vidaccel.generate(pipe, PROMPT, **{**SMALL, "offload": True})


def test_an_odd_size_is_written(tmp_path):
    """A deep-compression model makes any size; the file has the even one, and says so before."""
    from vidaccel.generation.job import Sparse, prepare
    from vidaccel.generation.requests.settings import Settings

    size = {"frames": 5, "height": 33, "width": 65}
    job = prepare("demo-dc", Settings(PROMPT, **size), Sparse(), device="cpu")
    assert job.notes == ("The file has 66x34 pixels, the last row or column twice: H.264 needs even sizes.",)
    made = vidaccel.generate("demo-dc", PROMPT, out=tmp_path / "odd.mp4", **{**SMALL, **size})
    assert made.frames.shape == (5, 33, 65, 3)
    assert read_video(tmp_path / "odd.mp4")[0].shape == (5, 34, 66, 3)


def test_the_device_may_be_any_that_torch_has(monkeypatch):
    """No more than the choice: this machine has none of them."""
    import torch

    from vidaccel.generation.machine import choose_device, choose_dtype

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert choose_device("auto", offload=True) == torch.device("xpu")
    assert choose_device("xpu:1", offload=False) == torch.device("xpu:1")
    assert choose_dtype("auto", torch.device("xpu"), "some/model") == torch.bfloat16
    for name, words in (("xpu:2", "there are 2, counted from 0"), ("mps", "finds no MPS device here. Give auto, cpu")):
        with pytest.raises(BadInput, match=words):
            choose_device(name, offload=False)
    with pytest.raises(BadInput, match="offload is 'layers': it must be True, False or \"blocks\""):
        choose_device("xpu", offload="layers")


@pytest.mark.parametrize("put_in", [vidaccel.accelerate, vidaccel.apply], ids=["accelerate", "apply"])
def test_a_pipeline_that_is_accelerated_already_is_refused_and_not_taken_for_dense(pipe, put_in):
    what = "svg2" if put_in is vidaccel.accelerate else vidaccel.Preset(name="mine", method=SVG2())
    told = "sparse attention" if put_in is vidaccel.accelerate else "the preset mine"
    arguments = {name: value for name, value in SMALL.items() if name != "device"}
    with put_in(pipe, what):
        for more in ({"method": "dense"}, {"method": "svg2"}, {"compare": True}, {}):
            with pytest.raises(BadInput, match=f"model is WanPipeline: {told} is at work in it already.*restore"):
                vidaccel.generate(pipe, PROMPT, **arguments, **more)
        with pytest.raises(BadInput, match=f"{told} is at work in it already"):
            vidaccel.waterfall(pipe, vidaccel.Preset(name="a", method=SVG2()), [PROMPT])
    vidaccel.generate(pipe, PROMPT, **arguments)


def test_what_decoding_takes_is_told_before_the_steps():
    cpu = torch.device("cpu")
    pipe = load_pipeline(vidaccel.demo.path(), torch.float32, cpu)
    settings = Settings(PROMPT, frames=33, height=128, width=128)
    weights = sum(p.nbytes for part in (pipe.transformer, pipe.text_encoder, pipe.vae) for p in part.parameters())
    whole = memory_to_decode(pipe.vae, 33, 128, 128)
    assert not decoding_note(pipe, settings, cpu, weights + whole)
    told = worded(decoding_note(pipe, settings, cpu, weights + whole - 1))
    assert (
        f"about {whole / 1e6:.1f} MB beside {weights / 1e6:.1f} MB of weights on cpu" in told and "give tiling" in told
    )
    # Of parts that are elsewhere until they are at work, the autoencoder alone counts.
    own = sum(p.nbytes for p in pipe.vae.parameters())
    assert not decoding_note(pipe, settings, torch.device("cuda"), own + whole)
    pipe.vae.enable_tiling()
    assert not decoding_note(pipe, settings, cpu, 0)
