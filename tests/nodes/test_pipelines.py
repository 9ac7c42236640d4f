"""Pipelines as the nodes run them, without a ComfyUI."""

from __future__ import annotations

import math
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from gft_adapters import write_adapter
from huggingface_hub import constants
from vsa_models import write_gates

import vidaccel
from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.levers.methods import MIN_SPARSE_TOKENS
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.tuning.store import store
from vidaccel.nodes.pipeline import inputs, pipelines
from vidaccel.nodes.pipeline.acceleration import METHODS, Acceleration
from vidaccel.nodes.pipeline.generating import generate
from vidaccel.nodes.pipeline.pipelines import find_pipelines, load, locate
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.report.tables import report_image, report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.nodes.watched import state_of_pipeline
from vidaccel.pipelines.break_even import BreakEven, Key
from vidaccel.pipelines.few_steps import convert_fastwan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def moved():
    return []


@pytest.fixture(scope="module")
def pipeline(moved):
    return load("demo", "auto", Residency(CPU, lambda part, memory: moved.append((type(part).__name__, memory))))


def settings(**changes):
    given = {"frames": 9, "height": 64, "width": 64, "steps": 3, "guidance_scale": 2.0, "seed": 1}
    return Settings("a red circle moves left on a grey background", **{**given, **changes})


def ignore(step, steps, latents):
    pass


def processors(pipeline):
    return {type(p).__name__ for p in pipeline.pipe.transformer.attn_processors.values()}


def test_dense_and_accelerated_from_one_pipeline(pipeline, moved):
    moved.clear()
    dense = generate(pipeline, settings(), on_step=ignore)
    fast = generate(pipeline.accelerated(Acceleration(density=0.5)), settings(), on_step=ignore)
    again = generate(pipeline, settings(), on_step=ignore)
    assert dense.frames.shape == (9, 64, 64, 3) and dense.frames.dtype == torch.float32
    assert dense.frames.min() >= 0 and dense.frames.max() <= 1
    assert torch.equal(dense.frames, again.frames)
    assert 0 < (dense.frames - fast.frames).abs().mean() < 0.2
    assert "tangent: density 0.5" in report_text(fast.report.news())
    assert "Nothing was accelerated" in report_text(dense.report.news())
    assert report_image(fast.report.news().report).shape[-1] == 3
    # Each part was brought in once a run, in the order of its work, and with an estimate of what it needs.
    names = [name for name, _ in moved]
    assert names[:3] == ["UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan"] and len(names) == 9
    assert all(memory > 0 for name, memory in moved if name != "UMT5EncoderModel")


def test_a_prompt_that_is_cut_off_is_told(pipeline):
    asked = replace(settings(), pipeline_options={"max_sequence_length": 6})
    report = report_text(generate(pipeline, asked, on_step=ignore).report.news())
    assert 'prompt has 9 tokens, and the text encoder reads the first 5; cut off: "on a grey background"' in report


@pytest.fixture
def adapter(tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer")
    return write_adapter(tmp_path, demo.path(), transformer)


def test_guidance_in_one_pass(pipeline, adapter):
    """As the handle does it; with sparse attention, too; the pipeline that came in keeps two passes."""
    before = generate(pipeline, settings(), on_step=ignore)
    guided = pipeline.guided_in_one_pass([adapter])
    with torch.inference_mode():  # as ComfyUI runs nodes
        made = generate(guided, settings(), on_step=ignore)
    with vidaccel.guidance_free(pipeline.pipe, adapter):
        wanted = generate(pipeline, settings(), on_step=ignore)
    assert torch.equal(made.frames, wanted.frames)
    text = report_text(made.report.news())
    assert "guidance 2 in one pass" in text and "Nothing was accelerated" not in text
    fast = generate(guided.accelerated(Acceleration(density=0.5)), settings(), on_step=ignore)
    assert "tangent: density 0.5" in report_text(fast.report.news()) and not torch.equal(fast.frames, made.frames)
    assert torch.equal(generate(pipeline, settings(), on_step=ignore).frames, before.frames)
    for changes, message in (
        ({"negative_prompt": "ugly"}, "negative_prompt is of no use"),
        ({"guidance_scale": 7.0}, "guidance is 7.0: .* was trained up to 6"),
    ):
        with pytest.raises(InputError, match=message):
            generate(guided, settings(**changes), on_step=ignore)
    with pytest.raises(InputError, match="guidance-free already: connect the pipeline from before the other"):
        guided.guided_in_one_pass([adapter])
    with pytest.raises(InputError, match="adapter cannot be used: .*gone"):
        pipeline.guided_in_one_pass([adapter.parent / "gone"])


def test_few_steps(pipeline, tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer")
    few = {
        "recipe": "consistency",
        "guidance_free": {"min_scale": 2.0, "max_scale": 2.0, "gated": False},
        "few_steps": {"sigmas": [1.0, 0.5]},
    }
    guided = pipeline.guided_in_one_pass([write_adapter(tmp_path, demo.path(), transformer, **few)])
    made = generate(guided, settings(steps=None, guidance_scale=None), on_step=ignore)
    assert "2 steps, guidance 2 in one pass" in report_text(made.report.news())
    with pytest.raises(InputError, match="steps is 3: .* was distilled to 2 steps"):
        generate(guided, settings(), on_step=ignore)


def test_a_method_that_is_trained_and_a_pipeline_with_and_without_it(pipeline, tmp_path):
    chosen = Acceleration(method="vsa", density=0.5, dense_start_percent=0.0)
    size = {"height": 128, "width": 128}  # of more than one block
    with pytest.raises(InputError, match=r"vsa: transformer has no gates for VSA"):
        generate(pipeline.accelerated(chosen), settings(**size), on_step=ignore)
    folder = convert_fastwan(write_gates(tmp_path / "FastWan", demo.path()), tmp_path / "fast", link=True)
    fast = load(str(folder), "auto", Residency(CPU, lambda part, memory: None))
    made = generate(fast.accelerated(chosen), settings(**size, steps=None, guidance_scale=None), on_step=ignore)
    text = report_text(made.report.news())
    assert text.startswith("vsa: density 0.5") and " 3 steps" in text


@pytest.mark.parametrize("method", [method for method in METHODS if method != "vsa"])
def test_each_method_makes_a_video(pipeline, method):
    chosen = Acceleration(method=method, density=0.6, dense_start_percent=0.2, measure_error=8)
    made = generate(pipeline.accelerated(chosen), settings(height=128, width=128), on_step=ignore)
    text = report_text(made.report.news())
    assert text.startswith(f"{method}: density 0.6") and "Measured error" in text
    assert ("predicted" in text) == (method == "tangent")


def test_the_callback_counts_steps_and_sees_latents(pipeline):
    seen = []
    generate(pipeline, settings(), on_step=lambda step, steps, latents: seen.append((step, steps, latents.shape)))
    assert seen == [(n, 3, (1, 8, 3, 8, 8)) for n in (1, 2, 3)]


def test_a_run_that_is_stopped_leaves_the_pipeline_as_it_was(pipeline):
    class Stopped(Exception):
        pass

    def stop(step, steps, latents):
        if step == 2:
            raise Stopped

    before = processors(pipeline)
    with pytest.raises(Stopped):
        generate(pipeline.accelerated(Acceleration(density=0.5)), settings(), on_step=stop)
    assert processors(pipeline) == before
    assert generate(pipeline, settings(steps=1), on_step=ignore).frames.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 10}, "frames is 10: this model makes 4k"),
        ({"width": 72}, "width is 72: it must be a multiple of 16"),
        ({"height": 100_000}, "positions of this model"),
    ],
)
def test_a_video_that_the_model_cannot_make(pipeline, changes, message):
    with pytest.raises(InputError, match=message):
        generate(pipeline, settings(**changes), on_step=lambda *_: pytest.fail("it ran"))


def test_a_picture_for_a_model_of_text(pipeline):
    with pytest.raises(InputError, match=r"^image is of no use: this WanPipeline takes no picture"):
        generate(pipeline, settings(), image=torch.zeros(1, 64, 64, 3), on_step=ignore)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.5}, "at most 1"),
        ({"method": "magic"}, "there are tangent, svg2, svg, radial"),
        ({"dense_start_percent": 0.6, "dense_end_percent": 0.4}, "leave no step sparse"),
        ({"dense_end_percent": -0.1}, "between 0 and 1"),
        ({"dense_layers": -1}, "0 or more"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"measure_error": -1}, "measure_error is -1"),
        ({"precision": "fp4"}, "precision is 'fp4': choose of the model or int8"),
    ],
)
def test_an_acceleration_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Acceleration(**changes)


def test_a_backend_that_this_machine_lacks(pipeline):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"^backend is triton: it cannot be used here"):
            pipeline.accelerated(Acceleration(backend="triton"))
    with pytest.raises(InputError, match=r"^backend is magic: there is none of that name"):
        pipeline.accelerated(Acceleration(backend="magic"))


def test_a_precision_that_cannot_be_had_here(pipeline):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^precision is int8: .*'triton' runs on cuda.* Choose of the model\."):
            pipeline.accelerated(Acceleration(precision="int8"))
    with pytest.raises(ValueError, match=r"^precision is int8: backend 'gather' does not compute with qk='int8'"):
        pipeline.accelerated(Acceleration(precision="int8", backend="gather"))


def test_a_backend_that_cannot_compensate(pipeline):
    said = r"^backend is flex: it cannot compute {} on cpu. Choose auto or gather or masked or reference, or {}\."
    with pytest.raises(ValueError, match=said.format("tangent", "another method")):
        pipeline.accelerated(Acceleration(backend="flex"))
    svg2 = Acceleration(backend="flex", method="svg2")
    with pytest.raises(ValueError, match=said.format("compensate", "switch compensate off")):
        pipeline.accelerated(svg2)
    for fits in (replace(svg2, compensate=False), Acceleration(backend="flex", method="radial")):
        assert pipeline.accelerated(fits).acceleration == fits


@pytest.mark.parametrize("method", METHODS)
def test_a_density_that_a_video_cannot_have_is_told_in_the_words_of_the_node(pipeline, method):
    fast = pipeline.accelerated(Acceleration(density=0.01, method=method))
    said = r"^density is 0.01, and with a video of 3 frames of 4x4 it must be at least (0\.\d+|1)\. Raise it"
    with pytest.raises(InputError, match=said) as refused:
        generate(fast, settings(), on_step=lambda *_: pytest.fail("it ran"))
    assert ("switch compensate off" in str(refused.value)) == (method == "svg2")


def test_the_report_names_the_inputs(pipeline):
    chosen = Acceleration(density=0.5, dense_start_percent=0.2, dense_end_percent=0.2, dense_layers=1)
    made = generate(pipeline.accelerated(chosen), settings(steps=5), on_step=ignore)
    report = made.report.news().report
    assert set(report.dense_reasons()) == {"dense_start_percent", "dense_end_percent", "dense_layers"}
    inputs = {field.name for field in fields(Acceleration)} - {"method"}
    assert set(report.config) == inputs - {"compensate"}  # of svg2 alone, and nothing is said of it elsewhere
    assert not [note for note in report.notes if "compensate" in note]
    svg2 = generate(pipeline.accelerated(Acceleration(method="svg2", density=0.8)), settings(), on_step=ignore)
    assert set(svg2.report.news().report.config) == inputs


def test_layers_that_would_all_stay_dense_are_refused_before_a_run(pipeline):
    blocks = len(pipeline.pipe.transformer.blocks)
    with pytest.raises(InputError, match=f"^dense_layers is 99: this model has {blocks} transformer blocks, so "):
        pipeline.accelerated(Acceleration(dense_layers=99))
    with pytest.raises(InputError, match=f"^dense_layers is {blocks}: .* Give {blocks - 1} at most"):
        pipeline.accelerated(Acceleration(dense_layers=blocks))
    assert pipeline.accelerated(Acceleration(dense_layers=blocks - 1)).acceleration.dense_layers == blocks - 1


def test_notes_of_a_schedule_name_the_inputs(pipeline):
    """They had the schedule as Python prints it, and told to give it whole numbers."""
    for share, said in (
        (0.95, "dense_start_percent 0.95: all 3 steps stay dense, so nothing will be sparse in runs of 3 steps"),
        (0.45, "which would be half of it or more: raise dense_start_percent or dense_end_percent for more"),
    ):
        chosen = Acceleration(density=0.5, dense_start_percent=share, dense_layers=0)
        made = generate(pipeline.accelerated(chosen), settings(), on_step=ignore)
        text = report_text(made.report.news())
        assert said in text and "DenseSchedule" not in text


def test_errors_are_measured_where_they_are_asked_for(pipeline):
    made = [
        generate(pipeline.accelerated(Acceleration(density=0.5, measure_error=rows)), settings(), on_step=ignore)
        for rows in (0, 16)
    ]
    assert torch.equal(made[0].frames, made[1].frames)
    texts = [report_text(one.report.news()) for one in made]
    assert "Measured error" not in texts[0] and "measure_error" not in texts[0]
    assert "measure_error 16" in texts[1] and "Measured error of the output in" in texts[1]


def test_a_short_video_stays_dense_and_says_why(pipeline):
    plain = generate(pipeline, settings(), on_step=ignore)
    short = generate(pipeline.accelerated(Acceleration(min_tokens=49)), settings(), on_step=ignore)
    assert torch.equal(plain.frames, short.frames)
    text = report_text(short.report.news())
    assert text.startswith("No call was sparse: min_tokens 49, above the video's 48 tokens.\ntangent: density 0.2")
    long = generate(pipeline.accelerated(Acceleration(density=0.5, min_tokens=48)), settings(), on_step=ignore)
    assert not torch.equal(plain.frames, long.frames)


def test_min_tokens_at_its_default_goes_by_what_was_measured_on_this_machine(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    default = Acceleration(density=0.5, min_tokens=MIN_SPARSE_TOKENS)
    text = report_text(generate(pipeline.accelerated(default), settings(), on_step=ignore).report.news())
    assert "No call was sparse: min_tokens 8192" in text and "`vidaccel break-even --model demo --device cpu" in text
    store(Key.here(3, 64, CPU, torch.float32), BreakEven(48, 40))
    text = report_text(generate(pipeline.accelerated(default), settings(), on_step=ignore).report.news())
    assert "No call was sparse" not in text and "min_tokens 48: On this machine" in text
    store(Key.here(3, 64, CPU, torch.float32), BreakEven(49, 40))
    text = report_text(generate(pipeline.accelerated(default), settings(), on_step=ignore).report.news())
    assert "No call was sparse: min_tokens 49, above the video's 48 tokens." in text
    # Of a method that was not measured, and of another number, nothing changes.
    assert replace(default, method="svg2").on(pipeline.facts, CPU, torch.float32)[0].min_tokens == MIN_SPARSE_TOKENS
    assert replace(default, min_tokens=48).on(pipeline.facts, CPU, torch.float32) == (
        replace(default, min_tokens=48),
        "",
    )


def test_the_end_of_the_schedule_stays_dense(pipeline):
    fast = pipeline.accelerated(Acceleration(density=0.5, dense_start_percent=0.2, dense_end_percent=0.2))
    made = generate(fast, settings(steps=5), on_step=ignore)
    sparse = {record.step for record in made.report.news().report.records if not record.reason}
    assert sparse == {1, 2, 3}


def test_finding_pipelines_and_choosing_one(tmp_path):
    shutil.copytree(demo.path(), tmp_path / "b" / "mine")
    (tmp_path / "b" / "no pipeline").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "model_index.json").write_text("{}")
    roots = [str(tmp_path), str(tmp_path / "missing")]
    assert find_pipelines(roots) == {"b/mine": tmp_path / "b" / "mine"}
    assert locate("b/mine", "", roots) == str(tmp_path / "b" / "mine")
    assert [locate(choice, "", roots) for choice in pipelines.BUILT_IN] == ["demo", "demo-dc"]
    assert locate("b/mine", " owner/name ", roots) == "owner/name"
    with pytest.raises(BadInput, match="gone: it is no longer in models/diffusers; there are b/mine"):
        locate("gone", "", roots)


def test_a_pipeline_whose_files_were_changed_is_another(tmp_path):
    shutil.copytree(demo.path(), tmp_path / "mine")
    seen = [state_of_pipeline(tmp_path / "mine")]
    assert seen[0] == state_of_pipeline(str(tmp_path / "mine")) and len(seen[0]) > 5
    for name in ("model_index.json", "transformer/config.json"):
        with (tmp_path / "mine" / name).open("a") as file:
            file.write(" ")
        seen.append(state_of_pipeline(tmp_path / "mine"))
    assert len({*seen}) == 3
    assert state_of_pipeline("owner/name") is None is state_of_pipeline(tmp_path)


@pytest.mark.parametrize("model", ["{}", "/no/such/folder"])
def test_a_folder_that_is_no_pipeline(tmp_path, model):
    words = "is .*: it is (no diffusers pipeline|neither .*, nor a folder)"
    with pytest.raises(InputError, match=f"^pipeline {words}"):
        load(model.format(tmp_path), "auto", Residency(CPU, lambda *_: None))
    with pytest.raises(InputError, match=f"^hub_id {words}"):  # where that input named it
        load(model.format(tmp_path), "auto", Residency(CPU, lambda *_: None), field="hub_id")


def test_weights_that_are_damaged(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(demo.path(), folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not whole: .*is cut off, or no file of weights"):
        load(str(folder), "auto", Residency(CPU, lambda *_: None))


def test_packages_that_are_missing_or_too_old(monkeypatch, tmp_path):
    (tmp_path / "needs.txt").write_text("# why\nno_such_package>=1\ntorch>=99\ndiffusers>=0.42\n")
    monkeypatch.setattr(pipelines, "REQUIREMENTS", tmp_path / "needs.txt")
    words = r"^diffusers pipelines need no_such_package>=1 \(not installed\), torch>=99 \(found 2\..*needs\.txt$"
    with pytest.raises(InputError, match=words):
        load("demo", "auto", Residency(CPU, lambda *_: None))


def test_a_backend_that_is_fast_on_the_device_is_asked_for_first(pipeline):
    elsewhere = replace(pipeline, residency=Residency(torch.device("meta"), lambda *_: None))
    with pytest.raises(InputError, match="finds no backend that is fast on meta: gather runs on .*, not on meta"):
        elsewhere.accelerated(Acceleration())


def test_nan_is_an_error_and_no_black_video(pipeline):
    head = pipeline.pipe.vae.decoder.conv_out.bias
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            generate(pipeline, settings(steps=1), on_step=ignore)
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_image_to_video(tmp_path):
    parts = WanPipeline.from_pretrained(demo.path()).components
    config = {**parts["transformer"].config, "in_channels": 8 + 4 + 8, "num_layers": 1}
    parts["transformer"] = WanTransformer3DModel.from_config(config)
    WanImageToVideoPipeline(**parts).save_pretrained(tmp_path / "i2v")
    loaded = load(str(tmp_path / "i2v"), "float32", Residency(CPU, lambda *_: None))
    factor = loaded.facts.size_multiple[0]
    size = {"height": 2 * factor, "width": 2 * factor, "frames": 5, "steps": 2}
    with pytest.raises(
        InputError, match="^image is missing: this WanImageToVideoPipeline needs a picture to start from"
    ):
        generate(loaded, settings(**size), on_step=ignore)
    pictures = [torch.full((1, 20, 30, 3), value) for value in (0.1, 0.9)]
    made = [generate(loaded, settings(**size), image=picture, on_step=ignore).frames for picture in pictures]
    assert made[0].shape == (5, 2 * factor, 2 * factor, 3) and not np.allclose(*made)


def test_the_last_frame(tmp_path):
    """Of a pipeline without an image encoder, as Wan 2.2's, which takes any pictures."""
    parts = WanPipeline.from_pretrained(demo.path()).components
    config = {**parts["transformer"].config, "in_channels": 8 + 4 + 8, "num_layers": 1}
    parts["transformer"] = WanTransformer3DModel.from_config(config)
    WanImageToVideoPipeline(**parts).save_pretrained(tmp_path / "i2v")
    loaded = load(str(tmp_path / "i2v"), "float32", Residency(CPU, lambda *_: None))
    size = {"height": 32, "width": 32, "frames": 5, "steps": 2}
    first, *last = (torch.full((1, 20, 30, 3), value) for value in (0.1, 0.4, 0.9))
    made = [generate(loaded, settings(**size), image=first, last_image=x, on_step=ignore).frames for x in (None, *last)]
    assert not torch.allclose(made[0], made[1]) and not torch.allclose(made[1], made[2])
    with pytest.raises(InputError, match="^image is missing"):
        generate(loaded, settings(**size), last_image=first, on_step=ignore)


def test_a_video_to_start_from(pipeline, moved):
    made = generate(pipeline, settings(), on_step=ignore).frames
    moved.clear()
    still = torch.full((12, 40, 60, 3), 0.3)
    again = generate(pipeline, settings(frames=None, steps=4), video=clip(made), on_step=ignore).frames
    other = generate(pipeline, settings(frames=None, steps=4), video=clip(still), on_step=ignore).frames
    assert again.shape == other.shape == (9, 64, 64, 3) and not torch.allclose(again, other)
    assert {name for name, _ in moved} == {"UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan"}
    part = generate(pipeline, settings(frames=None, steps=4, strength=0.25), video=clip(made), on_step=ignore)
    assert "64x64, 1 of 4 steps (strength 0.25), guidance 2" in report_text(part.report.news())
    near = part.frames
    assert (near - made).abs().mean() < (other - made).abs().mean()
    sparse = pipeline.accelerated(Acceleration(density=0.5))
    report = generate(sparse, settings(frames=None, steps=4), video=clip(made), on_step=ignore).report.news().report
    assert report.mean_density() < 0.9
    with pytest.raises(InputError, match="^strength is of use only with video"):
        generate(pipeline, settings(strength=0.5), on_step=ignore)
    with pytest.raises(InputError, match="^frames is 17: the input video has 12"):
        generate(pipeline, settings(frames=17), video=clip(still), on_step=ignore)
    assert torch.equal(generate(pipeline, settings(), on_step=ignore).frames, made)  # as it was
    with pytest.raises(InputError, match="^frames is 8: this model makes"):
        generate(pipeline, settings(frames=8), video=clip(still), on_step=ignore)


def clip(images):
    return lambda most: images


def test_no_more_of_a_video_is_read_than_is_used(pipeline):
    asked = []
    moving = torch.rand(30, 20, 30, 3)

    def some(most):
        asked.append(most)
        return moving[: None if most is None else most + 1]

    made = [generate(pipeline, settings(steps=4), video=each, on_step=ignore) for each in (clip(moving[:9]), some)]
    assert asked == [9] and torch.equal(made[0].frames, made[1].frames)
    assert "video: of its frames, the first 9 are used." in made[1].report.news().report.notes
    assert not any("are used" in note for note in made[0].report.news().report.notes)
    with pytest.raises(InputError, match="^face_video is of no use"):
        generate(pipeline, settings(), video=some, face_video=some, on_step=ignore)
    assert asked == [9]


@pytest.mark.parametrize(
    ("continues", "frames", "most"), [("", 9, 9), ("", None, None), ("inside", None, 33), ("before", 9, None)]
)
def test_which_frames_of_a_video_are_used(pipeline, continues, frames, most):
    facts = pipeline.starting_from(["video"]).facts
    facts = replace(facts, row=replace(facts.row, continues=continues))
    asked = []
    inputs.read(settings(frames=frames, video=lambda most: asked.append(most) or torch.rand(40, 8, 8, 3)), facts)
    assert asked == [most]


class Film:
    """A VIDEO of a file, whose first frames may be slower than its mean rate says."""

    def __init__(self, times, end=None):
        self.times, self.end, self.decoded = times, end, 0

    def get_frame_rate(self):
        return len(self.times) / self.times[-1]

    def get_duration(self):
        if self.times[-1] == math.inf:
            raise ValueError("Could not determine duration")
        return min(self.times[-1], self.end or math.inf)

    def as_trimmed(self, start, duration, strict_duration):
        assert start == 0 and not strict_duration
        self.trimmed = Film(self.times, duration)
        return self.trimmed

    def get_components(self):
        kept = [time for time in self.times if self.end is None or time < self.end]
        self.decoded = len(kept)
        return SimpleNamespace(images=torch.tensor(kept).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3))


@pytest.mark.parametrize("first", [0.1, 1.0, 20.0])
def test_the_first_frames_of_a_file_are_those_of_all_of_it(first):
    times = [first * n for n in range(5)] + [4 * first + 0.1 * n for n in range(1, 300)]
    film = Film(times)
    found = inputs.first_frames(film, True, 9)
    assert len(found) > 9 and torch.equal(found[:9], film.get_components().images[:9])
    if first == 0.1:
        assert film.trimmed.decoded < 13
    assert len(inputs.first_frames(film, False, 9)) == len(inputs.first_frames(film, True, None)) == 304
    assert len(inputs.first_frames(Film(times, 5 * first), True, 303)) == len(
        Film(times, 5 * first).get_components().images
    )
    film.get_duration = Film([math.inf]).get_duration
    assert len(inputs.first_frames(film, True, 9)) == 304  # a file that does not say how long it is
