"""`vidaccel convert turbowan`, and `vidaccel generate` with what it made, of a tiny model."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from turbowan_files import in_layout, own_weights

import vidaccel as package
from vidaccel.generation.media.video_reader import read_video

SMALL = ("--frames", 17, "--height", 128, "--width", 128, "--device", "cpu", "--backend", "gather")
"""5 x 8 x 8 tokens: five blocks of 64."""


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model):
    torch.manual_seed(2)
    model = WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer")
    path = tmp_path_factory.mktemp("published") / "TurboWan-tiny.pth"
    torch.save(in_layout(own_weights(model)), path)
    return path


@pytest.fixture(scope="module")
def converted(source, tiny_model, tmp_path_factory):
    from typer.testing import CliRunner

    from vidaccel.cli import app

    folder = tmp_path_factory.mktemp("converted") / "turbo"
    made = CliRunner().invoke(
        app, ["convert", "turbowan", str(source), str(folder), "--base", str(tiny_model), "--link"]
    )
    assert made.exit_code == 0 and made.output.endswith(f"Wrote {folder}\n"), made.output
    return folder


def test_four_steps_with_what_it_was_trained_for(vidaccel, converted, tmp_path, caplog):
    """Steps, guidance and method come from the folder, and nothing is said of weights that are read later."""
    out = tmp_path / "out.mp4"
    done = vidaccel("generate", "a dot", "--model", converted, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "method sla: the model was trained for it; --method dense for attention to all" in told
    assert "20 %" in told  # one of the five key blocks
    assert read_video(out)[0].shape == (17, 128, 128, 3)
    assert "were not used" not in caplog.text
    forecast = " ".join(vidaccel("info", "--forecast", "--model", converted, *SMALL[:6]).output.split())
    assert "tokens 320" in forecast


def test_more_steps_are_refused(vidaccel, converted, tmp_path):
    failed = vidaccel("generate", "a dot", "--model", converted, "--out", tmp_path / "a.mp4", *SMALL, "--steps", 20)
    told = " ".join(failed.output.split())
    assert failed.exit_code == 2 and "--steps is 20: this model is distilled to 4 steps at the most. Give 4." in told


def test_accelerate_and_a_loaded_pipeline(converted):
    """In Python: the projections change the result, leave with the handle, and `generate` knows a loaded pipeline."""
    pipe = WanPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)

    def latents():
        call = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 1.0}
        draw = torch.Generator().manual_seed(0)
        return pipe("a dot", **call, generator=draw, output_type="latent").frames

    dense = latents()
    with package.accelerate(pipe, "sla", backend="gather") as handle:
        sparse = latents()
        records = handle.report().records
        assert len(records) == 4 * 2 and not any(record.reason for record in records)
        assert {round(record.density, 6) for record in records} == {0.2}
    assert torch.equal(latents(), dense) and not torch.equal(sparse, dense)
    with package.accelerate(pipe, "sla", backend="gather"), torch.no_grad():
        assert torch.equal(latents(), sparse)
        for block in pipe.transformer.blocks:
            block.attn1.proj_l.weight.zero_()
        assert not torch.equal(latents(), sparse)  # so the linear attention counts

    pipe = WanPipeline.from_pretrained(converted)
    first = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: first.append(kwargs["hidden_states"]), with_kwargs=True
    )
    made = package.generate(pipe, "a dot", frames=17, height=128, width=128, backend="gather", progress=False)
    assert made.name == "sla" and len(made.report.records) == 4 * 2
    noise = torch.randn(first[0].shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first[0], noise * (80 / 81))  # as published, which the pipeline's own call leaves out


def test_another_share_of_blocks(vidaccel, converted, tmp_path, edit_json):
    """As the page says: topk is changed in the folder, and a run of another is refused."""
    import json
    import shutil

    folder = shutil.copytree(converted, tmp_path / "model", symlinks=True)
    asked = ["generate", "a dot", "--model", folder, "--out", tmp_path / "out.mp4", *SMALL]
    failed = vidaccel(*asked, "--set", "sla.topk=0.4")
    assert failed.exit_code == 2 and "topk is 0.4, trained with 0.1" in " ".join(failed.output.split())
    stated = json.loads((folder / "transformer/config.json").read_text())["_trained_for"]["sla"]
    edit_json(folder / "transformer/config.json", _trained_for={"sla": {**stated, "topk": 0.4}})
    done = vidaccel(*asked)
    assert done.exit_code == 0 and "40 %" in done.output, done.output


def test_a_community_lora_on_top(vidaccel, converted, tmp_path):
    """An ordinary Wan LoRA, with the names of diffusers, is loaded on the converted model."""
    from safetensors.torch import save_file

    lora = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 32),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(32, 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    made = []
    for name, more in (("without", ()), ("with", ("--lora", tmp_path / "lora.safetensors"))):
        out = tmp_path / f"{name}.mp4"
        done = vidaccel("generate", "a dot", "--model", converted, "--out", out, *SMALL, *more)
        assert done.exit_code == 0, done.output
        made.append(read_video(out)[0])
    assert (made[0] != made[1]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-file.pth", "out"), "SOURCE is no-file.pth: there is no such file or folder"),
        ((None, "."), "TARGET is .: it exists already"),
        ((None, "out", "--low-noise", "no-file.pth"), "--low-noise is no-file.pth: there is no such file"),
        ((None, "out", "--weights", "ema"), "--weights is ema: it must be net or net_ema"),
        ((None, "out", "--weights", "net_ema"), "has neither net nor net_ema, so weights= cannot be net_ema"),
        ((None, "out"), "of no published size: give the Wan pipeline that has the rest with base="),
    ],
)
def test_what_is_refused(vidaccel, source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    failed = vidaccel("convert", "turbowan", *(source if a is None else a for a in arguments))
    assert failed.exit_code == 2 and message in " ".join(failed.output.split()), failed.output
    assert not list(tmp_path.iterdir())


def test_the_kind_may_be_left_out(vidaccel):
    """`convert SOURCE TARGET` is DC-VideoGen's, as before."""
    assert "Autoencoder" not in vidaccel("convert", "turbowan", "--help").output
    for kind in ((), ("dc-videogen",)):
        failed = vidaccel("convert", *kind, "no-file", "out", "--chunk-size", 8)
        assert failed.exit_code == 2 and "SOURCE is no-file: there is no such file or folder" in failed.output
    told = vidaccel("convert", "--help").output
    assert "turbowan" in told and "dc-videogen" in told
