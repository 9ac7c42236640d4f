"""`vidaccel convert fastwan`, and `vidaccel generate` with what it made, of a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
from diffusers import WanPipeline
from vsa_models import as_published, write_gates

import vidaccel as package
from vidaccel.generation.job import prepare
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.requests.sparse import Sparse
from vidaccel.pipelines.acceleration.vsa_files import find_gates
from vidaccel.pipelines.few_steps import convert_fastwan

SIZE = {"frames": 17, "height": 128, "width": 128}
SMALL = ("--frames", 17, "--height", 128, "--width", 128, "--device", "cpu")
"""5 x 8 x 8 tokens: eight cubes of 64, of which four are one frame thick."""


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_model):
    return as_published(write_gates(tmp_path_factory.mktemp("published") / "FastWan", tiny_model))


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    from typer.testing import CliRunner

    from vidaccel.cli import app

    folder = tmp_path_factory.mktemp("converted") / "fast"
    made = CliRunner().invoke(app, ["convert", "fastwan", str(published), str(folder), "--link"])
    assert made.exit_code == 0 and made.output.endswith(f"Wrote {folder}\n"), made.output
    return folder


def test_three_steps_with_what_it_was_trained_for(vidaccel, converted, tmp_path, caplog):
    out = tmp_path / "out.mp4"
    done = vidaccel("generate", "a dot", "--model", converted, "--out", out, *SMALL)
    assert done.exit_code == 0 and out.is_file(), done.output
    told = " ".join(done.output.split())
    assert "method vsa: the model was trained for it; --method dense for attention to all" in told
    assert "were not used" not in caplog.text


def test_other_densities_and_steps(vidaccel, converted, tmp_path):
    call = ("generate", "a dot", "--model", converted, "--out", tmp_path / "out.mp4", *SMALL)
    done = vidaccel(*call, "--method", "vsa", "--density", 0.5)
    assert done.exit_code == 0, done.output
    failed = vidaccel(*call, "--steps", 20)
    assert failed.exit_code == 2 and "this model is distilled to 3 steps" in " ".join(failed.output.split())


def test_as_it_is_published_it_says_what_to_do(vidaccel, published, tmp_path):
    failed = vidaccel("generate", "a dot", "--model", published, "--out", tmp_path / "out.mp4", *SMALL)
    told = " ".join(failed.output.split())
    assert failed.exit_code == 2 and "as FastVideo publishes its models (WanDMDPipeline)" in told
    assert "vidaccel convert fastwan" in told
    pipe = WanPipeline.from_pretrained(published)
    made = package.generate(
        pipe, "a dot", method="vsa", density=0.5, steps=2, frames=17, height=128, width=128, progress=False
    )
    assert made.name == "vsa"


@pytest.mark.parametrize("given", ["model", "pipe"])
def test_a_model_without_gates(tiny_model, given):
    model = tiny_model if given == "model" else WanPipeline.from_pretrained(tiny_model)
    small = {"frames": 17, "height": 128, "width": 128, "progress": False}
    with pytest.raises(ValueError, match="method is vsa: "):
        package.generate(model, "a dot", method="vsa", **small)
    made = package.generate(model, "a dot", method="vsa", settings={"vsa": {"gated": False}}, steps=2, **small)
    assert made.name == "vsa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere at all", "new"), "SOURCE is nowhere at all: it is neither a folder here nor a hub id"),
        (("published", "published"), "it exists already"),
        (("published", "new.safetensors", "--link"), "--link is of no use for new.safetensors, one file"),
        (("published", "new", "--density", 0), "--density is 0.0: it must be above 0 and at most 1"),
    ],
)
def test_what_is_refused(vidaccel, published, tmp_path, arguments, message):
    given = [{"published": published}.get(a, tmp_path / a if str(a).startswith("new") else a) for a in arguments]
    failed = vidaccel("convert", "fastwan", *given)
    assert failed.exit_code == 2 and message in " ".join(failed.output.split())
    assert not any(tmp_path.iterdir())


def test_one_file_for_comfyui(vidaccel, published, tmp_path):
    file = tmp_path / "fastwan.safetensors"
    done = vidaccel("convert", "fastwan", published, file, "--density", 0.5)
    assert done.exit_code == 0 and done.output.endswith(f"Wrote {file}\n"), done.output
    assert find_gates(file).trained.density == 0.5


def test_a_comparison_says_what_its_reference_is(vidaccel, converted, tmp_path):
    call = ("generate", "a dot", "--model", converted, "--out", tmp_path / "out.mp4", *SMALL)
    done = vidaccel(*call, "--compare", "--no-warm-up")
    assert done.exit_code == 0, done.output
    told = "The model was trained for vsa: dense runs without what it learned for that, and as the reference it is"
    assert told in " ".join(done.output.split())
    assert told in (tmp_path / "out.report.html").read_text()
    assert any(told in note for note in json.loads((tmp_path / "out.report.json").read_text())["notes"])


def test_dense_on_a_model_that_was_trained_for_another_attention(converted):
    job = prepare(str(converted), Settings("a dot", **SIZE), Sparse(methods=("dense", "radial")), device="cpu")
    (note,) = [note for note in job.notes if "was trained for" in note]
    assert note == "The model was trained for vsa: dense and radial runs without what it learned for that."


def test_few_steps_with_full_attention_stay_dense(tiny_model, tmp_path):
    """FastWan's FullAttn, at any length; what is asked for runs."""
    source = as_published(shutil.copytree(tiny_model, tmp_path / "FullAttn"))
    folder = convert_fastwan(source, tmp_path / "made", link=True)
    size = {"frames": 81, "height": 320, "width": 320}
    job = prepare(str(folder), Settings("a dot", **size), Sparse(), device="cpu")
    assert job.layout.tokens > 8192 and job.methods == {"dense": None}
    assert job.why.startswith("the model was distilled to 3 steps with attention to all, and each step counts")
    assert not job.hint and not job.notes
    asked = prepare(str(folder), Settings("a dot", **size), Sparse(methods=("tangent",)), device="cpu")
    assert list(asked.methods) == ["tangent"]
    with pytest.raises(ValueError, match="of use only with a sparse method, and the model was distilled to 3 steps"):
        prepare(str(folder), Settings("a dot", **size), Sparse(density=0.3), device="cpu")


def test_gates_that_nothing_is_said_of(published, tmp_path):
    """A folder that is no FastWan by the name of its class, with gates."""
    folder = as_published(shutil.copytree(published, tmp_path / "model"), "WanPipeline")
    job = prepare(str(folder), Settings("a dot", **SIZE), Sparse(), device="cpu")
    assert list(job.methods.values()) == [package.VSA(density=0.2)]


def test_what_cannot_be_tuned_is_refused_before_weights_are_read(vidaccel, converted, tiny_model, tmp_path, no_loading):
    call = ("tune", "a dot", "--out", tmp_path / "tune", "--min-psnr", 20, *SMALL)
    failed = vidaccel(*call, "--model", converted)
    assert failed.exit_code == 2 and "it was trained for vsa, and all that is measured" in " ".join(
        failed.output.split()
    )
    failed = vidaccel(*call, "--model", tiny_model, "--method", "vsa")
    assert (
        failed.exit_code == 2
        and "--method is vsa: it is none of the methods that can be measured without" in " ".join(failed.output.split())
    )
    failed = vidaccel("break-even", "--method", "vsa", "--seconds", 1, "--device", "cpu")
    assert failed.exit_code == 2 and "it is none of the methods that can be measured" in " ".join(failed.output.split())


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr("vidaccel.generation.tuning.api.load", lambda *a, **k: pytest.fail("weights were read"))
