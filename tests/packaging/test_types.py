"""What type checkers see of the public names, which are looked up on first use when they are run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidaccel
from vidaccel import Preset
from vidaccel.generation.requests.options import GenerateOptions


def _for_types(file: Path) -> Iterator[ast.stmt]:
    """The statements of a module's `if TYPE_CHECKING:` blocks, those in its classes as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body


def _imported(file: Path) -> dict[str, str]:
    """Name -> the module that it is imported from for types; as itself, so that others may import it."""
    found = {}
    for node in _for_types(file):
        assert isinstance(node, ast.ImportFrom) and len(node.names) == 1, ast.unparse(node)
        assert node.names[0].name == node.names[0].asname, ast.unparse(node)
        found[node.names[0].name] = "." * node.level + (node.module or node.names[0].name)
    return found


def test_each_name_of_the_root_is_told(root):
    assert _imported(root / "__init__.py") == vidaccel._PUBLIC


def test_each_name_of_the_rooms_is_told(root):
    files = [file for file in (root / "pipelines").rglob("__init__.py") if "_LATER" in file.read_text(encoding="utf-8")]
    assert len(files) == 10
    for file in files:
        module = sys.modules[".".join(["vidaccel", *file.parent.relative_to(root).parts])]
        assert _imported(file) == module._LATER


def test_a_preset_tells_what_it_takes(root):
    """By name and by place, as its fields are."""
    (told,) = _for_types(root / "pipelines" / "presets" / "preset.py")
    names = [argument.arg for argument in told.args.args]
    assert names == ["self", *(field.name for field in dataclasses.fields(Preset))]


def test_generate_tells_what_it_takes():
    """What it returns depends on `compare`, so that each call of both kinds has its own signature."""
    taken = inspect.signature(vidaccel.generate).parameters.values()
    told = {each.name: each.annotation for each in taken if each.kind is each.KEYWORD_ONLY and each.name != "compare"}
    assert GenerateOptions.__annotations__.keys() == told.keys()
    written = {name: each.__forward_arg__ for name, each in GenerateOptions.__annotations__.items()}
    assert written == told


USER = """
    from __future__ import annotations

    import torch

    import vidaccel
    from vidaccel import SVG, Preset, Tangent, VideoLayout
    from vidaccel.attention import BlockPlan, sparse_attention

    class Mine(Tangent): ...

    def preset(layout: VideoLayout) -> Preset:
        method: SVG = SVG.for_density(layout, 0.3)
        Preset(method="svg", cache="first_block", guidance_free="own", loras="a.safetensors")
        Preset(guidance_cache=3, compile=True)
        return Preset(method=method)

    def attend(q: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
        out, lse = sparse_attention(q, q, q, plan, return_lse=True)
        return sparse_attention(q, q, q, plan) + out + lse[..., None]

    def density(pipe: object) -> float:
        with vidaccel.accelerate(pipe, "svg") as handle:
            return handle.report().mean_density()

    def videos(either: bool) -> float:
        video = vidaccel.generate("demo", "dot", method="svg", density=0.2, steps=5)
        made = vidaccel.generate("demo", "dot", method=["svg", SVG()], compare=True, report="report.html")
        vidaccel.generate("demo", "dot", compare=either)
        return video.fps + made.metrics["svg"].mean_psnr

    vidaccel.generate("demo", "dot", stepz=5)
    vidaccel.generation, vidaccel.lora, vidaccel.pipelines.presets.measure_mag_ratios, vidaccel.demo.path()
    vidaccel.acclerate
    vidaccel.pipelines.acclerate
"""


@pytest.mark.slow
def test_types_of_documented_use_hold_and_misspelt_names_do_not(tmp_path, on_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(textwrap.dedent(USER), encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(on_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    lines = [error for line in told.stdout.splitlines() if (error := line.partition(" error: ")[2])]
    misspelt, call, *names = lines
    assert misspelt.startswith('Unexpected keyword argument "stepz" for overloaded function "generate"'), told.stdout
    assert call.startswith('No overload variant of "generate"'), told.stdout
    assert names == ['Module has no attribute "acclerate"  [attr-defined]'] * 2, told.stdout + told.stderr
