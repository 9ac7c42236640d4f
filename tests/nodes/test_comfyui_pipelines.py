"""The nodes for diffusers pipelines in a real ComfyUI, over HTTP and a WebSocket, with the built-in demo model."""

from __future__ import annotations

import json
import struct
import subprocess
import time
import urllib.error
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from comfy_server import COMFYUI, PYTHON, ROOT, WHY_SKIPPED
from diffusers import WanPipeline
from gft_adapters import write_adapter
from peft import LoraConfig, get_peft_model_state_dict

from vidaccel import demo

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMFYUI, reason=WHY_SKIPPED)]

PREVIEWS = (1, 4)  # binary messages with a picture: without and with metadata


def graph(accelerate: bool = False, pipeline: str = "demo (built-in)", hub_id: str = "", **inputs) -> dict:
    """One video of the demo model, saved as a film and as pictures."""
    settings = {"prompt": "a blue square moves up on a white background", "negative_prompt": "", "seed": 0, "fps": 16.0}
    settings |= {"width": 64, "height": 64, "frames": 9, "steps": 3, "guidance": 2.0}
    made = {
        "load": {
            "class_type": "VidaccelLoadPipeline",
            "inputs": {"pipeline": pipeline, "hub_id": hub_id, "dtype": "auto"},
        },
        "make": {"class_type": "VidaccelGenerateVideo", "inputs": {"pipeline": ["load", 0], **settings}},
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["make", 1], "filename_prefix": "film", "format": "auto", "codec": "auto"},
        },
        "frames": {"class_type": "SaveImage", "inputs": {"images": ["make", 0], "filename_prefix": "frame"}},
        "report": {"class_type": "VidaccelReport", "inputs": {"report": ["make", 2], "after": ["make", 0]}},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}},
    }
    if accelerate:
        chosen = {"method": "svg2", "density": 0.4, "dense_start_percent": 0.3, "dense_end_percent": 0.0}
        chosen |= {"dense_layers": 0, "compensate": False, "backend": "auto"}
        chosen |= {name: inputs.pop(name) for name in list(inputs) if name in (*chosen, "min_tokens")}
        made["fast"] = {"class_type": "VidaccelAcceleratePipeline", "inputs": {"pipeline": ["load", 0], **chosen}}
        made["make"]["inputs"]["pipeline"] = ["fast", 0]
    made["make"]["inputs"] |= inputs
    return made


def test_demo_compare_as_shipped(server):
    shipped = json.loads((ROOT / "example_workflows" / "api" / "demo_compare.json").read_text())
    entry = server.queue(shipped)
    assert entry["status"]["status_str"] == "success", entry["status"]
    films = [
        found for out in entry["outputs"].values() for found in out.get("images", []) if "mp4" in found["filename"]
    ]
    frames = iio.imread(server.file(films[0]))
    assert frames.shape == (33, 128, 260, 3)  # dense, a gap of 4 pixels, accelerated
    dense, fast = frames[:, :, :128].astype(float), frames[:, :, 132:].astype(float)
    assert dense.std() > 20 and 0 < np.abs(dense - fast).mean() < 12
    (text,) = [out["text"][0] for out in entry["outputs"].values() if "text" in out]
    assert text.startswith("tangent: density 0.2, dense_start_percent 0.2") and "Mean density" in text
    assert "dense_start_percent (" in text and "first steps" not in text


def test_accelerate_pipeline_with_the_values_that_it_begins_with(server):
    """Nothing is said of what belongs to another method, and nothing warned of."""
    known = server.get("/object_info/VidaccelAcceleratePipeline")["VidaccelAcceleratePipeline"]["input"]
    values = {name: options[1]["default"] for name, options in known["required"].items() if "default" in options[1]}
    assert values["method"] == "tangent"
    entry = server.queue(graph(accelerate=True, **values, min_tokens=0, width=128, height=128))
    assert entry["status"]["status_str"] == "success", entry["status"]
    text = entry["outputs"]["text"]["text"][0]
    assert text.startswith("tangent: density 0.2") and "Mean density" in text
    assert "compensate" not in text and "warning" not in text.lower()


def test_outputs_history_and_another_size(server):
    entry = server.queue(graph(accelerate=True))
    (film,) = entry["outputs"]["save"]["images"]
    assert iio.imread(server.file(film)).shape == (9, 64, 64, 3)
    pictures = entry["outputs"]["frames"]["images"]
    assert len(pictures) == 9 and iio.imread(server.file(pictures[0])).shape == (64, 64, 3)
    assert "Mean density" in entry["outputs"]["text"]["text"][0]

    other = server.queue(graph(accelerate=True, width=96, height=48, frames=5))
    (film,) = other["outputs"]["save"]["images"]
    assert iio.imread(server.file(film)).shape == (5, 48, 96, 3)


def test_short_videos_stay_dense_where_min_tokens_is_given(server):
    """A graph that was saved before the input was there runs as it did."""
    plain = server.queue(graph(seed=5))["outputs"]["frames"]["images"]
    entry = server.queue(graph(accelerate=True, min_tokens=8192, seed=5))
    text = entry["outputs"]["text"]["text"][0]
    assert "No call was sparse: min_tokens 8192, above the video's 48 tokens." in text
    for one, other in zip(plain, entry["outputs"]["frames"]["images"], strict=True):
        assert np.array_equal(iio.imread(server.file(one)), iio.imread(server.file(other)))
    entry = server.queue(graph(accelerate=True, method="radial", density=0.8, compensate=True, seed=5))
    text = entry["outputs"]["text"]["text"][0]
    assert "Mean density" in text and "dense_start_percent (" in text and "compensate" not in text


def test_a_pipeline_of_the_folder_makes_the_same_video(server):
    choices = server.get("/object_info/VidaccelLoadPipeline")["VidaccelLoadPipeline"]["input"]["required"]["pipeline"]
    choices = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
    assert "my demo" in choices and "no pipeline" not in choices
    first = server.queue(graph(seed=3))["outputs"]["frames"]["images"]
    second = server.queue(graph(seed=3, pipeline="my demo"))["outputs"]["frames"]["images"]
    assert np.array_equal(iio.imread(server.file(first[-1])), iio.imread(server.file(second[-1])))


def frames_of(server, entry: dict) -> np.ndarray:
    assert entry["status"]["status_str"] == "success", entry["status"]
    return np.stack([iio.imread(server.file(found)).astype(float) for found in entry["outputs"]["frames"]["images"]])


def save_lora(folder: Path) -> None:
    """One of the demo model, of random weights."""
    transformer = WanPipeline.from_pretrained(demo.path()).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))


def test_a_chain_of_loras(server, tmp_path):
    save_lora(tmp_path)

    def video(*weights: float) -> np.ndarray:
        made = graph(seed=4)
        for number, weight in enumerate(weights):
            inputs = {"lora": "the path below", "path": str(tmp_path), "weight": weight, "transformer": "all"}
            inputs |= {"loras": [f"lora{number - 1}", 0]} if number else {}
            made[f"lora{number}"] = {"class_type": "VidaccelPipelineLoRA", "inputs": inputs}
            made["load"]["inputs"]["loras"] = [f"lora{number}", 0]
        return frames_of(server, server.queue(made))

    plain, one = video(), video(1.0)
    assert np.array_equal(video(0.0), plain) and np.abs(one - plain).mean() > 0.5
    assert np.abs(video(1.0, -1.0) - plain).mean() < 0.1
    missing = graph()
    missing["lora"] = {
        "class_type": "VidaccelPipelineLoRA",
        "inputs": {"lora": "the path below", "path": "/no/such", "weight": 1.0, "transformer": "all"},
    }
    missing["load"]["inputs"]["loras"] = ["lora", 0]
    assert "path is /no/such: there is no such file or folder" in json.dumps(server.queue(missing)["status"])


def test_files_are_read_anew_once_they_were_changed_and_only_then(server, tmp_path):
    """Also where their path comes through a link, whose value ComfyUI does not tell before it runs the graph."""
    save_lora(tmp_path)
    made = graph(seed=31)
    made["lora"] = {
        "class_type": "VidaccelPipelineLoRA",
        "inputs": {"lora": "the path below", "path": str(tmp_path), "weight": 1.0, "transformer": "all"},
    }
    made["load"]["inputs"]["loras"] = ["lora", 0]
    made["where"] = {"class_type": "PrimitiveString", "inputs": {"value": "demo-cache"}}
    made["preset"] = {"class_type": "VidaccelLoadPreset", "inputs": {"preset": "demo-cache", "path": ["where", 0]}}
    made["fast"] = {"class_type": "VidaccelApplyPreset", "inputs": {"pipeline": ["load", 0], "preset": ["preset", 0]}}
    made["make"]["inputs"]["pipeline"] = ["fast", 0]

    def kept() -> list[str]:
        entry = server.queue(made)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return [
            name for kind, told in entry["status"]["messages"] if kind == "execution_cached" for name in told["nodes"]
        ]

    logged = len(server.log.read_text())
    kept()
    assert {"lora", "load", "preset", "make"} <= {*kept()}
    save_lora(tmp_path)
    again = kept()
    assert "preset" in again and not {"lora", "load", "make"} & {*again}
    assert "WARNING" not in server.log.read_text()[logged:]


def test_guidance_in_one_pass(server, tmp_path):
    """Another video, the same each time, and the pipeline before the node keeps two passes."""
    transformer = WanPipeline.from_pretrained(demo.path()).transformer
    path = str(write_adapter(tmp_path, demo.path(), transformer))

    def video(**changes) -> np.ndarray:
        made = graph(seed=4, guidance=3.0, **changes)
        made["free"] = {
            "class_type": "VidaccelGuidanceFreePipeline",
            "inputs": {"pipeline": ["load", 0], "adapter": "the model's own", "path": path, "second_path": ""},
        }
        made["make"]["inputs"]["pipeline"] = ["free", 0]
        entry = server.queue(made)
        assert "guidance 3 in one pass" in entry["outputs"]["text"]["text"][0]
        return frames_of(server, entry)

    plain = frames_of(server, server.queue(graph(seed=4, guidance=3.0)))
    one = video()
    assert np.abs(one - plain).mean() > 0.5
    assert np.array_equal(frames_of(server, server.queue(graph(seed=4, guidance=3.0))), plain)
    assert np.array_equal(video(), one)


def test_a_video_that_starts_from_another(server):
    first = graph(seed=6)
    plain = frames_of(server, server.queue(first))
    made = graph(seed=7, accelerate=True, steps=4, frames=0, strength=0.25)
    made["source"] = {**first["make"]}
    made["again"] = {"class_type": "CreateVideo", "inputs": {"images": ["source", 0], "fps": 16.0}}
    made["make"]["inputs"]["video"] = ["again", 0]
    near = frames_of(server, server.queue(made))
    made["make"]["inputs"]["strength"] = 1.0
    far = frames_of(server, server.queue(made))
    assert near.shape == far.shape == plain.shape
    assert np.abs(near - plain).mean() < np.abs(far - plain).mean()


def test_progress_and_previews_on_the_websocket(server):
    with server.events() as events:
        number = server.submit(graph(accelerate=True, steps=4, seed=11))
        progress, pictures = [], []
        while True:
            message = events.recv()
            if isinstance(message, bytes):
                if struct.unpack(">I", message[:4])[0] in PREVIEWS:
                    pictures.append(message[message.find(b"\xff\xd8") :])
                continue
            event = json.loads(message)
            if event["type"] == "progress" and event["data"]["node"] == "make":
                progress.append((event["data"]["value"], event["data"]["max"]))
            if event["type"] in ("execution_success", "execution_error"):
                break
    assert event["type"] == "execution_success" and event["data"]["prompt_id"] == number
    assert [p for p in progress if p[0]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    height, width, _ = iio.imread(pictures[-1]).shape
    assert height == width >= 64  # newer versions enlarge it


def test_an_interrupt_stops_within_a_step_and_the_queue_goes_on(server):
    with server.events() as events:
        server.submit(graph(accelerate=True, steps=500, frames=33, width=128, height=128))
        stopped = None
        while True:
            message = events.recv()
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            if event["type"] == "progress" and event["data"]["value"] == 2 and stopped is None:
                server.post("/interrupt")
                stopped = time.monotonic()
            if event["type"] == "progress":
                last = event["data"]["value"]
            assert event["type"] not in ("execution_success", "execution_error"), event
            if event["type"] == "execution_interrupted":
                break
    # A step takes about a second on a slow CPU; the check is before every use of a part of the pipeline.
    assert last <= 4 and time.monotonic() - stopped < 10
    assert server.queue(graph(accelerate=True, seed=12))["status"]["status_str"] == "success"


def test_bad_input_is_one_readable_error_and_the_queue_goes_on(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.submit(graph(accelerate=True, density=7.0))
    assert refused.value.code == 400 and "density" in refused.value.read().decode()
    folder = str(server.folder / "models" / "diffusers" / "no pipeline")
    for changed, message in (
        (graph(frames=10), "4k+1 frames"),
        (graph(width=72), "multiple of 16"),
        (graph(hub_id=folder), "no diffusers pipeline"),
        (graph(hub_id="not a pipeline"), "nor a hub id"),
        (graph(accelerate=True, dense_start_percent=0.8, dense_end_percent=0.3), "leave no step sparse"),
        (graph(accelerate=True, backend="triton"), "backend is triton"),
        (
            graph(accelerate=True, backend="flex", compensate=True),
            "backend is flex: it cannot compute compensate on cpu",
        ),
        (
            graph(accelerate=True, method="svg", density=0.01),
            "density is 0.01, and with a video of 3 frames of 4x4 it must be at least",
        ),
        (graph(prompt="  "), "prompt is empty"),
    ):
        try:
            said = json.dumps(server.queue(changed)["status"])
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        assert message in said, (message, said[-1500:])
    assert server.queue(graph(seed=13))["status"]["status_str"] == "success"


def test_the_deep_compression_model_makes_any_size(server):
    entry = server.queue(graph(pipeline="demo-dc (built-in)", width=104, height=72, frames=10))
    assert entry["status"]["status_str"] == "success", entry["status"]
    (film,) = entry["outputs"]["save"]["images"]
    assert iio.imread(server.file(film)).shape == (10, 72, 104, 3)


def test_dc_ae_v_with_the_stock_encode_and_decode(server):
    """A video of the demo, encoded and decoded by ComfyUI's own nodes, also in tiles, is nearly the same."""
    made = graph(width=128, height=128, frames=33, steps=6, seed=5)
    loaded = {"autoencoder": "demo-dc (built-in)", "path": ""}
    made["dc"] = {"class_type": "VidaccelLoadDCAEV", "inputs": loaded}
    made["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["make", 0], "vae": ["dc", 0]}}
    made["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["dc", 0]}}
    tiles = {"tile_size": 96, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    made["tiled"] = {"class_type": "VAEDecodeTiled", "inputs": {"samples": ["encode", 0], "vae": ["dc", 0], **tiles}}
    made["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": ["encode", 0], "filename_prefix": "dc"}}
    for name in ("decode", "tiled"):
        inputs = {"images": [name, 0], "filename_prefix": name}
        made[f"save_{name}"] = {"class_type": "SaveImage", "inputs": inputs}
    entry = server.queue(made)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert server.latent(entry, "latent").shape == (1, 32, 9, 4, 4)
    pictures = {
        name: [iio.imread(server.file(found)).astype(float) for found in entry["outputs"][name]["images"]]
        for name in ("frames", "save_decode", "save_tiled")
    }
    assert [len(pictures[name]) for name in pictures] == [33, 36, 36]  # 33 frames became 36, the last repeated
    for name, bound in (("save_decode", 12), ("save_tiled", 20)):
        error = [np.abs(a - b).mean() for a, b in zip(pictures["frames"], pictures[name], strict=False)]
        assert np.mean(error) < bound, (name, error)


def test_a_file_that_is_no_autoencoder(server):
    made = {"dc": {"class_type": "VidaccelLoadDCAEV", "inputs": {"autoencoder": "demo-dc (built-in)", "path": "/no"}}}
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 4, "color": 0}}
    made |= {
        "image": image,
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["image", 0], "vae": ["dc", 0]}},
    }
    made["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["encode", 0], "filename_prefix": "x"}}
    said = json.dumps(server.queue(made)["status"])
    assert "autoencoder cannot be used: There is no file /no" in said


def test_tune_is_interrupted_goes_on_and_its_preset_makes_a_video(server):
    inputs = {
        "prompts": "a blue square moves up on a white background", "min_psnr": 5.0, "max_error": 0.0,
        "max_time_ratio": 0.0, "effort": "quick", "confirm": 1, "sparse": False, "caches": True, "adapters": False,
        "guidance_cache": False, "negative_prompt": "", "width": 64, "height": 64, "frames": 9, "steps": 6,
        "guidance": 2.0, "seed": 0, "name": "tuned/demo", "compiled_blocks": False,
    }  # fmt: skip
    made = graph(frames=9, steps=6, guidance=0.0)
    made["tune"] = {"class_type": "VidaccelTune", "inputs": {"pipeline": ["load", 0], **inputs}}
    made["fast"] = {"class_type": "VidaccelApplyPreset", "inputs": {"pipeline": ["load", 0], "preset": ["tune", 0]}}
    made["make"]["inputs"]["pipeline"] = ["fast", 0]
    folder = server.folder / "output" / "tuned" / "demo"
    if b"torchmetrics" not in subprocess.run([PYTHON, "-m", "pip", "list"], capture_output=True).stdout:
        said = json.dumps(server.queue(made)["status"])
        assert "tuning needs torchmetrics>=1.4 (not installed): with ComfyUI's Python, pip install -r" in said
        pytest.skip("ComfyUI's Python has no torchmetrics")
    with server.events() as events:
        server.submit(made)
        progress, asked = [], False
        while True:
            message = events.recv()
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            if event["type"] == "progress" and event["data"]["node"] == "tune":
                progress.append(event["data"]["value"])
                if progress[-1] >= 2 and not asked:
                    asked = True
                    server.post("/interrupt")
            assert event["type"] not in ("execution_success", "execution_error"), event
            if event["type"] == "execution_interrupted":
                break
    known = (folder / "journal.jsonl").read_text()
    assert known.count("\n") >= 2 and not (folder / "preset.yaml").exists()
    entry = server.queue(made)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert (folder / "journal.jsonl").read_text().startswith(known)
    text = entry["outputs"]["tune"]["text"][0]
    assert str(folder / "tune.html") in text and (folder / "tune.html").is_file()
    assert "6 steps" in entry["outputs"]["text"]["text"][0]
    made["tune"]["inputs"] |= {"min_psnr": 0.0}
    assert "min_psnr is needed, or another bound" in json.dumps(server.queue(made)["status"])
    made["tune"]["inputs"] |= {"min_psnr": 5.0, "frames": 5}
    assert "measurements of something else: size was [9, 64, 64]" in json.dumps(server.queue(made)["status"])
