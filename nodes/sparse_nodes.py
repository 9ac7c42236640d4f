"""The nodes that go between Load Diffusion Model and KSampler: sparse attention in a native video model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..attention import BACKENDS, SVG, SVG2, Method, Radial, Sparge, Tangent, VideoLayout
from ..attention.methods.base import check_fraction
from ..generation.levers.methods import MIN_SPARSE_TOKENS
from .defaults import Defaults, defaults_of
from .native.models import supported_models
from .native.patch import sparsify
from .report.wording import PRECISIONS, STEP
from .report_node import Report
from .schema import accepted

CATEGORY = "video acceleration/sparse attention"
SPARSE_BACKENDS = ["auto", *(name for name, backend in BACKENDS.items() if backend.capability.sparse)]
QUALITY = (
    "The video differs from the dense one of the same seed, the more so the lower the density and the fewer steps stay "
    "dense; raise both when details flicker or motion changes. Cross-attention, masked calls, text and reference "
    f"tokens are not touched. Models: {supported_models()}; any other stays dense and says so in the log."
)


# Inputs of one name are the same in every node that makes attention sparse, but for what a method has of its own
# (`defaults.py`); tests/nodes/test_comfyui.py compares them.
def share_inputs(own: Defaults) -> list[io.Input]:
    """How much is computed, and which part of the sampling stays dense.

    Args:
        own: of the method that the inputs start with.
    """
    return [
        io.Float.Input(
            "density",
            default=own.density,
            min=0.01,
            max=1.0,
            step=STEP,
            tooltip="Share of all query-key pairs that a sparse attention call computes. 1 computes all of them. Lower "
            "is less work and further from the dense video.",
        ),
        io.Float.Input(
            "dense_start_percent",
            default=own.start,
            min=0.0,
            max=1.0,
            step=STEP,
            tooltip="Share of the sampling that stays dense at its start, where composition and motion are decided. "
            "Two samplers that follow one another (Wan 2.2) share one scale, as start and end percent of other nodes: "
            "of noise levels. They are shares of the steps with the scheduler simple, not with beta or kl_optimal. "
            "With 4 to 8 steps (distilled models, Lightning LoRAs), 0.25 keeps one or two of them dense.",
        ),
        io.Float.Input(
            "dense_end_percent",
            default=own.end,
            min=0.0,
            max=1.0,
            step=STEP,
            tooltip="Share of the sampling that stays dense at its end, where fine detail is made. Start and end "
            "together must stay below 1.",
        ),
    ]


def min_tokens_input(default: int = MIN_SPARSE_TOKENS, **more: Any) -> io.Input:
    """From which length on a video is worth the planning."""
    return io.Int.Input(
        "min_tokens",
        default=default,
        min=0,
        max=10_000_000,
        tooltip="Videos with fewer tokens stay dense, because planning would cost more than it saves. A token is a "
        "patch of the latent: 81 frames of Wan at 480x832 have 32,760, at 720x1280 75,600; the built-in models' have a "
        "few hundred. At 8192, what `vidaccel break-even` measured on this machine counts instead, for methods that "
        "need no training.",
        **more,
    )


def compensate_input(only: str = "") -> io.Input:
    """What stands for the keys that are skipped."""
    return io.Boolean.Input(
        "compensate",
        default=True,
        **accepted(io.Boolean.Input, advanced=True),
        tooltip=f"{only}Let the keys that a query skips enter through the mean of their cluster. Nearer to the dense "
        "video at low densities, for some more work per call.",
    )


def backend_input() -> io.Input:
    """What computes."""
    return io.Combo.Input(
        "backend",
        options=SPARSE_BACKENDS,
        default="auto",
        **accepted(io.Combo.Input, advanced=True),
        tooltip="What computes the sparse calls. auto chooses for the device, and the report says what; one "
        "that is chosen by name runs, or the node says why it cannot.",
    )


def measure_error_input() -> io.Input:
    """How much of the output is held against dense attention. Optional and the last, so that saved graphs run on."""
    return io.Int.Input(
        "measure_error",
        default=0,
        min=0,
        max=4096,
        optional=True,
        **accepted(io.Int.Input, advanced=True),
        tooltip="So many queries of each sparse call are computed densely too, and the report tells how far the output "
        "is from that, by layer and step. 64 is enough; 0 measures nothing. The video stays the same; it takes some "
        "time and memory.",
    )


def precision_input() -> io.Input:
    """In which format the scores are computed. Optional and behind all others, as `measure_error_input`."""
    return io.Combo.Input(
        "precision",
        options=PRECISIONS,
        default=PRECISIONS[0],
        optional=True,
        **accepted(io.Combo.Input, advanced=True),
        tooltip="int8: the scores of sparse attention in 8 bits, on NVIDIA GPUs with Triton. Not faster on every GPU "
        "(on an H200 it was slower); measure_error shows what it costs. Dense calls keep the model's.",
    )


def _inputs(method: type[Method], special: list[io.Input]) -> list[io.Input]:
    """The inputs that every method has, with those of one method in their midst."""
    own = defaults_of(method)
    return [
        io.Model.Input(
            "model",
            tooltip="A native video model. It stays as it is; the output is a clone. A model that has a Sparse "
            "Attention node before it already is refused.",
        ),
        *share_inputs(own),
        io.String.Input(
            "dense_layers",
            default=", ".join(map(str, range(own.layers))),
            tooltip='Transformer layers that stay dense, counted from 0: numbers and ranges such as "0, 1, 36-39". '
            "Empty for none.",
        ),
        min_tokens_input(),
        *special,
        backend_input(),
        measure_error_input(),
        precision_input(),
    ]


def _schema(name: str, words: list[str], description: str, inputs: list[io.Input]) -> io.Schema:
    return io.Schema(
        node_id=f"VidaccelSparseAttention{name}",
        display_name=f"Sparse Attention ({name})",
        category=CATEGORY,
        description=f"{description} {QUALITY}",
        inputs=inputs,
        outputs=[
            io.Model.Output(display_name="model", tooltip="The model with sparse attention."),
            Report.Output(display_name="report", tooltip="For the node Sparse Attention Report."),
        ],
        **accepted(io.Schema, search_aliases=["vidaccel", "video acceleration", "speed up video", *words]),
    )


def _patched(
    model: Any,
    method_for: Callable[[VideoLayout], Method],
    name: str,
    settings: dict[str, Any],
    common: dict[str, Any],
    stand_ins: str = "",
) -> io.NodeOutput:
    told: dict[str, Any] = {"name": name, "settings": settings, "stand_ins": stand_ins}
    return io.NodeOutput(*sparsify(model, method_for, **told, by_length=name.lower(), **common))


def _for_density(model: Any, method: type[Method], name: str, density: float, common: dict[str, Any]) -> io.NodeOutput:
    """A method whose settings for a density follow from the size of the video."""
    check_fraction(name, "density", density, fix="0.3 computes 30 % of the pairs")
    return _patched(model, lambda layout: method.for_density(layout, density), name, {"density": density}, common)


def _cluster_inputs() -> list[io.Input]:
    """How many groups a method makes that follows content."""
    return [
        io.Int.Input(
            f"{name}_clusters",
            default=0,
            min=0,
            max=4096,
            **accepted(io.Int.Input, advanced=True),
            tooltip=f"Clusters of {of} in each head. 0 follows the length of the video.",
        )
        for name, of in (("query", "queries"), ("key", "keys"))
    ]


class VidaccelSparseAttentionSVG2(io.ComfyNode):
    """SVG2 in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        special = [compensate_input(), *_cluster_inputs()]
        description = (
            "Sparse VideoGen 2: groups queries and keys by content, and each group of queries reads the groups of keys "
            "that matter to it. On the built-in model it stays nearer to the dense video than SVG and Radial from a "
            "density of about 0.35 up; below that, with compensate on. It spends more time on planning than they do."
        )
        words = ["sparse videogen 2", "semantic clustering"]
        return _schema("SVG2", words, description, _inputs(SVG2, special))

    @classmethod
    def execute(
        cls, model: Any, density: float, compensate: bool, query_clusters: int, key_clusters: int, **common: Any
    ) -> io.NodeOutput:
        method = SVG2(
            density=density,
            compensate=compensate,
            q_clusters=query_clusters or None,
            k_clusters=key_clusters or None,
        )
        settings = {
            "density": density,
            "compensate": compensate,
            "query_clusters": query_clusters or None,
            "key_clusters": key_clusters or None,
        }
        stand_ins = "compensate" if compensate else ""
        return _patched(model, lambda layout: method, "SVG2", settings, common, stand_ins)


class VidaccelSparseAttentionSVG(io.ComfyNode):
    """SVG in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        description = (
            "Sparse VideoGen: finds out for each head whether it looks at nearby frames or at one place through time, "
            "and computes only that band. Planning is cheap; heads that are of neither kind lose detail."
        )
        return _schema("SVG", ["sparse videogen"], description, _inputs(SVG, []))

    @classmethod
    def execute(cls, model: Any, density: float, **common: Any) -> io.NodeOutput:
        method = SVG(density=density)
        return _patched(model, lambda layout: method, "SVG", {"density": density}, common)


class VidaccelSparseAttentionRadial(io.ComfyNode):
    """Radial Attention in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        description = (
            "Radial Attention: near frames are read whole, far ones ever less. One fixed pattern for all heads and "
            "steps, blind to content, with no planning after the first call; meant for long videos. With few frames "
            "little can be left out."
        )
        return _schema("Radial", ["radial attention", "long video"], description, _inputs(Radial, []))

    @classmethod
    def execute(cls, model: Any, density: float, **common: Any) -> io.NodeOutput:
        return _for_density(model, Radial, "Radial", density, common)


class VidaccelSparseAttentionTangent(io.ComfyNode):
    """Tangent in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        special = [
            io.Combo.Input(
                "budget",
                options=["density", "tolerance"],
                default="density",
                tooltip="What sets the amount of work. density: the same share of the pairs in every call. tolerance: "
                "as many pairs as the error of a call asks for, measured on some queries: work follows the content.",
            ),
            io.Float.Input(
                "tolerance",
                default=0.02,
                min=0.001,
                max=1.0,
                step=0.001,
                tooltip="With the budget tolerance alone, in place of density: the error of a call's output, relative "
                "to the output; 0.02 is 2 %.",
            ),
            *_cluster_inputs(),
        ]
        description = (
            "Tangent, this project's own: groups queries and keys by content, as SVG2 does; a group of keys that is "
            "skipped enters by the tangent of what it would have given, and pairs are computed where they change the "
            "output most. Made for low densities. Planning looks at all keys for each group of queries in every call."
        )
        return _schema("Tangent", ["tangent", "semantic clustering"], description, _inputs(Tangent, special))

    @classmethod
    def execute(
        cls,
        model: Any,
        density: float,
        budget: str,
        tolerance: float,
        query_clusters: int,
        key_clusters: int,
        **common: Any,
    ) -> io.NodeOutput:
        spent: dict[str, Any] = {"density": density} if budget == "density" else {"tolerance": tolerance}
        method = Tangent(**spent, q_clusters=query_clusters or None, k_clusters=key_clusters or None)
        settings = {**spent, "query_clusters": query_clusters or None, "key_clusters": key_clusters or None}
        return _patched(model, lambda layout: method, "Tangent", settings, common, stand_ins="tangent")


class VidaccelSparseAttentionSparge(io.ComfyNode):
    """The first stage of SpargeAttn in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        description = (
            "SpargeAttn, its first stage: blocks of neighbouring tokens stand for themselves by their means, and each "
            "block of queries reads the blocks of keys that their means say matter most. Planning is cheap; blocks "
            "follow the order of the tokens and not their content."
        )
        return _schema("Sparge", ["spargeattn", "sparge attention"], description, _inputs(Sparge, []))

    @classmethod
    def execute(cls, model: Any, density: float, **common: Any) -> io.NodeOutput:
        return _for_density(model, Sparge, "Sparge", density, common)


NODES: list[type[io.ComfyNode]] = [
    VidaccelSparseAttentionSVG2,
    VidaccelSparseAttentionSVG,
    VidaccelSparseAttentionRadial,
    VidaccelSparseAttentionTangent,
    VidaccelSparseAttentionSparge,
]
