"""Guidance in one pass in ComfyUI's native Wan: an adapter of the recipe `gft` or `consistency` as patches of a MODEL's
weights.

ComfyUI's own machinery does the work. At one guidance scale the LoRA has one strength, and what beta adds to the
embedding of the timestep is a constant: a change of the bias of its last layer. So both are patches, as those of any
LoRA, on weights of whatever kind, and a clone of the MODEL has them. The sampler's CFG is set to 1 while it samples,
with which ComfyUI leaves the pass of the negative prompt out. An adapter for few steps brings their noise levels, which
take the place of those of the sampler's scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..report.wording import InputError
from .caches import GUIDANCE, NAMES
from .geometry import diffusion_model_of
from .lora import with_lora

logger = logging.getLogger(__name__)

KEY = "vidaccel_guidance_free"
MODELS = ("WanModel",)
"""Classes of diffusion models that adapters are for; others of Wan's have inputs that none was trained with."""
_BIAS = "diffusion_model.time_embedding.2.diff_b"
"""In files of LoRAs, a change of the bias that is added to the embedding of the timestep."""


def guide(model: Any, location: Path, scale: float) -> Any:
    """A clone of a MODEL that is guided in one pass; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher of a Wan model.
        location: file or folder of the adapter.
        scale: of the guidance; 1 is without.

    Raises:
        InputError: no such adapter, one of another model, a scale that it was not trained for, or a MODEL that has one
            already, or a guidance cache.
    """
    from comfy.patcher_extension import WrappersMP

    from ...pipelines.guidance_free.adapter_file import GuidanceFreeError, read_adapter
    from ...pipelines.guidance_free.low_rank import gate_of

    diffusion_model = diffusion_model_of(model)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise InputError("this MODEL is guidance-free already: connect the MODEL from before the other Guidance-Free.")
    if model.get_wrappers(WrappersMP.CALC_COND_BATCH, GUIDANCE):
        raise InputError(
            f"this MODEL has a {NAMES[GUIDANCE]}, which leaves out passes that guidance in one pass does not make: "
            "connect the MODEL from before it."
        )
    try:
        adapter = read_adapter(location)
    except GuidanceFreeError as error:
        raise InputError(f"adapter: {error}") from error
    if not adapter.min_scale <= scale <= adapter.max_scale:
        trained = (
            f"{adapter.min_scale:g} alone. Give that."
            if adapter.min_scale == adapter.max_scale
            else f"{adapter.min_scale:g} to {adapter.max_scale:g}. Give one of these."
        )
        raise InputError(f"guidance is {scale:g}: {adapter.path.name} was trained for {trained}")
    lora, embedder = adapter.weights()
    _check_fits(adapter.path.name, diffusion_model, lora, embedder.linear.out_features)
    gate = gate_of(scale, adapter.max_scale if adapter.gated else None)
    with torch.inference_mode(False), torch.no_grad():
        patches = {**lora, _BIAS: embedder(torch.tensor([1 / scale]))[0]}
    clone = with_lora(model, patches, gate, field="adapter", file=adapter.path.name)
    one_pass = _OnePass(scale, adapter.path.name, adapter.sigmas)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, one_pass.sample)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, one_pass.predict)
    return clone


def _check_fits(file: str, diffusion_model: Any, lora: dict[str, torch.Tensor], width: int) -> None:
    """Raise InputError for an adapter of a model of another kind or size."""
    kind = type(diffusion_model).__name__
    if kind not in MODELS:
        raise InputError(
            f"model is a {kind}, and guidance-free adapters are for {', '.join(MODELS)} (Wan 2.1 and 2.2)."
        )
    blocks = {int(name.split(".")[2]) for name in lora if name.startswith("diffusion_model.blocks.")}
    own = len(diffusion_model.blocks)
    if width != diffusion_model.dim or max(blocks, default=0) >= own:
        raise InputError(
            f"adapter: {file} is for a model of width {width}"
            + (f" with {max(blocks) + 1} blocks" if blocks else "")
            + f", and this MODEL has {diffusion_model.dim} and {own}: give the adapter of this model."
        )


class _OnePass:
    """What runs a sampling without its second pass, and at the noise levels of the adapter where it has some.

    Args:
        scale: of the guidance. file: name of the adapter. levels: of the adapter, None where it has none.
    """

    def __init__(self, scale: float, file: str, levels: Sequence[float] | None) -> None:
        self._scale, self._file, self._levels = scale, file, levels
        self._told = False  # in this sampling, that there are two passes

    def sample(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The OUTER_SAMPLE wrapper."""
        from comfy.samplers import CFGGuider

        guider = executor.class_obj
        if type(guider).predict_noise is not CFGGuider.predict_noise:
            raise InputError(
                f"this sampling is guided by a {type(guider).__name__}, which makes passes of its own: with "
                "Guidance-Free, use KSampler, or SamplerCustomAdvanced with BasicGuider."
            )
        if self._levels is not None:
            sigmas = _few_steps(self._file, self._levels, sampler, sigmas)
        given, scale = guider.cfg, self._scale
        if given not in (1.0, scale):
            logger.info("Guidance-Free: cfg %g of the sampler is not used; the node's guidance is %g.", given, scale)
        guider.cfg, self._told = 1.0, False
        try:
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:
            guider.cfg = given

    def predict(self, executor: Any, x: Any, timestep: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The PREDICT_NOISE wrapper: says where the pass of the negative prompt is made all the same.

        Who asks for it computes with its result, which would be zeros without it: it is not taken away.
        """
        wanted = options.get("disable_cfg1_optimization") and executor.class_obj.conds.get("negative") is not None
        if wanted and not self._told:
            self._told = True
            logger.warning(
                "Guidance-Free: another node, or the sampler, needs the pass of the negative prompt with a cfg of 1, "
                "too, so each step makes two passes and takes as long as without Guidance-Free. Take that node out, or "
                "choose a sampler without cfg_pp in its name."
            )
        return executor(x, timestep, options, *args, **kwargs)


def _few_steps(file: str, levels: Sequence[float], sampler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """The noise levels of an adapter for few steps, in place of those of the sampler's scheduler.

    Raises:
        InputError: another number of steps, a part of them alone, or another sampler than Euler's.
    """
    count = len(sigmas) - 1
    if count != len(levels) or float(sigmas[-1]) != 0:
        whole = "" if count == len(levels) else f" and the sampler makes {count}"
        raise InputError(
            f"steps: {file} was distilled to {len(levels)}, all of them in one sampling{whole}: set the steps to "
            f"{len(levels)}, and denoise to 1."
        )
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    if name != "sample_euler":
        raise InputError(f"sampler is {name.removeprefix('sample_')}, and {file} was distilled for euler: set that.")
    taught = sigmas.new_tensor([*levels, 0.0])
    if float(sigmas[0]) < 0.97 * levels[0]:
        raise InputError(
            f"denoise: {file} was distilled for steps from a noise of {levels[0]:g}, and these begin at "
            f"{float(sigmas[0]):.3g}: set denoise to 1, and leave the input video out."
        )
    if not torch.allclose(taught, sigmas, atol=0.01):
        logger.info("Guidance-Free: the noise levels of the scheduler are not used; %s has its own.", file)
    return taught
