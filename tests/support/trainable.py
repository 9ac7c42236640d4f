"""Tiny pipelines that the recipe `lora` trains: those of `families`, in what matters there as published ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from families import cogvideo, hunyuan, ltx


def _certain(pipe: Any, conv: Any) -> Any:
    """An autoencoder whose distributions have no width, so that what stock pipelines draw is the mean."""
    channels = pipe.vae.config.latent_channels
    with torch.no_grad():
        conv.weight[channels:] = 0
        conv.bias[channels:] = -60
    return pipe


def _predicting_v(pipe: Any) -> Any:
    pipe.register_modules(
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
            clip_sample=False,
        )
    )
    return _certain(pipe, pipe.vae.encoder.conv_out.conv)


def _ltx(kind: str) -> Any:
    import diffusers

    made = ltx.ltx_condition() if kind == "LTXConditionPipeline" else ltx.ltx()
    pipe = getattr(diffusers, kind)(**made.components)
    return _certain(pipe, pipe.vae.encoder.conv_out.conv)


def _ltx2(kind: str) -> Any:
    import diffusers

    pipe = getattr(diffusers, kind)(**ltx.ltx2().components)
    return _certain(pipe, pipe.vae.encoder.conv_out.conv)


def _hunyuan(made: Callable[[], Any] = hunyuan.hunyuan) -> Any:
    pipe = made()
    return _certain(pipe, pipe.vae.quant_conv)


MADE: dict[str, Callable[[], Any]] = {
    "hunyuan": _hunyuan,
    "hunyuan first frame": lambda: _hunyuan(hunyuan.hunyuan_image),
    "hunyuan replaced first frame": lambda: _hunyuan(hunyuan.hunyuan_image_replaced),
    "cogvideox 2b": lambda: _predicting_v(cogvideo.cogvideox_2b()),
    "cogvideox 5b": lambda: _predicting_v(cogvideo.cogvideox_5b()),
    "cogvideox 1.5 first frame": lambda: _predicting_v(cogvideo.cogvideox_15_image()),
    "cogvideox first frame": lambda: _predicting_v(cogvideo.cogvideox_image()),
    "ltx": lambda: _ltx("LTXPipeline"),
    "ltx first frame": lambda: _ltx("LTXImageToVideoPipeline"),
    "ltx condition": lambda: _ltx("LTXConditionPipeline"),
    "ltx2": lambda: _ltx2("LTX2Pipeline"),
    "ltx2 first frame": lambda: _ltx2("LTX2ImageToVideoPipeline"),
    "ltx condition first frame": lambda: _ltx("LTXConditionPipeline"),
}
"""Kind -> its pipeline."""


def saved(kind: str, folder: Path) -> Path:
    """The folder of a pipeline of a kind."""
    torch.manual_seed(sum(map(ord, kind)))
    pipe = MADE[kind]()
    pipe.save_pretrained(folder / kind)
    return folder / kind
