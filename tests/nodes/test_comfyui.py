"""The nodes in a real ComfyUI: its server, its model classes, its samplers, on the CPU with random weights.

Needs the folder of a ComfyUI (`COMFYUI_PATH`) and a Python that can run it (`COMFYUI_PYTHON`, this one by default).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="set COMFYUI_PATH to the folder of a ComfyUI to run the nodes in it"),
]

# Without a text encoder's weights: a node that makes a conditioning of random numbers.
TEST_NODE = """
import torch

class RandomConditioning:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {"default": 0})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    def make(self, seed):
        text = torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed))
        return ([[text, {}]],)

NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}
"""


def tiny_wan() -> dict[str, torch.Tensor]:
    """The state dict of a text-to-video Wan with 2 layers and 2 heads of 128, as ComfyUI's loader knows it."""
    generator = torch.Generator().manual_seed(0)
    dim, ffn, text = 256, 512, 4096

    def linear(name: str, out: int, inside: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(out, inside, generator=generator) * inside**-0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(out)}

    state = linear("text_embedding.0", dim, text) | linear("text_embedding.2", dim, dim)
    state |= linear("time_embedding.0", dim, 256) | linear("time_embedding.2", dim, dim)
    state |= linear("time_projection.1", 6 * dim, dim) | linear("head.head", 64, dim)
    state["head.modulation"] = torch.randn(1, 2, dim, generator=generator) * 0.1
    state["patch_embedding.weight"] = torch.randn(dim, 16, 1, 2, 2, generator=generator) * 0.1
    state["patch_embedding.bias"] = torch.zeros(dim)
    for i in range(2):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                state |= linear(f"{block}.{attention}.{part}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                state[f"{block}.{attention}.{norm}.weight"] = torch.ones(dim)
        state |= {f"{block}.norm3.weight": torch.ones(dim), f"{block}.norm3.bias": torch.zeros(dim)}
        state |= linear(f"{block}.ffn.0", ffn, dim) | linear(f"{block}.ffn.2", dim, ffn)
        state[f"{block}.modulation"] = torch.randn(1, 6, dim, generator=generator) * 0.1
    return state


class Server:
    """A running ComfyUI, spoken to over HTTP."""

    def __init__(self, url: str, folder: Path, process: subprocess.Popen, log: Path) -> None:
        self.url, self.folder, self.process, self.log = url, folder, process, log

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def queue(self, graph: dict) -> dict:
        """The history entry of a graph once it has run.

        Raises:
            urllib.error.HTTPError: the server refuses the graph.
        """
        body = json.dumps({"prompt": graph, "client_id": uuid.uuid4().hex}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            number = json.load(answer)["prompt_id"]
        for _ in range(600):
            entry = self.get(f"/history/{number}").get(number)
            if entry and entry["status"].get("status_str") in ("success", "error"):
                return entry
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-2000:])

    def latent(self, entry: dict, node: str) -> torch.Tensor:
        (found,) = entry["outputs"][node]["latents"]
        return load_file(self.folder / "output" / found["subfolder"] / found["filename"])["latent_tensor"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models/diffusion_models", "output", "input", "temp", "user"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "vidaccel-pack").symlink_to(ROOT)
    (folder / "custom_nodes" / "test_node.py").write_text(TEST_NODE)
    from safetensors.torch import save_file

    save_file(tiny_wan(), folder / "models" / "diffusion_models" / "tiny_wan.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    options = ["--cpu", "--disable-auto-launch", "--disable-api-nodes", "--listen", "127.0.0.1"]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", *options, "--port", str(port)]
    command += ["--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=file, stderr=subprocess.STDOUT)
    running = Server(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        for _ in range(300):
            try:
                running.get("/queue")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(20)


def graph(node: str | None = None, size: int = 128, frames: int = 17, **inputs) -> dict:
    """Text to video with the tiny model, four steps, the latent saved; `node` between the loader and the sampler."""
    made = {
        "load": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"},
        },
        "yes": {"class_type": "RandomConditioning", "inputs": {"seed": 1}},
        "no": {"class_type": "RandomConditioning", "inputs": {"seed": 2}},
        "empty": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": size, "height": size, "length": frames, "batch_size": 1},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["load", 0],
                "seed": 0,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "positive": ["yes", 0],
                "negative": ["no", 0],
                "latent_image": ["empty", 0],
                "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "test"}},
    }
    if node:
        common = {"density": 0.5, "dense_start_percent": 0.2, "dense_end_percent": 0.0, "dense_layers": ""}
        if node == "SVG2":
            common |= {"compensate": False, "query_clusters": 0, "key_clusters": 0}
        made["sparse"] = {
            "class_type": f"VidaccelSparseAttention{node}",
            "inputs": {"model": ["load", 0], **common, "min_tokens": 0, "backend": "auto", **inputs},
        }
        made["sample"]["inputs"]["model"] = ["sparse", 0]
        made["report"] = {"class_type": "VidaccelReport", "inputs": {"report": ["sparse", 1], "after": ["sample", 0]}}
        made["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}}
        made["map"] = {"class_type": "PreviewImage", "inputs": {"images": ["report", 1]}}
    return made


def test_the_pack_loads_quickly_and_without_a_warning(server):
    log = server.log.read_text()
    (line,) = [line for line in log.splitlines() if "vidaccel-pack" in line and "seconds" in line]
    assert float(line.split("seconds")[0].split()[-1]) < 2 and "IMPORT FAILED" not in line
    assert "is already loaded" not in log and "WARNING:vidaccel" not in log


def test_every_input_of_every_node_has_a_tooltip(server):
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("Vidaccel")}
    assert set(nodes) == {f"VidaccelSparseAttention{m}" for m in ("SVG2", "SVG", "Radial")} | {"VidaccelReport"}
    for info in nodes.values():
        assert info["category"].startswith("video acceleration") and info["description"]
        for kind in {"required", "optional"} & set(info["input"]):
            assert all(options[1]["tooltip"] for options in info["input"][kind].values())


def test_density_one_gives_the_video_of_the_unpatched_model(server):
    plain = server.latent(server.queue(graph()), "save")
    patched = server.latent(server.queue(graph("SVG2", density=1.0)), "save")
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(patched, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [("SVG2", {"density": 0.4, "compensate": True}), ("SVG", {"density": 0.5}), ("Radial", {"density": 0.8})],
)
def test_each_method_runs_and_reports(server, node, inputs):
    entry = server.queue(graph(node, **inputs))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert server.latent(entry, "save").isfinite().all()
    text = entry["outputs"]["text"]["text"][0]
    assert "Mean density" in text and "first 20% of the sampling" in text and f"{node}: density" in text
    (picture,) = entry["outputs"]["map"]["images"]
    assert (server.folder / "temp" / picture["filename"]).stat().st_size > 2000


def test_another_size_and_the_first_one_again(server):
    settings = {"density": 0.4}
    first = server.latent(server.queue(graph("SVG2", **settings)), "save")
    other = server.latent(server.queue(graph("SVG2", size=160, frames=9, **settings)), "save")
    again = server.queue(graph("SVG2", **{**settings, "dense_end_percent": 0.001}))  # not from ComfyUI's cache
    assert other.shape == (1, 16, 3, 20, 20) and first.shape == (1, 16, 5, 16, 16)
    assert again["status"]["status_str"] == "success"


def test_the_model_classes_in_comfyuis_own_python():
    """`test_native_comfyui.py`, where the Python that runs these tests cannot import ComfyUI."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    if python == sys.executable:
        pytest.skip("this Python runs them itself")
    if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip(f"{python} has no pytest: install it there to run ComfyUI's model classes")
    tests = ROOT / "tests" / "nodes" / "test_native_comfyui.py"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_bad_values_are_refused_and_the_queue_goes_on(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.queue(graph("SVG2", density=7.0))
    assert "density" in refused.value.read().decode() and refused.value.code == 400
    for inputs, message in (
        ({"density": 0.4, "dense_start_percent": 0.9, "dense_end_percent": 0.2}, "leave no step sparse"),
        ({"density": 0.4, "dense_layers": "7"}, "the model has 2 layers"),
        ({"density": 0.4, "backend": "triton"}, "backend 'triton'"),
    ):
        entry = server.queue(graph("SVG", **inputs))
        assert entry["status"]["status_str"] == "error" and message in json.dumps(entry["status"])
    assert server.queue(graph())["status"]["status_str"] == "success"
