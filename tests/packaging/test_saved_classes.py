"""What pipelines with classes of this package need where they are loaded: in a fresh process, `import vidaccel`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import WanPipeline

import vidaccel
from vidaccel import DMDScheduler, GridScheduler, RCMScheduler, demo
from vidaccel.autoencoders import AutoencoderDCV

# What each of the processes begins with; the classes of ours are not loaded by it.
START = "import vidaccel\nfrom diffusers import DiffusionPipeline, WanPipeline\n"
LOAD = "pipe = DiffusionPipeline.from_pretrained({!r})\n"
SCHEDULERS = (DMDScheduler, GridScheduler, RCMScheduler)


@pytest.fixture(scope="module")
def made(fresh_each, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the processes ran, and what each printed."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = WanPipeline.from_pretrained(demo.path())
    codes = {}
    for scheduler in SCHEDULERS:
        name = scheduler.__name__
        pipe.scheduler = scheduler()
        pipe.save_pretrained(folder / name)
        codes[name] = LOAD.format(str(folder / name)) + "kind = type(pipe.scheduler)\n"
        codes[name] += f"print(kind is vidaccel.{name}, kind.__module__)"
    call = ["generate", "a dot", "--model", str(folder / "DMDScheduler"), "--out", "out.mp4", "--device", "cpu"]
    call += ["--frames", "5", "--height", "64", "--width", "64", "--guidance-scale", "1"]
    codes["generate"] = f"import sys\nfrom vidaccel.cli import main\nsys.argv[1:] = {call}\nmain()"
    pipe.vae = AutoencoderDCV.from_pretrained(demo.path("demo-dc") / "vae")
    pipe.save_pretrained(folder / "autoencoder")
    index = json.loads((folder / "autoencoder" / "model_index.json").read_text())
    index["vae"] = [AutoencoderDCV.__module__, AutoencoderDCV.__name__]
    (folder / "autoencoder" / "model_index.json").write_text(json.dumps(index))
    ours = "print('is', type(pipe.vae) is vidaccel.AutoencoderDCV)"
    codes["autoencoder"] = LOAD.format(str(folder / "autoencoder")) + ours
    vidaccel.DCVideoGenPipeline.from_pretrained(demo.path("demo-dc")).save_pretrained(folder / "pipeline")
    codes["pipeline"] = f"pipe = vidaccel.DCVideoGenPipeline.from_pretrained({str(folder / 'pipeline')!r})\n" + ours
    return folder, fresh_each(START, codes, folder)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pipelines_with_a_scheduler_of_ours(made, scheduler):
    assert made[1][scheduler.__name__].split("\n")[-2:-1] == [f"True {scheduler.__module__}"]


def test_pickle_loads_none_of_them(fresh, on_path):
    """It asks all loaded modules for `torch`, and crashed where one of them loaded others meanwhile: as torch.compile
    does, where this package was imported before torch."""
    code = "import vidaccel, sys, torch, pickle\n"
    code += "print(pickle.loads(pickle.dumps(torch.contiguous_format)) is torch.contiguous_format)\n"
    code += "print('diffusers' in sys.modules, vidaccel.GridScheduler.__name__)"
    assert fresh(code, on_path).split("\n")[-3:-1] == ["True", "False GridScheduler"]


def test_generate(made):
    assert (made[0] / "out.mp4").is_file()


def test_a_pipeline_with_the_autoencoder_of_ours(made):
    assert "is True" in made[1]["autoencoder"]


def test_a_saved_pipeline_class_of_ours(made):
    assert "is True" in made[1]["pipeline"]


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
