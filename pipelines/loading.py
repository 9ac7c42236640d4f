"""Load a saved pipeline as the command line wants it, and what its class would do by default."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import few_of
from .quiet_logs import only_logs

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

BLOCKS = "blocks"
"""What `offload` is where a transformer does not fit on the device as a whole."""


def find_class(name: str) -> type[DiffusionPipeline]:
    """A pipeline class by name: this package's or diffusers' own.

    Raises:
        AttributeError: there is none.
    """
    import diffusers

    from .. import pipelines

    return getattr(pipelines if name in pipelines.__all__ else diffusers, name)


def usual_autoencoder_dtype(is_dc_ae_v: bool, dtype: torch.dtype) -> torch.dtype:
    """The dtype that an autoencoder runs in beside a model of `dtype`.

    DC-AE-V follows bfloat16, in which it is published; all others, and DC-AE-V beside float16, stay in float32, as
    diffusers' examples for Wan have it.
    """
    import torch

    return dtype if is_dc_ae_v and dtype == torch.bfloat16 else torch.float32


def load_pipeline(
    location: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    pipeline_class: str = "DiffusionPipeline",
    offload: bool | str = False,
    tiling: bool = False,
    autoencoder_dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """Load a pipeline and place it, without progress bars.

    Args:
        location: a folder that `save_pretrained` wrote, or a hub id; for DC-VideoGen also an adapter's folder.
        dtype: of all components but the autoencoder.
        device: where it runs.
        pipeline_class: its name; "DiffusionPipeline" finds out which of diffusers' it is.
        offload: keep only the component at work on `device` (`enable_model_cpu_offload`); with `BLOCKS`, of a
            transformer one block at a time, where it is larger than the device as a whole.
        tiling: let the autoencoder work in tiles.
        autoencoder_dtype: of the autoencoder; None for that of `usual_autoencoder_dtype`.

    Raises:
        OSError: weights that are missing or unreadable.
    """
    import diffusers
    import torch
    import transformers

    from ..autoencoders import AutoencoderDCV

    # Several bars of two libraries, none of which says how long the wait is.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtypes = {"default": dtype, "vae": autoencoder_dtype or torch.float32}
    with _silent_on_projections():
        pipe = find_class(pipeline_class).from_pretrained(location, dtype=dtypes)
    _check_whole(pipe, location)
    # The class of the autoencoder is known only now.
    usual = usual_autoencoder_dtype(isinstance(pipe.vae, AutoencoderDCV), dtype)
    if autoencoder_dtype is None and usual != torch.float32:
        # diffusers' own `to` warns here that no modules need to stay in float32.
        torch.nn.Module.to(pipe.vae, usual)
        logger.info("DC-AE-V runs in bfloat16, as it is published.")
    if tiling:
        pipe.vae.enable_tiling()
    if "VideoToVideo" in pipeline_class:
        _use_own_factors(pipe)
    pipe.set_progress_bar_config(disable=True)
    if offload == BLOCKS:
        _offload_blocks(pipe, torch.device(device))
    elif offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _check_whole(pipe: DiffusionPipeline, location: str) -> None:
    """Raise OSError where files lack weights of a pipeline just loaded: diffusers says so in its log alone, and leaves
    them without numbers."""
    import torch

    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        lacking = [key for key, value in (*part.named_parameters(), *part.named_buffers()) if value.is_meta]
        if lacking:
            raise OSError(
                f"the weights in {location}/{name} lack {few_of(lacking)} of this {type(part).__name__}: download them "
                "again, or take the config.json that belongs to them."
            )


def _offload_blocks(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Keep of transformers one block on a device, of text encoders one layer; autoencoders, which are small, stay."""
    import torch
    import transformers
    from diffusers.hooks import apply_group_offloading

    for name, part in pipe.components.items():
        if name.startswith("transformer") and part is not None:
            part.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
        elif isinstance(part, transformers.PreTrainedModel):
            apply_group_offloading(part, device, offload_type="leaf_level")
        elif isinstance(part, torch.nn.Module):
            part.to(device)


def _silent_on_projections() -> contextlib.AbstractContextManager[None]:
    """While this lasts, diffusers does not say that what was learned of SLA and VSA is not used: `accelerate` reads
    it."""

    def says_more(text: str) -> bool:
        names = re.findall(r"[\w.]+\.(?:weight|bias)\b", text) if "were not used" in text else []
        return not names or not all(".proj_l." in name or ".to_gate_compress." in name for name in names)

    return only_logs("diffusers.models.modeling_utils", says_more)


def as_video_to_video(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A loaded `WanPipeline` as one that starts from a video, with the same parts where and as they are.

    (diffusers' own `from_pipe` would cast them.)
    """
    import diffusers

    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    made = diffusers.WanVideoToVideoPipeline(**{name: getattr(pipe, name) for name in names})
    made.register_to_config(_name_or_path=pipe.name_or_path)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    _use_own_factors(made)
    return made


def _use_own_factors(pipe: DiffusionPipeline) -> None:
    """diffusers' video to video takes its factors from the number of downsampling steps in time, as Wan 2.1's
    autoencoder has them; others (Wan 2.2's, the demo's) say theirs in the config."""
    from diffusers.video_processor import VideoProcessor

    config = pipe.vae.config
    pipe.vae_scale_factor_temporal = config.get("scale_factor_temporal") or pipe.vae_scale_factor_temporal
    pipe.vae_scale_factor_spatial = config.get("scale_factor_spatial") or pipe.vae_scale_factor_spatial
    pipe.video_processor = VideoProcessor(vae_scale_factor=pipe.vae_scale_factor_spatial)


def call_defaults(pipeline_class: str) -> dict[str, Any]:
    """The default arguments of the `__call__` of a pipeline class and of those it is built on, by name."""
    found: dict[str, Any] = {}
    for cls in reversed(find_class(pipeline_class).__mro__):
        if "__call__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__call__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found


def call_arguments(pipeline_class: str) -> list[str]:
    """The names of the arguments of the `__call__` of a pipeline class and of those it is built on."""
    found: dict[str, None] = {}
    for cls in find_class(pipeline_class).__mro__:
        if "__call__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__call__"]).parameters.values()
            found |= {p.name: None for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return [name for name in found if name != "self"]


def call_types(pipeline_class: str) -> dict[str, Any]:
    """The type hints of the arguments of the `__call__` of a pipeline class and of those it is built on, by name."""
    found: dict[str, Any] = {}
    for cls in reversed(find_class(pipeline_class).__mro__):
        if "__call__" in vars(cls):
            found |= get_type_hints(vars(cls)["__call__"])
    found.pop("return", None)
    return found
