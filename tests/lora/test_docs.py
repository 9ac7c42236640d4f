"""docs/training.md names every setting with its type, bounds and default, and no other."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidaccel.lora import config_folder
from vidaccel.lora.config import Settings, build
from vidaccel.lora.recipes import RECIPES, find, reconstructing
from vidaccel.lora.recipes import ae_adapt_settings as ae_adapt
from vidaccel.lora.recipes import autoencoder as autoencoder_recipe
from vidaccel.lora.recipes import consistency_settings as consistency_recipe
from vidaccel.lora.recipes import gft_settings as gft_recipe
from vidaccel.lora.recipes import length_settings as length_recipe
from vidaccel.lora.recipes import lora_settings as lora_recipe
from vidaccel.lora.recipes import sla_settings as sla_recipe
from vidaccel.lora.recipes import tiny_decoder_settings as tiny_recipe
from vidaccel.lora.reconstruction import LossSettings
from vidaccel.lora.settings import (
    DataSettings,
    FolderSettings,
    LoopSettings,
    PhaseSettings,
    RunSettings,
    SizeSettings,
    ValidationSettings,
)

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")

TABLES: dict[str, type[Settings]] = {
    "Every run": RunSettings,
    "`loop`": LoopSettings,
    "`data`": DataSettings,
    "An entry of `folders`": FolderSettings,
    "An entry of `sizes`": SizeSettings,
    "A phase": PhaseSettings,
    "`lora`": lora_recipe.LoraSettings,
    "`model` of `lora`": lora_recipe.ModelSettings,
    "`lora` of `lora`": lora_recipe.AdapterSettings,
    "`flow` of `lora`": lora_recipe.FlowSettings,
    "`attention` of `lora`": lora_recipe.AttentionSettings,
    "`length`": length_recipe.LengthLoraSettings,
    "`length` of `length`": length_recipe.LengthSettings,
    "`gft`": gft_recipe.GuidanceFreeLoraSettings,
    "`gft` of `gft`": gft_recipe.GuidanceFreeSettings,
    "`consistency`": consistency_recipe.ConsistencyLoraSettings,
    "`consistency` of `consistency`": consistency_recipe.ConsistencySettings,
    "`sla`": sla_recipe.SLASettings,
    "`sla` of `sla`": sla_recipe.SparseLinearSettings,
    "`ae_adapt`": ae_adapt.AEAdaptSettings,
    "`model` of `ae_adapt`": ae_adapt.ModelSettings,
    "`flow` of `ae_adapt`": ae_adapt.FlowSettings,
    "`phases` of `ae_adapt`": ae_adapt.PhasesSettings,
    "`phases.lora` of `ae_adapt`": ae_adapt.LoraPhase,
    "`validation` of `lora`, `length`, `gft`, `consistency` and `ae_adapt`": ValidationSettings,
    "`autoencoder`": autoencoder_recipe.AutoencoderSettings,
    "`model` of `autoencoder`": autoencoder_recipe.ModelSettings,
    "An entry of `phases` of `autoencoder`": autoencoder_recipe.AutoencoderPhase,
    "`autoencoder` and `tiny_decoder`": reconstructing.ReconstructionSettings,
    "`loss` of `autoencoder` and `tiny_decoder`": LossSettings,
    "An entry of `phases` of `autoencoder` and `tiny_decoder`": reconstructing.ReconstructionPhase,
    "`validation` of `autoencoder` and `tiny_decoder`": reconstructing.ValidationSettings,
    "`tiny_decoder`": tiny_recipe.TinyDecoderSettings,
    "`model` of `tiny_decoder`": tiny_recipe.ModelSettings,
    "`decoder` of `tiny_decoder`": tiny_recipe.DecoderSettings,
}
"""Heading -> the class whose own fields are in the table below it; what it inherits is in that of its base."""


def own_fields(cls: type[Settings]) -> dict[str, Field]:
    inherited = {field.name for base in cls.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    return {field.name: field for field in fields(cls) if field.name not in inherited}


def kind(hint: Any, bounds: typing.Mapping[str, Any]) -> str:
    """A type as the tables show it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return f"{kind(next(a for a in args if a is not type(None)), bounds)}, or `null`"
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        inner = kind(args[0], bounds)
        return f"list: {inner}" if args[-1] is Ellipsis else f"list of {len(args)}: {inner}"
    if is_dataclass(hint):
        return "settings"
    name = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[hint]
    signs = {"low": "≥", "above": ">", "high": "≤", "below": "<"}
    limits = [f"{sign} {bounds[bound]}" for bound, sign in signs.items() if bounds.get(bound) is not None]
    return " ".join([name, " and ".join(limits)]) if limits else name


def changed(value: Settings) -> dict[str, Any]:
    """The fields of an instance that differ from the defaults of its class."""
    return {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if field.default_factory is not MISSING or getattr(value, field.name) != field.default
    }


def plain(value: Any) -> Any:
    if is_dataclass(value):
        return {name: plain(entry) for name, entry in changed(value).items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """A value as the tables show it: YAML on one line."""
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    if isinstance(value, float):
        return f"`{value!r}`"
    text = yaml.safe_dump(plain(value), default_flow_style=True, sort_keys=False, width=10_000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def default_of(field: Field) -> str:
    if field.default is not MISSING:
        return shown(field.default)
    if field.default_factory is MISSING:
        return "required"
    made = field.default_factory()
    return "its own" if is_dataclass(made) else shown(made)


def expected(cls: type[Settings]) -> list[list[str]]:
    """Key, type, default, and whether a resumed run may have another, for each row."""
    hints = typing.get_type_hints(cls)
    return [
        [
            f"`{name}`",
            kind(hints[name], field.metadata),
            default_of(field),
            "yes" if field.metadata.get("free") else "",
        ]
        for name, field in own_fields(cls).items()
    ]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    section = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", DOC, re.MULTILINE | re.DOTALL)
    assert section, f"docs/training.md has no heading {heading}"
    lines = re.search(r"(?:^\|.*\n)+", section[1], re.MULTILINE)
    assert lines, f"docs/training.md has no table below {heading}"
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def reachable(cls: type[Settings]) -> Iterator[type[Settings]]:
    """A settings class, and those of its fields, at any depth, with what they derive from."""
    for base in cls.__mro__:
        if issubclass(base, Settings) and base is not Settings:
            yield base
    pending = list(typing.get_type_hints(cls).values())
    while pending:
        hint = pending.pop()
        pending += typing.get_args(hint)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from reachable(hint)


def leads_somewhere(path: str) -> bool:
    """Whether a dotted name is a setting of a recipe."""

    def within(hint: Any, keys: list[str]) -> bool:
        args = [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
        if typing.get_origin(hint) is tuple:
            return not keys or (keys[0].isdigit() and within(args[0], keys[1:]))
        if args and typing.get_origin(hint) is not typing.Literal:
            return any(within(arg, keys) for arg in args)
        if not keys:
            return True
        hints = typing.get_type_hints(hint) if is_dataclass(hint) else {}
        return keys[0] in hints and within(hints[keys[0]], keys[1:])

    return any(within(find(recipe).Config, path.split(".")) for recipe in RECIPES)


def test_every_settings_class_has_a_table():
    classes = {cls for recipe in RECIPES for cls in reachable(find(recipe).Config)}
    assert classes == set(TABLES.values())


@pytest.mark.parametrize("heading", TABLES)
def test_keys_types_and_defaults(heading):
    rows = table(heading)
    assert [row[:4] for row in rows] == expected(TABLES[heading])
    assert all(len(row) == 5 and row[4] for row in rows), "every key has its meaning"


def test_the_defaults_of_each_phase():
    phases = ae_adapt.PhasesSettings()
    differing = {field.name: changed(getattr(phases, field.name)) for field in fields(phases)}
    keys = list(dict.fromkeys(key for values in differing.values() for key in values))
    rows = table("What the phases of `ae_adapt` start from")
    assert {row[0] for row in rows} == {f"`{key}`" for key in keys}
    for row in rows:
        key = row[0].strip("`")
        assert row[1:] == [shown(getattr(getattr(phases, name), key)) for name in differing], key


@pytest.mark.parametrize("number", range(len(re.findall(r"```yaml\n", DOC))))
def test_the_examples_are_settings_that_can_be_used(number):
    content = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[number])
    build(find(content["recipe"]).Config, content)


def test_dotted_names_and_overrides_are_settings():
    texts = [DOC, (ROOT / "README.md").read_text(encoding="utf-8")]
    texts += [file.read_text(encoding="utf-8") for file in config_folder().glob("*.yaml")]
    named = re.findall(
        r"`((?:loop|data|phases|model|lora|train|flow|sla|attention|length|loss|validation)\.[\w.]+)`", DOC
    )
    overridden = [name for text in texts for name in re.findall(r"--set ([\w.]+)=", text)]
    # The first is the form of an override, the second of `vidaccel generate`.
    named += [name for name in overridden if name != "a.b" and not name.startswith("svg2.")]
    assert len(named) > 10
    assert [name for name in named if not leads_somewhere(name)] == []
    assert not leads_somewhere("phases.lora.warmup")


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in re.findall(r"^#+ .*$", DOC, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        file, _, anchor = target.partition("#")
        assert target.startswith("https://") or not file or (ROOT / "docs" / file).exists(), target
        assert file or anchor in headings, target


def test_the_files_of_the_ready_settings_are_listed():
    assert all(f"`{file.stem}`" in DOC for file in config_folder().glob("*.yaml"))
