"""int8 as users reach it: through whole pipelines, with its error measured, and refused where it cannot be had."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("diffusers")

from length_adapters import write_length
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel import SVG2, DenseSchedule, Tangent
from vidaccel.attention import RandomBlocks
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor

SPARSE = DenseSchedule(first_steps=1, first_layers=1)
SHORT = {"steps": 2, "frames": 9, "size": 64, "guidance_scale": 1.0}
METHODS = {
    "blocks": (RandomBlocks(density=0.6, block_size=32), "a scale for each token of Q and 32 keys"),
    "svg2": (SVG2(density=0.6, q_clusters=3, k_clusters=6, init_iterations=2), "a scale for each token"),
    "tangent": (Tangent(density=0.5, q_clusters=3, k_clusters=6), "a scale for each token"),
}


def accelerated(pipe, method, device, **options):
    with vidaccel.accelerate(pipe.to(device), method, schedule=SPARSE, measure_error=32, **options) as handle:
        return generate(pipe, **SHORT), handle.report()


@pytest.mark.parametrize("name", METHODS)
def test_a_pipeline_runs_and_the_report_says_what_it_costs(device, name):
    method, scales = METHODS[name]
    pipe = make_pipe()
    exact, _ = accelerated(pipe, method, device, backend="triton")
    out, report = accelerated(pipe, method, device, precision="int8")
    assert not out.equal(exact), "nothing was computed in 8 bits"
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.05)
    assert report.config["precision"] == "int8"
    assert set(report.backends()) == {"dense", "triton"}
    kept = f"precision int8: Q K^T of sparse calls in 8 bits, with {scales}; dense calls keep float32"
    assert [note for note in report.notes if note.startswith("precision")] == [kept]
    assert report.measured() and "precision=int8" in str(report)


def test_the_meter_shows_what_int8_adds(device):
    """With all pairs computed there is no other error."""
    every = SVG2(top_p=1.0, q_clusters=3, k_clusters=6, init_iterations=2)
    errors = [
        accelerated(make_pipe(), every, device, backend="triton", precision=precision)[1].median_error()
        for precision in (None, "int8")
    ]
    assert errors[0] < 1e-4 < 1e-3 < errors[1] < 0.03


def test_a_tolerance_does_not_claim_what_int8_adds(device):
    """The method measures what its pairs leave, and only that."""
    tight = Tangent(tolerance=0.001, q_clusters=3, k_clusters=6)
    _, exact = accelerated(make_pipe(), tight, device, backend="triton")
    _, report = accelerated(make_pipe(), tight, device, precision="int8")
    assert exact.measured_by_method() and "the method itself measured" in exact.error_in_words()
    assert report.median_error() > 0.001 and not report.measured_by_method()
    assert "the method itself predicted" in report.error_in_words()
    told = "; what 8 bits add to the error is beside the tolerance, and measure_error tells it"
    assert [note for note in report.notes if note.endswith(told)] and not any(n.endswith(told) for n in exact.notes)


def test_a_lora_for_longer_videos_takes_a_precision(device, tmp_path):
    from diffusers import WanPipeline

    make_pipe().save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path, **dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer_2")))
    pipe.set_progress_bar_config(disable=True)
    file = write_length(tmp_path, tmp_path, pipe.transformer)
    found = []
    for options in ({"backend": "triton"}, {"precision": "int8"}):
        with vidaccel.lengthen(pipe.to(device), file, **options) as handle:
            found.append(generate(pipe, **SHORT))
    assert handle.report().config["precision"] == "int8"
    assert not found[1].equal(found[0]), "nothing was computed in 8 bits"
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, r"precision is 'int4': choose \"int8\", or None"),
        ({"precision": "fp8"}, ValueError, r"on Hopper the compiled kernel takes 720 instructions"),
        (
            {"precision": "int8", "backend": "gather"},
            RuntimeError,
            "'gather' does not compute with qk='int8'",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(device, options, error, message):
    pipe = make_pipe().to(device)
    with pytest.raises(error, match=message):
        vidaccel.accelerate(pipe, "svg2", **options)
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())


def test_a_machine_without_the_kernels_is_told_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(RuntimeError, match=r"with qk='int8': backend 'triton' runs on cuda; on the cpu only in"):
        vidaccel.accelerate(make_pipe(), "svg2", precision="int8")


def test_the_first_call_tells_what_only_calls_tell(device):
    """Though it is dense: the first sparse step may be minutes away."""
    pipe = make_pipe().to(device)
    with vidaccel.accelerate(pipe, "svg2", schedule=DenseSchedule(first_steps=9), precision="int8"):
        hidden, text = torch.randn(1, 4, 3, 8, 8, device=device), torch.randn(1, 6, 16, device=device)
        inputs = {"timestep": torch.tensor([500], device=device), "encoder_hidden_states": text}
        with pytest.raises(RuntimeError, match=r"'triton' has no backward with qk='int8': call it under torch.no_grad"):
            pipe.transformer(hidden_states=hidden, **inputs)
        with torch.no_grad():
            assert pipe.transformer(hidden_states=hidden, **inputs).sample.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the request is for the interpreter")
def test_a_request_is_checked_and_carried_out(device):
    from vidaccel.generation.job import Sparse, prepare
    from vidaccel.generation.report.described import described
    from vidaccel.generation.requests.settings import Settings

    small = {"frames": 5, "height": 32, "width": 32, "steps": 2, "guidance_scale": 1.0}
    asked = {"methods": ("svg2",), "density": 0.9, "precision": "int8"}
    job = prepare("demo", Settings("a red dot", **small), Sparse(**asked), device="cpu")
    assert job.precision == "int8" and described(job)["precision"] == "int8 in sparse attention"
    asked = {"method": "svg2", "density": 0.9, "dense_steps": 1, "precision": "int8", "device": "cpu"}
    made = vidaccel.generate("demo", "a red dot", **asked, **small)
    assert made.report.config["precision"] == "int8" and "triton" in made.report.backends()
