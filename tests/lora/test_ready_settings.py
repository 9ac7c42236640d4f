"""The ready settings of published models run as they are: on pipelines of the same kind at tiny sizes, and a folder of
videos, with nothing changed but where these lie, the sizes, the number of steps and the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fast_set import fast
from trainable import saved

from vidaccel.lora import config_folder, run
from vidaccel.lora.recipes import RECIPES
from vidaccel.lora.trainer import Stopped

WAN = {
    "wan2.1_t2v_1.3b_lora": "text",
    "wan2.1_14b_lora": "first frame",
    "wan2.2_a14b_lora": "two stages",
    "wan2.1_t2v_1.3b_length": "text",
    "wan2.1_14b_length": "text",
    "wan2.1_t2v_1.3b_gft": "text",
    "wan2.1_14b_gft": "first frame",
    "wan2.2_a14b_gft": "two stages, first frame",
    "wan2.1_t2v_1.3b_sla": "text",
    "wan2.1_t2v_14b_sla": "text",
    "wan2.2_a14b_sla": "two stages",
    "wan2.1_t2v_1.3b_ae_adapt": "text",
    "wan2.1_t2v_14b_ae_adapt": "text",
}
"""Settings -> the kind of Wan pipeline that they, or a comment in them, are for."""
TINY = "wan2.1_tiny_decoder"
"""test_tiny_decoder.py runs it."""
ALIKE = {
    "wan2.1_14b_lora",
    "wan2.1_14b_length",
    "wan2.1_t2v_1.3b_gft",
    "wan2.2_a14b_gft",
    "wan2.1_t2v_14b_sla",
    "wan2.2_a14b_sla",
    "wan2.1_t2v_14b_ae_adapt",
    "hunyuanvideo_lora",
}
"""Those whose recipe and whose kind of pipeline run in others as well; they are slow."""
OTHERS = {
    "hunyuanvideo_lora": "hunyuan first frame",
    "cogvideox_lora": "cogvideox 5b",
    "ltx_video_lora": "ltx",
}
DEMO_QUICK = {"demo_length", "demo_dc_consistency", "demo_autoencoder", "demo_dc_tiny_decoder"}
"""Of the built-in models, those that no other test is like, or that take a second or two; the others are slow."""
SMALLER = {
    "length": {"length.base_frames": 5, "attention.density": 0.9, "attention.block_size": 8},
    "sla": {"sla.topk": 0.5, "sla.block_q": 4, "sla.block_k": 4},
}


def shortened(name: str, base: Path, videos: Path, out: Path, **more: Any) -> list[str]:
    """Overrides for a run of two steps on a tiny model and folder."""
    content = yaml.safe_load((config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    frames, side = more.pop("frames", 9), 128 if content["recipe"] == "length" else 64
    sizes = [(32, side), (side, 32)] if len(content["data"]["sizes"]) == 2 else [(32, side)]
    changed: dict[str, Any] = {
        "out": str(out),
        "model.base": str(base),
        "data.folder": str(videos),
        "data.cache": str(out.parent / "cache"),
        "data.sizes": [{"frames": frames, "height": height, "width": width} for height, width in sizes],
        "data.workers": 1,
        "loop.device": "cpu",
        "validation.clips": 2,
        "validation.steps": 2,
        **SMALLER.get(content["recipe"], {}),
        **more,
    }
    if content["recipe"] == "ae_adapt":
        changed |= {f"phases.{phase}.steps": 2 for phase in ("align", "head", "lora")}
        changed |= {"phases.lora.rank": 4}
    else:
        changed |= {"train.steps": 2}
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]


def test_every_file_is_here():
    kinds = {file.stem for file in config_folder().glob("*.yaml") if not file.stem.startswith("demo")}
    assert kinds == {*WAN, *OTHERS, "wan2.1_t2v_1.3b_consistency", "wan2.2_a14b_consistency", TINY}


@pytest.mark.parametrize("name", fast(WAN.keys() - ALIKE, WAN))
def test_wan(tmp_path, wan_bases, autoencoder_folder, video_folder, name):
    recipe = next(recipe for recipe in sorted(RECIPES, key=len, reverse=True) if recipe in name)
    more = {"model.autoencoder": str(autoencoder_folder), "frames": 8} if recipe == "ae_adapt" else {}
    check(recipe, name, wan_bases[WAN[name]], video_folder, tmp_path / "run", **more)


@pytest.mark.parametrize("name", fast(OTHERS.keys() - ALIKE, OTHERS))
def test_others(tmp_path, video_folder, name):
    # An empty caption has a token of its own in the published tokenizers, and none in the tiny ones.
    check("lora", name, saved(OTHERS[name], tmp_path), video_folder, tmp_path / "run", **{"flow.unconditional": "a"})


def test_few_steps_go_on_from_the_guidance_free_adapter(tmp_path, text_base, video_folder):
    check("gft", "wan2.1_t2v_1.3b_gft", text_base, video_folder, tmp_path / "gft")
    teacher = {"consistency.teacher": str(tmp_path / "gft" / "adapter"), "validation.steps": 4}
    check("consistency", "wan2.1_t2v_1.3b_consistency", text_base, video_folder, tmp_path / "few", **teacher)


@pytest.mark.slow  # test_consistency.py has both transformers of this kind
def test_few_steps_of_two_transformers(tmp_path, wan_bases, video_folder):
    base, teacher = wan_bases["two stages"], {"consistency.teacher": str(tmp_path / "gft" / "adapter")}
    check("gft", "wan2.2_a14b_gft", base, video_folder, tmp_path / "gft")
    check("consistency", "wan2.2_a14b_consistency", base, video_folder, tmp_path / "few", **teacher)


@pytest.mark.parametrize("name", fast(DEMO_QUICK, sorted(f.stem for f in config_folder().glob("demo_*.yaml"))))
def test_the_built_in_model(tmp_path, stop_after, name):
    """As they are up to the first step, but for the number of clips."""
    content = yaml.safe_load((config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    fewer = ["data.clips=2", f"data.cache={tmp_path / 'cache'}"] if "clips" in content["data"] else []
    fewer += ["validation.clips=1"] if "clips" in content.get("validation", {}) else []
    fewer += ["train.batch_size=1"] if "train" in content else []
    stop_after(1)
    with pytest.raises(Stopped):
        run(content["recipe"], name, [f"out={tmp_path / 'run'}", *fewer])


def check(recipe: str, name: str, base: Path, videos: Path, out: Path, **more: Any) -> None:
    """It ends, with a result, a checkpoint to go on from, and a log."""
    result = run(recipe, name, shortened(name, base, videos, out, **more))
    assert all(Path(path).exists() for path in result.values() if isinstance(path, str))
    assert list((out / "checkpoints").iterdir())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(row["seconds_per_step"] > 0 for row in rows if "loss" in row) and len(rows) > 1
    wanted = yaml.safe_load((config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))["validation"]
    last = max((file.name[:8] for file in (out / "validation").glob("*")), default="none")
    assert len(list((out / "validation").glob(f"{last}*.mp4"))) == len(wanted.get("prompts", ()))
