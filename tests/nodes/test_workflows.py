"""The workflow files, as far as they can be checked without a ComfyUI."""

from __future__ import annotations

import re
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from workflow_files import FOLDER, NAMES, NOTES, PAGES, page_form, server_form, to_server_form

from vidaccel.attention import METHODS
from vidaccel.nodes.defaults import defaults_of

ROOT = FOLDER.parent
CONVERTED = {"fastwan_1.3b.safetensors": "vidaccel convert fastwan FastVideo/FastWan2.1-T2V-1.3B-Diffusers"}
"""Files that nobody publishes -> the command that makes them."""


def test_comfyui_serves_the_templates_from_their_folder():
    """It looks for folders of these names, and of a pack that has two of them it serves files of the first alone."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert next(name for name in names if (ROOT / name).is_dir()) == FOLDER.name


def test_these_are_the_workflows():
    assert NAMES == [
        "demo_compare",
        "fastwan_t2v_vsa",
        "hunyuan_t2v_svg",
        "wan22_i2v_svg2",
        "wan_t2v_radial_long",
        "wan_t2v_svg2",
        "wan_t2v_tangent",
        "wan_t2v_tangent_forecast",
    ]
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name):
    sent = to_server_form(page_form(name))
    filed = {number: {k: node[k] for k in ("class_type", "inputs")} for number, node in server_form(name).items()}
    assert sent == filed


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("demo_compare", "fastwan_t2v_vsa")])
def test_the_layers_that_stay_dense_are_those_that_the_nodes_start_with(name):
    nodes = [n for n in server_form(name).values() if n["class_type"].startswith("VidaccelSparse")]
    for node in nodes:
        method = METHODS[node["class_type"].removeprefix("VidaccelSparseAttention").lower()]
        assert node["inputs"]["dense_layers"] == ", ".join(map(str, range(defaults_of(method).layers)))
    assert nodes


@pytest.mark.parametrize("name", NAMES)
def test_links_and_numbers_of_the_page_form_agree(name):
    page = page_form(name)
    nodes = {node["id"]: node for node in page["nodes"]}
    assert len(nodes) == len(page["nodes"]) and page["last_node_id"] == max(nodes)
    for number, source, slot, target, place, kind in page["links"]:
        output, wanted = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"] and wanted["link"] == number and kind in (output["type"], "*")
    assert any(node["type"] in NOTES for node in page["nodes"])  # what it is for and which weights it needs


@pytest.mark.parametrize("name", NAMES)
def test_a_card_of_the_browser_has_a_square_picture_and_a_title(name):
    """The title is the file's name, a part of an address and of a path on Windows."""
    path = PAGES[name].with_suffix(".jpg")
    height, width, _ = iio.imread(path).shape
    assert width == height >= 400 and path.stat().st_size < 120_000
    title = PAGES[name].stem
    assert title[0].isupper() and " " in title and "_" not in title and len(title) <= 30  # more is cut off
    assert re.fullmatch(r"[\w .,()-]+", title)


def test_the_pictures_are_made_by_one_command(tmp_path):
    """From results of the workflows, where there are some, without a model."""
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    for number, name in enumerate(NAMES):
        wide = 2 if name == "demo_compare" else 1
        frames = np.full((9, 64, 64 * wide + 4 * (wide - 1), 3), 40 + 20 * number, np.uint8)
        iio.imwrite(results / f"{name}_00001_.mp4", frames)
    command = [sys.executable, str(FOLDER / "thumbnails.py"), "--results", str(results), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(NAMES)
    for number, name in enumerate(NAMES):
        made = iio.imread(out / PAGES[name].with_suffix(".jpg").name)
        assert made.shape == iio.imread(PAGES[name].with_suffix(".jpg")).shape
        assert abs(int(made[100, 100, 0]) - 40 - 20 * number) < 8


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_named_with_their_address_and_folder(name):
    for node in page_form(name)["nodes"]:
        files = [v for v in node.get("widgets_values", []) if isinstance(v, str) and v.endswith(".safetensors")]
        files = [file for file in files if file not in CONVERTED]
        models = node["properties"].get("models", [])
        assert sorted(m["name"] for m in models) == sorted(files)
        assert all(m["url"].startswith("https://") and m["url"].endswith(m["name"]) for m in models)
        assert {m["directory"] for m in models} <= {"diffusion_models", "text_encoders", "vae"}


def test_what_nobody_publishes_is_named_with_the_command_that_makes_it():
    page = page_form("fastwan_t2v_vsa")
    told = " ".join(node["widgets_values"][0] for node in page["nodes"] if node["type"] in NOTES)
    for file, command in CONVERTED.items():
        assert f"`{command} {file}`" in told
        users = [node["type"] for node in page["nodes"] if file in node["widgets_values"]]
        assert users == ["UNETLoader", "VidaccelApplyVSA"]


def test_every_node_of_this_pack_has_a_page_of_help():
    used = {n["class_type"] for name in NAMES for n in server_form(name).values() if "Vidaccel" in n["class_type"]}
    helped = {path.parent.name for path in (ROOT / "nodes" / "web" / "docs").glob("*/en.md")}
    assert used <= helped and len(helped) == 23


def test_the_page_of_comfyui_counts_them():
    count = len([*(ROOT / "example_workflows").glob("*.json")])
    words = ("six", "seven", "eight", "nine", "ten")[count - 6]
    assert f"*Workflow > Browse Templates* has {words} of this pack" in (ROOT / "docs/start/comfyui.md").read_text()
