"""The workflow files of the repository: as the page saves them, and as the server takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "example_workflows"
# The name of a page's file is the title of its card in the template browser; scripts have names without spaces.
PAGES = {
    Path(json.loads(path.read_text(encoding="utf-8"))["extra"]["api"]).stem: path for path in FOLDER.glob("*.json")
}
NAMES = sorted(PAGES)
NOTES = ("MarkdownNote", "Note")
_CONTROLS = ("fixed", "increment", "decrement", "randomize")


def page_form(name: str) -> dict[str, Any]:
    """The file that the template browser opens."""
    return json.loads(PAGES[name].read_text(encoding="utf-8"))


def server_form(name: str) -> dict[str, Any]:
    """The file for scripts."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def to_server_form(page: dict[str, Any]) -> dict[str, Any]:
    """What the page would send to the server: class and inputs of each node, by number."""
    sources = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    graph = {}
    for node in page["nodes"]:
        if node["type"] in NOTES:
            continue
        values = list(node.get("widgets_values", []))
        inputs = {}
        for slot in node["inputs"]:
            if "widget" in slot:
                inputs[slot["name"]] = values.pop(0)
                # The page has a menu behind a seed and a button behind an uploaded file, which the server never sees.
                if slot["name"] in ("seed", "noise_seed") and values and values[0] in _CONTROLS:
                    values.pop(0)
                if node["type"] == "LoadImage":
                    values.pop(0)
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        assert not values, f"{node['type']} has values without a widget: {values}"
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
