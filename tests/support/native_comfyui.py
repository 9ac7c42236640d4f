"""What the tests of native models in this process share. Importing it skips the test file where there is no ComfyUI."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidaccel import SVG2, VideoLayout

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("set COMFYUI_PATH to the folder of a ComfyUI to run its models", allow_module_level=True)
try:
    from comfy_models import MODELS, build, comfy, conditioning, missing, sample
except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
    reason = f"this Python cannot import ComfyUI ({error}): run pytest with the one that ComfyUI runs with"
    pytest.skip(reason, allow_module_level=True)
from vidaccel.nodes.native.patch import sparsify

__all__ = ["MODELS", "Calls", "build", "defaults", "forget_models", "layouts", "management", "missing", "models"]
__all__ += ["ANCHORED", "comfy", "conditioning", "nodes", "patched", "sample", "tiny", "windowed", "with_override"]

management = comfy.model_management
# Whether context windows but the first have the video's first frame in front, as in newer versions of ComfyUI.
ANCHORED = "causal_window_fix" in inspect.signature(comfy.context_windows.IndexListContextHandler).parameters
_built: dict[str, tuple] = {}


def models(*names: str) -> list:
    """Parameters of a test: the names of models, each skipped where this ComfyUI lacks it."""
    marked = []
    for name in names or MODELS:
        why = missing(MODELS[name])
        marked.append(pytest.param(name, marks=[pytest.mark.skip(reason=why)] if why else []))
    return marked


def tiny(name: str) -> tuple:
    """The description of a model, its MODEL, and what it samples unpatched."""
    if name not in _built:
        model = build(MODELS[name])
        _built[name] = model, sample(model, MODELS[name])
    return MODELS[name], *_built[name]


def forget_models() -> None:
    """Before Python ends: a MODEL that outlives ComfyUI's modules complains."""
    _built.clear()


def patched(model: Any, method: Any = None, **options: Any) -> tuple:
    """A clone with sparse attention, and its session."""
    method = method or SVG2(density=0.6)
    settings = {"dense_start_percent": 0.25, **options}
    return sparsify(model, method if callable(method) else lambda layout: method, name="test", settings={}, **settings)


def layouts(session: Any) -> list[VideoLayout]:
    return list(session._engines)


def with_override(model: Any, override: Callable) -> Any:
    """A clone whose attention calls all go to `override(func, q, k, v, heads, ...)`, as another node's would."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def windowed(model: Any, schedule: str, length: int, overlap: int) -> Any:
    """A clone that is sampled in context windows of so many latent frames."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = {"context_schedule": schedule, "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}
    settings |= {"context_length": length, "context_overlap": overlap}
    return ContextWindowsManualNode.execute(model, **settings, dim=2, freenoise=False).args[0]


class Calls:
    """An override that only writes down which attention calls it gets: `lengths` of `(queries, keys)`, and `queries`
    `[N, H * D]` of the first entry of the batch where they are as many as the keys."""

    def __init__(self) -> None:
        self.lengths: list[tuple[int, int]] = []
        self.queries: list[torch.Tensor] = []

    def override(self) -> Callable:
        def record(func, q, k, v, heads, *args, **kwargs):
            apart = kwargs.get("skip_reshape", False)
            self.lengths.append((q.shape[2 if apart else 1], k.shape[2 if apart else 1]))
            if q.shape == k.shape:
                self.queries.append((q.transpose(1, 2).flatten(2) if apart else q)[0])
            return func(q, k, v, heads, *args, **kwargs)

        return record  # older versions of ComfyUI copy objects deeply, and functions not


def nodes() -> dict:
    """The nodes for native models by id."""
    from vidaccel.nodes import report_node, sla_nodes, sparse_nodes, vsa_nodes

    native = [*sparse_nodes.NODES, sla_nodes.VidaccelApplySLA, *vsa_nodes.NODES, *report_node.NODES]
    return {node.define_schema().node_id: node for node in native}


def defaults(node: Any) -> dict:
    return {i.id: i.default for i in node.define_schema().inputs if hasattr(i, "default")}
