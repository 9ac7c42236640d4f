"""What ComfyUI does when it starts: it loads the nodes, each with its schema.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_comfyui import nodes  # skips these where there is no ComfyUI

from vidaccel.nodes.report.wording import InputError

APPLY_VSA = nodes()["VidaccelApplyVSA"]
# The start of a process of its own, with ComfyUI and without what requirements.txt does not name.
WITHOUT = """
import asyncio, os, sys
sys.modules.update(dict.fromkeys(("diffusers", "peft")))
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
from comfy.cli_args import args
args.cpu = True
from vidaccel.nodes import comfy_entrypoint
nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
for node in nodes:
    node.define_schema()
print(len(nodes))
"""


def test_all_nodes_load_without_the_packages_for_pipelines():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 20


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A folder for diffusion models, one of whose files is a link to nowhere."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"no weights")
    return tmp_path


def test_a_link_to_nowhere_keeps_no_node_from_loading(models):
    from vidaccel.nodes import comfy_entrypoint

    found = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    schemas = {node.define_schema().node_id: node.define_schema() for node in found}
    (menu,) = [each for each in schemas["VidaccelApplyVSA"].inputs if each.id == "gates"]
    assert "gone.safetensors" in menu.options and "there.safetensors" in menu.options
    assert APPLY_VSA.fingerprint_inputs("gone.safetensors", "") is None
    assert APPLY_VSA.fingerprint_inputs("there.safetensors", None)[0][0][0] == "there.safetensors"
    with pytest.raises(InputError, match="gates is gone.safetensors: it is no longer there; there are there"):
        APPLY_VSA.execute(None, "gone.safetensors", "", 0.0)


def test_a_path_below_the_home_folder_is_watched(models, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    (models / "wan" / "transformer").mkdir(parents=True)
    weights = models / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"no weights")
    before = APPLY_VSA.fingerprint_inputs("the path below", "~/wan")
    weights.write_bytes(b"other weights")
    assert before is not None and APPLY_VSA.fingerprint_inputs("", "~/wan") != before


def test_presets_of_other_folders_are_in_the_menu(tmp_path, monkeypatch):
    """As those of extra_model_paths.yaml, which ComfyUI reads before it loads nodes."""
    import folder_paths

    from vidaccel.nodes.preset_nodes import VidaccelLoadPreset

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop("vidaccel_presets", None)
    folder_paths.add_model_folder_path("vidaccel_presets", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("version: 1\nname: mine\n")
    menu = VidaccelLoadPreset.define_schema().inputs[0]
    assert "mine.yaml" in menu.options and VidaccelLoadPreset.execute("mine.yaml", "").args[0].name == "mine"


def test_inputs_that_came_later_are_the_last_and_change_nothing_where_they_are_missing():
    from vidaccel.nodes.preset_nodes import VidaccelApplyPresetNative

    inputs = VidaccelApplyPresetNative.define_schema().inputs
    assert [each.id for each in inputs] == ["model", "preset", "skip_others", "min_tokens", "measure_error"]
    assert [(each.optional, each.default) for each in inputs[3:]] == [(True, 0), (True, 0)]


def test_values_and_prompts_as_the_page_takes_them():
    from vidaccel.nodes.forecast_node import VidaccelForecastCache
    from vidaccel.nodes.pipeline_nodes import VidaccelGenerateVideo

    (tolerance,) = [each for each in VidaccelForecastCache.define_schema().inputs if each.id == "tolerance"]
    assert tolerance.step <= tolerance.min  # another step would round the least away
    prompts = [each for each in VidaccelGenerateVideo.define_schema().inputs if each.id.endswith("prompt")]
    assert len(prompts) == 2 and all(each.dynamic_prompts for each in prompts)
