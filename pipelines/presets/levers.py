"""The levers that a preset has besides those with modules of their own: caches, layers in 8 bits, schedulers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...attention.account.plain_values import of_python
from ..forecast.settings import ForecastSettings
from ..nearest_name import nearest
from .errors import PresetError

KINDS = ("int8", "fp8")
"""Of 8 bits."""
MODES = ("default", "max-autotune-no-cudagraphs")
"""Of `torch.compile`. Those with CUDA graphs are left out: a block would overwrite what the one before it made."""


@dataclass(frozen=True)
class CacheSetting:
    """A setting of a cache.

    Args:
        low: its bound below, which it may touch. high: and above, None for none.
        whole: it is a whole number. many: it is a list of numbers.
    """

    low: float = 0.0
    high: float | None = None
    whole: bool = False
    many: bool = False


@dataclass(frozen=True)
class CacheKind:
    """A cache over steps.

    Args:
        summary: what decides whether a step is skipped.
        threshold: the default; larger skips more.
        settings: further ones, by the names of the library.
        package: what must be installed, besides diffusers; "" for nothing.
        bounds: of the threshold.
        skips_more: what has it skip more, in words.
        around: its hook is on the model as a whole, not on blocks or layers of it.
        by_parts: it decides or computes by what it sees within the transformer, of which processes that share a
            sequence have a part each.
    """

    summary: str
    threshold: float
    settings: Mapping[str, CacheSetting] = field(default_factory=dict)
    package: str = ""
    bounds: CacheSetting = CacheSetting()
    skips_more: str = "raise the threshold"
    around: bool = False
    by_parts: bool = False


_COUNT = CacheSetting(whole=True)
FORECAST = "forecast"
CACHES: dict[str, CacheKind] = {
    FORECAST: CacheKind(
        "the error that forecasts of the noise in a step turned out to have (of this package; models of flow matching "
        "and of diffusion, whose scheduler tells how much noise is in a step)",
        ForecastSettings().tolerance,
        {
            "retention_steps": _COUNT,
            "cache_end_steps": _COUNT,
            "max_consecutive_cached": _COUNT,
        },
        bounds=CacheSetting(1e-6),
        skips_more="raise the threshold, or make more steps",
        around=True,
    ),
    "first_block": CacheKind(
        "the change of the first block's residual (diffusers' FirstBlockCache)", 0.05, by_parts=True
    ),
    "magcache": CacheKind(
        "ratios of residuals that were measured for the model (diffusers' MagCache)",
        0.06,
        {
            "mag_ratios": CacheSetting(many=True),
            "max_skip_steps": CacheSetting(1, whole=True),
            "retention_ratio": CacheSetting(high=1.0),
        },
        skips_more="raise the threshold, or lower retention_ratio",
        by_parts=True,
    ),
    "seacache": CacheKind(
        "the change of the denoised content's spectrum (diffusers' SeaCache; Wan from text or video, Cosmos 3)",
        0.25,
        {
            "residual_order": CacheSetting(high=1, whole=True),
            "retention_steps": _COUNT,
            "cache_end_steps": _COUNT,
            "max_consecutive_cached": _COUNT,
            "power_exp": CacheSetting(),
        },
        skips_more="raise the threshold, or lower retention_steps or cache_end_steps",
        around=True,
        by_parts=True,
    ),
    "taylorseer": CacheKind(
        "nothing: one step in so many (the threshold) is computed, and what the model makes in between is extrapolated "
        "(diffusers' TaylorSeer, arXiv 2503.06923, of the last layer's output)",
        3,
        {
            "max_order": CacheSetting(high=3, whole=True),
            "disable_cache_before_step": CacheSetting(1, whole=True),
            "disable_cache_after_step": CacheSetting(1, whole=True),
        },
        bounds=CacheSetting(2, whole=True),
        skips_more="make more steps, or lower disable_cache_before_step",
    ),
    "cache_dit": CacheKind(
        "the change of the first blocks' residual (cache-dit's DBCache)",
        0.08,
        {
            "Fn_compute_blocks": CacheSetting(1, whole=True),
            "Bn_compute_blocks": _COUNT,
            "max_warmup_steps": _COUNT,
            "max_cached_steps": CacheSetting(-1, whole=True),
            "max_continuous_cached_steps": CacheSetting(-1, whole=True),
        },
        package="cache_dit",
        skips_more="raise the threshold, or lower max_warmup_steps",
        by_parts=True,
    ),
}
"""The caches that a preset can have, by name."""


def unshared_cache(cache: str) -> str:
    """Why processes cannot share a sequence where a cache is at work; "" where they can."""
    if not CACHES[cache].by_parts:
        return ""
    return (
        f"the cache {cache} goes by what it sees within the transformer, of which each process has another part, so "
        "one would skip what another waits for, or fail; forecast goes by the whole"
    )


@dataclass(frozen=True)
class Cache:
    """A cache over steps.

    Args:
        name: of `CACHES`.
        threshold: larger skips more; None for the default.
        settings: further ones, see `CACHES`; MagCache needs `mag_ratios`.

    Raises:
        PresetError: an unknown name or setting, or a value out of its bounds.
    """

    name: str
    threshold: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", settings_of("cache.settings", self.settings))
        if not isinstance(self.name, str):
            raise PresetError("cache.name", "it must be a text", value=repr(self.name))
        if self.name not in CACHES:
            raise PresetError("cache", f"there is none of that name{nearest(self.name, CACHES)}", value=self.name)
        kind = CACHES[self.name]
        if self.threshold is not None:
            # A command line hands over 3 as 3.0.
            threshold = int(self.threshold) if kind.bounds.whole and self.threshold in range(10**6) else self.threshold
            object.__setattr__(self, "threshold", threshold)
            check_number("cache.threshold", self.threshold, kind.bounds)
        for name, value in self.settings.items():
            if name not in kind.settings:
                has = ", ".join(kind.settings) or "none besides threshold"
                raise PresetError("cache", f"{self.name} has no setting {name}; it has {has}")
            check_number(f"cache.{name}", value, kind.settings[name])
        if self.name == "magcache" and not self.settings.get("mag_ratios"):
            raise PresetError(
                "cache",
                "magcache needs mag_ratios, which are another for each model",
                "Measure them with vidaccel.pipelines.presets.measure_mag_ratios, or take first_block.",
            )

    @property
    def limit(self) -> float:
        """Its threshold, the default where none is given."""
        return CACHES[self.name].threshold if self.threshold is None else self.threshold


def forecast_settings(cache: Cache) -> ForecastSettings:
    """Those of a cache of the name `FORECAST`, whose settings are called as those of diffusers' caches are."""
    names = {"retention_steps": "first_steps", "cache_end_steps": "last_steps", "max_consecutive_cached": "most"}
    return ForecastSettings(cache.limit, **{names[name]: value for name, value in cache.settings.items()})


@dataclass(frozen=True)
class Quantize:
    """The linear layers of the transformer's blocks in 8 bits, by torchao.

    Args:
        kind: "int8" or "fp8" (float8_e4m3).
        activations: what they are multiplied with is quantised too, as it comes ("dynamic"); fp8 then needs a GPU
            that multiplies float8. Without it, memory is saved and little time.
        keep: the weights as they were, in main memory, so that `remove()` gives them back to the bit. Without, they
            are gone.

    Raises:
        PresetError: another kind.
    """

    kind: str
    activations: bool = False
    keep: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PresetError("quantize", f"it must be one of {', '.join(KINDS)}", value=self.kind)
        for name in ("activations", "keep"):
            if not isinstance(getattr(self, name), bool):
                raise PresetError(f"quantize.{name}", "it must be true or false", value=repr(getattr(self, name)))


@dataclass(frozen=True)
class Compile:
    """The repeated blocks of the transformer compiled by `torch.compile`, at the first call of each shape.

    Everything between attention, which is compiled already, and the matrix products becomes few kernels: the same
    numbers up to rounding.

    Args:
        mode: of `MODES`. The second tries several kernels for each product first, which takes minutes.
        dynamic: see `torch.compile`; None for another set of kernels where a second shape comes.

    Raises:
        PresetError: another mode.
    """

    mode: str = "default"
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PresetError("compile", f"its mode must be one of {', '.join(MODES)}", value=self.mode)
        if self.dynamic is not None and not isinstance(self.dynamic, bool):
            raise PresetError("compile.dynamic", "it must be true or false", value=repr(self.dynamic))

    def in_words(self) -> str:
        """What users see."""
        return "the blocks" if self.mode == "default" else f"the blocks, {self.mode}"


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler instead of the pipeline's.

    Args:
        name: class in diffusers, "RCMScheduler", "DMDScheduler" or "GridScheduler".
        settings: of its config; the others are those of the scheduler that the pipeline has.

    Raises:
        PresetError: a name that is no text, or settings that are no names and values.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PresetError("scheduler.name", "it must be a text", value=repr(self.name))
        object.__setattr__(self, "settings", settings_of("scheduler.settings", self.settings))


def settings_of(lever: str, settings: Any) -> Mapping[str, Any]:
    """Settings by name, a copy; none where YAML has nothing behind the colon. PresetError for what is no mapping."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise PresetError(lever, "they must be names and values", value=repr(settings))
    return dict(settings)


def check_number(name: str, value: Any, bounds: CacheSetting) -> None:
    """Raise PresetError for what is no number within bounds."""
    if bounds.many:
        if not isinstance(value, list | tuple) or not value:
            raise PresetError(name, "it must be a list of numbers", value=repr(value))
        for each in value:
            check_number(name, each, CacheSetting())
        return
    kind = "a whole number" if bounds.whole else "a number"
    wanted = int if bounds.whole else int | float
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
        fix = "YAML takes 1e-4 for a text: write 1.0e-4." if isinstance(value, str) else of_python(value).strip()
        raise PresetError(name, f"it must be {kind}", fix, value=repr(value))
    if value < bounds.low or (bounds.high is not None and value > bounds.high):
        most = "" if bounds.high is None else f" and at most {bounds.high:g}"
        raise PresetError(name, f"it must be at least {bounds.low:g}{most}", value=value)
