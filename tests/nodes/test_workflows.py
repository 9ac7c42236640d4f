"""The workflow files, as far as they can be checked without a ComfyUI."""

from __future__ import annotations

import imageio.v3 as iio
import pytest
from workflow_files import FOLDER, NAMES, NOTES, page_form, server_form, to_server_form

ROOT = FOLDER.parent


def test_these_are_the_workflows():
    assert NAMES == ["demo_compare", "hunyuan_t2v_svg", "wan22_i2v_svg2", "wan_t2v_radial_long", "wan_t2v_svg2"]
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name):
    sent = to_server_form(page_form(name))
    filed = {number: {k: node[k] for k in ("class_type", "inputs")} for number, node in server_form(name).items()}
    assert sent == filed


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
def test_a_thumbnail_of_a_page_of_the_browser(name):
    path = FOLDER / f"{name}.jpg"
    height, width, _ = iio.imread(path).shape
    assert width >= 300 and height >= 200 and path.stat().st_size < 120_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_named_with_their_address_and_folder(name):
    for node in page_form(name)["nodes"]:
        files = [v for v in node.get("widgets_values", []) if isinstance(v, str) and v.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert sorted(m["name"] for m in models) == sorted(files)
        assert all(m["url"].startswith("https://") and m["url"].endswith(m["name"]) for m in models)
        assert {m["directory"] for m in models} <= {"diffusion_models", "text_encoders", "vae"}


def test_every_node_of_this_pack_has_a_page_of_help():
    used = {n["class_type"] for name in NAMES for n in server_form(name).values() if "Vidaccel" in n["class_type"]}
    helped = {path.parent.name for path in (ROOT / "nodes" / "web" / "docs").glob("*/en.md")}
    assert used <= helped and len(helped) == 8
