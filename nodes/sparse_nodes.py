"""The nodes that patch a native model: Load Diffusion Model, one of these, KSampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention import BACKENDS, SVG, SVG2, Radial
from .native import patch_model
from .report_node import ReportHandle, ReportType

CATEGORY = "video acceleration/sparse attention"


def _density() -> Any:
    return io.Float.Input(
        "density",
        default=0.3,
        min=0.02,
        max=1.0,
        step=0.01,
        tooltip="Share of attention that is computed in the sparse steps. Lower is faster and drifts further from the "
        "dense video.",
    )


def _common(start: float, layers: int) -> list[Any]:
    """The inputs that every method has, with its defaults."""
    return [
        io.Float.Input(
            "start_percent",
            default=start,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Sampling before this point stays dense: the first steps decide on the composition. With two "
            "samplers (Wan 2.2) it counts over both.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Sampling after this point is dense again.",
        ),
        io.Int.Input(
            "dense_first_layers",
            default=layers,
            min=0,
            max=100,
            tooltip="So many transformer blocks at the input stay dense.",
        ),
        io.Int.Input(
            "dense_last_layers",
            default=0,
            min=0,
            max=100,
            tooltip="So many transformer blocks at the output stay dense.",
        ),
        io.Int.Input(
            "min_tokens",
            default=4000,
            min=0,
            max=10_000_000,
            tooltip="Videos with fewer tokens stay dense: there planning costs more than it saves.",
        ),
        io.Combo.Input(
            "backend",
            options=["auto", *BACKENDS],
            default="auto",
            tooltip="What computes attention. auto picks what can run here and the report says which; a name runs or "
            "raises an error that says why it cannot.",
        ),
    ]


def _schema(name: str, title: str, text: str, inputs: list[Any]) -> io.Schema:
    return io.Schema(
        node_id=f"VidaccelSparseAttention{name}",
        display_name=f"Sparse Attention ({title})",
        category=CATEGORY,
        description=text,
        inputs=[
            io.Model.Input(
                "model", tooltip="A native video model: Wan, HunyuanVideo, Mochi, LTX-Video, Cosmos Predict2."
            ),
            *inputs,
        ],
        outputs=[io.Model.Output(display_name="model"), ReportType.Output(display_name="report")],
    )


def _patch(model: Any, method: Any, dense_first_layers: int, dense_last_layers: int, **settings: Any) -> io.NodeOutput:
    reason = None if settings["backend"] == "auto" else _declines(settings["backend"])
    if reason:
        raise ValueError(f"backend {settings['backend']!r} {reason}. Choose another, or auto.")
    layers = {"first_layers": dense_first_layers, "last_layers": dense_last_layers}
    clone, session = patch_model(model, method, **layers, **settings)
    return io.NodeOutput(clone, ReportHandle(session))


def _declines(backend: str) -> str | None:
    import comfy.model_management

    return BACKENDS[backend].unavailable(comfy.model_management.get_torch_device())


class SparseAttentionSVG2(io.ComfyNode):
    """SVG2 on a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        text = (
            "Sparse VideoGen 2: clusters queries and keys by content, and each cluster of queries reads the clusters "
            "of keys that matter to it. The video changes: compare with density 1 from the same seed."
        )
        inputs = [
            _density(),
            io.Boolean.Input(
                "compensate",
                default=True,
                tooltip="Let skipped clusters enter through their mean. Closer to the dense video at the same density.",
            ),
            *_common(0.3, 0),
        ]
        return _schema("SVG2", "SVG2", text, inputs)

    @classmethod
    def execute(cls, model: Any, density: float, compensate: bool, **settings: Any) -> io.NodeOutput:
        return _patch(model, SVG2(density=density, compensate=compensate), **settings)


class SparseAttentionSVG(io.ComfyNode):
    """Sparse VideoGen on a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        text = (
            "Sparse VideoGen: finds for each head whether it looks at nearby frames or at one place over time, and "
            "computes that band. Heads that are neither lose detail."
        )
        return _schema("SVG", "SVG", text, [_density(), *_common(0.25, 1)])

    @classmethod
    def execute(cls, model: Any, density: float, **settings: Any) -> io.NodeOutput:
        return _patch(model, SVG(density=density), **settings)


class SparseAttentionRadial(io.ComfyNode):
    """Radial Attention on a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        text = (
            "Radial Attention: a fixed mask, whole for near frames and narrower the further frames lie apart. Its "
            "density falls as videos grow longer; with few frames little can be skipped. Blind to content."
        )
        inputs = [
            io.Float.Input(
                "decay",
                default=0.2,
                min=0.05,
                max=4.0,
                step=0.05,
                tooltip="Width of the windows: 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo, 1 for long "
                "videos. Higher computes more.",
            ),
            *_common(0.24, 1),
        ]
        return _schema("Radial", "Radial", text, inputs)

    @classmethod
    def execute(cls, model: Any, decay: float, **settings: Any) -> io.NodeOutput:
        return _patch(model, Radial(decay=decay), **settings)


NODES = [SparseAttentionSVG2, SparseAttentionSVG, SparseAttentionRadial]
