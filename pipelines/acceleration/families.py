"""What differs between model families, as data: the next family is one row here, and a layout where none fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ...attention import VideoLayout
from .. import head_counts
from . import layouts
from .layouts import Given, Layouts

BOTH = ("all",)  # one pass a step, with the guidance branches as samples of one batch


@dataclass(frozen=True)
class Family:
    """Video transformers that differ in nothing that concerns their self-attention over the video.

    Args:
        name: in messages and tables.
        transformers: class names in diffusers.
        pipelines: diffusers pipelines that such transformers come in.
        sites: paths of the self-attention modules over the video in running order, `*` for the number of a block.
        feeds: list of blocks beside the main ones -> setting of the transformer that says which main block each feeds.
        layout: `(transformer, arguments of its forward pass) -> Layouts` of the sequence its blocks see.
        branches: names of the guidance branches in the order in which pipelines call them.
        timestep: the argument of the forward pass that changes from step to step.
        trims: the model pads its text, and gives its attention a mask that hides the padding. It is cut off instead.
        own_samples: attention is called once for each sample, with its own text.
        reads_prefix: keys begin with tokens that are no queries.
        left_out: the setting of the transformer that says how many of the last sites are left as they are.
        stays_dense: what of it stays dense and why, in words; empty if nothing does.
        heads: config of the transformer -> heads of its self-attention, and their size.

    Raises:
        ValueError: a field of another kind than above, or an empty one.
    """

    name: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    layout: Callable[[Any, Given], Layouts]
    sites: tuple[str, ...] = ("transformer_blocks.*.attn1",)
    branches: tuple[str, ...] = ("cond", "uncond")
    timestep: str = "timestep"
    trims: bool = False
    own_samples: bool = False
    reads_prefix: bool = False
    left_out: str = ""
    stays_dense: str = ""
    heads: Callable[[Mapping[str, Any]], tuple[int, int]] = head_counts.usual
    feeds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("transformers", "pipelines", "sites", "branches"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
                self._refuse(name, 'it must be a tuple of texts, such as ("WanTransformer3DModel",)')
            if not value and name != "pipelines":
                self._refuse(name, "it must have at least one")
        for path in self.sites:
            if path.count(".*.") != 1:
                self._refuse("sites", f'{path!r} needs one "*" for the number of a block, as in "blocks.*.attn1"')
        if not callable(self.layout):
            self._refuse("layout", "it must be a function of a transformer and the arguments of its forward pass")

    def _refuse(self, name: str, problem: str) -> NoReturn:
        raise ValueError(f"Family({self.name!r}).{name} is {getattr(self, name)!r}: {problem}.")

    def modules(self, transformer: torch.nn.Module) -> dict[str, Any]:
        """The self-attention modules of a transformer by path, in running order.

        Raises:
            TypeError: the transformer is another one than this row says.
        """
        found: dict[str, Any] = {}
        for path in self.sites:
            blocks, inner = path.split(".*.")
            try:
                for number, block in enumerate(transformer.get_submodule(blocks).children()):
                    found[f"{blocks}.{number}.{inner}"] = block.get_submodule(inner)
            except AttributeError as error:
                raise self._other(transformer, f"sites has {path!r}", str(error)) from error
        wrong = [path for path, module in found.items() if not hasattr(module, "processor")]
        if wrong or not found:
            told = f"{wrong[0]} has no processor, as attention of diffusers has" if wrong else "it has no such blocks"
            raise self._other(transformer, f"sites is {self.sites}", told)
        kept = len(found) - (self._setting(transformer, "left_out", self.left_out) if self.left_out else 0)
        return dict(list(found.items())[:kept])

    def layouts_of(self, transformer: torch.nn.Module, given: Given) -> Layouts:
        """What `layout` says of a forward pass.

        Raises:
            TypeError: it is neither layouts nor a reason.
        """
        found = self.layout(transformer, given)
        is_layouts = isinstance(found, tuple) and found and all(isinstance(each, VideoLayout) for each in found)
        if not is_layouts and not (isinstance(found, str) and found):
            told = "a tuple with one VideoLayout, or one for each sample, or why there is none, as a text"
            raise TypeError(f"the layout of Family({self.name!r}) returned {found!r}: it must return {told}.")
        return found

    def _setting(self, transformer: Any, field: str, name: str) -> Any:
        try:
            return getattr(transformer.config, name)
        except AttributeError as error:
            raise self._other(transformer, f"{field} names the setting {name!r}", "its config has none") from error

    def _other(self, transformer: object, told: str, found: str) -> TypeError:
        return TypeError(f"Family({self.name!r}) does not fit {type(transformer).__name__}: {told}, but {found}.")

    def depths(self, transformer: torch.nn.Module) -> list[int]:
        """The block that each module of `modules` counts as in a schedule: its place among the main blocks.

        A block that feeds a main one is dense with it: `first_layers=1` means the first main block and what it is fed.
        """
        made = []
        main = itertools.count()
        for path in self.modules(transformer):
            blocks, number, _ = path.split(".", 2)
            fed = self.feeds.get(blocks)
            # Models hand on what was made for main blocks in the order of these, however the setting has them.
            made.append(next(main) if fed is None else sorted(self._setting(transformer, "feeds", fed))[int(number)])
        return made


_WAN = ("blocks.*.attn1",)
_DUAL = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

FAMILIES: list[Family] = [
    Family(
        "Wan 2.1 / 2.2",
        ("WanTransformer3DModel",),
        (
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "LucyEditPipeline",
            "DCVideoGenPipeline",
            "DCVideoGenImageToVideoPipeline",
        ),
        layouts.video_alone,
        _WAN,
    ),
    Family(
        "Wan VACE",
        ("WanVACETransformer3DModel",),
        ("WanVACEPipeline",),
        layouts.video_alone,
        ("vace_blocks.*.attn1", "blocks.*.attn1"),
        feeds={"vace_blocks": "vace_layers"},
    ),
    Family("Wan Animate", ("WanAnimateTransformer3DModel",), ("WanAnimatePipeline",), layouts.video_alone, _WAN),
    Family("ChronoEdit", ("ChronoEditTransformer3DModel",), ("ChronoEditPipeline",), layouts.video_alone, _WAN),
    Family(
        "SkyReels V2",
        ("SkyReelsV2Transformer3DModel",),
        (
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        layouts.video_alone,
        _WAN,
        stays_dense="causal blocks of diffusion forcing, whose attention has a mask",
    ),
    Family("AnyFlow", ("AnyFlowTransformer3DModel",), ("AnyFlowPipeline",), layouts.frames_before_channels, _WAN, BOTH),
    Family("Helios", ("HeliosTransformer3DModel",), ("HeliosPipeline", "HeliosPyramidPipeline"), layouts.helios, _WAN),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        layouts.text_after,
        _DUAL,
        trims=True,
    ),
    Family(
        "HunyuanVideo Framepack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        ("HunyuanVideoFramepackPipeline",),
        layouts.framepack,
        _DUAL,
        trims=True,
    ),
    Family(
        "HunyuanVideo 1.5",
        ("HunyuanVideo15Transformer3DModel",),
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        layouts.hunyuan_15,
        ("transformer_blocks.*.attn",),
        trims=True,
    ),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        layouts.cogvideox,
        branches=BOTH,
    ),
    Family("ConsisID", ("ConsisIDTransformer3DModel",), ("ConsisIDPipeline",), layouts.cogvideox, branches=BOTH),
    Family(
        "EasyAnimate",
        ("EasyAnimateTransformer3DModel",),
        ("EasyAnimatePipeline", "EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline"),
        layouts.easyanimate,
        branches=BOTH,
    ),
    Family(
        "Mochi 1",
        ("MochiTransformer3DModel",),
        ("MochiPipeline",),
        layouts.mochi,
        branches=BOTH,
        own_samples=True,
    ),
    Family(
        "LTX-Video",
        ("LTXVideoTransformer3DModel",),
        ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
        layouts.packed,
        branches=BOTH,
    ),
    Family(
        "LTX-2",
        ("LTX2VideoTransformer3DModel",),
        (
            "LTX2Pipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2ConditionPipeline",
            "LTX2InContextPipeline",
            "LTX2HDRPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
        ),
        layouts.packed,
        branches=("all", "pass 1", "pass 2"),
        stays_dense="video-to-video masks of IC-LoRAs; sound, and attention between sound and video",
    ),
    Family(
        "Cosmos 1 / Predict2 / 2.5",
        ("CosmosTransformer3DModel",),
        (
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        layouts.video_alone,
        stays_dense="the ControlNet of Cosmos2_5_TransferPipeline, a model of its own",
    ),
    Family(
        "Cosmos 3",
        ("Cosmos3OmniTransformer",),
        ("Cosmos3OmniPipeline",),
        layouts.cosmos_3,
        ("layers.*.self_attn",),
        timestep="vision_timesteps",
        reads_prefix=True,
        stays_dense="the causal attention of its understanding tokens",
        heads=head_counts.cosmos_3,
    ),
    Family(
        "Kandinsky 5",
        ("Kandinsky5Transformer3DModel",),
        ("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
        layouts.kandinsky,
        ("visual_transformer_blocks.*.self_attention",),
        stays_dense="10-second models, which have the sparse attention NABLA of their own",
        heads=head_counts.kandinsky,
    ),
    Family(
        "Kandinsky 6",
        ("Kandinsky6Transformer3DModel",),
        ("Kandinsky6TI2VAPipeline",),
        layouts.kandinsky,
        ("visual_transformer_blocks.*.video_dec_block.self_attention",),
        stays_dense="sound; its super-resolution model, which has the sparse attention NABLA of its own",
        heads=head_counts.kandinsky,
    ),
    Family("Allegro", ("AllegroTransformer3DModel",), ("AllegroPipeline",), layouts.video_alone, branches=BOTH),
    Family(
        "Motif-Video",
        ("MotifVideoTransformer3DModel",),
        ("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        layouts.motif,
        _DUAL,
        trims=True,
        left_out="num_decoder_layers",
        stays_dense="the last num_decoder_layers blocks, which read the encoder's video beside their own",
    ),
    Family(
        "MiniMax-H3",
        ("MiniMaxH3Transformer3DModel",),
        (),
        layouts.minimax,
        ("transformer_blocks.*.attn",),
    ),
]
"""One row for each kind of model, of which the first that has a class counts; one of somebody's own is appended."""

NOT_SERVED = {  # transformers of diffusers' video pipelines, and why
    "LatteTransformer3DModel": "its attention is factorised: no call sees the whole video",
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "Kandinsky6SRTransformer3DModel": "it has the sparse attention NABLA of its own",
    "WanAnimate2Transformer3DModel": "its denoising passes run FlexAttention over reference tokens of their own",
    "AnyFlowFARTransformer3DModel": "its passes read a cache of keys that is longer than their queries",
}


def family_of(pipeline: str) -> Family | None:
    """The family that a class of pipeline is of, by its name; None where it is of no family that is known."""
    return next((f for f in FAMILIES if pipeline in f.pipelines), None)


def supported_pipelines() -> list[str]:
    """Names of the diffusers pipelines that `accelerate` knows."""
    return sorted(name for family in FAMILIES for name in family.pipelines)


def unwrap(component: Any) -> Any:
    """The model inside the wrappers that training and compilation put round one.

    Raises:
        RuntimeError: a `DataParallel` over several devices.
    """
    while True:
        if isinstance(component, torch.nn.DataParallel) and len(component.device_ids) > 1:
            raise RuntimeError(
                f"DataParallel runs copies of the model in threads on {len(component.device_ids)} devices, which would "
                "share what sparse attention remembers: use DistributedDataParallel, or a process for each device."
            )
        if isinstance(component, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            component = component.module
        elif hasattr(component, "_orig_mod"):  # torch.compile
            component = component._orig_mod
        elif callable(getattr(component, "get_base_model", None)):  # PEFT
            component = component.get_base_model()
        else:
            return component


def find_transformers(pipe: object) -> dict[str, tuple[torch.nn.Module, Family]]:
    """The transformers of a pipeline that have a row, by component name.

    Args:
        pipe: a diffusers pipeline, or one transformer. What `torch.compile`, PEFT, DDP and `DataParallel` wrap
            round a transformer is looked through.

    Raises:
        TypeError: there is none, or one of several denoisers has none; names the families and what a row needs.
        RuntimeError: a `DataParallel` over several devices.
    """
    components = getattr(pipe, "components", None) or {"transformer": pipe}
    found = {}
    unknown = {}
    for name, component in components.items():
        component = unwrap(component)
        # Through the whole inheritance, so that a subclass of a known transformer is one.
        classes = [c.__name__ for c in type(component).__mro__]
        family = next((f for c in classes for f in FAMILIES if c in f.transformers), None)
        if family is not None:
            found[name] = (component, family)
        elif name.startswith("transformer") and component is not None:
            unknown[name] = next((NOT_SERVED[c] for c in classes if c in NOT_SERVED), "no family has it")
            unknown[name] = f"{name} is a {classes[0]}: {unknown[name]}"
    if found and not unknown:
        return found
    why = "; ".join(unknown.values()) or "it has none"
    raise TypeError(
        f"{type(pipe).__name__} has no transformer that vidaccel knows, or not all of them ({why}). Known families: "
        f"{', '.join(family.name for family in FAMILIES)}. A new one is a row, vidaccel.pipelines.FAMILIES.append("
        "Family(...)): where its self-attention modules are, and where the video tokens are in their sequence."
    )
