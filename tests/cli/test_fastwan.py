"""`vidaccel convert fastwan`, and `vidaccel generate` with what it made, of a tiny model."""

from __future__ import annotations

import pytest
from diffusers import WanPipeline
from vsa_models import as_published, write_gates

import vidaccel as package

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
        (("published", "new", "--density", 0), "--density is 0.0: it must be above 0 and at most 1"),
    ],
)
def test_what_is_refused(vidaccel, published, tmp_path, arguments, message):
    given = [{"published": published, "new": tmp_path / "new"}.get(a, a) for a in arguments]
    failed = vidaccel("convert", "fastwan", *given)
    assert failed.exit_code == 2 and message in " ".join(failed.output.split())
    assert not (tmp_path / "new").exists()
