"""The demo's checker reads videos of a GPU, where `demo.evaluate --device cuda` makes them."""

from __future__ import annotations

from gpu_compiler import run_with_compiler

SCRIPT = """
import torch
from pretended_gpu import pretended_gpu

from vidaccel.demo.checker import check

with pretended_gpu() as gpu:
    reading = check(torch.rand(8, 3, 32, 32, device="cuda"))
    print(json.dumps([reading.background, len(gpu.tensors.waits)]))
"""


def test_a_video_on_a_gpu_is_copied_from_there_once(tmp_path):
    # Copies of the pretended GPU are zeros, which show the black of the world's backgrounds.
    assert run_with_compiler(SCRIPT, tmp_path) == ["black", 1]
