"""However the folder is loaded, its modules exist once, as `vidaccel` and below."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import vidaccel

# Loads a node pack as ComfyUI's `load_custom_node` does, and lists under which names each file of a folder is loaded.
HELPERS = """
import importlib.util, os, sys

def load_by_path(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

def names_of_files(folder):
    names = {}
    for name, module in list(sys.modules.items()):
        file = os.path.realpath(getattr(module, "__file__", None) or "/")
        if file.startswith(folder + os.sep) and "site-packages" not in file:  # a .venv in the checkout
            names.setdefault(os.path.relpath(file, folder), []).append(name)
    return names

def assert_one_copy(folder):
    names = names_of_files(folder)
    assert "vidaccel" in names.pop("__init__.py")
    assert len(names) > 5, names
    for file, of_file in names.items():
        dotted = file.removesuffix(".py").removesuffix(os.sep + "__init__").replace(os.sep, ".")
        assert of_file == ["vidaccel." + dotted], (file, of_file)
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder to put on the path, in which `vidaccel` is another one, version 9.9."""
    folder = tmp_path / "elsewhere"
    (folder / "vidaccel").mkdir(parents=True)
    (folder / "vidaccel" / "__init__.py").write_text('__version__ = "9.9"\nmark = "other"\n')
    return folder


def test_by_path_alone(fresh, root):
    """Not installed: the folder becomes `vidaccel`, and the loaded module stands for it."""
    fresh(f"""{HELPERS}
folder = {str(root)!r}
pack = load_by_path(folder)
import vidaccel
from vidaccel.attention.layout import VideoLayout
assert isinstance(pack.VideoLayout(frames=2, height=2, width=2), VideoLayout)
assert pack.VideoLayout is vidaccel.VideoLayout is VideoLayout
assert VideoLayout.__module__ == "vidaccel.attention.layout"
assert pack.attention is vidaccel.attention is sys.modules["vidaccel.attention"]
assert pack.__version__ == vidaccel.__version__
assert pack.__all__ == vidaccel.__all__ and dir(pack) == dir(vidaccel)
assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
assert_one_copy(folder)
""")


@pytest.mark.parametrize("path_first", [True, False])
def test_by_path_and_installed(fresh, root, on_path, path_first):
    """Installed from the same folder: loading by path and importing meet, in either order and through a link."""
    fresh(
        f"""{HELPERS}
link = os.path.join({str(on_path)!r}, "vidaccel")
if not {path_first}:
    from vidaccel import VideoLayout
first, second = load_by_path({str(root)!r}), load_by_path(link)
from vidaccel import VideoLayout, attention
import vidaccel
assert isinstance(first.VideoLayout(frames=2, height=2, width=2), VideoLayout)
assert first.BlockPlan is second.BlockPlan is vidaccel.BlockPlan is attention.BlockPlan
assert_one_copy({str(root)!r})
""",
        on_path,
    )


def test_no_submodule_under_another_name(fresh, root):
    """The second copy that a wrong import would make is refused."""
    out = fresh(f"""{HELPERS}
pack = load_by_path({str(root)!r})
sys.modules["pack"] = pack
try:
    import pack.attention
except ModuleNotFoundError as error:
    print(error.name)
assert sorted(name for name in sys.modules if "attention" in name) == []
""")
    assert out.split() == ["pack.attention"]


def test_another_one_is_installed(fresh, root, other):
    """The folder asked for by path wins over one that nobody has loaded, and says so."""
    out = fresh(
        f"""{HELPERS}
import logging
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
pack = load_by_path({str(root)!r})
import vidaccel
assert os.path.samefile(vidaccel.__file__, {str(root / "__init__.py")!r})
assert pack.VideoLayout is vidaccel.VideoLayout
assert_one_copy({str(root)!r})
""",
        other,
    )
    assert out.startswith(
        f"vidaccel WARNING vidaccel 9.9 is installed in {other / 'vidaccel'}, but the copy in {root} ("
    )
    assert "pip uninstall vidaccel" in out


def test_another_one_is_loaded(fresh, root, other):
    """The copy whose classes are in use already stays, and the folder says that it is not used."""
    out = fresh(
        f"""{HELPERS}
import logging
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
import vidaccel
pack = load_by_path({str(root)!r})
assert pack.mark == "other" and pack.__version__ == "9.9"
assert sys.modules["vidaccel"] is vidaccel
assert list(names_of_files({str(root)!r})) == ["__init__.py"]
""",
        other,
    )
    assert out.startswith(
        f"vidaccel WARNING vidaccel 9.9 is already loaded from {other / 'vidaccel' / '__init__.py'}, "
    )
    assert f"the one in {root} ({vidaccel.__version__}) is not" in out


def test_same_folder_says_nothing(fresh, root, on_path):
    out = fresh(
        f"""{HELPERS}
import logging
logging.basicConfig(stream=sys.stdout)
load_by_path({str(root)!r}); load_by_path({str(on_path / "vidaccel")!r})
""",
        on_path,
    )
    assert out == ""


def test_a_plain_folder_of_the_name_is_no_package(fresh, root, tmp_path):
    """A folder `vidaccel` without code, say one of videos, does not count as an installation."""
    (tmp_path / "vidaccel").mkdir()
    out = fresh(f"""{HELPERS}
import logging
logging.basicConfig(stream=sys.stdout)
pack = load_by_path({str(root)!r})
assert pack.VideoLayout.__module__ == "vidaccel.attention.layout"
""")
    assert out == ""


def test_failure_leaves_nothing_behind(fresh, root, tmp_path):
    """A root that fails while it becomes `vidaccel` is not kept half made."""
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(root / "__init__.py", folder)
    with open(folder / "__init__.py", "a") as file:
        file.write('\nif __name__ == "vidaccel":\n    raise RuntimeError("broken on purpose")\n')
    out = fresh(f"""{HELPERS}
try:
    load_by_path({str(folder)!r})
except RuntimeError as error:
    print(error)
assert "vidaccel" not in sys.modules
""")
    assert out == "broken on purpose\n"


def test_this_pytest_process(root):
    """pytest, too, has loaded each file once: it imports the `__init__.py` of the root by itself."""
    names: dict[Path, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not os.path.isabs(file):  # torch.ops and torch.classes give a bare file name
            continue
        relative = os.path.relpath(os.path.realpath(file), root)
        if not relative.startswith(("..", "tests" + os.sep, ".venv" + os.sep)) and "site-packages" not in relative:
            names.setdefault(Path(relative), []).append(name)
    names.pop(Path("__init__.py"), None)
    twice = {str(file): of_file for file, of_file in names.items() if len(of_file) > 1}
    stray = {str(file): of_file for file, of_file in names.items() if not of_file[0].startswith("vidaccel.")}
    assert not twice
    assert not stray
