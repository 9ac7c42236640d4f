"""ComfyUI's page in a headless Chromium: the nodes are found, and the template opens."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
from chromium import EXECUTABLE, Page
from comfy_server import COMFYUI, WHY_SKIPPED
from workflow_files import PAGES, server_form

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason=WHY_SKIPPED),
    pytest.mark.skipif(not EXECUTABLE, reason="install chromium to open ComfyUI's page"),
]

DIALOGS = "[...document.querySelectorAll('[role=dialog]')].map(d => d.innerText)"


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    server.post("/settings/Comfy.TutorialCompleted", True)
    opened = Page(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def browse(server, page: Page) -> str:
    """Open the template browser and look for this pack's comparison; its card, as JavaScript."""
    page.open(server.url)
    page.until("!!(window.app && app.graph && app.graph._nodes && app.extensionManager)", 120)
    title = PAGES["demo_compare"].stem
    selector = f'[data-testid="template-workflow-{title}"]'
    card = f"document.querySelector({json.dumps(selector)})"
    page.until("app.extensionManager.command.execute('Comfy.BrowseTemplates').then(() => true)", 30)
    search = "document.querySelector('[role=dialog] input')"
    page.until(f"!!{search} && ({search}.focus(), true)", 60)
    page.type(title)
    page.until(f"!!{card}", 60)
    return card


def test_the_card_of_a_template_has_its_title_and_picture(server, page, tmp_path):
    card = browse(server, page)
    loaded = (
        f"[...({card}).querySelectorAll('img')].some(i => i.naturalWidth == i.naturalHeight && i.naturalWidth > 400)"
    )
    page.until(loaded, 30)
    assert PAGES["demo_compare"].stem in page.run(f"({card}).innerText")
    page.screenshot(Path(os.environ.get("VIDACCEL_SCREENSHOTS", tmp_path)) / "comfyui_templates.png")


def test_the_template_opens_without_missing_nodes(server, page, tmp_path):
    # The page shows its own default workflow first.
    card = browse(server, page)
    page.until(f"!!{card} && (({card}).click(), true)", 30)
    page.until("app.graph._nodes.some(n => n.type == 'VidaccelGenerateVideo')", 60)
    assert page.run("app.graph._nodes.filter(n => n.has_errors).length") == 0
    assert not [text for text in page.run(DIALOGS) if "issing" in text]
    sent = page.run("app.graphToPrompt().then(p => p.output)")
    filed = server_form("demo_compare")
    assert {k: v["class_type"] for k, v in sent.items()} == {k: v["class_type"] for k, v in filed.items()}
    for number, node in filed.items():  # newer versions of ComfyUI's own nodes have more inputs
        assert node["inputs"].items() <= sent[number]["inputs"].items(), node["class_type"]
    page.run("app.canvas.ds.scale = 1; app.canvas.setDirty(true, true)")
    picture = Path(os.environ.get("VIDACCEL_SCREENSHOTS", tmp_path)) / "comfyui_demo_compare.png"
    for _ in range(30):  # it is drawn some time after the graph is there
        page.screenshot(picture)
        if iio.imread(picture).std() > 10:  # not an empty page
            return
        time.sleep(1)
    pytest.fail("the page stayed empty")


@pytest.mark.parametrize("words", ["vidaccel", "sparse attention", "generate video"])
def test_the_search_finds_the_nodes(server, page, words):
    page.open(server.url)
    page.until("!!(window.app && app.graph && app.graph._nodes && document.querySelector('canvas'))", 120)
    page.run("app.graph.clear()")
    for _ in range(20):  # the page takes a while to listen
        page.double_click(800, 700)
        time.sleep(1)
        if page.run("document.activeElement.tagName") == "INPUT":
            break
    page.type(words)
    wanted = "Generate Video" if words == "generate video" else "Sparse Attention (SVG2)"
    page.until(f"document.body.innerText.includes({wanted!r})", 30)
