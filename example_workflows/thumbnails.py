"""Makes the pictures of the template cards anew: `python example_workflows/thumbnails.py`.

A card of ComfyUI's template browser is square and shows what a workflow makes. The weights of the workflows for Wan
and HunyuanVideo are tens of GB, so by default the built-in model makes each picture, with the workflow's method and
density, and the picture says so. `--results FOLDER` takes a workflow's own result where the folder has one, as Save
Video names it (`wan_t2v_svg2_00001_.mp4`); the dense half of the comparison is the left half of its film.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
SIDE = 640  # pixels
BAR = 92  # below the picture; a card is some 220 pixels wide, so its letters are large
METHODS = {"VidaccelSparseAttention" + name: name.lower() for name in ("SVG2", "SVG", "Radial", "Tangent", "Sparge")}
METHODS["VidaccelApplyVSA"] = "vsa"
OF_TRAINING = 0.2  # the density of FastWan 1.3B, where a node has 0 for it
PROMPTS = {
    "fastwan_t2v_vsa": "a red circle moves right on a white background",
    "demo_compare": "a red circle moves left on a grey background",
    "hunyuan_t2v_svg": "a yellow circle moves up on a black background",
    "wan22_i2v_svg2": "a blue square moves right on a white background",
    "wan_t2v_radial_long": "a green circle moves right on a grey background",
    "wan_t2v_svg2": "a red square moves down on a white background",
    "wan_t2v_tangent": "a green square moves left on a black background",
    "wan_t2v_tangent_forecast": "a blue circle moves down on a grey background",
}


@dataclass(frozen=True)
class Card:
    """One template.

    Args:
        name: of the file for scripts, and of its results.
        page: the file that the template browser opens; its name is the title of the card.
        method, density: of its sparse attention.
        cache: over steps, as `generate` takes it; "" for none.
    """

    name: str
    page: Path
    method: str
    density: float
    cache: str = ""

    @property
    def picture(self) -> Path:
        """Where the browser looks for the picture."""
        return self.page.with_suffix(".jpg")


def cards() -> list[Card]:
    """All templates, as their files say."""
    found = []
    for page in sorted(FOLDER.glob("*.json")):
        api = FOLDER / json.loads(page.read_text(encoding="utf-8"))["extra"]["api"]
        graph = json.loads(api.read_text(encoding="utf-8"))
        (inputs, *_) = (node for node in graph.values() if "density" in node["inputs"])
        method = METHODS.get(inputs["class_type"]) or inputs["inputs"]["method"]
        caches = [node["inputs"] for node in graph.values() if node["class_type"] == "VidaccelForecastCache"]
        cache = f"forecast={caches[0]['tolerance']}" if caches else ""
        found.append(Card(api.stem, page, method, inputs["inputs"]["density"] or OF_TRAINING, cache))
    return found


def compose(card: Card, frames: np.ndarray, dense: np.ndarray | None, note: str) -> Image.Image:
    """The picture of a card, from a video `[F, H, W, 3]` of bytes and, of a comparison, the dense one."""
    method = card.method.upper() if card.method.startswith(("svg", "vsa")) else card.method.capitalize()
    told = f"{method}, {card.density:.0%} of pairs" + (" + forecast" if card.cache else "")
    middle = len(frames) // 2
    if dense is not None:
        halves = [_fitted(video[middle], SIDE // 2 - 2, SIDE - BAR) for video in (dense, frames)]
        whole = _grid([halves], gap=4)
        return _captioned(whole, [("dense", 0.25), (told, 0.75)], note)
    if "long" in card.name:
        places = np.linspace(0, len(frames) - 1, 9).round().astype(int)
        size = (SIDE - 8) // 3, (SIDE - BAR - 8) // 3
        tiles = [_fitted(frames[place], *size) for place in places]
        return _captioned(_grid([tiles[0:3], tiles[3:6], tiles[6:9]], gap=4), [(told, 0.5)], note)
    if "i2v" in card.name:
        size = SIDE // 2 - 2, (SIDE - BAR) // 2 - 2
        tiles = [_fitted(frames[place], *size) for place in np.linspace(0, len(frames) - 1, 4).round().astype(int)]
        return _captioned(_grid([tiles[:2], tiles[2:]], gap=4), [(told, 0.5)], note)
    return _captioned(_fitted(frames[middle], SIDE, SIDE - BAR), [(told, 0.5)], note)


def _fitted(frame: np.ndarray, width: int, height: int) -> Image.Image:
    """A frame that fills a rectangle, cut at its edges where it has another shape."""
    from PIL import ImageOps

    return ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)


def _grid(rows: list[list[Image.Image]], gap: int) -> Image.Image:
    whole = Image.new("RGB", (SIDE, SIDE - BAR), "white")
    y = 0
    for row in rows:
        x = 0
        for tile in row:
            whole.paste(tile, (x, y))
            x += tile.width + gap
        y += row[0].height + gap
    return whole


def _captioned(picture: Image.Image, words: list[tuple[str, float]], note: str) -> Image.Image:
    """With a bar below: words, each around a place from 0 (left) to 1, and a note in small letters."""
    whole = Image.new("RGB", (SIDE, SIDE), "#1c1c22")
    whole.paste(picture, (0, 0))
    draw, letters = ImageDraw.Draw(whole), ImageFont.load_default(34 if len(words) == 1 else 28)
    for text, place in words:
        y = SIDE - BAR / 2 - (16 if note else 0)
        draw.text((place * SIDE, y), text, "white", letters, anchor="mm")
    draw.text((SIDE / 2, SIDE - 22), note, "#b8b8c4", ImageFont.load_default(25), anchor="mm")
    return whole


def built_in(card: Card, **settings: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The card's method on the built-in model, and for the comparison the dense video."""
    from vidaccel.generation.api import generate

    own = {"seed": 0, "progress": False, "cache": card.cache or None, **settings}
    if "long" in card.name:
        own["frames"] = 65
    wanted = [(card.method, {"density": card.density})] + [("dense", {})] * (card.name == "demo_compare")
    if card.method == "vsa":  # the built-in model has no gates, and twelve cubes of 4x4x4 alone
        own["settings"] = {"vsa": {"gated": False, "cube": (2, 2, 2)}}
    made = [generate("demo", PROMPTS[card.name], method=m, **own, **more).frames for m, more in wanted]
    return made[0], made[1] if len(made) > 1 else None


def result(card: Card, folder: Path) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The newest result of a workflow in a folder; None where there is none."""
    from vidaccel.generation.media.video_reader import read_video

    files = sorted(folder.glob(f"{card.name}_[0-9]*.mp4"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    frames, _ = read_video(files[-1])
    if card.name != "demo_compare":
        return frames, None
    half = (frames.shape[2] - 4) // 2  # as Image Stitch lays them, with 4 pixels between
    return frames[:, :, -half:], frames[:, :, :half]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, help="folder with videos that the workflows made")
    parser.add_argument("--out", type=Path, help="write the pictures there instead of beside the workflows")
    options = parser.parse_args()
    for card in cards():
        own = result(card, options.results) if options.results else None
        frames, dense = own or built_in(card)
        picture = compose(card, frames, dense, "" if own else "made with the built-in model")
        path = card.picture if options.out is None else options.out / card.picture.name
        picture.save(path, quality=88)
        print(path)


if __name__ == "__main__":
    main()
