"""A real ComfyUI server on the CPU with this repository as custom node, and tiny weights for its native models.

`COMFYUI_PATH` is the folder of a ComfyUI, `COMFYUI_PYTHON` a Python that can run it (this one by default).
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
PACK = "vidaccel"
WHY_SKIPPED = "set COMFYUI_PATH to the folder of a ComfyUI to run the nodes in it"

# Text encoders are fixed in size (11 GB for Wan's): a node that makes a conditioning of random numbers stands in.
TEST_NODE = """
import torch

class RandomConditioning:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {"default": 0})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    def make(self, seed):
        text = torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed))
        return ([[text, {"pooled_output": torch.zeros(1, 768)}]],)

NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}
"""


class Server:
    """A running ComfyUI, spoken to over HTTP and a WebSocket."""

    def __init__(self, url: str, folder: Path, process: subprocess.Popen, log: Path) -> None:
        self.url, self.folder, self.process, self.log = url, folder, process, log
        self.client = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """What is at a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, content: Any = None) -> bytes:
        """Send JSON."""
        body = json.dumps(content).encode() if content is not None else b""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def submit(self, graph: dict[str, Any]) -> str:
        """Put a graph in the queue; its number.

        Raises:
            urllib.error.HTTPError: the server refuses the graph.
        """
        return json.loads(self.post("/prompt", {"prompt": graph, "client_id": self.client}))["prompt_id"]

    def wait(self, number: str, seconds: float = 180) -> dict[str, Any]:
        """The history entry of a graph once it has run."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{number}").get(number)
            if entry and entry["status"].get("status_str") in ("success", "error"):
                return entry
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-2000:])

    def queue(self, graph: dict[str, Any]) -> dict[str, Any]:
        """`submit` and `wait`."""
        return self.wait(self.submit(graph))

    def file(self, found: dict[str, str]) -> Path:
        """A file that a history entry names."""
        return self.folder / found.get("type", "output") / found.get("subfolder", "") / found["filename"]

    def latent(self, entry: dict[str, Any], node: str) -> torch.Tensor:
        """What the node SaveLatent saved."""
        (found,) = entry["outputs"][node]["latents"]
        return load_file(self.file(found))["latent_tensor"]

    @contextmanager
    def events(self) -> Iterator[Any]:
        """A WebSocket of this client, as the page has one."""
        import websocket

        connection = websocket.create_connection(
            f"ws{self.url.removeprefix('http')}/ws?clientId={self.client}", timeout=120
        )
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start a server with tiny weights and this repository below `folder`, on a free port."""
    for name in ("custom_nodes", "models/diffusion_models", "models/vae", "models/diffusers/no pipeline"):
        (folder / name).mkdir(parents=True)
    for name in ("output", "input", "temp", "user"):
        (folder / name).mkdir()
    (folder / "custom_nodes" / PACK).symlink_to(ROOT)
    (folder / "custom_nodes" / "test_node.py").write_text(TEST_NODE)
    (folder / "models" / "diffusers" / "my demo").symlink_to(ROOT / "demo" / "weights")
    weights = [PYTHON, str(Path(__file__).with_name("comfy_weights.py")), str(folder / "models")]
    done = subprocess.run(weights, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    options = ["--cpu", "--disable-auto-launch", "--disable-api-nodes", "--listen", "127.0.0.1", "--port", str(port)]
    options += ["--preview-method", "latent2rgb", "--base-directory", str(folder)]
    options += ["--database-url", "sqlite:///:memory:"]
    with log.open("w") as file:
        process = subprocess.Popen([PYTHON, "main.py", *options], cwd=COMFYUI, stdout=file, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        for _ in range(400):
            try:
                server.get("/queue")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


__all__ = ["COMFYUI", "PACK", "PYTHON", "ROOT", "WHY_SKIPPED", "Server", "running_server"]
