"""Who may import whom, read from the source, and what an import really loads, in fresh processes."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

# The parts of the package that each part may import from. A part is a folder, or the root's `__init__.py` ("vidaccel").
LOWER = {"attention", "autoencoders", "demo"}
MAY_IMPORT = {
    "attention": set(),
    "autoencoders": set(),
    "demo": set(),
    "pipelines": LOWER,
    "generation": LOWER | {"pipelines"},
    "lora": LOWER | {"pipelines", "generation"},
    "nodes": LOWER | {"pipelines", "generation", "lora"},
    "cli": LOWER | {"pipelines", "generation", "lora"},
    "vidaccel": LOWER | {"pipelines", "generation", "lora", "nodes"},
    "__main__": {"cli", "generation"},
}
# Outside packages that only some parts may import, as prefixes of module names.
ONLY_IN = {
    "diffusers": ("autoencoders", "demo", "pipelines", "lora", "nodes"),
    "triton": ("attention.kernels", "attention.backends"),
    "sageattention": ("attention.backends",),
    "spas_sage_attn": ("attention.backends",),
    "flash_attn": ("attention.backends",),
    "comfy": ("nodes",),
    "comfy_api": ("nodes",),
    "comfy_execution": ("nodes",),
    "comfy_extras": ("nodes",),
    "folder_paths": ("nodes",),
}
# Packages that a machine may lack: outside the folders that exist for them, they are imported inside functions only.
OPTIONAL = {
    "triton",
    "sageattention",
    "spas_sage_attn",
    "flash_attn",
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
}
EXIST_FOR_THEM = ("attention.kernels", "nodes")


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """Each imported module as an absolute name, its line, and whether importing the file runs it."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_import
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            # `from .. import name` may name a module: the name goes along.
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno, at_import


def _starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _only_for_types(tree: ast.Module) -> set[int]:
    """The lines of `if TYPE_CHECKING:` blocks, which never run."""
    blocks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    return {line for block in blocks for child in block.body for line in range(child.lineno, child.end_lineno + 1)}


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the imports of one file do that the rules forbid; `module` is its dotted name, `vidaccel` included."""
    tree = ast.parse(source)
    for_types = _only_for_types(tree)
    own = module.partition(".")[2]  # without "vidaccel."
    part = own.partition(".")[0] or "vidaccel"
    if part not in MAY_IMPORT:
        return [f"{module}: there is no rule for {part}; add it to MAY_IMPORT, or put it into a folder that is there"]
    relative = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    found = []
    for name, line, at_import in _imports(tree, module, is_package):
        where = f"{module}, line {line}: imports {name}"
        if line in relative:
            target = name.split(".")[1]
            if target != "__version__" and target not in MAY_IMPORT[part] | {part}:
                found.append(f"{where}: {part} may import {sorted(MAY_IMPORT[part]) or 'no other part'}")
            continue
        if _starts(name, *MAY_IMPORT):
            found.append(f"{where}: imports inside the package are relative")
        for package, allowed in ONLY_IN.items():
            if _starts(name, package) and line not in for_types:
                if not _starts(own, *allowed):
                    found.append(f"{where}: only {', '.join(allowed)} may")
                elif at_import and package in OPTIONAL and not _starts(own, *EXIST_FOR_THEM):
                    found.append(f"{where}: an optional package is imported inside the function that needs it")
    return found


def test_the_package_keeps_the_rules(package_folders):
    found = []
    for name, folder in package_folders.items():
        for file in sorted(folder.glob("*.py")):
            module = name if file.stem == "__init__" else f"{name}.{file.stem}"
            found += violations(module, file.read_text(encoding="utf-8"), is_package=file.stem == "__init__")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("vidaccel.attention.plan", "from ..pipelines import accelerate", "attention may import no other part"),
        ("vidaccel.attention.methods.svg", "from ...demo.world import World", "attention may import no other part"),
        ("vidaccel.demo.world", "def f():\n    from .. import attention", "demo may import no other part"),
        ("vidaccel.pipelines.wan", "from .. import accelerate", "pipelines may import"),
        ("vidaccel.pipelines.wan", "from ..cli import main", "pipelines may import"),
        ("vidaccel.lora.trainer", "from ..nodes import load", "lora may import"),
        ("vidaccel.pipelines.wan", "from vidaccel.attention import BlockPlan", "are relative"),
        ("vidaccel.pipelines.wan", "import attention.plan", "are relative"),
        ("vidaccel.attention.engine", "import diffusers.models", "only autoencoders"),
        ("vidaccel.cli", "def f():\n    from diffusers import WanPipeline", "only autoencoders"),
        ("vidaccel.attention.plan", "def f():\n    import triton", "only attention.kernels"),
        ("vidaccel.attention.backends.triton", "import triton.language as tl", "inside the function"),
        ("vidaccel", "import comfy.utils", "only nodes may"),
        ("vidaccel.pipelines.wan", "from ..generation import report", "pipelines may import"),
        ("vidaccel.generation.job", "from ..cli import main", "generation may import"),
        ("vidaccel.generation.job", "from .. import nodes", "generation may import"),
        ("vidaccel.generation.job", "from ..lora import train", "generation may import"),
        ("vidaccel.extra.more", "import torch", "no rule for extra"),
        ("vidaccel.loose", "import torch", "no rule for loose"),
    ],
)
def test_the_check_finds_what_it_is_for(module, source, fault):
    found = violations(module, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("vidaccel.attention.plan", "from .layout import VideoLayout", False),
        ("vidaccel.attention.methods.svg", "from ..plan import BlockPlan", False),
        ("vidaccel.attention.methods", "from ..plan import BlockPlan", True),
        ("vidaccel.attention.backends.triton", "def f():\n    import triton", False),
        ("vidaccel.attention.kernels.sparse", "import triton", False),
        ("vidaccel.pipelines.wan", "from ..attention.plan import BlockPlan\nfrom .. import __version__", False),
        ("vidaccel.cli.info", "from ..pipelines import accelerate\nfrom .. import demo, generation", False),
        ("vidaccel.lora.trainer", "from ..generation.video import write_mp4", False),
        (
            "vidaccel.generation.report.page",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers",
            False,
        ),
        ("vidaccel", "def f():\n    from .nodes import pack", True),
    ],
)
def test_the_check_lets_the_rest_pass(module, source, is_package):
    assert violations(module, source, is_package) == []


# As if a package were not installed: `import` raises ModuleNotFoundError, `importlib.util.find_spec` returns None.
ABSENT = "import sys; sys.modules.update(dict.fromkeys({names}))"
HEAVY = ("torch", "numpy", "diffusers", "transformers", "triton", "matplotlib", "comfy", "comfy_api", "typer")


def test_the_root_loads_nothing_heavy(fresh, on_path):
    out = fresh(
        f"""
        import sys, vidaccel
        print([name for name in {HEAVY} if name in sys.modules])
        # Modules that only stand for those that saved pipelines name have no spec.
        print([name for name, module in sys.modules.items() if name.startswith("vidaccel.") and module.__spec__])
        """,
        on_path,
    )
    assert out.split("\n")[:2] == ["[]", "[]"]


def test_what_comfyui_loads_at_its_start_leaves_diffusers_out(fresh, on_path, package_folders):
    """It takes seconds to import, may not be installed, and a workflow with native models does without."""
    of_comfyui = ("_node", "_nodes")
    top = package_folders["vidaccel.nodes"]
    files = [file.relative_to(top) for file in top.rglob("*.py") if not file.stem.endswith(of_comfyui)]
    names = [".".join(["vidaccel.nodes", *file.with_suffix("").parts]).removesuffix(".__init__") for file in files]
    assert len(names) > 20
    absent = ("diffusers", "transformers", "accelerate", "peft", "matplotlib", "comfy", "comfy_api", "folder_paths")
    fresh(
        f"""
        {ABSENT.format(names=absent)}
        import importlib
        for name in {sorted(names)}:
            importlib.import_module(name)
        """,
        on_path,
    )


def test_attention_loads_neither_diffusers_nor_triton(fresh, on_path):
    out = fresh(
        """
        import sys, torch
        import vidaccel.attention
        names = ("diffusers", "transformers", "triton", "accelerate", "comfy")
        print([name for name in names if name in sys.modules])
        loaded = [name for name, module in sys.modules.items() if name.startswith("vidaccel.") and module.__spec__]
        print(sorted({name.split(".")[1] for name in loaded}))
        """,
        on_path,
    )
    assert out.split("\n")[:2] == ["[]", "['attention']"]


def test_attention_needs_torch_alone(fresh, on_path):
    """The functional entry works where diffusers, Triton and whatever else the package uses are not installed."""
    names = (
        "diffusers",
        "transformers",
        "triton",
        "accelerate",
        "peft",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
        "comfy",
    )
    fresh(
        f"""
        {ABSENT.format(names=names)}
        import torch
        from vidaccel import SVG, SVG2, BlockPlan, Radial, sparse_attention
        q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
        plan = BlockPlan.from_block_mask(torch.eye(2, dtype=torch.bool)[None, None], 4, 4, 8, 8)
        out = sparse_attention(q, k, v, plan, backend="reference")
        halves = [torch.nn.functional.scaled_dot_product_attention(*(x[:, :, s] for x in (q, k, v)))
                  for s in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(out, torch.cat(halves, dim=2))
        """,
        on_path,
    )


def test_pipelines_need_no_optional_package(fresh, on_path):
    names = ("triton", "sageattention", "spas_sage_attn", "flash_attn", "comfy", "comfy_api", "folder_paths")
    fresh(f"{ABSENT.format(names=names)}; import vidaccel; vidaccel.accelerate", on_path)
