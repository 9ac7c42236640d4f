"""Every family of video pipelines, whole and real, at tiny sizes: saved to a folder, and run from there."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pytest
import torch
from families import cogvideo, cosmos
from no_torchvision import without_torchvision
from PIL import Image
from torch.overrides import TorchFunctionMode

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.generation.forecast import forecast
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.models.inspected import inspect_model, inspect_pipeline
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.run import load, run

PROMPT = "a dot moves"


def picture(size: int = 32, value: int = 200) -> Image.Image:
    return Image.new("RGB", (size, size), (value, 40, 90))


def clip(frames: int, size: int = 32) -> np.ndarray:
    return np.full((frames, size, size, 3), 90, np.uint8)


@dataclass(frozen=True)
class Case:
    """One run of a tiny pipeline.

    Args:
        build: file and function of tests/support/families.
        runs: the class that runs, where it is not the one that was saved.
        request: arguments of `generate` beside size and frames.
        frames, size: of the video.
        loaded: it cannot be saved to a folder, and runs as it was built.
    """

    build: str
    frames: int = 5
    size: int = 32
    request: dict[str, Any] = field(default_factory=dict, hash=False)
    runs: str = ""
    loaded: bool = False

    def arguments(self) -> dict[str, Any]:
        sized = {"frames": self.frames, "height": self.size, "width": self.size}
        return {**sized, "steps": 2, **self.request}

    def __str__(self) -> str:
        given = [name for name in ("image", "last_image", "video") if name in self.request]
        return "-".join([self.build.partition(".")[2], *given])


IMAGE = {"image": picture()}
BOTH = {**IMAGE, "last_image": picture(value=20)}
STG = {"pipeline_options": {"spatio_temporal_guidance_blocks": [1]}}
I2V, V2V = "DiffusionForcingImageToVideoPipeline", "DiffusionForcingVideoToVideoPipeline"
CASES = [
    Case("wan_kin.wan"),
    Case("wan_kin.wan_5b", request=IMAGE, runs="WanImageToVideoPipeline"),
    Case("wan_kin.wan_image", request=IMAGE),
    Case("wan_kin.wan_first_last", request=BOTH),
    Case("wan_kin.lucy", request={"video": clip(5)}),
    Case("wan_kin.vace"),
    Case("wan_kin.vace", request=IMAGE),
    Case("wan_kin.vace", request={"video": clip(5)}),
    Case("wan_kin.animate", 9, request={**IMAGE, "video": clip(9), "face_video": clip(9, 16)}),
    Case("wan_kin.chronoedit", request=IMAGE),
    Case("wan_kin.skyreels"),
    Case("wan_kin.skyreels_image", request=IMAGE),
    Case("wan_kin.skyreels_forcing"),
    Case("wan_kin.skyreels_forcing", 9, request=IMAGE, runs=f"SkyReelsV2{I2V}"),
    Case("wan_kin.skyreels_forcing", 33, request={"video": clip(17)}, runs=f"SkyReelsV2{V2V}"),
    Case("wan_kin.skyreels_forcing", 21, request={"video": clip(5)}, runs=f"SkyReelsV2{V2V}"),
    Case("wan_kin.anyflow"),
    Case("wan_kin.anyflow", 9, request={"video": clip(5)}),
    Case("wan_kin.helios", 33),
    Case("wan_kin.helios", 65, request=IMAGE),
    Case("wan_kin.helios", 33, request={"video": clip(34)}),
    Case("wan_kin.helios_pyramid", 33, 128, request={"steps": 3}),
    Case("hunyuan.hunyuan"),
    Case("hunyuan.hunyuan", request={"negative_prompt": "a", "pipeline_options": {"true_cfg_scale": 4.0}}),
    Case("hunyuan.hunyuan_image", request=IMAGE),
    Case("hunyuan.hunyuan_image_replaced", request=IMAGE),
    Case("hunyuan.skyreels_v1", request=IMAGE),
    Case("hunyuan.framepack", 37, request=IMAGE),
    Case("hunyuan.framepack", 73, request=BOTH),
    Case("hunyuan.hunyuan_15"),
    Case("hunyuan.hunyuan_15_image", size=64, request=IMAGE),
    Case("cogvideo.cogvideox_2b", 9),
    Case("cogvideo.cogvideox_5b", 9),
    Case("cogvideo.cogvideox_15", 9),
    Case("cogvideo.cogvideox_image", 9, request=IMAGE),
    Case("cogvideo.cogvideox_15_image", 17, request=IMAGE),
    Case("cogvideo.cogvideox_video", 9, request={"video": clip(9), "strength": 0.6}),
    Case("cogvideo.cogvideox_15_video", 8, request={"video": clip(9), "strength": 0.6}),
    Case("cogvideo.cogvideox_control", 9, request={"video": clip(9)}),
    Case("cogvideo.consisid", 9, request=IMAGE, loaded=True),
    Case("cogvideo.easyanimate"),
    Case("cogvideo.easyanimate_inpaint", request=IMAGE),
    Case("ltx.ltx", 9, 64),
    Case("ltx.ltx", 9, 64, request=IMAGE, runs="LTXImageToVideoPipeline"),
    Case("ltx.ltx_condition", 9, 64),
    Case("ltx.ltx_condition", 17, 64, request=BOTH),
    Case("ltx.ltx_condition", 17, 64, request={"video": clip(9)}),
    Case("ltx.ltx2", 9, 64, request=STG),
    Case("ltx.ltx2", 9, 64, request={**STG, **IMAGE}, runs="LTX2ImageToVideoPipeline"),
    Case("ltx.ltx2", 17, 64, request={**STG, **BOTH}, runs="LTX2ConditionPipeline"),
    Case("cosmos.text_to_world", 9, loaded=True),
    Case("cosmos.video_to_world", 9, request=IMAGE, loaded=True),
    Case("cosmos.predict_2", request=IMAGE, loaded=True),
    Case("cosmos.predict_2", 9, request={"video": clip(5)}, loaded=True),
    Case("cosmos.cosmos_3"),
    Case("cosmos.cosmos_3", request=IMAGE),
    Case("kandinsky.kandinsky_5", loaded=True),
    Case("kandinsky.kandinsky_5_image", 17, request=IMAGE, loaded=True),
    Case("kandinsky.kandinsky_6", loaded=True),
    Case("kandinsky.kandinsky_6", request=IMAGE, loaded=True),
    Case("others.mochi", 7),
    Case("others.motif"),
    Case("others.motif", request=IMAGE, runs="MotifVideoImage2VideoPipeline", loaded=True),
]


class Lengths(TorchFunctionMode):
    """Collects the lengths of the sequences that attend to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.seen.add(query.shape[-2])
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny pipeline by its name: the folder that it was saved to, or itself where that cannot be."""

    @functools.cache
    def of(build: str, loaded: bool) -> Any:
        torch.manual_seed(0)
        group, name = build.split(".")
        pipe = getattr(importlib.import_module(f"families.{group}"), name)()
        pipe.set_progress_bar_config(disable=True)
        if loaded:
            return pipe
        folder = tmp_path_factory.mktemp("families") / name
        pipe.save_pretrained(folder)
        return folder

    return of


# Its autoencoder decodes in tiles of 24 frames and 320 pixels, and no smaller.
ALLEGRO = pytest.param(Case("others.allegro", 24, 320, request={"steps": 1}), marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [*CASES, ALLEGRO], ids=str)
def test_a_family_runs(case, built, monkeypatch):
    """The video that was asked for comes out, and the sequence in self-attention is the one that was told before."""
    without_torchvision(monkeypatch)
    cogvideo.without_opencv(monkeypatch)
    model = built(case.build, case.loaded)
    place = {} if case.loaded else {"device": "cpu"}
    job = prepare(model if case.loaded else str(model), Settings(PROMPT, **case.arguments()), Sparse(), **place)
    assert not case.runs or job.facts.pipeline_class == case.runs
    with Lengths() as lengths:
        made = vidaccel.generate(model, PROMPT, **case.arguments(), **place, progress=False)
    assert made.frames.shape == (case.frames, case.size, case.size, 3)
    assert not [note for note in made.notes if "frames instead" in note]
    layout = job.layout
    least = layout.video_tokens + layout.text_before if job.facts.row.text_varies else layout.tokens
    assert any(least <= length <= layout.tokens for length in lengths.seen), (layout, sorted(lengths.seen))


SHORT = {"pipeline_options": {"max_sequence_length": 16}}
SPARSE = [
    Case("wan_kin.wan_5b", 17, 64, request=IMAGE),
    Case("wan_kin.vace", 17, 64, request=IMAGE),
    Case("wan_kin.animate", 9, 64, request={**IMAGE, "video": clip(9), "face_video": clip(9, 16)}),
    Case("wan_kin.skyreels_forcing", 17, 64, request=IMAGE),
    Case("wan_kin.anyflow", 17, 64),
    Case("wan_kin.helios", 33, 64, request=IMAGE),
    Case("hunyuan.hunyuan", 17, 64, request=SHORT),
    Case("hunyuan.framepack", 37, 64, request={**SHORT, **IMAGE}),
    Case("hunyuan.hunyuan_15_image", 17, 64, request=IMAGE),
    Case("cogvideo.cogvideox_15", 17, 64, request=SHORT),
    Case("cogvideo.easyanimate", 17, 64),
    Case("ltx.ltx", 33, 128, request=IMAGE),
    Case("ltx.ltx2", 33, 128, request=STG),
    Case("cosmos.predict_2", 17, 64, request=IMAGE, loaded=True),
    Case("cosmos.cosmos_3", 17, 64),
    Case("kandinsky.kandinsky_5", 17, 64, loaded=True),
    Case("kandinsky.kandinsky_6", 17, 64, request=IMAGE, loaded=True),
    Case("others.mochi", 25, 64, request=SHORT),
    Case("others.motif", 17, 64, request=SHORT),
]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_a_family_runs_sparse(case, built, monkeypatch):
    """With a method by its name, in every step and layer; the sequences are those that were told before."""
    without_torchvision(monkeypatch)
    model = built(case.build, case.loaded)
    place = {} if case.loaded else {"device": "cpu"}
    job = prepare(model if case.loaded else str(model), Settings(PROMPT, **case.arguments()), Sparse(), **place)
    # Text stays dense: of so small a video it is most of the pairs.
    text = 1 - (job.layout.video_tokens / job.layout.tokens) ** 2
    asked = {"method": "svg2", "density": text + 0.6 * (1 - text), "dense_steps": 0, "dense_layers": 0}
    made = vidaccel.generate(model, PROMPT, **case.arguments(), **asked, **place, progress=False)
    assert made.frames.shape == (case.frames, case.size, case.size, 3)
    sparse = [record for record in made.report.records if not record.reason]
    assert sparse and all(0 < record.density < 1 for record in sparse)


@pytest.mark.parametrize(("distilled", "steps"), [(False, 30), (True, 6)])
def test_the_steps_of_helios_are_those_of_its_authors(built, tmp_path, distilled, steps):
    """Ten a size, and two of a distilled one."""
    folder = shutil.copytree(built("wan_kin.helios_pyramid", False), tmp_path / "helios")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
    facts = inspect_model(str(folder))
    settings = Settings(PROMPT, height=128, width=128).sized(facts)
    assert settings.steps == steps and (settings.guidance_scale is None) == distilled


@pytest.mark.parametrize("build", ["cogvideo.cogvideox_15", "hunyuan.hunyuan_15", "wan_kin.helios", "ltx.ltx2"])
def test_a_forecast_counts_what_lies_beside_the_video(build, built):
    facts = inspect_model(str(built(build, False)))
    settings = Settings(PROMPT, height=64, width=64).sized(facts)
    rows = dict(forecast(facts, settings, 2))
    layout = facts.layout(settings.frames, 64, 64)
    assert rows["tokens"].startswith(f"{layout.tokens:,} ({layout.frames} x {layout.height} x {layout.width}")
    beside = {"cogvideox_15": ", and 226 beside them)", "hunyuan_15": ", and at most 1,256 beside them)"}
    assert rows["tokens"].endswith(beside.get(build.partition(".")[2], ")"))
    assert ("decoding, about" in rows) == (build != "ltx.ltx2") != ("decoding" in rows)
    assert rows.get("decoding", "not counted").startswith("not counted")
    assert rows.get("made in") == ("4 parts, one after the other" if build == "wan_kin.helios" else None)


@pytest.mark.parametrize(
    ("build", "options", "frames"),
    [
        ("wan_kin.helios", {"num_latent_frames_per_chunk": 5}, 33),
        ("hunyuan.framepack", {"latent_window_size": 5}, 37),
        ("wan_kin.skyreels_forcing", {"base_num_frames": 57, "overlap_history": 9}, 121),
        ("wan_kin.animate", {"segment_frame_length": 33}, 33),
    ],
)
def test_a_forecast_names_options_that_change_what_is_made_at_once(build, options, frames, built):
    """It counts with the defaults alone, and with these given by name."""
    from vidaccel.pipelines.loading import call_defaults

    facts = inspect_model(str(built(build, False)))
    usual = call_defaults(facts.row.pipeline)

    def told(pipeline_options: dict) -> dict[str, str]:
        settings = Settings(PROMPT, frames=frames, height=64, width=64, pipeline_options=pipeline_options)
        return dict(forecast(facts, settings.sized(facts), 2))

    plain, changed = told({}), told(options)
    named = ", ".join(f"{name}={value}" for name, value in options.items())
    assert changed["tokens"] == f"not counted: {named} changes how much is made at once"
    assert {"made in", "pairs a dense call", "a forward pass, about"}.isdisjoint(changed)
    assert changed["weights on disk"] == plain["weights on disk"] and "pairs a dense call" in plain
    assert told({name: usual[name] for name in options}) == plain
    with pytest.raises(BadInput, match="has no such argument"):
        told({"windowed": 3})


def test_sound_is_in_the_file(built, tmp_path):
    case = Case("ltx.ltx2", 25, 64, request=STG)
    out, folder = tmp_path / "out.mp4", built("ltx.ltx2", False)
    made = vidaccel.generate(folder, PROMPT, **case.arguments(), device="cpu", out=out, progress=False)
    assert made.sound.rate == 16000 and made.sound.samples.shape[1] == 2 and np.abs(made.sound.samples).max() > 0
    with av.open(str(out)) as file:
        assert file.streams.video[0].frames == 25
        sound = file.streams.audio[0]
        assert sound.rate == 16000 and sound.channels == 2
        heard = float(sound.duration * sound.time_base)
        assert abs(heard - len(made.sound.samples) / 16000) < 0.1  # AAC has blocks of 1024 samples


def test_the_rate_of_a_video_from_pictures_is_the_model_s_own(built):
    """Also where TI2V-5B runs as another class, from a folder and loaded."""
    folder = built("wan_kin.wan_5b", False)
    for model in (folder, load(inspect_model(str(folder)), torch.float32, "cpu")):
        place = {"device": "cpu"} if model is folder else {}
        asked = {"frames": 5, "height": 32, "width": 32, "steps": 2, "progress": False, **place}
        assert vidaccel.generate(model, PROMPT, video=clip(5), **asked).fps == 24.0


def test_a_sound_that_an_option_asks_for_is_there():
    asked = {"frames": 5, "height": 32, "width": 32, "steps": 2, "progress": False}
    pipe = cosmos.cosmos_3_sound()
    made = vidaccel.generate(pipe, PROMPT, **asked, pipeline_options={"enable_sound": True})
    assert made.sound.rate == 800 and made.sound.samples.shape == (168, 2)  # 5 of 24 frames a second, whole latents
    assert vidaccel.generate(pipe, PROMPT, **asked).sound is None
    with pytest.raises(BadInput, match="^pipeline_options is enable_sound=True: the pipeline refuses it"):
        vidaccel.generate(cosmos.cosmos_3(), PROMPT, **asked, pipeline_options={"enable_sound": True})


def test_steps_are_told_of_pipelines_that_have_no_callback_and_of_those_that_go_through_them_again(built):
    for build, case, told in (
        ("hunyuan.hunyuan_15", Case("", 5), [(1, 2), (2, 2)]),
        ("wan_kin.helios", Case("", 65), [(1, 4), (2, 4), (3, 4), (4, 4)]),
    ):
        facts = inspect_model(str(built(build, False)))
        pipe = load(facts, torch.float32, "cpu")
        seen: list[tuple[int, int]] = []
        settings = Settings(PROMPT, **case.arguments()).checked(facts)
        run(pipe, settings, on_step=lambda done, total, latents, seen=seen: seen.append((done, total)), decode=False)
        assert seen == told
        assert "step" not in vars(pipe.scheduler)


def test_a_guider_has_the_scale_of_the_request_for_the_run_alone(built):
    facts = inspect_model(str(built("hunyuan.hunyuan_15", False)))
    pipe = load(facts, torch.float32, "cpu")
    before = pipe.guider
    made = {
        scale: run(pipe, Settings(PROMPT, **Case("").arguments(), guidance_scale=scale).checked(facts)).frames
        for scale in (None, 6.0, 1.0, 9.0)
    }
    assert pipe.guider is before
    assert np.array_equal(made[None], made[6.0])
    assert not np.array_equal(made[1.0], made[6.0]) and not np.array_equal(made[9.0], made[6.0])


def test_a_loaded_pipeline_runs_as_the_one_that_takes_what_is_given(built):
    """The same weights, where they are; the result is that of the folder."""
    from vidaccel.pipelines.loading import load_pipeline

    folder = built("ltx.ltx", False)
    pipe = load_pipeline(str(folder), torch.float32, "cpu")
    case = Case("ltx.ltx", 9, 64, request=IMAGE)
    loaded = vidaccel.generate(pipe, PROMPT, **case.arguments(), progress=False)
    saved = vidaccel.generate(folder, PROMPT, **case.arguments(), device="cpu", progress=False)
    assert inspect_pipeline(pipe).pipeline_class == "LTXPipeline"
    assert np.array_equal(loaded.frames, saved.frames)


def test_a_comparison_warms_up_with_as_few_steps_as_there_can_be(built):
    case = Case("ltx.ltx", 33, 128)
    asked = {"method": "radial", "dense_steps": 0, "dense_layers": 0, "device": "cpu", "progress": False}
    made = vidaccel.generate(built("ltx.ltx", False), PROMPT, **case.arguments(), **asked, compare=True)
    assert [video.name for video in made.videos] == ["dense", "radial"]
    assert all(video.warm_up_seconds > 0 for video in made.videos)


def test_options_reach_the_pipeline(built):
    folder, case = built("cogvideo.cogvideox_2b", False), Case("", 9)
    plain, dynamic = (
        vidaccel.generate(folder, PROMPT, **case.arguments(), device="cpu", progress=False, pipeline_options=options)
        for options in ({}, {"use_dynamic_cfg": True})
    )
    assert not np.array_equal(plain.frames, dynamic.frames)
