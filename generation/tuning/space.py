"""What `tune` tries: the levers one by one, and how they are put together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...attention.methods.description import in_words
from ..errors import BadInput
from ..levers.methods import build_method
from ..machine import check_stand_ins

if TYPE_CHECKING:
    import torch

    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method
    from ...attention.schedule import DenseSchedule
    from ...pipelines.guidance_cache.settings import GuidanceCache
    from ...pipelines.presets import Cache, Compile, Preset, Quantize
    from .adapters import AdapterLever

LEVERS = ("sparse", "cache", "precision", "quantize", "compile", "adapter", "guidance")
METHODS = ("tangent", "svg2", "sparge", "radial")
"""Tried where none is named: those that need no training and stood for themselves in the fidelity tables."""
EFFORTS = ("quick", "normal", "thorough")
_DENSITIES = {"quick": (0.2, 0.4), "normal": (0.1, 0.2, 0.3, 0.45), "thorough": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55)}
_TOLERANCES = {"quick": (), "normal": (0.05,), "thorough": (0.02, 0.05, 0.1)}
THRESHOLDS: dict[str, dict[str, tuple[float, ...]]] = {
    "forecast": {
        "quick": (0.1, 0.2),
        "normal": (0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.45),
        "thorough": (0.03, 0.04, 0.05, 0.06, 0.07, 0.085, 0.1, 0.12, 0.14, 0.17, 0.2, 0.25, 0.3, 0.37, 0.45, 0.6),
    },
    "first_block": {
        "quick": (0.05, 0.1, 0.2),
        "normal": (0.03, 0.05, 0.08, 0.12, 0.2, 0.3),
        "thorough": (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4),
    },
    "magcache": {
        "quick": (0.06, 0.2),
        "normal": (0.03, 0.06, 0.12, 0.24),
        "thorough": (0.02, 0.03, 0.045, 0.06, 0.09, 0.12, 0.18, 0.24, 0.36),
    },
    "seacache": {
        "quick": (0.15, 0.3),
        "normal": (0.1, 0.15, 0.25, 0.4),
        "thorough": (0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55),
    },
    "taylorseer": {"quick": (2, 3), "normal": (2, 3, 4), "thorough": (2, 3, 4, 5, 6)},
    "cache_dit": {"quick": (0.08,), "normal": (0.05, 0.08, 0.16), "thorough": (0.03, 0.05, 0.08, 0.12, 0.18, 0.25)},
}
"""Cache -> effort -> thresholds, the lowest first."""
_VARIANTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "forecast": ({}, {"cache_end_steps": 0}),
    "magcache": ({}, {"retention_ratio": 0.1, "max_skip_steps": 2}),
    "seacache": ({}, {"max_consecutive_cached": 4}),
    "cache_dit": ({"Fn_compute_blocks": 1},),
}
"""Cache -> settings beside its threshold; from the effort "normal" on, all of them."""
CACHES = tuple(THRESHOLDS)
_EVERY = {"quick": (3,), "normal": (2, 3, 4), "thorough": (2, 3, 4, 6)}


@dataclass(frozen=True)
class SparseLever:
    """Sparse attention in all steps and layers.

    Args:
        method: with a schedule that keeps nothing dense.
        precision: see `Preset`.
    """

    method: Method
    precision: str | None = None

    @property
    def label(self) -> str:
        """What users see."""
        return " ".join([in_words(self.method), *filter(None, [self.precision])])


@dataclass(frozen=True)
class LayersLever:
    """What makes the layers between attention faster.

    They are measured together, because 8 bits gain most, or at all, where what converts them is compiled.

    Args:
        quantize: of the linear layers. compile: of the blocks. At least one of the two.
    """

    quantize: Quantize | None = None
    compile: Compile | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to make the model faster.

    Args:
        sparse: of attention; None for dense.
        schedule: the steps and layers that stay dense.
        cache: over steps.
        layers: in 8 bits, or compiled.
        adapter: for guidance in one pass, or few steps.
        guidance: leaves second passes out; not with an adapter, which has none.
    """

    sparse: SparseLever | None = None
    schedule: DenseSchedule | None = None
    cache: Cache | None = None
    layers: LayersLever | None = None
    adapter: AdapterLever | None = None
    guidance: GuidanceCache | None = None

    @property
    def label(self) -> str:
        """What users see, in one line."""
        told = [] if self.adapter is None else [self.adapter.label]
        quantize, compiled = self._of_layers
        if quantize is not None:
            told.append(f"layers in {quantize.kind}{'' if quantize.activations else ', weights alone'}")
        if compiled is not None:
            told.append("compiled")
        if self.sparse is not None:
            told.append(self.sparse.label)
            names = {"first_steps": "first steps", "last_steps": "last steps", "first_layers": "first layers"}
            kept = [f"{n} {text}" for field, text in names.items() if (n := getattr(self.schedule, field, 0))]
            told += [f"dense: {', '.join(kept)}"] if kept else []
        if self.cache is not None:
            own = [f"{name} {value:g}" for name, value in self.cache.settings.items() if name != "mag_ratios"]
            told.append(" ".join([f"{self.cache.name} {self.cache.limit:g}", *own]))
        if self.guidance is not None:
            told.append(f"guidance every {self.guidance.every}")
        return "; ".join(told) or "dense"

    @property
    def _of_layers(self) -> tuple[Quantize | None, Compile | None]:
        return (None, None) if self.layers is None else (self.layers.quantize, self.layers.compile)

    @property
    def is_single(self) -> bool:
        """Whether it is one lever, in all steps and layers: such are measured, combinations are predicted."""
        from ...attention.schedule import DenseSchedule

        levers = (self.sparse, self.cache, self.layers, self.adapter, self.guidance)
        return sum(lever is not None for lever in levers) < 2 and self.schedule in (None, DenseSchedule())

    @property
    def kind(self) -> str:
        """What its errors are of: a lever, or several joined by +; "" for an adapter alone.

        Compiled blocks have no part in it: their rounding is nothing beside the others' errors.
        """
        quantize, _ = self._of_layers
        told = (
            quantize and quantize.kind,
            self.sparse and self.sparse.method.name,
            self.cache and self.cache.name,
            self.guidance and "guidance",
        )
        return "+".join(filter(None, told))

    def preset(self, **facts: Any) -> Preset:
        """It as a preset; `facts` are further fields of that."""
        from ...pipelines.presets import Preset

        method = None
        if self.adapter is not None:
            facts["guidance_free"] = self.adapter.in_preset
            facts |= {} if self.adapter.steps is None else {"num_inference_steps": self.adapter.steps}
        if self.sparse is not None:
            method = self.sparse.method
            method = method if self.schedule is None else replace(method, schedule=self.schedule)
            facts["precision"] = self.sparse.precision
        quantize, compiled = self._of_layers
        facts = {"name": "candidate", **facts, "guidance_cache": self.guidance, "compile": compiled}
        return Preset(**facts, method=method, cache=self.cache, quantize=quantize)

    @property
    def key(self) -> str:
        """The same for the same candidate, in every process."""
        stated = self.preset().to_dict()
        fields = ("attention", "cache", "quantize", "compile", "guidance_free", "guidance_cache")
        made = {k: stated[k] for k in fields if k in stated}
        return json.dumps(made | ({} if self.adapter is None else {"digest": self.adapter.digest}), sort_keys=True)


def sparse_levers(
    names: Sequence[str], layout: VideoLayout, device: torch.device, effort: str, precisions: Sequence[str] = ()
) -> tuple[list[SparseLever], dict[str, str]]:
    """The methods at their densities and tolerances, the fewest pairs first; and what cannot be, with why.

    Args:
        names: of methods.
        layout: of the video.
        device: where it runs.
        effort: of `EFFORTS`.
        precisions: of the product of queries and keys, besides that of its inputs.
    """
    from ...attention.schedule import DenseSchedule

    made: list[SparseLever] = []
    refused: dict[str, str] = {}
    for name in names:
        asked: list[dict[str, Any]] = [{"density": density} for density in _DENSITIES[effort]]
        if name == "tangent":
            asked += [{"overrides": {"tolerance": tolerance}} for tolerance in _TOLERANCES[effort]]
        for each in asked:
            try:
                method = build_method(name, layout, **each)
                check_stand_ins("auto", device, method)
            except BadInput as error:
                ((setting, amount),) = each.get("overrides", each).items()
                refused[f"{name} {setting} {amount:g}"] = error.problem
                continue
            method = replace(method, schedule=DenseSchedule())
            for precision in (None, *precisions):
                if (lever := SparseLever(method, precision)) not in made:  # two densities may be one set of blocks
                    made.append(lever)
    return made, refused


def cache_levers(names: Sequence[str], effort: str, ratios: Sequence[float] | None = None) -> list[Cache]:
    """The caches at their thresholds, the lowest first.

    Args:
        names: of `CACHES`.
        effort: of `EFFORTS`.
        ratios: of the model, which MagCache needs; it is left out without.
    """
    from ...pipelines.presets import Cache

    made = []
    for name in names:
        if name == "magcache" and not ratios:
            continue
        own = {"mag_ratios": list(ratios)} if name == "magcache" else {}
        variants = _VARIANTS.get(name, ({},))
        for variant in variants[:1] if effort == "quick" else variants:
            made += [Cache(name, limit, {**variant, **own}) for limit in THRESHOLDS[name][effort]]
    return made


def quantize_levers(effort: str) -> list[Quantize]:
    """The layers in 8 bits that may save time, what they are multiplied with in 8 bits as well; where that is
    "thorough", the weights alone, too, which save memory and rarely time."""
    from ...pipelines.presets import Quantize

    ways = (True, False) if effort == "thorough" else (True,)
    return [Quantize(kind, activations) for activations in ways for kind in ("int8", "fp8")]


def layers_levers(quantize: Sequence[Quantize], compile: Compile | None) -> list[LayersLever]:
    """Compiled blocks first, and each way of 8 bits without them and with them.

    Args:
        quantize: of the linear layers, as far as they can be. compile: of the blocks; None where they cannot be.
    """
    compiled = [] if compile is None else [compile]
    made = [LayersLever(compile=each) for each in compiled]
    return made + [LayersLever(how, each) for how in quantize for each in (None, *compiled)]


def guidance_levers(effort: str) -> list[GuidanceCache]:
    """How many second passes of guidance are left out, the fewest first."""
    from ...pipelines.guidance_cache.settings import GuidanceCache

    return [GuidanceCache(every) for every in _EVERY[effort]]


def schedules(steps: int, layers: int) -> list[DenseSchedule]:
    """The steps and layers that may stay dense, from nothing to 30 % of the steps."""
    from ...attention.schedule import DenseSchedule

    firsts = dict.fromkeys(round(share * steps) for share in (0, 0.1, 0.2, 0.3))
    lasts = (0, 1) if steps > 4 else (0,)
    kept_layers = (0, 1) if layers > 2 else (0,)
    found = [
        DenseSchedule(first_steps=a, last_steps=b, first_layers=c) for a in firsts for b in lasts for c in kept_layers
    ]
    return [each for each in found if not each.warning(steps, layers)]
