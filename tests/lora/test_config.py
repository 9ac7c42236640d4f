"""Settings: every fault at once, each with what would be right."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from vidaccel.lora import config_folder, run
from vidaccel.lora.config import ConfigError, Settings, as_yaml, build, differences, flat, load, read, setting
from vidaccel.lora.places import absent
from vidaccel.lora.recipes import RECIPES, find
from vidaccel.lora.settings import DataSettings, LoopSettings


@dataclass(frozen=True)
class Part(Settings):
    rate: float = setting(0.1, above=0, below=1)
    kind: Literal["round", "square"] = "round"


@dataclass(frozen=True)
class Whole(Settings):
    name: str
    steps: int = setting(10, low=0)
    on: bool = False
    limit: float | None = setting(None, above=0, free=True)
    pair: tuple[float, float] = (0.9, 0.99)
    parts: tuple[Part, ...] = ()
    part: Part = field(default_factory=Part)

    def check(self):
        if self.on and not self.parts:
            yield "parts is empty: give one, or set on to false."


def test_defaults_and_values():
    made = build(Whole, {"name": "x", "parts": [{"rate": 0.5}], "limit": 3, "steps": 1e3, "part": {"rate": "1e-3"}})
    assert made == Whole(name="x", parts=(Part(rate=0.5),), limit=3.0, steps=1000, part=Part(rate=0.001))
    assert isinstance(made.limit, float) and isinstance(made.steps, int)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, ["name is missing"]),
        ({"name": 3}, ["name is the number 3, but must be text"]),
        ({"name": "a \ud83d"}, [r"name has \ud83d, which is half of a character: write the character itself"]),
        ({"name": "x", "stepz": 1}, ['stepz is not known: did you mean "steps"?']),
        ({"name": "x", "part": {"rte": 1}}, ['part.rte is not known: did you mean "rate"?']),
        ({"name": "x", "qqqqqq": 1}, ["known: name, steps"]),
        ({"name": "x", "steps": -1}, ["steps is -1: it must be at least 0"]),
        ({"name": "x", "steps": True}, ["steps is true or false, but must be a whole number"]),
        ({"name": "x", "steps": 1.5}, ["must be a whole number"]),
        ({"name": "x", "on": 1}, ["must be true or false"]),
        ({"name": "x", "part": {"rate": 1}}, ["part.rate is 1.0: it must be below 1"]),
        ({"name": "x", "part": {"rate": 0}}, ["part.rate is 0.0: it must be above 0"]),
        ({"name": "x", "part": {"rate": float("nan")}}, ["must be finite"]),
        ({"name": "x", "part": {"kind": "flat"}}, ["'flat', but must be one of round, square"]),
        ({"name": "x", "part": 3}, ["part is the number 3, but must be a mapping"]),
        ({"name": "x", "pair": [1]}, ["pair has 1 entries, but must have 2"]),
        ({"name": "x", "pair": 1}, ["must be a list"]),
        ({"name": "x", "parts": [{"rate": 0.5}, {"rate": 7}]}, ["parts.1.rate is 7.0"]),
        ({"name": "x", "on": True}, ["parts is empty"]),
        ({"steps": -1, "stepz": 1, "part": {"rate": 5}}, ["3 faults", "name is missing", "stepz", "part.rate is 5.0"]),
    ],
)
def test_faults_are_named(content, words):
    with pytest.raises(ConfigError) as caught:
        build(Whole, content)
    for word in words:
        assert word in str(caught.value)


def test_parts_that_are_not_given_keep_the_defaults_of_their_place():
    @dataclass(frozen=True)
    class Outer(Settings):
        part: Part = field(default_factory=lambda: Part(rate=0.7, kind="square"))

    assert build(Outer, {"part": {"rate": 0.2}}).part == Part(rate=0.2, kind="square")


def test_a_bare_no_is_a_word():
    assert build(LoopSettings, yaml.safe_load("mixed_precision: no")).mixed_precision == "no"


def test_checks_hold_without_yaml():
    with pytest.raises(ConfigError, match="rate is 2: it must be below 1"):
        Part(rate=2)


def test_overrides(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nparts: [{rate: 0.5}]\n")
    made = load(Whole, file, ["steps=5", "parts.0.rate=0.25", "part.kind=square", "pair=[0, 1]", "limit=null"])
    assert (made.steps, made.parts[0].rate, made.part.kind, made.pair, made.limit) == (5, 0.25, "square", (0, 1), None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", 'write it as "a.b=value"'),
        ("parts.3.rate=1", "has the entries 0 to 0"),
        ("name.x=1", 'name is the text "x" and has no'),
        ("stepz=1", 'did you mean "steps"'),
        ("steps=[", "no YAML"),
        ("part={rate: 0.5, rate: 0.7}", "rate is there twice"),
        pytest.param("steps=" + "[" * 10_000, "no YAML: it is nested too deeply", id="deep"),
    ],
)
def test_bad_overrides(tmp_path, override, words):
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nparts: [{rate: 0.5}]\n")
    with pytest.raises(ConfigError, match=words):
        load(Whole, file, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("[1]", "a list"),
        ("a: [", "cannot be read"),
        ("", "empty"),
        ("name: x\nsteps: 1\nsteps: 2\n", "steps is there twice.*\n.*line 3"),
        ("name: x\npart: {rate: 0.5, rate: 0.7}\n", "rate is there twice"),
        pytest.param("[" * 10_000, "cannot be read as YAML: it is nested too deeply", id="deep"),
    ],
)
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(Whole, file)


def test_what_is_merged_may_be_replaced(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nparts: [&one {rate: 0.5}, &two {<<: *one, rate: 0.25}, {<<: *two, rate: 0.75}]\n")
    assert [part.rate for part in load(Whole, file).parts] == [0.5, 0.25, 0.75]


def test_written_settings_are_read_back(tmp_path):
    made = Whole(name="x", parts=(Part(),), limit=2.0)
    (tmp_path / "a.yaml").write_text(as_yaml(made))
    assert load(Whole, tmp_path / "a.yaml") == made


def test_differences_leave_out_what_is_free():
    old = Whole(name="x", parts=(Part(rate=0.5),), limit=2.0)
    assert differences(old, Whole(name="x", parts=(Part(rate=0.5),))) == []
    new = Whole(name="x", steps=11, parts=(Part(rate=0.25), Part()))
    lines = differences(old, new)
    assert "steps: 10 then, 11 now" in lines
    assert "parts.0.rate: 0.5 then, 0.25 now" in lines
    assert "parts.1.rate: absent then, 0.1 now" in lines
    assert flat(old)["limit"] == 2.0


def test_a_run_may_go_on_with_other_prompts_and_more_steps():
    """What training does not depend on. With a fall of the learning rate it depends on the steps."""
    start = load(find("ae_adapt").Config, config_folder() / "wan2.1_t2v_1.3b_ae_adapt.yaml")
    lora = replace(start.phases.lora, steps=60_000)
    more = replace(start, validation=replace(start.validation, prompts=("a",)), phases=replace(start.phases, lora=lora))
    assert differences(start, more) == []
    falling = replace(start, phases=replace(start.phases, lora=replace(lora, lr_scheduler="cosine")))
    # Of which the steps are refused alone where the rate fell then, too: with the rate of then they may change.
    assert differences(start, falling) == ["phases.lora.lr_scheduler: 'constant' then, 'cosine' now"]
    shorter = replace(falling, phases=replace(falling.phases, lora=replace(falling.phases.lora, steps=50_000)))
    assert differences(shorter, falling) == ["phases.lora.steps: 50000 then, 60000 now"]
    held = replace(start, validation=replace(start.validation, clips=2))
    assert differences(start, held) == ["validation.clips: 16 then, 2 now"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demo_ltxx_lora", r'did you mean "demo_lora"'),
        ("zzz.yaml", r"ready settings of that name: known: cogvideox_lora"),
    ],
)
def test_ready_settings_of_no_such_name(name, words):
    with pytest.raises(ConfigError, match=f"{name}: no such file, and no .*{words}"):
        run("lora", name)


@pytest.mark.parametrize("file", sorted(config_folder().glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_settings_are_right(file):
    name = next(name for name in sorted(RECIPES, key=len, reverse=True) if name in file.stem)
    config = load(find(name).Config, file)
    assert config.recipe == name
    if getattr(config.data, "fps", None) and hasattr(config, "validation"):
        assert getattr(config.validation, "fps", None) is None  # else another data.fps makes videos of the wrong speed
    if name == "tiny_decoder":
        assert config.model.autoencoder_dtype == ("bfloat16" if file.stem.startswith("wan") else "float32")
    elif file.stem.startswith("wan"):
        assert config.model.autoencoder_dtype == config.model.dtype == "bfloat16"
        last = config.data.sizes[-1]  # of the videos that validation makes
        assert last.width > last.height


def test_a_zoom_of_videos_is_refused():
    """They were taken as they are, whatever it said."""
    assert DataSettings(zoom=(1.0, 2.0)).zoom == (1.0, 2.0)
    with pytest.raises(ConfigError, match=r"^zoom is \[1.0, 2.0\], of use only with kind demo: leave it out"):
        DataSettings(kind="videos", folder="videos", zoom=(1.0, 2.0))


def test_unknown_recipe():
    with pytest.raises(ConfigError, match='did you mean "ae_adapt"'):
        find("ae_adopt")
    assert find("ae-adapt") is find("ae_adapt")


def test_a_recipe_of_ones_own_is_its_class_or_names_it(tmp_path, monkeypatch):
    (tmp_path / "my_recipes.py").write_text("class Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(RECIPES, "mine", "my_recipes:Mine")
    cls = find("mine")
    assert cls.__module__ == "my_recipes"
    monkeypatch.setitem(RECIPES, "mine", cls)
    assert find("mine") is cls
    for row in ("my_recipes:Other", "no_recipes:Mine", ("nothing", "Mine")):
        monkeypatch.setitem(RECIPES, "mine", row)
        with pytest.raises(ConfigError, match=r"was registered, but there is no \w+ in a module"):
            find("mine")
    monkeypatch.setitem(RECIPES, "mine", "my_recipes")
    with pytest.raises(ConfigError, match=r"'my_recipes' names no class: register the class itself"):
        find("mine")


def test_the_home_of_the_user_is_written_with_a_tilde_in_every_place(tmp_path, monkeypatch):
    """No shell sees what is in YAML: a run was written into a folder of the name "~", beside where it was started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("recipe: consistency\nout: ~/run\ndata: {folders: [{path: ~/v}], cache: ~/c}\n")
    places = [
        "model.base=~/m.gguf",
        "model.components=~/p",
        "lora.start=~/s",
        "consistency.teacher=~/t",
        "train.steps=1",
    ]
    content = read(tmp_path / "a.yaml", ["data.kind=videos", "train.steps=1", *places])
    assert all(str(tmp_path) in fault for fault in absent(content)) and len(absent(content)) == 5
    made = flat(build(find("consistency").Config, content))
    named = ("out", "data.folders.0.path", "data.cache", "model.base", "model.components", "lora.start")
    assert [Path(made[name]).parent for name in (*named, "consistency.teacher")] == [tmp_path] * 7
    others = {"sla": {"start": "~/x"}, "decoder": {"start": "~/x"}, "model": {"start": "~/x", "autoencoder": "~/x"}}
    assert len(absent(others)) == 4 and all(f": {tmp_path}/x is no f" in fault for fault in absent(others))


def test_places_that_are_not_there_are_named_with_all_other_faults(tmp_path):
    """Each was found in a run of its own, the folder behind the loading of the text encoder."""
    file = tmp_path / "a.yaml"
    content = {
        "recipe": "lora",
        "out": str(tmp_path / "run"),
        "model": {"base": "./gone"},
        "lora": {"rank": 0, "start": str(tmp_path / "no.safetensors")},
        "data": {"kind": "videos", "folders": [{"path": str(tmp_path)}, {"path": "nowhere"}]},
        "train": {"steps": 1},
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        run("lora", file)
    head, *faults = str(caught.value).splitlines()
    assert head == f"{file}: 4 faults in the settings:"
    assert [fault.split()[0] for fault in faults] == ["lora.rank", "model.base:", "lora.start:", "data.folders.1:"]
