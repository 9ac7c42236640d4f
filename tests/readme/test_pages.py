"""The code of every page: Python runs on the built-in model, and each command line is one that the command takes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from doc_code import ROOT, blocks, commands, make_files, pages, small
from packaging.requirements import Requirement
from typer.testing import CliRunner

from vidaccel import demo

PAGES = pages()
NOT_RUN = {"docs/several-gpus.md": "needs a process for each of several GPUs"}
ELSEWHERE = ("README.md",)  # in test_readme.py
WITH_PYTHON = [page for page in PAGES if blocks(PAGES[page], "python") and page not in (*NOT_RUN, *ELSEWHERE)]
COMMANDS = [(page, words) for page in PAGES for words in commands(PAGES[page])]


def described(words: list[str]) -> str:
    return " ".join(words)[:80]


# Python


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    make_files(made)
    return made


@pytest.fixture(scope="module")
def weights():
    """The built-in model, which is read once."""
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(demo.path()).components


@pytest.fixture
def short_calls(monkeypatch):
    """Calls that leave the size of the video to the pipeline make the smallest, in place of 81 frames of 480x832."""
    from diffusers import WanPipeline

    original = WanPipeline.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        small = {"num_frames": 9, "height": 96, "width": 96, "num_inference_steps": 2}
        return original(self, *args, **kwargs, **{name: small[name] for name in small.keys() - given.keys()})

    monkeypatch.setattr(WanPipeline, "__call__", call)


@pytest.fixture
def tables():
    """The tables that pages register entries in, which are the whole process's."""
    from vidaccel.attention import BACKENDS, METHODS
    from vidaccel.lora.backbones import OWN_FAMILIES
    from vidaccel.lora.recipes import RECIPES
    from vidaccel.pipelines import FAMILIES

    named = [(table, dict(table)) for table in (METHODS, BACKENDS, OWN_FAMILIES, RECIPES)]
    families = list(FAMILIES)
    yield
    for table, before in named:
        table.clear()
        table.update(before)
    FAMILIES[:] = families


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, folder, weights, short_calls, tables, monkeypatch):
    """Its blocks one after the other, with a pipeline and a prompt at hand."""
    from diffusers import WanPipeline

    import vidaccel

    monkeypatch.chdir(folder)
    parts = {**weights, "scheduler": type(weights["scheduler"]).from_config(weights["scheduler"].config)}
    names = {"pipe": WanPipeline(**parts), "prompt": "a red circle moves left on a grey background"}
    names |= {"vidaccel": vidaccel, "WanPipeline": WanPipeline, "torch": importlib.import_module("torch")}
    given = names["pipe"]
    for code in blocks(PAGES[page], "python"):
        exec(compile(small(code), page, "exec"), names)
    vidaccel.restore(given)  # the weights are those of the next page
    if given.transformer.peft_config if hasattr(given.transformer, "peft_config") else None:
        given.unload_lora_weights()


@pytest.mark.parametrize("page", NOT_RUN)
def test_what_is_not_run_names_what_is_there(page):
    """Nothing but its imports, and that it is Python."""
    for code in blocks(PAGES[page], "python"):
        compile(code, page, "exec")
        exec("\n".join(re.findall(r"^(?:import|from) .*", code, re.MULTILINE)), {})
        import vidaccel

        for name in re.findall(r"\bvidaccel\.(\w+)", code):
            assert hasattr(vidaccel, name), name


# Command lines


class ReachedTheWork(Exception):
    """The request was taken."""


def take_vidaccel(words: list[str], monkeypatch, tmp_path) -> None:
    from vidaccel.cli import app

    command, context = typer.main.get_command(app), None
    rest, name = words[1:], "vidaccel"
    while True:  # down the groups to the command, with options and arguments of the types that it has
        context = command.make_context(name, list(rest), parent=context)
        if not hasattr(command, "commands"):
            break
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    if name == "adapt" and not context.params["show"]:
        given = context.params
        take_recipe(given["recipe"].replace("-", "_"), given["config"], given["change"] or ())
    if name == "generate" and not of_the_reader(words, context.params):  # so all of its checks can be made
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("vidaccel.generation.api.carry_out", _reached)
        result = CliRunner().invoke(app, words[1:])
        assert isinstance(result.exception, ReachedTheWork), result.output


def of_the_reader(words: list[str], given: dict) -> bool:
    """Whether a video needs files, a model, a training or a device that only the reader has."""
    read = [
        value for option, value in pairwise(words) if option.startswith("-") and option not in ("--out", "--report")
    ]
    files = [value for value in read if re.search(r"/|\.(ya?ml|json|safetensors|png|jpg|mp4)(=|$)", value)]
    model = given["model"] not in ("", "demo", "demo-dc")  # "": that of a preset, or "demo"
    return bool(files) or model or "--device" in words or "sla" in (given["method"] or ())


def _reached(*args, **kwargs):
    raise ReachedTheWork


def take_recipe(recipe: str, config: str, changes) -> None:
    """Settings that are ready can be used with the changes; others are the reader's own."""
    from vidaccel.lora import config_folder
    from vidaccel.lora.config import load
    from vidaccel.lora.recipes import find

    found = find(recipe)
    if config.endswith(".yaml"):
        return
    file = config_folder() / f"{config}.yaml"
    assert file.is_file(), f"no ready settings {config}"
    load(found.Config, file, changes)


def take_module(name: str, words: list[str]) -> None:
    """`python -m NAME`: a module of the package, and options that it takes."""
    spec = importlib.util.find_spec(name)
    assert spec, f"no module {name}"
    if name == "vidaccel.lora":
        assert words[1] == "--config" and len(words) == 3
        return take_recipe(words[0], words[2], ())
    module = importlib.import_module(name)
    take_typer(getattr(module, "app", None) or module.main, words)


def take_typer(what: typer.Typer | Callable, words: list[str]) -> None:
    app = what
    if not isinstance(what, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(what)
    command = typer.main.get_command(app)
    if words == ["--help"]:
        return
    if hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def take_script(words: list[str], monkeypatch) -> None:
    file = ROOT / words[0]
    assert file.is_file(), f"no script {words[0]}"
    text = file.read_text(encoding="utf-8")
    if "typer.run(main)" in text:
        monkeypatch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        before = set(sys.modules)
        try:
            spec.loader.exec_module(module)
            return take_typer(module.main, words[1:])
        finally:  # what scripts share has common names, and would be found by other tests
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(str(file.parent)):
                    del sys.modules[name]
    for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--") and word != "--help"):
        assert f'add_argument("{option}"' in text, f"{words[0]} has no option {option}"


def take_pip(words: list[str]) -> None:
    assert words[1] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rest = words[2:]
    while rest:
        word = rest.pop(0)
        if word in ("-r", "-c"):
            assert rest and (ROOT / Path(rest.pop(0)).name).is_file()
        elif word.startswith("."):
            named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
            assert named and set((named[1] or "").split(",")) <= {"", *extras}, word
        elif word not in ("-e", "--editable", "-U", "--upgrade"):
            Requirement(word)


def take(words: list[str], monkeypatch, tmp_path) -> None:
    """Check a command line as far as can be done without carrying it out."""
    if words[0] == "vidaccel":
        take_vidaccel(words, monkeypatch, tmp_path)
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", targets, re.MULTILINE) for word in words[1:] if "=" not in word)
        assert all(re.search(rf"\b{word.partition('=')[0]}\b", targets) for word in words[1:])
    elif words[0] == "pip":
        take_pip(words)
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[2:])
        assert given.module
        take_module(given.training_script, given.training_script_args)
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        take_module(given.training_script, given.training_script_args)
    elif words[:2] == ["python", "-m"]:
        take_module(words[2], words[3:])
    elif words[0] == "python":
        take_script(words[1:], monkeypatch)
    elif words[0] == "pytest":
        pass
    else:
        raise AssertionError(f"no rule to check: {words[0]}")


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {described(words)}" for page, words in COMMANDS])
def test_a_command_line_is_taken(page, words, monkeypatch, tmp_path):
    take(words, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "vidaccel generate x --metod tangent",
        "vidaccel generate x --method tangnt",
        "vidaccel generate x --method svg2 --set svg2.rute=error",
        "vidaccel adapt lora --config demo_lora --set train.stepps=3",
        "vidaccel adapt lora --config demo_loro",
        "make demos",
        "pip install .[gpus]",
        "python benchmarks/quality.py --nonsense 3",
        "python -m vidaccel.demo.trian vae RUN",
        "curl https://example.org",
    ],
)
def test_a_wrong_command_line_is_not(line, monkeypatch, tmp_path):
    with pytest.raises((Exception, SystemExit)):
        take(line.split(), monkeypatch, tmp_path)
