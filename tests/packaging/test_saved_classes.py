"""What pipelines with classes of this package need where they are loaded: in a fresh process, `import vidaccel`."""

from __future__ import annotations

import json

import pytest
from diffusers import WanPipeline

import vidaccel
from vidaccel import DMDScheduler, GridScheduler, RCMScheduler, demo
from vidaccel.autoencoders import AutoencoderDCV

LOAD = "import vidaccel\nfrom diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained({!r})\n"


@pytest.mark.parametrize("scheduler", [DMDScheduler, GridScheduler, RCMScheduler])
def test_pipelines_with_a_scheduler_of_ours(fresh, on_path, tmp_path, scheduler):
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.scheduler = scheduler()
    pipe.save_pretrained(tmp_path / "model")
    name = scheduler.__name__
    out = fresh(
        LOAD.format(str(tmp_path / "model"))
        + f"print(type(pipe.scheduler) is vidaccel.{name}, type(pipe.scheduler).__module__)",
        on_path,
    )
    assert out.split("\n")[-2:-1] == [f"True {scheduler.__module__}"]


def test_generate(fresh, on_path, tmp_path):
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.scheduler = DMDScheduler()
    pipe.save_pretrained(tmp_path / "model")
    call = ["generate", "a dot", "--model", str(tmp_path / "model"), "--out", "out.mp4", "--device", "cpu"]
    call += ["--frames", "5", "--height", "64", "--width", "64", "--guidance-scale", "1"]
    fresh(f"import sys\nfrom vidaccel.cli import main\nsys.argv[1:] = {call}\nmain()", on_path)
    assert (tmp_path / "out.mp4").is_file()


def test_a_pipeline_with_the_autoencoder_of_ours(fresh, on_path, tmp_path):
    vae = AutoencoderDCV.from_pretrained(demo.path("demo-dc") / "vae")
    WanPipeline.from_pretrained(demo.path(), vae=None).save_pretrained(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = [AutoencoderDCV.__module__, AutoencoderDCV.__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "is True" in fresh(
        LOAD.format(str(tmp_path)) + "print('is', type(pipe.vae) is vidaccel.AutoencoderDCV)", on_path
    )


def test_a_saved_pipeline_class_of_ours(fresh, on_path, tmp_path):
    vidaccel.DCVideoGenPipeline.from_pretrained(demo.path("demo-dc")).save_pretrained(tmp_path)
    code = f"import vidaccel\npipe = vidaccel.DCVideoGenPipeline.from_pretrained({str(tmp_path)!r})\n"
    assert "is True" in fresh(code + "print('is', type(pipe.vae) is vidaccel.AutoencoderDCV)", on_path)


def test_modules_that_wait_are_the_modules_themselves(fresh, on_path):
    """However they are asked for, what is set on them and what is read of them is the module's own."""
    fresh(
        """
        import inspect, sys
        import vidaccel.pipelines.few_steps.dmd as early
        inspect.getmodule(early.__class__), hasattr(early, "__file__")
        assert "diffusers" not in sys.modules
        early.FASTWAN_SHIFT = 7.0
        from vidaccel.pipelines.few_steps import DMDScheduler, dmd, rcm
        assert dmd is sys.modules["vidaccel.pipelines.few_steps.dmd"] and dmd.FASTWAN_SHIFT == 7.0
        assert early.DMDScheduler is dmd.DMDScheduler is DMDScheduler and DMDScheduler.__module__ == dmd.__name__
        assert rcm.RCMScheduler.__module__ == "vidaccel.pipelines.few_steps.rcm"
        try:
            rcm.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        """,
        on_path,
    )
