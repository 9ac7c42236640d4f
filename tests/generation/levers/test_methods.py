"""Which methods a request means: settings that belong together, densities that cannot be met, runs of one method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from diffusers import WanPipeline

import vidaccel
from vidaccel import SVG2, Radial, Sparge, Tangent, demo
from vidaccel.attention import BlockPlan, DenseSchedule, Method, VideoLayout
from vidaccel.attention.methods import RandomBlocks
from vidaccel.generation.errors import BadInput, worded
from vidaccel.generation.job import Sparse, prepare
from vidaccel.generation.levers.methods import build_method, labels
from vidaccel.generation.requests.settings import Settings

PROMPT = "a red circle moves left on a grey background"
SMALL = {"frames": 9, "height": 64, "width": 64, "steps": 3, "progress": False}
LAYOUT = VideoLayout(9, 16, 16)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("random", {"density": 0.9}),
        ("svg", {"density": 0.9}),
        ("svg2", {"top_p": 0.9}),
        ("svg2", {"min_ratio": 0.2}),
        ("radial", {"decay": 0.2}),
        ("radial", {"rule": "published"}),
        ("sparge", {"topk": 0.2}),
        ("sparge", {"cdf": 0.9}),
        ("tangent", {"tolerance": 0.1}),
    ],
)
def test_what_a_density_decides_cannot_be_set_too(name, setting):
    field = next(iter(setting))
    with pytest.raises(
        BadInput, match=rf"^settings is {name}\.{field}: density 0\.4 decides it\. Give one of the two\.$"
    ):
        build_method(name, LAYOUT, density=0.4, overrides=setting)
    made = build_method(name, LAYOUT, overrides={**setting, **({"block_size": 128} if name == "radial" else {})})
    assert getattr(made, field) == setting[field]


def test_a_density_takes_the_other_settings_into_account():
    """The search, or the calibration, is of the method as it will run."""
    for block in ((16, 16), (128, 64)):
        made = build_method("sparge", LAYOUT, density=0.4, overrides={"block": block})
        assert made == Sparge.for_density(LAYOUT, 0.4, block=block)
    made = build_method("radial", LAYOUT, density=0.4, overrides={"sink": 0, "block_size": 16}, dense_layers=2)
    assert (made.sink, made.block_size, made.schedule.first_layers) == (0, 16, 2)
    assert made.expected_density(LAYOUT) == pytest.approx(0.4, abs=0.01)
    made = build_method("svg2", LAYOUT, density=0.4, overrides={"compensate": True}, dense_steps=0.5)
    assert made == SVG2(density=0.4, compensate=True, schedule=DenseSchedule(first_steps=0.5))


def test_one_setting_may_stand_for_another():
    assert build_method("tangent", LAYOUT, overrides={"tolerance": 0.1}) == Tangent(tolerance=0.1)
    assert build_method("sparge", LAYOUT, overrides={"cdf": 0.9}) == Sparge(cdf=0.9)
    with pytest.raises(BadInput, match=r"^method is tangent: .*density.*tolerance"):
        build_method("tangent", LAYOUT, overrides={"tolerance": 0.1, "density": 0.2})


# -- densities that cannot be met --------------------------------------------------------------------------------------


def test_a_density_that_is_known_to_be_another_is_said_before_the_run():
    size = Settings(PROMPT, frames=33, height=64, width=64)
    job = prepare("demo", size, Sparse(["radial"], 0.6), device="cpu")
    reached = job.methods["radial"].expected_density(job.layout)
    assert abs(reached - 0.6) > 0.01
    assert job.notes == (f"radial: density 0.6 cannot be met on this video; the nearest is {reached:.3f}.",)
    assert prepare("demo", size, Sparse(["svg2"], 0.6), device="cpu").notes == ()


def test_a_plan_that_covers_all_pairs_is_said_before_the_run():
    size = Settings(PROMPT, frames=9, height=64, width=64)
    said = ("{}: its plan covers all pairs of this video, so nothing is skipped; give density.",)
    for name in ("radial", "lvsa"):
        job = prepare("demo", size, Sparse([name]), device="cpu")
        assert tuple(worded(note) for note in job.notes) == tuple(note.format(name) for note in said)
    for asked in (Sparse(["radial"], 0.8), Sparse(["svg2"]), Sparse([SVG2(density=1.0)])):
        assert not any("covers all pairs" in note for note in prepare("demo", size, asked, device="cpu").notes)


def test_words_that_a_built_in_model_does_not_know_are_said_before_the_run(pipe):
    size = {"frames": 9, "height": 64, "width": 64}
    for model in ("demo", "demo-dc", pipe):
        (note,) = prepare(model, Settings("a cat surfs a wave", **size), Sparse()).notes
        assert note.startswith("The built-in model does not know cat, surfs, wave: it makes videos of prompts such as ")
        assert prepare(model, Settings(PROMPT, **size), Sparse()).notes == ()


def test_a_density_of_whole_blocks_is_said_before_the_run(pipe):
    """48 tokens are 3 blocks of 16: a share of 0.27 becomes one of them."""
    made = vidaccel.generate(pipe, PROMPT, method="random", density=0.27, dense_steps=1, backend="gather", **SMALL)
    assert made.notes == ("random: density 0.27 cannot be met on this video; the nearest is 0.333.",)
    made = vidaccel.generate(pipe, PROMPT, method="random", density=0.333, dense_steps=1, backend="gather", **SMALL)
    assert made.notes == ()


def test_a_density_that_turned_out_to_be_another_is_said_after_it(pipe, monkeypatch):
    monkeypatch.setattr(RandomBlocks, "expected_density", lambda method, layout: None)
    made = vidaccel.generate(pipe, PROMPT, method="random", density=0.27, dense_steps=1, backend="gather", **SMALL)
    sparse = [record.density for record in made.report.records if not record.reason]
    assert sparse == pytest.approx([1 / 3] * len(sparse)) and sparse
    assert made.notes == ("random: density 0.27 was not met; its sparse calls computed 0.333 of the pairs.",)


# -- methods that cannot run -------------------------------------------------------------------------------------------


def test_of_the_methods_of_a_comparison_one_without_a_backend_is_left_out():
    """The methods that were not asked for by name; nothing is loaded yet."""
    job = prepare("demo", Settings(PROMPT), Sparse(backend="flex"), compare=True, device="cpu")
    assert list(job.methods) == ["dense", "svg2", "radial"]
    why = "tangent is left out: flex cannot compute what stands for the keys that tangent skips on cpu"
    assert [note for note in job.notes if note.startswith("tangent")] == [why]
    for asked in ("tangent", Tangent(), SVG2(density=0.5, compensate=True)):
        with pytest.raises(BadInput, match=r"^backend is flex: flex cannot .* Give auto, gather, masked, reference"):
            prepare("demo", Settings(PROMPT), Sparse([asked], backend="flex"), compare=True, device="cpu")
    assert prepare("demo", Settings(PROMPT), Sparse([SVG2()], backend="flex"), device="cpu").notes == ()


def test_the_default_method_alone_says_itself_why_it_cannot(monkeypatch):
    monkeypatch.setattr("vidaccel.pipelines.default_method.MIN_SPARSE_TOKENS", 48)
    small = Settings(PROMPT, frames=9, height=64, width=64)
    with pytest.raises(BadInput, match=r"^method is tangent: Tangent density is 0\.1, but one stand-in .* raise"):
        prepare("demo", small, Sparse(density=0.1), device="cpu")


def test_a_video_that_the_default_method_cannot_do_is_dense_where_nothing_was_asked(monkeypatch):
    """32 tokens, with more stand-ins than the pairs that it computes."""
    monkeypatch.setattr("vidaccel.pipelines.default_method.MIN_SPARSE_TOKENS", 1)
    small = Settings(PROMPT, frames=5, height=64, width=64)
    job = prepare("demo", small, Sparse(), device="cpu")
    assert job.methods == {"dense": None} and job.why == "tangent is the choice, but cannot do this video"
    (note,) = (note for note in job.notes if note.startswith("tangent"))
    assert note.startswith("tangent is left out: Tangent density is 0.2, but one stand-in for each key cluster makes")
    with pytest.raises(BadInput, match=r"^method is tangent: Tangent density is 0\.2"):
        prepare("demo", small, Sparse(["tangent"]), device="cpu")


# -- several runs of one method ----------------------------------------------------------------------------------------


def test_labels_tell_what_differs():
    assert labels([SVG2(), Radial()]) == ["svg2", "radial"]
    configs = [SVG2(top_p=0.9), Radial(), SVG2(top_p=0.8, density=0.3), SVG2(schedule=DenseSchedule(first_steps=2))]
    assert labels(configs) == [
        "svg2-top_p=0.9-first_steps=0.3",
        "radial",
        "svg2-top_p=0.8-density=0.3-first_steps=0.3",
        "svg2-top_p=0.9-first_steps=2",
    ]
    assert labels([Sparge(block=(64, 64)), Sparge()]) == ["sparge-block=_64_64_", "sparge-block=_128_64_"]


def test_labels_leave_out_what_is_not_set():
    """Of a density and a tolerance one is None; a label of settings that are all None is the method's name alone."""
    configs = [Tangent(tolerance=0.1), Tangent(tolerance=0.2), Tangent(density=0.7), Tangent(density=0.7, k_clusters=8)]
    assert labels(configs) == [
        "tangent-tolerance=0.1",
        "tangent-tolerance=0.2",
        "tangent-density=0.7",
        "tangent-density=0.7-k_clusters=8",
    ]
    assert labels([Tangent(), Tangent(probe=True), Tangent(probe=False)]) == [
        "tangent",
        "tangent-probe=True",
        "tangent-probe=False",
    ]


def test_two_configs_of_one_method_are_compared(pipe, tmp_path):
    low, high = (RandomBlocks(density=density, schedule=DenseSchedule(first_steps=1)) for density in (0.3, 0.7))
    made = vidaccel.generate(
        pipe, PROMPT, method=[low, high, low], compare=True, warm_up=False, backend="gather",
        out=tmp_path / "clip.mp4", report=tmp_path / "page.html", **SMALL,
    )  # fmt: skip
    names = ["dense", "random-density=0.3", "random-density=0.7"]
    assert [video.name for video in made.videos] == names and list(made.metrics) == names[1:]
    assert made.metrics[names[1]].mean_psnr != made.metrics[names[2]].mean_psnr
    assert [file.name for file in made.files] == ["clip.dense.mp4", "clip.mp4", "clip.random-density=0.7.mp4"]
    assert all(file.is_file() for file in made.files)
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in names)


def test_a_comparison_refuses_two_videos_of_one_name(comparison, clip):
    """Its metrics are by name: one would stand for the other."""
    made = comparison(svg=clip)
    with pytest.raises(ValueError, match="names of their own, got dense, svg, svg"):
        replace(made, videos=(*made.videos, made.videos[1]), files=())


def test_a_config_that_is_its_methods_default_is_the_same_run():
    job = prepare("demo", Settings(PROMPT), Sparse(["svg2", SVG2()]), compare=True, device="cpu")
    assert list(job.methods) == ["dense", "svg2"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SVG2, r"^method is svg2: it is the class, not a config\. Give SVG2\(\)\.$"),
        ([Radial(), SVG2], r"^method is svg2: it is the class"),
        (5, r"^method is 5: it must be a name, or a config such as SVG2\(\)\.$"),
        ([None], r"^method is None: it must be a name"),
        (SVG2(schedule=None), r"^method is SVG2\(.*\): SVG2\.schedule is None: give a DenseSchedule"),
    ],
)
def test_what_is_no_method(loads_nothing, method, message):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate("demo", PROMPT, method=method, compare=True, device="cpu", **SMALL)


def test_a_config_of_ones_own_method_runs(pipe):
    """Its name is no more than a label."""

    @dataclass(frozen=True, kw_only=True)
    class Near(Method):
        name: ClassVar[str] = "near"
        reach: int = 1

        def plan(self, q, k, v, layout, memory):
            return BlockPlan.dense(layout.tokens, layout.tokens)

    made = vidaccel.generate(pipe, PROMPT, method=Near(schedule=DenseSchedule(first_steps=1)), **SMALL)
    assert made.name == "near" and made.report.method == "near"
    assert labels([SVG2(), *(type(name, (Near,), {"name": "svg2"})() for name in "A")])[0].startswith("svg2-")
