"""Recipe `ae_adapt` on real Wan pipelines and a real `AutoencoderDCV`, at tiny sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from vidaccel.lora import run
from vidaccel.lora.backbones import wan_encoding
from vidaccel.lora.backbones.wan import WanBackbone
from vidaccel.lora.config import ConfigError, build, read
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.export import export_adapter
from vidaccel.lora.export import main as export_main
from vidaccel.lora.launch import config_folder
from vidaccel.lora.recipes.ae_adapt import AEAdapt, AEAdaptSettings, on_one_grid
from vidaccel.lora.recipes.base import Process
from vidaccel.lora.trainer import Stopped
from vidaccel.pipelines import DCVideoGenImageToVideoPipeline, DCVideoGenPipeline
from vidaccel.pipelines.deep_compression.adapted import load_adapter
from vidaccel.pipelines.files.weight_files import transformer_files

SIZE = {"frames": 8, "height": 64, "width": 64}


def write(folder: Path, base: Path, autoencoder: Path, **sections) -> Path:
    """Settings of a run of 2 steps a phase, in `folder/a.yaml`."""
    content = {
        "recipe": "ae_adapt",
        "out": str(folder / "run"),
        "model": {"base": str(base), "autoencoder": str(autoencoder)},
        "data": {"kind": "demo", "clips": 6, "contact_sheet": 0, "sizes": [SIZE], "cache": str(folder / "cache")},
        "phases": {
            "align": {"steps": 2, "batch_size": 2},
            "head": {"steps": 2, "learning_rate": 0.01},
            "lora": {"steps": 2, "rank": 2, "alpha": 6, "lr_warmup_steps": 0, "learning_rate": 0.01},
        },
        "validation": {"clips": 2, "prompts": ["a red circle"], "steps": 1, "guidance_scale": 2},
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    file = folder / "a.yaml"
    file.write_text(json.dumps(content))
    return file


def recipe(file: Path, overrides: Sequence[str] = ()) -> AEAdapt:
    made = AEAdapt(build(AEAdaptSettings, read(file, overrides)), Process(torch.device("cpu")))
    made.prepare()
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_base, autoencoder_folder) -> tuple[Path, dict]:
    """A run of all phases."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run("ae-adapt", write(folder, text_base, autoencoder_folder))


def test_the_pipeline_loads_and_generates(finished, autoencoder_folder):
    pipe = DCVideoGenPipeline.from_pretrained(finished[1]["pipeline"])
    config = pipe.transformer.config
    assert (tuple(config.patch_size), config.in_channels, config.out_channels) == ((1, 1, 1), 4, 4)
    assert type(pipe.transformer) is WanTransformer3DModel and pipe.vae.config.scaling_factor == 1.5
    assert pipe.text_encoder is not None and pipe.tokenizer is not None
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle", height=64, width=64, num_frames=8, num_inference_steps=1, output_type="pt").frames
    assert video.shape == (1, 8, 3, 64, 64) and video.isfinite().all()


def test_no_file_of_the_result_names_a_path_of_this_machine(finished, text_base, autoencoder_folder):
    for file in Path(finished[1]["pipeline"]).rglob("*.json"):
        text = file.read_text()
        assert str(text_base) not in text and str(autoencoder_folder) not in text, file


def test_the_adapter_is_what_changed(finished, text_base, autoencoder_folder):
    """Base, adapter and nothing else give the weights of the pipeline, with the LoRA apart or merged."""
    adapter = Path(finished[1]["adapter"])
    assert {file.name for file in adapter.iterdir()} == {
        "adapter.json",
        "embedder_head.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    facts = json.loads((adapter / "adapter.json").read_text())
    assert facts["base"] == str(text_base) and facts["autoencoder"] == "../pipeline/vae"
    assert facts["base_hash"] == transformer_files(str(text_base))
    transformer = load_adapter(WanBackbone(str(text_base), str(autoencoder_folder)).student(), adapter)
    merged = WanTransformer3DModel.from_pretrained(finished[1]["pipeline"], subfolder="transformer")
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 2, 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    }
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs).sample, merged(**inputs).sample, rtol=1e-4, atol=1e-5)
    changed = {name for name in load_file(adapter / "pytorch_lora_weights.safetensors")}
    assert any("attn1.to_q" in name for name in changed) and not any("attn2" in name for name in changed)
    assert any("time_proj" in name for name in changed) and any("ffn.net.2" in name for name in changed)
    assert not any("text_embedder" in name for name in changed)


def test_the_last_checkpoint_has_the_adapter_of_the_result(finished):
    """The LoRA with its alpha, too, though it was written from tensors alone."""
    from safetensors import safe_open

    run_folder = finished[0] / "run"
    for name in ("embedder_head.safetensors", "pytorch_lora_weights.safetensors"):
        files = [run_folder / "adapter" / name, run_folder / "checkpoints" / "step_00000006" / "adapter" / name]
        first, second = map(load_file, files)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        stated = [safe_open(file, "pt").metadata() for file in files]
        assert stated[0] == stated[1]
    facts = [
        json.loads((run_folder / at / "adapter" / "adapter.json").read_text())
        for at in (".", "checkpoints/step_00000006")
    ]
    assert {**facts[0], "autoencoder": ""} == {**facts[1], "autoencoder": ""}


def test_a_full_disk_while_the_result_is_written(tmp_path, text_base, autoencoder_folder, capsys):
    """One error with the path and the exit code of the documentation, nothing half written, and a resume writes it."""
    import resource

    from vidaccel.lora.__main__ import main

    file = write(tmp_path, text_base, autoencoder_folder, phases={"align": {"steps": 0}, "lora": {"steps": 0}})
    finish, limits = AEAdapt.finish, resource.getrlimit(resource.RLIMIT_FSIZE)

    def finish_on_a_full_disk(self, trained):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return finish(self, trained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AEAdapt, "finish", finish_on_a_full_disk)
        assert main(["ae_adapt", "--config", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.count("Error:") == 1 and "Traceback" not in said
    assert f"Error: {tmp_path / 'run' / 'pipeline'} could not be written: " in said and "MiB are free there" in said
    assert not [path for path in (tmp_path / "run").rglob("*.part")] and not (tmp_path / "run" / "pipeline").exists()
    assert main(["ae_adapt", "--config", str(file), "--resume", "latest"]) == 0
    assert (tmp_path / "run" / "pipeline" / "generation_defaults.json").is_file()


def test_a_run_that_was_moved_loads(finished, tmp_path):
    moved = shutil.copytree(finished[0] / "run", tmp_path / "moved")
    adapted = DCVideoGenPipeline.from_pretrained(moved / "adapter").transformer.state_dict()
    whole = DCVideoGenPipeline.from_pretrained(moved / "pipeline").transformer.state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(adapted[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_result_says_what_size_it_was_made_for(finished):
    wanted = {**SIZE, "guidance_scale": 2}
    assert json.loads((Path(finished[1]["adapter"]) / "adapter.json").read_text())["defaults"] == wanted
    assert json.loads((Path(finished[1]["pipeline"]) / "generation_defaults.json").read_text()) == wanted


def test_the_ready_settings_need_nothing_but_the_built_in_models(tmp_path):
    made = recipe(config_folder() / "demo_ae_adapt.yaml", [f"data.cache={tmp_path}", f"out={tmp_path}"])
    assert made.backbone.autoencoder.config.latent_channels == 32


@pytest.mark.parametrize("name", ["base", "autoencoder"])
def test_a_model_that_is_not_there(tmp_path, text_base, autoencoder_folder, name):
    file = write(tmp_path, text_base, autoencoder_folder)
    with pytest.raises(ConfigError, match=rf"model\.{name}: \./models/gone is no folder here, no hub id"):
        recipe(file, [f"model.{name}=./models/gone"])


def test_an_adapter_of_another_model_is_refused(finished, text_base):
    base = WanTransformer3DModel.from_pretrained(text_base, subfolder="transformer")
    with pytest.raises(ValueError, match=r"weight is \[24, 4, 1, 1, 1\] in the adapter and \[24, 8, 1, 2, 2\]"):
        load_adapter(base, Path(finished[1]["adapter"]))


def test_a_shipped_adapter_is_the_pipeline(finished, tmp_path):
    """In half precision, with the LoRA's alpha, which is not its rank here."""
    target = export_adapter(finished[0] / "run", tmp_path / "exported")
    exported = DCVideoGenPipeline.from_pretrained(target).transformer.state_dict()
    wanted = DCVideoGenPipeline.from_pretrained(finished[1]["pipeline"]).transformer.state_dict()
    assert exported.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(exported[name], value, rtol=2e-3, atol=2e-3, msg=name)
    for file in target.rglob("*.json"):  # nothing of the machine that it was made on
        assert str(finished[0]) not in file.read_text()


def test_what_each_phase_trained(finished):
    phases = {
        name: load_file(finished[0] / "run" / "phases" / f"{name}.safetensors") for name in ("align", "head", "lora")
    }
    embedder, head = {"patch_embedding.weight", "patch_embedding.bias"}, {"proj_out.weight", "proj_out.bias"}
    assert set(phases["align"]) == embedder
    assert set(phases["head"]) == embedder | head
    assert {name for name in phases["lora"] if ".lora_" not in name} == embedder | head


def test_an_interrupted_run_ends_bit_equal(finished, tmp_path, text_base, autoencoder_folder, stop_after):
    """In the middle of the LoRA's phase."""
    file = write(tmp_path, text_base, autoencoder_folder)
    stop_after(5)
    with pytest.raises(Stopped):
        run("ae_adapt", file)
    assert not (tmp_path / "run" / "pipeline").exists()
    run("ae_adapt", file, resume="latest")
    straight, resumed = (load_file(f / "run" / "phases" / "lora.safetensors") for f in (finished[0], tmp_path))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_validation_leaves_videos_and_numbers(finished):
    names = {file.name for file in (finished[0] / "run" / "validation").iterdir()}
    assert {"00000004_0.mp4", "00000004.png", "00000006_0.mp4"} <= names
    rows = [json.loads(line) for line in (finished[0] / "run" / "log.jsonl").read_text().splitlines()]
    assert {"align", "head", "lora"} == {row["phase"] for row in rows if any("validation_" in key for key in row)}


def test_alignment_learns(tmp_path, text_base, autoencoder_folder, caplog):
    file = write(
        tmp_path,
        text_base,
        autoencoder_folder,
        phases={
            "align": {"steps": 60, "batch_size": 4, "learning_rate": 0.02},
            "head": {"steps": 0},
            "lora": {"steps": 0},
        },
    )
    run("ae_adapt", file)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()  # skipped phases leave a whole pipeline
    # Whose head is all zeros.
    assert "phases.head.steps and phases.lora.steps are 0: the result will be an embedding alone" in caplog.text
    assert "proj_out.weight was not trained, so what is written makes no pictures" in caplog.text


def test_a_weight_of_the_object_is_for_the_demo_world(tmp_path, text_base, autoencoder_folder):
    more = {"data": {"kind": "videos", "folder": str(tmp_path), "clips": None}, "flow": {"object_weight": 4}}
    file = write(tmp_path, text_base, autoencoder_folder, **more)
    with pytest.raises(ConfigError, match=r"flow.object_weight is 4, of use only with data.kind demo.* set it to 1"):
        recipe(file)


def test_the_cache_is_used_again(tmp_path, text_base, autoencoder_folder, monkeypatch, caplog):
    phases = {"align": {"steps": 0}, "head": {"steps": 1}, "lora": {"steps": 0}}
    run("ae_adapt", write(tmp_path, text_base, autoencoder_folder, phases=phases))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(before) >= 4 + 5  # the clips that are not held out, captions and prompts
    monkeypatch.setattr(wan_encoding.WanTextEncoder, "encode", lambda *a: pytest.fail("a text was encoded again"))
    run("ae_adapt", write(tmp_path, text_base, autoencoder_folder, phases=phases), [f"out={tmp_path / 'second'}"])
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    first, second = (load_file(tmp_path / name / "phases" / "head.safetensors") for name in ("run", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "not trained" not in caplog.text and "embedding alone" not in caplog.text


def test_the_cache_changes_no_number(tmp_path, text_base, autoencoder_folder):
    phases = {"align": {"steps": 1}, "head": {"steps": 1}, "lora": {"steps": 0}}
    run("ae_adapt", write(tmp_path, text_base, autoencoder_folder, phases=phases))
    run("ae_adapt", tmp_path / "a.yaml", [f"out={tmp_path / 'second'}", "data.cache=null"])
    first, second = (load_file(tmp_path / name / "phases" / "head.safetensors") for name in ("run", "second"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_an_image_to_video_model(tmp_path, image_base, autoencoder_folder):
    result = run("ae_adapt", write(tmp_path, image_base, autoencoder_folder))
    pipe = DCVideoGenImageToVideoPipeline.from_pretrained(result["pipeline"])
    assert pipe.transformer.config.in_channels == 2 * 4 + 4 and pipe.image_encoder is not None
    pipe.set_progress_bar_config(disable=True)
    from PIL import Image

    image = Image.new("RGB", (64, 64), "red")
    video = pipe(image, "a", height=64, width=64, num_frames=8, num_inference_steps=1, output_type="pt").frames
    assert video.shape == (1, 8, 3, 64, 64) and video.isfinite().all()


def test_the_model_is_given_exactly_the_timestep_of_its_noise(tmp_path, text_base, autoencoder_folder, monkeypatch):
    """The noise level can be read off the input where clean latents are 0 and the noise is 1."""
    made = recipe(write(tmp_path, text_base, autoencoder_folder))
    phase = made.phases()[1]
    model = phase.setup({})
    seen = {}

    def forward(hidden_states, timestep, **_):
        seen.update(x=hidden_states, t=timestep)
        return (torch.zeros_like(hidden_states),)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: torch.ones(len(self), *shape))
    places = [Place(0, number, 8, number) for number in range(8)]
    phase.loss(model, {"latents": torch.zeros(8, 4, 2, 2, 2), "caption": ["a red circle"] * 8}, Generators(places))
    sigma = seen["x"].flatten(1).mean(1)
    torch.testing.assert_close(seen["t"], sigma * 1000, rtol=1e-6, atol=0)
    off_grid = (seen["t"] / 20).frac()  # a grid of 50 has multiples of 20
    assert ((off_grid > 1e-3) & (off_grid < 1 - 1e-3)).all()


def test_the_noise_is_that_of_the_level_that_the_model_is_told(tmp_path, text_base, autoencoder_folder, monkeypatch):
    made = recipe(write(tmp_path, text_base, autoencoder_folder, loop={"mixed_precision": "bf16"}))
    monkeypatch.setattr(made.backbone, "told", lambda sigma, dtype: sigma.mul(8).ceil() / 8)
    seen = {}
    monkeypatch.setattr(made.backbone, "velocity", lambda m, x, s, t, b: seen.update(x=x, s=s) or torch.zeros_like(x))
    monkeypatch.setattr(Generators, "normal", lambda self, *shape: torch.ones(len(self), *shape))
    places = [Place(0, number, 4, number) for number in range(4)]
    batch = {"latents": torch.zeros(4, 4, 1, 1, 1), "caption": ["a"] * 4}
    made.phases()[1].loss(None, batch, Generators(places))
    assert torch.equal(seen["x"][:, 0].flatten(), seen["s"]) and not (seen["s"] * 8).frac().any()


def test_the_adapter_names_models_that_are_found_from_anywhere(tmp_path, text_base, autoencoder_folder, monkeypatch):
    file = write(tmp_path, text_base, autoencoder_folder)
    (tmp_path / "demo").mkdir()
    (tmp_path / "base").symlink_to(text_base)
    monkeypatch.chdir(tmp_path)
    assert recipe(file, ["model.base=base"])._facts()["base"] == str(text_base)
    assert recipe(file, ["model.base=demo"])._facts()["base"] == "demo"


def test_a_folder_that_is_no_adapter_is_not_replaced(finished, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no adapter"):
        export_adapter(finished[0] / "run", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["adapter/adapter.json", "pipeline/vae/config.json"])
def test_a_run_with_a_file_that_is_no_json_is_not_packed(finished, tmp_path, capsys, name):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    for text, problem in (("{", "Expecting"), ("[]", "it must be an object, and is a list")):
        (tmp_path / "run" / name).write_text(text)
        with pytest.raises(ValueError, match=rf"run/{name} cannot be read: {problem}"):
            export_adapter(tmp_path / "run", tmp_path / "small")
        with pytest.raises(typer.Exit):
            export_main(tmp_path / "run", tmp_path / "small")
        assert f"{name} cannot be read: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_validation_that_cannot_be_written_does_not_end_the_run(tmp_path, text_base, autoencoder_folder, caplog):
    """And the numbers are there all the same."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation").write_text("in the way")
    phases = {"align": {"steps": 0}, "head": {"steps": 1}, "lora": {"steps": 0}}
    run("ae_adapt", write(tmp_path, text_base, autoencoder_folder, phases=phases))
    assert "validation could not be written to" in caplog.text
    assert "validation_error" in (tmp_path / "run" / "log.jsonl").read_text()


def test_dropped_prompts(tmp_path, text_base, autoencoder_folder, monkeypatch):
    made = recipe(write(tmp_path, text_base, autoencoder_folder, flow={"caption_dropout": 0.5}))
    phase, seen = made.phases()[1], []
    monkeypatch.setattr(made.backbone, "velocity", lambda m, x, s, texts, b: seen.extend(texts) or torch.zeros_like(x))
    places = [Place(0, number, 64, number) for number in range(64)]
    phase.loss(None, {"latents": torch.zeros(64, 4, 1, 1, 1), "caption": ["a red circle"] * 64}, Generators(places))
    empty = made.flowing.texts([""])[0]["states"]
    states = [text["states"] for text in seen]
    dropped = sum(text.shape == empty.shape and torch.equal(text, empty) for text in states)
    assert 20 <= dropped <= 44


def test_tokens_on_one_grid():
    teacher = torch.arange(16.0).view(1, 1, 1, 4, 4).expand(1, 1, 2, 4, 4)
    _, averaged = on_one_grid(torch.zeros(1, 1, 2, 2, 2), teacher)
    assert averaged[0, 0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    student, same = on_one_grid(torch.zeros(1, 1, 1, 2, 2), teacher[:, :, :1])
    assert student.shape == same.shape == (1, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="cannot be averaged"):
        on_one_grid(torch.zeros(1, 1, 2, 3, 3), teacher)


def test_pictures_are_needed_to_start_from(tmp_path, image_base, autoencoder_folder):
    with pytest.raises(ConfigError, match="validation.clips is 0, but videos from prompts need their first frames"):
        recipe(write(tmp_path, image_base, autoencoder_folder, validation={"clips": 0, "prompts": ["a"]}))


def test_settings_that_do_not_fit(tmp_path, text_base, autoencoder_folder):
    file = write(tmp_path, text_base, autoencoder_folder)
    for override, words in (
        ("data.sizes.0.height=48", "48x64 must be a multiple of 32"),
        ("data.sizes.0.frames=9", "clips of 9 frames do not fit: their number must be a multiple of 4"),
        ("model.dtype=bfloat16", "set loop.mixed_precision"),
        ("validation.clips=6", "only 6 clips"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("ae_adapt", file, [override])
    assert not (tmp_path / "run").exists()


def test_half_precision(tmp_path, image_base, autoencoder_folder):
    """Frozen weights in bfloat16, as on a GPU; what is trained stays float32, and the result is bfloat16."""
    loop = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    file = write(tmp_path, image_base, autoencoder_folder, loop=loop)
    result = run("ae_adapt", file, ["model.dtype=bfloat16"])
    trained = load_file(tmp_path / "run" / "phases" / "lora.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    saved = load_file(Path(result["pipeline"]) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved["patch_embedding.weight"].dtype == saved["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("cached", [True, False])
def test_a_video_folder_with_a_damaged_file(
    tmp_path, video_folder, damage, text_base, autoencoder_folder, caplog, cached
):
    """Two shapes, three clips a video; of one video only the beginning is whole, whatever its header says."""
    import shutil

    folder = tmp_path / "videos"
    shutil.copytree(video_folder, folder)
    damage(folder / "e.mp4")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "e.mp4", "text": "video e"}')
    sizes = [{"frames": 8, "height": 32, "width": 64}, {"frames": 8, "height": 64, "width": 32}]
    data = {"kind": "videos", "folder": str(folder), "clips": None, "sizes": sizes}
    data["cache"] = str(tmp_path / "cache") if cached else None
    phases = {"align": {"steps": 0}, "head": {"steps": 12, "batch_size": 2}, "lora": {"steps": 0}}
    sections = {"data": data, "phases": phases, "validation": {"prompts": []}}
    run(
        "ae_adapt", write(tmp_path, text_base, autoencoder_folder, **sections), ["seed=2"]
    )  # of which e is not measured
    assert "e.mp4 cannot be decoded: " in caplog.text
    assert ("it is left out" if cached else "another clip takes its place") in caplog.text


def test_a_run_that_trains_nothing_is_refused(tmp_path, text_base, autoencoder_folder):
    """Its result was the model with a new embedder at random."""
    phases = {name: {"steps": 0} for name in ("align", "head", "lora")}
    with pytest.raises(ConfigError, match="phases: no phase has steps, so nothing would be trained"):
        run("ae_adapt", write(tmp_path, text_base, autoencoder_folder, phases=phases))
    assert not (tmp_path / "run").exists()
