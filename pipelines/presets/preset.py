"""`Preset`: all that makes a pipeline faster, as one frozen description."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...attention.account.plain_values import plain
from ...attention.backends import check_backend, precision_of
from ...attention.methods import Method, check_config
from ...attention.methods.description import describe, in_words
from ...demo import MODELS
from ..files.locations import is_hub_id, is_model
from ..guidance_cache.settings import GuidanceCache
from ..loras.files import LoraFile
from .errors import PresetError
from .levers import Cache, CacheSetting, Compile, Quantize, SchedulerChoice, check_number
from .stated import (
    attention_of,
    check_names,
    compile_of,
    guidance_cache_of,
    lora_file,
    lora_of,
    part_of,
    place_of,
    several,
)

VERSION = 1
"""Of the format."""
OWN = "own"
"""As `guidance_free` and `decoder`: the one that the model has of its own."""
Place = str | Path


@dataclass(frozen=True)
class Preset:
    """What `apply` does to a pipeline; None and empty leave it as it is.

    Args:
        name, summary: what users see.
        model: what it was made for: a name, folder or hub id. Of a file, a folder beside it goes before others.
        base: the model that `model` stands for, where it is another one ("demo" for "demo-dc").
        family: of `FAMILIES` by name; "" for any.
        transformer: settings of the transformer that it is for, such as `num_layers`.
        method: of sparse attention, with its `DenseSchedule`; None for dense.
        backend: see `accelerate`.
        precision: of the scores of sparse calls, see `accelerate`.
        sla: adapters of the recipe `sla`, for the method "sla".
        guidance_free: files of adapters of the recipe `gft` or `consistency`, or `("own",)`.
        loras: in the order in which they are loaded.
        cache: over steps.
        guidance_cache: leaves second passes of guidance out; its `every` may stand for it.
        quantize: of the linear layers.
        compile: of the blocks; true for `Compile()`.
        scheduler: instead of the pipeline's.
        decoder: tiny one in the place of the autoencoder's, see `tiny_decoder`: a file, a folder or a hub id, or "own".
        num_inference_steps, guidance_scale: for the call; see `Applied.arguments`.
        measured: what was found of it, in whatever words; of its `size`, as `tune` writes it, `generate` tells a video
            of another.
        version: of the format.

    Raises:
        PresetError: a value out of its bounds, or levers that refuse one another.
    """

    name: str = "preset"
    summary: str = ""
    model: str = ""
    base: str = ""
    family: str = ""
    transformer: Mapping[str, Any] = field(default_factory=dict, hash=False)
    method: Method | None = None
    backend: str = "auto"
    precision: str | None = None
    sla: tuple[str, ...] = ()
    guidance_free: tuple[str, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    cache: Cache | None = None
    guidance_cache: GuidanceCache | None = None
    quantize: Quantize | None = None
    compile: Compile | None = None
    scheduler: SchedulerChoice | None = None
    decoder: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    measured: Mapping[str, Any] = field(default_factory=dict, hash=False)
    version: int = VERSION

    if TYPE_CHECKING:
        # What is taken, and then put into the kinds above.
        def __init__(
            self,
            name: str = ...,
            summary: str = ...,
            model: str = ...,
            base: str = ...,
            family: str = ...,
            transformer: Mapping[str, Any] = ...,
            method: Method | str | None = ...,
            backend: str = ...,
            precision: str | None = ...,
            sla: Place | Sequence[Place] = ...,
            guidance_free: Place | Sequence[Place] = ...,
            loras: Place | LoraFile | Sequence[Place | LoraFile] = ...,
            cache: Cache | str | None = ...,
            guidance_cache: GuidanceCache | int | Mapping[str, Any] | None = ...,
            quantize: Quantize | str | None = ...,
            compile: Compile | bool | str | Mapping[str, Any] | None = ...,
            scheduler: SchedulerChoice | str | None = ...,
            decoder: Place | None = ...,
            num_inference_steps: int | None = ...,
            guidance_scale: float | None = ...,
            measured: Mapping[str, Any] = ...,
            version: int = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        if type(self.version) is not int:  # true and 1.0 are equal to 1
            problem = "it must be a whole number"
            raise PresetError("version", problem, f"Write version: {VERSION}.", value=repr(self.version))
        if self.version != VERSION:
            fix = "Update vidaccel." if self.version > VERSION else ""
            raise PresetError("version", f"this vidaccel reads version {VERSION}", fix, value=self.version)
        self._take_harmless_kinds()
        self._check_attention()
        steps, scale = self.num_inference_steps, self.guidance_scale
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise PresetError("num_inference_steps", "it must be a whole number of at least 1", value=repr(steps))
        if scale is not None:
            check_number("guidance_scale", scale, CacheSetting(low=1.0))
        self._check_together()

    def _take_harmless_kinds(self) -> None:
        """Names for what has defaults, one for several, and texts for paths."""

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("guidance_free", "sla"):
            places = several(name, getattr(self, name), str | Path)
            if wrong := [place for place in places if not isinstance(place, str | Path)]:
                raise PresetError(name, "each must be a file", value=repr(wrong[0]))
            put(name, tuple(map(str, places)))
        put("loras", tuple(lora_file(lora) for lora in several("loras", self.loras, str | Path | LoraFile)))
        for name, kind in (("cache", Cache), ("quantize", Quantize), ("scheduler", SchedulerChoice)):
            if isinstance(value := getattr(self, name), str):
                put(name, kind(value))
            elif value is not None and not isinstance(value, kind):
                raise PresetError(name, f"it must be a {kind.__name__}, its name or None", value=repr(value))
        put("guidance_cache", guidance_cache_of(self.guidance_cache))
        put("compile", compile_of(self.compile))
        if isinstance(self.decoder, Path):
            put("decoder", str(self.decoder))
        if self.decoder is not None and (not isinstance(self.decoder, str) or not self.decoder.strip()):
            fix = f'Name one, or "{OWN}" for that of the model.'
            raise PresetError("decoder", "it must be a file, a folder or a hub id", fix, repr(self.decoder))
        if isinstance(self.method, str):
            put("method", attention_of(self.method, None)["method"])

    def _check_attention(self) -> None:
        if self.method is not None and not isinstance(self.method, Method):
            fix = "Give a config such as Tangent(), or describe it in a file."
            raise PresetError("method", "it must be a config of a method, or None for dense", fix, repr(self.method))
        if self.method is not None:
            try:
                check_config(self.method)
            except TypeError as error:
                raise PresetError("method", str(error).rstrip(".")) from error
        try:
            check_backend(self.backend)
        except ValueError as error:
            raise PresetError("backend", str(error).rstrip(".")) from error
        try:
            precision_of(self.precision)
        except ValueError as error:
            raise PresetError("precision", str(error).partition(": ")[2].rstrip("."), value=self.precision) from error

    def _check_together(self) -> None:
        """Raise for levers that refuse one another."""
        if self.method is None:
            for name in ("precision", "sla"):
                if getattr(self, name):
                    raise PresetError(
                        name, "is of sparse attention, and there is no method", "Give one, or leave it out."
                    )
        if self.sla and self.method.name != "sla":
            raise PresetError("sla", f"the adapters are for the method sla, and it is {self.method.name}")
        if self.guidance_free and self.guidance_scale == 1:
            raise PresetError(
                "guidance_free",
                "it puts guidance into one pass, and guidance_scale 1 has none",
                "Raise guidance_scale, or leave guidance_free out.",
            )
        self._check_guidance_cache()
        schedule = None if self.method is None else self.method.schedule
        if self.cache is not None and schedule is not None and self.num_inference_steps is not None:
            kept = sum(schedule.steps_of(self.num_inference_steps))
            if kept >= self.num_inference_steps:
                raise PresetError(
                    "cache",
                    f"the schedule keeps all {self.num_inference_steps} steps dense, and a dense step is not skipped",
                    "Keep fewer steps dense, or leave the cache out.",
                )

    def _check_guidance_cache(self) -> None:
        if self.guidance_cache is None:
            return
        if self.guidance_free:
            problem = "guidance_free makes one pass a step, and there is none to leave out"
            raise PresetError("guidance_cache", problem, "Leave one of both out.")
        if self.guidance_scale == 1:
            problem = "guidance_scale 1 is without guidance, and there is no second pass to leave out"
            raise PresetError("guidance_cache", problem, "Raise guidance_scale, or leave it out.")
        steps = self.num_inference_steps
        if steps is not None and not self.guidance_cache.leaves_out(steps):
            problem = f"it makes both passes in all {steps} steps"
            raise PresetError("guidance_cache", problem, "Make more steps, lower first_steps, or leave it out.")

    def replace(self, **changes: Any) -> Preset:
        """The same with other fields."""
        return replace(self, **changes)

    def levers(self) -> dict[str, str]:
        """Lever -> what it is in words, in the order in which `apply` works; those that are not used are left out."""
        told = {
            "scheduler": self.scheduler and self.scheduler.name,
            "loras": ", ".join(f"{lora.path.name} ({lora.weight:g})" for lora in self.loras),
            "guidance_free": ", ".join(Path(place).name for place in self.guidance_free),
            "quantize": self.quantize
            and f"{self.quantize.kind}, {'weights and activations' if self.quantize.activations else 'weights alone'}",
            "compile": self.compile and self.compile.in_words(),
            "method": self.method and ", ".join([in_words(self.method), *filter(None, [self.precision])]),
            "cache": self.cache and f"{self.cache.name}, threshold {self.cache.limit:g}",
            "guidance_cache": self.guidance_cache and self.guidance_cache.in_words(),
            "decoder": self.decoder and Path(self.decoder).name,
        }
        return {name: text for name, text in told.items() if text}

    def to_dict(self) -> dict[str, Any]:
        """What files hold; fields that are not used are left out."""
        made: dict[str, Any] = {"version": self.version}
        for name in ("name", "summary", "model", "base", "family"):
            made[name] = getattr(self, name)
        made["transformer"] = plain(self.transformer)
        if self.method is not None:
            made["attention"] = {**plain(describe(self.method)), "backend": self.backend}
            made["attention"] |= {"precision": self.precision} if self.precision else {}
            made["attention"] |= {"adapters": list(self.sla)} if self.sla else {}
        made["guidance_free"] = list(self.guidance_free)
        made["loras"] = [
            {"file": str(lora.path), "weight": lora.weight, **({} if lora.target is None else {"target": lora.target})}
            for lora in self.loras
        ]
        for name in ("cache", "quantize", "compile", "scheduler"):
            value = getattr(self, name)
            made[name] = (
                None if value is None else plain({k: v for k, v in asdict(value).items() if v not in (None, {})})
            )
        made["guidance_cache"] = None if self.guidance_cache is None else asdict(self.guidance_cache)
        made["decoder"] = self.decoder
        made |= {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        made["measured"] = plain(self.measured)
        return {name: value for name, value in made.items() if value not in (None, "", [], {})}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], folder: Path | None = None) -> Preset:
        """The preset that `to_dict` describes.

        Args:
            content: as a file holds it.
            folder: that relative files are in.

        Raises:
            PresetError: what is wrong, and where.
        """
        if not isinstance(content, Mapping):
            fix = "load_preset reads a file, or one of the package by its name."
            raise PresetError("", f"a preset must be names and values, and this is a {type(content).__name__}", fix)
        content = dict(content)
        if "version" not in content:
            problem = f"this vidaccel reads version {VERSION}"
            raise PresetError("version", problem, f"Write version: {VERSION}.", "missing")
        cls(version=content["version"])  # says what is wrong, before what another version holds is found unknown
        check_names("", content, _FIELDS)
        values = {name: value for name, value in content.items() if name in _SIMPLE and value is not None}
        for name in ("name", "summary", "model", "base", "family"):
            if not isinstance(values.get(name, ""), str):
                raise PresetError(name, "it must be a text", "Put it in quotation marks.", repr(values[name]))
        for name in ("transformer", "measured"):
            if name in values and not isinstance(values[name], Mapping):
                raise PresetError(name, "it must hold names and values", value=repr(values[name]))
        for name in ("model", "base"):
            place = values.get(name, "")
            if folder is not None and place not in ("", *MODELS) and is_model(folder / place):
                values[name] = place_of(name, place, folder)
        values |= attention_of(content.get("attention"), folder)
        places = several("guidance_free", content.get("guidance_free"))
        values["guidance_free"] = tuple(
            place if place == OWN else place_of("guidance_free", place, folder) for place in places
        )
        values["loras"] = tuple(lora_of(each, folder) for each in several("loras", content.get("loras")))
        for name, kind in (("cache", Cache), ("quantize", Quantize), ("scheduler", SchedulerChoice)):
            if (stated := content.get(name)) is not None:
                values[name] = part_of(name, kind, stated)
        for name in ("guidance_cache", "compile"):
            if (stated := content.get(name)) is not None:
                values[name] = stated
        if (stated := content.get("decoder")) is not None:
            beside = folder is not None and isinstance(stated, str) and os.path.exists(folder / stated)
            known = stated == OWN or (isinstance(stated, str) and is_hub_id(stated) and not beside)
            values["decoder"] = stated if known else place_of("decoder", stated, folder)
        return cls(**values)


_SIMPLE = (
    "version", "name", "summary", "model", "base", "family", "transformer", "num_inference_steps", "guidance_scale",
    "measured",
)  # fmt: skip
_FIELDS = (
    *_SIMPLE,
    "attention",
    "guidance_free",
    "loras",
    "cache",
    "guidance_cache",
    "quantize",
    "compile",
    "scheduler",
    "decoder",
)
