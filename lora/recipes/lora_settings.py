"""Settings of the recipe `lora`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ...pipelines.files.locations import is_single_file
from ..config import Settings, setting
from ..settings import PhaseSettings, RunSettings, ValidationSettings


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model that gets a LoRA.

    Args:
        base: folder or hub id of a diffusers pipeline, or folder of adapter-only weights; "demo" and "demo-dc" are the
            built-in ones. Or the file of a transformer, as ComfyUI has it (.safetensors), with `components`.
        components: of such a file: folder or hub id of a diffusers pipeline of the same model, from which text encoder,
            autoencoder, scheduler and tokenizer come; None for a base that has them.
        stage: of a base with two transformers (Wan 2.2 14B): which one; None for a base with one.
        first_frame: train from first frames; None for what the class of the pipeline says. Wan 2.2 5B and LTX-Video do
            both.
        dtype: of the frozen weights; what is trained stays float32.
        offload_blocks: the frozen linear layers of so many blocks, the last ones, stay in the memory of the CPU and are
            copied to the GPU where they are needed: the same result, less memory and more time.
        quantise: keep the frozen weights of the linear layers in 8 bits, through torchao, which must be installed.
        autoencoder_dtype: in which clips are encoded.
        autoencoder_tiling: encode large clips in tiles: less memory, and other latents near the seams.
        merge_text_padding: let one position stand for the padding of a prompt, which changes nothing but the time;
            for Wan without an image encoder.
        guidance: what models that are distilled on a guidance scale are told in training; None for the usual: 3.5 of
            FLUX dev, 1 of HunyuanVideo.
    """

    base: str = setting(free=True, place=True)
    components: str | None = setting(None, free=True, place=True)
    stage: Literal["high_noise", "low_noise"] | None = None
    first_frame: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    offload_blocks: int = setting(0, low=0, free=True)
    quantise: Literal["none", "int8", "fp8"] = "none"
    autoencoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autoencoder_tiling: bool = False
    merge_text_padding: bool = False
    guidance: float | None = setting(None, low=0)

    def check(self) -> Iterator[str]:
        single = is_single_file(self.base)
        if single and self.components is None:
            yield (
                f"components is missing: {self.base} is a transformer alone. Give the folder or hub id of a diffusers "
                "pipeline of the same model, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
        if self.components is not None and not single:
            yield f"components is of use only with a single file as base, and that is {self.base}: leave it out."


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """The LoRA.

    Args:
        rank: of its two matrices.
        alpha: its update is multiplied by alpha / rank; None for the rank.
        dropout: share of a layer's inputs that the LoRA is not shown in a step.
        targets: ends of the names of the layers that get one, such as "to_q" or "attn1.to_q"; None for the family's:
            attention and feed-forward of every block.
        start: file or folder of a LoRA to go on from, or that of its run, of this recipe or, for `lora` and `length`,
            of another tool, as diffusers reads it; None for a new one.
        file_dtype: of the result.
    """

    rank: int = setting(32, low=1)
    alpha: float | None = setting(None, above=0)
    dropout: float = setting(0.0, low=0, below=1)
    targets: tuple[str, ...] | None = None
    start: str | None = setting(None, free=True, place=True)
    file_dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", free=True)

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self) -> Iterator[str]:
        if self.targets is not None and not self.targets:
            yield "targets is empty: name at least one layer, such as to_q, or leave it out."


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Noise levels and prompts in training.

    Args:
        density: of the noise levels before the shift: "logit_normal" of `logit_mean` and `logit_std`, or "uniform";
            None for the model's: "logit_normal", and "uniform" of CogVideoX, whose own schedule does the rest.
        shift: of the noise levels towards noise; None for the model's: 3, of HunyuanVideo that of its scheduler, of
            LTX-Video by the number of tokens, as its scheduler has it, of CogVideoX 1.
        min_level, max_level: noise levels that are trained, of 0 to 1, of those that the model is used for; the density
            is cut to them.
        caption_dropout: share of the clips that are shown with `unconditional` instead of their caption.
        unconditional: the text that stands for no caption: the negative prompt that the model will be sampled with.
        guidance_preserving: of a base that is distilled on guidance, the scale that is to stay in it: the loss compares
            v / s + (1 - 1 / s) u with the flow, u the velocity of `unconditional` without gradients. None for none.
    """

    density: Literal["logit_normal", "uniform"] | None = None
    logit_mean: float = 0.0
    logit_std: float = setting(1.0, above=0)
    shift: float | None = setting(None, above=0)
    min_level: float = setting(0.0, low=0, below=1)
    max_level: float = setting(1.0, above=0, high=1)
    caption_dropout: float = setting(0.1, low=0, high=1)
    unconditional: str = ""
    guidance_preserving: float | None = setting(None, above=1)

    def check(self) -> Iterator[str]:
        if self.min_level >= self.max_level:
            yield f"min_level is {self.min_level:g}, and max_level {self.max_level:g}: it must be below that."
        if self.density == "uniform":
            for name, usual in (("logit_mean", 0.0), ("logit_std", 1.0)):
                if getattr(self, name) != usual:
                    yield f'{name} is of use only with "logit_normal": set density to it, or leave {name} out.'


@dataclass(frozen=True)
class AttentionSettings(Settings):
    """The self-attention in training.

    Args:
        method: "dense", or one of `vidaccel.attention.METHODS`.
        density: share of the pairs that the method computes, at the last of `data.sizes`; None for its own.
        dense_layers: first layers that stay dense; None for the method's own.
        block_size: tokens of a block, of methods that have blocks of one size; None for the method's own.
        backend: what computes it; "auto" chooses.
    """

    method: str = "dense"
    density: float | None = setting(None, above=0, high=1)
    dense_layers: int | None = setting(None, low=0)
    block_size: int | None = setting(None, low=8)
    backend: str = setting("auto", free=True)

    def check(self) -> Iterator[str]:
        if self.method == "dense":
            for name in ("density", "dense_layers", "block_size"):
                if getattr(self, name) is not None:
                    yield f"{name} is of use only with a sparse method: set method, or leave it out."
            if self.backend != "auto":
                yield f"backend is {self.backend}, of use only with a sparse method: set method, or leave it out."


SPARSE_COMPILED = "which has no gradients in compiled blocks: set loop.compile to false."


@dataclass(frozen=True, kw_only=True)
class LoraSettings(RunSettings):
    """Settings of the recipe `lora`."""

    model: ModelSettings
    train: PhaseSettings
    lora: AdapterSettings = field(default_factory=AdapterSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    @property
    def sparse(self) -> bool:
        return self.attention.method != "dense"

    def check(self) -> Iterator[str]:
        if self.model.dtype != "float32" and self.loop.mixed_precision == "no":
            yield f'model.dtype is {self.model.dtype}: set loop.mixed_precision to "bf16" or "fp16" with it.'
        if not self.train.steps:
            yield "train.steps is 0: give at least 1."
        if self.model.offload_blocks and not self.loop.gradient_checkpointing:
            yield (
                f"model.offload_blocks is {self.model.offload_blocks}: set loop.gradient_checkpointing with it, "
                "without which all blocks would be on the GPU until the backward pass."
            )
        if self.model.offload_blocks and self.loop.compile:
            yield (
                f"model.offload_blocks is {self.model.offload_blocks} and loop.compile true, but weights that come and "
                "go would break the graphs: leave one of them out."
            )
        if self.attention.method != "dense" and self.loop.compile:
            yield f"loop.compile is true and attention.method {self.attention.method}, {SPARSE_COMPILED}"
        low_bits = {"model.quantise": self.model.quantise, "train.low_bit_linears": self.train.low_bit_linears}
        for name, value in low_bits.items():
            if self.model.offload_blocks and value != "none":
                yield (
                    f"model.offload_blocks is {self.model.offload_blocks} and {name} {value}, which do not go "
                    "together: leave one of them out."
                )
        if self.model.quantise != "none" and self.train.low_bit_linears != "none":
            yield (
                f"train.low_bit_linears is {self.train.low_bit_linears} and model.quantise {self.model.quantise}, "
                "whose weights have no such products: set one of them to none."
            )

    def without_lora(self, setting: str) -> Iterator[str]:
        """What does not go together with the training of all weights, which `setting` asks for."""
        if self.lora != AdapterSettings():
            yield f'lora is of use only with {setting} "lora": set that, or leave lora out.'
        if self.model.offload_blocks:
            yield f'model.offload_blocks is {self.model.offload_blocks}, for frozen weights: set {setting} to "lora".'
        if self.model.quantise != "none":
            yield f'model.quantise is {self.model.quantise}, whose weights stay frozen: set {setting} to "lora".'
