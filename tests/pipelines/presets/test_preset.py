"""A preset as a description: what it refuses, and files that hold it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

from vidaccel import METHODS, SLA, SVG, DenseSchedule, Method, Preset, Radial, Tangent, demo
from vidaccel.pipelines.presets import (
    Cache,
    Compile,
    LoraFile,
    PresetError,
    Quantize,
    SchedulerChoice,
    apply,
    load_preset,
    save_preset,
    shipped_presets,
)


def full(folder: Path) -> Preset:
    return Preset(
        name="all of it",
        summary="every lever",
        model="some/model",
        base="some/base",
        family="Wan 2.1 / 2.2",
        transformer={"num_layers": 3, "patch_size": [1, 2, 2]},
        method=Tangent(density=0.25, schedule=DenseSchedule(first_steps=0.2, last_steps=1, sigma_above=0.95)),
        backend="reference",
        precision="int8",
        guidance_free=(str(folder / "gft.safetensors"),),
        loras=(LoraFile(folder / "a.safetensors", 0.8), LoraFile(folder / "b.safetensors", 1.0, "transformer_2")),
        cache=Cache("magcache", 0.1, {"mag_ratios": [1.0, 0.9], "retention_ratio": 0.25}),
        quantize=Quantize("int8", activations=True, keep=False),
        compile=Compile(dynamic=True),
        scheduler=SchedulerChoice("UniPCMultistepScheduler", {"flow_shift": 5.0}),
        num_inference_steps=20,
        guidance_scale=4.5,
        measured={"psnr": 31.5},
    )


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_holds_all_of_it(tmp_path, suffix):
    preset = full(tmp_path)
    file = save_preset(preset, tmp_path / f"a{suffix}")
    assert load_preset(file) == preset
    content = json.loads(file.read_text()) if suffix == ".json" else yaml.safe_load(file.read_text())
    assert content["version"] == 1 and content["attention"]["schedule"]["last_steps"] == 1
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_file_holds_every_method(tmp_path):
    for name, kind in METHODS.items():
        preset = Preset(method=kind())
        assert load_preset(save_preset(preset, tmp_path / f"{name}.yaml")) == preset


@dataclass(frozen=True, kw_only=True)
class Near(Method):
    """Of nobody's package."""

    name: ClassVar[str] = "near"
    reach: int = 1

    def plan(self, *given): ...


@dataclass(frozen=True, kw_only=True)
class MySVG(SVG):
    """With the name of another."""

    extra: int = 3


def test_a_file_holds_no_method_that_it_cannot_name(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    with pytest.raises(
        PresetError, match=r"method is Near: .* 'near' is not in vidaccel\.METHODS\. Register it .*Near\.$"
    ):
        save_preset(Preset(method=Near(reach=2)), file)
    with pytest.raises(PresetError, match=r"method is MySVG: a file names a method, and 'svg' is SVG\. Give it a name"):
        save_preset(Preset(method=MySVG()), file)
    assert not file.exists() and Preset(method=Near()).to_dict()["attention"]["method"] == "near"
    monkeypatch.setitem(METHODS, "near", Near)
    assert load_preset(save_preset(Preset(method=Near(reach=2)), file)).method == Near(reach=2)


def test_a_file_holds_what_was_measured_in_kinds_of_its_own(tmp_path):
    measured = {"a": torch.tensor(3.0), "b": np.float32(0.5), "c": (1, 2)}
    preset = load_preset(
        save_preset(Preset(measured=measured, transformer={"num_layers": np.int64(6)}), tmp_path / "a.yaml")
    )
    assert preset.measured == {"a": 3.0, "b": 0.5, "c": [1, 2]} and preset.transformer == {"num_layers": 6}


def test_files_are_beside_the_preset_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("version: 1\nloras: [x.safetensors]\nguidance_free: own\n")
    preset = load_preset(tmp_path / "a.yaml")
    assert preset.loras == (LoraFile(tmp_path / "x.safetensors"),) and preset.guidance_free == ("own",)
    # And those that are given relative to the current folder stay where they are.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    save_preset(Preset(loras=(LoraFile(Path("x.safetensors")),), decoder="y.safetensors"), "other/b.yaml")
    loaded = load_preset("other/b.yaml")
    assert loaded.loras[0].path == tmp_path / "x.safetensors" and loaded.decoder == str(tmp_path / "y.safetensors")
    for decoder in ("own", "owner/name"):
        assert load_preset(save_preset(Preset(decoder=decoder), "other/c.yaml")).decoder == decoder


def test_a_model_is_beside_the_preset_that_names_it_or_where_it_was(tmp_path, monkeypatch):
    """A folder there goes before others; the built-in models and hub ids are names."""
    for folder in ("mine", "demo", "there/own", "there/owner/name"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model_index.json").write_text("{}")
    for folder in ("there/other/name", "third/name"):  # empty, as a download that failed leaves it
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    (there / "notes").write_text("of the model of this name")
    (there / "x.safetensors").write_bytes(b"")
    (there / "run").mkdir()
    (there / "run" / "config.yaml").write_text("recipe: ae_adapt\n")
    for name, found in (
        ("own", there / "own"),
        ("owner/name", there / "owner" / "name"),
        ("../mine", tmp_path / "mine"),
        ("mine", "mine"),
        ("demo", "demo"),
        ("other/name", "other/name"),
        ("third/name", "third/name"),
        ("notes", "notes"),
        ("x.safetensors", there / "x.safetensors"),
        ("run", there / "run"),
        ("x" * 300, "x" * 300),
        ("x/" + "y" * 300, "x/" + "y" * 300),
    ):
        (there / "a.yaml").write_text(f"version: 1\nmodel: {name}\nbase: {name}\n")
        loaded = load_preset("there/a.yaml")
        assert loaded.model == loaded.base and Path(loaded.model).absolute() == Path(found).absolute(), name
    # What is named relative to the current folder is found from elsewhere, too.
    save_preset(Preset(model="mine", base="demo"), "there/b.yaml")
    monkeypatch.chdir(there)
    loaded = load_preset("b.yaml")
    assert (loaded.model, loaded.base) == (str(tmp_path / "mine"), "demo")
    for name in ("other/name", "x" * 300):
        assert load_preset(save_preset(Preset(model=name), "b.yaml")).model == name
    assert load_preset(save_preset(Preset(decoder="x/" + "y" * 300), "b.yaml")).decoder == "x/" + "y" * 300


def test_what_is_not_said_is_the_default():
    preset = Preset.from_dict({"version": 1, "attention": "radial", "cache": "first_block", "quantize": "int8"})
    assert preset == Preset(method=Radial(), cache=Cache("first_block"), quantize=Quantize("int8"))
    assert Preset.from_dict({"version": 1}).to_dict() == {"version": 1, "name": "preset"}


def test_one_stands_for_a_list_of_one_and_nothing_for_none(tmp_path):
    texts = {
        "loras: a.safetensors": Preset(loras=str(tmp_path / "a.safetensors")),
        "loras: {file: a.safetensors, weight: 0.5}": Preset(loras=LoraFile(tmp_path / "a.safetensors", 0.5)),
        "guidance_free: a.safetensors": Preset(guidance_free=str(tmp_path / "a.safetensors")),
        "attention: {method: sla, adapters: a.safetensors}": Preset(method=SLA(), sla=str(tmp_path / "a.safetensors")),
        "cache: {name: first_block, settings: }": Preset(cache=Cache("first_block")),
        "scheduler: {name: A, settings: }": Preset(scheduler=SchedulerChoice("A")),
        "loras:\nguidance_free:\nattention:\ncache:": Preset(),
    }
    for text, wanted in texts.items():
        (tmp_path / "a.yaml").write_text(f"version: 1\n{text}\n")
        assert load_preset(tmp_path / "a.yaml") == wanted, text


def test_a_name_that_stands_twice(tmp_path):
    (tmp_path / "a.yaml").write_text("version: 1\ncache: first_block\nattention: svg2\ncache: seacache\n")
    with pytest.raises(PresetError, match=r"a\.yaml cannot be read: cache is there twice .*line 4"):
        load_preset(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("version: 1\ncache: {name: first_block, threshold: 0.1, threshold: 0.2}\n")
    with pytest.raises(PresetError, match=r"threshold is there twice .*line 2"):
        load_preset(tmp_path / "a.yaml")
    (tmp_path / "a.json").write_text('{"version": 1, "cache": "first_block", "cache": "seacache"}')
    with pytest.raises(PresetError, match=r"a\.json cannot be read: cache is there twice"):
        load_preset(tmp_path / "a.json")


def test_what_is_merged_may_be_replaced(tmp_path):
    merged = "version: 1\ncache: {<<: {name: first_block, threshold: 0.1}, threshold: 0.2}\n"
    (tmp_path / "a.yaml").write_text(merged)
    assert load_preset(tmp_path / "a.yaml").cache == Cache("first_block", 0.2)
    (tmp_path / "a.yaml").write_text(merged.replace("threshold: 0.2", "threshold: 0.2, threshold: 0.3"))
    with pytest.raises(PresetError, match="threshold is there twice"):
        load_preset(tmp_path / "a.yaml")


def test_names_stand_for_what_has_defaults():
    short = Preset(method="radial", cache="first_block", quantize="fp8", loras="a.safetensors", guidance_free="own")
    assert short == Preset(
        method=Radial(),
        cache=Cache("first_block"),
        quantize=Quantize("fp8"),
        loras=(LoraFile(Path("a.safetensors")),),
        guidance_free=("own",),
    )


@pytest.mark.parametrize(
    ("content", "lever", "message"),
    [
        ({}, "version", "version is missing: this vidaccel reads version 1"),
        ({"version": 2, "news": 1}, "version", "version is 2: this vidaccel reads version 1. Update vidaccel."),
        ({"version": "1"}, "version", "version is '1': it must be a whole number. Write version: 1."),
        ({"version": True}, "version", "version is True: it must be a whole number"),
        ({"version": 1.0}, "version", "version is 1.0: it must be a whole number"),
        ({"version": 1, "cach": "first_block"}, "", "there is no cach; did you mean cache"),
        ({"version": 1, "cache": "first_blok"}, "cache", "first_blok: there is none of that name; did you mean first"),
        ({"version": 1, "cache": {"threshold": 1}}, "cache", "it has no name"),
        ({"version": 1, "cache": "magcache"}, "cache", "magcache needs mag_ratios"),
        (
            {"version": 1, "cache": {"name": "first_block", "threshold": -1}},
            "cache.threshold",
            "is -1: it must be at least 0",
        ),
        (
            {"version": 1, "cache": {"name": "first_block", "threshold": "1e-4"}},
            "cache.threshold",
            "is '1e-4': it must be a number. YAML takes",
        ),
        (
            {"version": 1, "cache": {"name": "seacache", "settings": {"residual_order": 2}}},
            "cache.residual_order",
            "at least 0 and at most 1",
        ),
        ({"version": 1, "cache": {"name": "taylorseer", "threshold": 1}}, "cache.threshold", "must be at least 2"),
        (
            {"version": 1, "cache": {"name": "taylorseer", "threshold": 2.5}},
            "cache.threshold",
            "must be a whole number",
        ),
        ({"version": 1, "cache": {"name": "seacache", "settings": {"order": 2}}}, "cache", "seacache has no setting o"),
        ({"version": 1, "quantize": "int4"}, "quantize", "int4: it must be one of int8, fp8"),
        ({"version": 1, "attention": "radiall"}, "attention", "there is no method 'radiall'"),
        (
            {"version": 1, "attention": {"method": "svg2", "settings": {"topp": 1}}},
            "attention",
            "svg2 has no setting topp",
        ),
        ({"version": 1, "attention": {"method": "svg2", "schedule": {"first": 1}}}, "attention", "has no first"),
        ({"version": 1, "attention": {"method": "svg2", "settings": {"top_p": 2}}}, "attention", "top_p"),
        ({"version": 1, "attention": {"method": "svg2", "backend": "cuda9"}}, "backend", "cuda9"),
        ({"version": 1, "attention": {"method": "svg2", "precision": "int2"}}, "precision", "int2"),
        ({"version": 1, "num_inference_steps": 0}, "num_inference_steps", "is 0: it must be a whole number of at le"),
        ({"version": 1, "guidance_scale": 0.5}, "guidance_scale", "is 0.5: it must be at least 1"),
        (
            {"version": 1, "attention": "dense"},
            "attention",
            "is dense: it is for sparse attention. Leave",
        ),
        ({"version": 1, "attention": {"method": "none"}}, "attention", "is none: it is for sparse attention. Leave a"),
        ({"version": 1, "attention": {"method": "svg2", "schedule": 5}}, "attention.schedule", "names and values"),
        ({"version": 1, "attention": {"method": "svg2", "settings": "a"}}, "attention.settings", "names and values"),
        (
            {"version": 1, "attention": {"method": "sla", "adapters": 5}},
            "attention.adapters",
            "5: it must be a file or",
        ),
        ({"version": 1, "guidance_free": True}, "guidance_free", "is True: it must be a file or a list of them"),
        ({"version": 1, "guidance_free": {"file": "a"}}, "guidance_free", "a file must be a text that names it"),
        ({"version": 1, "loras": 5}, "loras", "is 5: it must be a file or a list of them"),
        ({"version": 1, "loras": [5]}, "loras", "it must be a file, or hold names and values (file, weight, target)"),
        ({"version": 1, "loras": {"a": "b.safetensors"}}, "loras", "there is no a; there are file, weight, target"),
        ({"version": 1, "loras": {"file": "a", "weight": "x"}}, "loras.weight", "'x': it must be a finite number"),
        ({"version": 1, "scheduler": {"name": 5}}, "scheduler.name", "is 5: it must be a text"),
        ({"version": 1, "scheduler": {"name": "A", "settings": [1]}}, "scheduler.settings", "be names and values"),
        ({"version": 1, "cache": {"name": 5}}, "cache.name", "is 5: it must be a text"),
        ({"version": 1, "cache": {"name": "first_block", "settings": 5}}, "cache.settings", "must be names and values"),
        ({"version": 1, "cache": 5}, "cache", "it must be its name alone, or hold names and values (name, threshold"),
        ({"version": 1, "compile": 3}, "compile", "it must be true, false, a mode, or hold names and values (mode, d"),
        ({"version": 1, "attention": []}, "attention", "[]: it must be the name of a method, or hold names and values"),
        ({"version": 1, "loras": [3]}, "loras", "3: it must be a file, or hold names and values (file, weight, targ"),
        ({"version": 1, "model": 5}, "model", "is 5: it must be a text"),
        ({"version": 1, "loras": [{"weight": 1}]}, "loras", "each needs a file"),
        ({"version": 1, "loras": [{"file": "a", "target": "vae"}]}, "loras.target", "'vae': it must be one of all"),
    ],
)
def test_what_cannot_be_is_named(content, lever, message):
    with pytest.raises(PresetError) as raised:
        Preset.from_dict(content)
    assert raised.value.lever == lever and message in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance_free": ("own",), "guidance_scale": 1.0}, "guidance_free: .* guidance_scale 1 has none"),
        ({"guidance_free": True}, "guidance_free is True: it must be a file"),
        ({"method": SVG(schedule=None)}, r"method: SVG\.schedule is None: give a DenseSchedule"),
        ({"loras": 5}, "loras is 5: it must be a file"),
        ({"cache": 5}, "cache is 5: it must be a Cache, its name or None"),
        ({"precision": "int8"}, "precision: .* there is no method"),
        ({"sla": ("a",), "method": Radial()}, "sla: the adapters are for the method sla, and it is radial"),
        (
            {
                "method": Radial(schedule=DenseSchedule(first_steps=3, last_steps=1)),
                "cache": Cache("first_block"),
                "num_inference_steps": 4,
            },
            "cache: the schedule keeps all 4 steps dense",
        ),
    ],
)
def test_levers_that_refuse_one_another(fields, message):
    with pytest.raises(PresetError, match=message):
        Preset(**fields)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_file_of_an_editor_that_marks_the_order_of_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"version": 1, "num_inference_steps": 5}')
    assert load_preset(tmp_path / name) == Preset(num_inference_steps=5)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_file_that_is_nested_too_deeply(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(PresetError, match=f"{name} cannot be read: it is nested too deeply"):
        load_preset(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PresetError, match="there is no preset none.yaml"):
        load_preset("none.yaml")
    (tmp_path / "a.yaml").write_text("version: [")
    with pytest.raises(PresetError, match=r"a\.yaml cannot be read"):
        load_preset(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("version: 1\ncache: none\n")
    with pytest.raises(PresetError, match=r"cache is none: .*in .*a\.yaml"):
        load_preset(tmp_path / "a.yaml")
    with pytest.raises(PresetError, match="suffix"):
        save_preset(Preset(), tmp_path / "a.txt")
    with pytest.raises(
        PresetError, match=r"^.* is a folder, and there is no preset\.yaml in it\. Give a file, or the f"
    ):
        load_preset(tmp_path)


def test_the_folder_of_a_tune_stands_for_its_preset(tmp_path):
    file = save_preset(Preset(name="tuned", cache="forecast"), tmp_path / "preset.yaml")
    assert load_preset(tmp_path) == load_preset(file)


def test_only_a_text_is_told_how_yaml_takes_numbers():
    for value, hint in (("1e-4", True), (float("nan"), False), ([1], False)):
        with pytest.raises(PresetError, match="cache.threshold is .*: it must be a number") as raised:
            Cache("first_block", value)
        assert ("YAML" in str(raised.value)) is hint


def test_those_of_the_package_can_be_read():
    for name in shipped_presets():
        preset = load_preset(name)
        assert preset.name == name and preset.summary and preset.family and preset.levers()


def test_those_of_the_package_say_what_stands_for_them():
    """What was measured here names its table, whose numbers are in it; the others say that nothing was."""
    root = Path(__file__).parents[3]
    for name in shipped_presets():
        preset = load_preset(name)
        if not preset.model.startswith("demo"):
            assert "Not measured here with these weights" in preset.summary, name
        else:
            [row] = [
                line for line in (root / preset.measured["table"]).read_text().splitlines() if f"| {name} |" in line
            ]
            nearness = preset.measured[f"psnr_to_{preset.model.replace('-', '_')}"]
            for number in (preset.measured["right"].split(" (")[0], nearness, preset.measured["times_as_fast_as_demo"]):
                assert f"| {number} |" in row, name
    assert len(load_preset("wan-2.1-1.3b-480p-magcache").cache.settings["mag_ratios"]) == 50


def test_the_adapter_of_a_preset_of_the_package_is_in_the_package():
    preset = load_preset("demo-dc-four-steps")
    (place,) = preset.guidance_free
    assert Path(place) == Path(demo.path("demo-dc"), "transformer", "few_steps_4.safetensors").resolve()
    assert preset.levers()["guidance_free"] == "few_steps_4.safetensors" and preset.num_inference_steps == 4


def test_what_is_no_preset(tmp_path):
    with pytest.raises(PresetError, match=r"^a preset must be names and values, and this is a str\. load_preset reads"):
        Preset.from_dict("svg")
    for wrong, kind in (({"version": 1}, "dict"), (3, "int")):
        with pytest.raises(PresetError, match=rf"^a {kind} is no preset\. Give a Preset, a file or a name"):
            apply(None, wrong)
    with pytest.raises(PresetError, match="measure_error is 8, and a preset without a method has no sparse attention"):
        apply(None, Preset(), measure_error=8)


def test_settings_are_the_presets_own():
    given = {"mag_ratios": [1.0] * 5}
    cache, scheduler = Cache("magcache", settings=given), SchedulerChoice("A", given)
    given["more"] = 1
    assert list(cache.settings) == list(scheduler.settings) == ["mag_ratios"]


def test_the_value_of_an_error_is_text():
    with pytest.raises(PresetError) as raised:
        Preset(version=2)
    assert raised.value.value == "2"
