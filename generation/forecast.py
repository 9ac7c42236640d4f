"""`vidaccel info --forecast`: what a video will take, before any weights are read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calls import parts_of, row_of
from .errors import BadInput, mention
from .levers.methods import DEFAULT_METHOD, MIN_SPARSE_TOKENS
from .models.facts import ModelFacts
from .requests.pipeline_options import check_options
from .requests.settings import Settings

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

    from ..attention.layout import VideoLayout

_COUNTED = ("AutoencoderKLWan", "AutoencoderDCV")
"""Autoencoders whose memory `autoencoders.memory` estimates."""


def transformer_bytes(tokens: int, width: int, itemsize: int) -> int:
    """Activations of one forward pass.

    A block holds about 16 tensors of the model's width at a time (the feed-forward layer alone is four wide or more).
    """
    return 16 * tokens * width * itemsize


def forecast(facts: ModelFacts, settings: Settings, itemsize: int) -> list[tuple[str, str]]:
    """Tokens and rough memory of a video with a model in a folder: names and texts.

    Of a long video that is made in parts, the tokens of one part count. Options of a pipeline that change these parts
    are named instead.

    Args:
        facts: of the model.
        settings: the request, checked.
        itemsize: bytes a value of the weights; Wan's autoencoder runs in four.

    Raises:
        BadInput: a model that is not in a folder here, or whose configs cannot be read; or options that its pipeline
            refuses.
    """
    from ..autoencoders.memory import video_bytes

    folder = Path(facts.location)
    if not folder.is_dir():
        raise BadInput("model", "a forecast needs the folder of a model that is on this machine", value=facts.name)
    frames, height, width = settings.frames, settings.height, settings.width
    layout = settings.layout(facts)
    adapter = _json(folder / "adapter.json") if (folder / "adapter.json").is_file() else None
    vae = _autoencoder_config(facts)
    heads, head_dim = facts.row.heads(facts.transformer)
    check_options(settings.pipeline_options, facts.row)
    unknown = _changed_window(facts, settings)
    rows = [("model", f"{facts.name} ({facts.pipeline_class})"), ("video", f"{frames} frames of {width}x{height}")]
    canvas = facts.canvas(frames, height, width)
    if canvas is not None and canvas.is_larger:
        rows.append(("made as", f"{canvas.frames} frames of {canvas.width}x{canvas.height}, cropped"))
    made = (frames, height, width) if canvas is None else (canvas.frames, canvas.height, canvas.width)
    parts = facts.row.parts(frames, facts.frame_factor)
    if parts > 1 and not unknown:
        rows.append(("made in", f"{parts} parts, one after the other"))
    of_vae = itemsize if canvas is not None or facts.row.follows else 4
    on_disk = ("weights on disk", _weights_on_disk(facts, adapter))
    if unknown:
        rows += [("tokens", f"not counted: {unknown} changes how much is made at once"), on_disk]
    else:
        rows += [
            ("tokens", _tokens(facts, layout)),
            ("pairs a dense call", f"{layout.tokens**2:,}"),
            on_disk,
            ("a forward pass, about", _gb(transformer_bytes(layout.tokens, heads * head_dim, itemsize))),
            *_sparse_rows(layout, heads, head_dim, itemsize),
        ]
    rows += [
        *_decoding_rows(vae, made, of_vae, parts),
        ("the decoded video", _gb(video_bytes(frames, height, width))),
    ]
    return rows


def _changed_window(facts: ModelFacts, settings: Settings) -> str:
    """The options by which another number of tokens is made at once than the row of the pipeline counts with; "" for
    none.
    """
    from ..pipelines.loading import call_defaults

    usual = call_defaults(facts.row.pipeline)
    given = settings.pipeline_options
    return ", ".join(
        f"{name}={given[name]!r}" for name in facts.row.windows if given.get(name, usual[name]) != usual[name]
    )


def _tokens(facts: ModelFacts, layout: VideoLayout) -> str:
    """The grid, and what lies beside it."""
    told = f"{layout.tokens:,} ({layout.frames} x {layout.height} x {layout.width}"
    if layout.text_tokens:
        told += f", and {'at most ' if facts.row.text_varies else ''}{layout.text_tokens:,} beside them"
    return f"{told})"


def _decoding_rows(vae: dict[str, Any], made: tuple[int, int, int], itemsize: int, parts: int) -> list[tuple[str, str]]:
    """What decoding takes, whole and in tiles; for an autoencoder that was not counted, that it was not."""
    from ..autoencoders.counting import COUNTED, counted_bytes
    from ..autoencoders.memory import decoding_bytes, default_tile

    if (name := vae.get("_class_name")) in COUNTED and parts == 1:
        return [("decoding, about", f"{_gb(counted_bytes(name, vae, *made, itemsize))}, in tiles much less")]
    if name not in _COUNTED:
        return [("decoding", f"not counted: what {name or 'its autoencoder'} takes was not measured")]
    return [
        ("decoding, about", _gb(decoding_bytes(vae, *made, itemsize))),
        ("decoding in tiles, about", _gb(decoding_bytes(vae, *made, itemsize, default_tile(vae)))),
    ]


def memory_to_decode(vae: ModelMixin, frames: int, height: int, width: int, parts: int = 1) -> int:
    """What decoding takes beside the weights, in bytes, of an autoencoder as it is now.

    One that was not counted, or not in tiles, is taken for Wan's, a third wider.

    Args:
        vae: the autoencoder.
        frames, height, width: of the video.
        parts: in which it is made; Framepack decodes one of them with the one before.
    """
    from ..autoencoders import memory
    from ..autoencoders.counting import COUNTED, counted_bytes

    if (name := type(vae).__name__) in _COUNTED:
        return memory.memory_to_decode(vae, frames, height, width)
    if name in COUNTED and not vae.use_tiling:
        at_once = min(frames, 2 * math.ceil(frames / parts))
        return counted_bytes(name, vae.config, at_once, height, width, vae.dtype.itemsize)
    return memory.decoding_bytes({"base_dim": 128}, frames, height, width, vae.dtype.itemsize)


def decoding_note(pipe: DiffusionPipeline, settings: Settings, device: torch.device, capacity: int) -> str:
    """What to do about frames that will not fit where they are decoded, after all steps; "" where they will.

    Args:
        pipe: loaded and placed.
        settings: checked.
        device: where it runs. capacity: bytes that it has.
    """
    import torch

    from ..autoencoders.counting import COUNTED

    vae = pipe.vae
    if type(vae).__name__ not in (*_COUNTED, *COUNTED) or vae.use_tiling:
        return ""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    there = {id(p): p.nbytes for m in modules for p in m.parameters() if m is vae or p.device.type == device.type}
    parts, weights = parts_of(pipe, row_of(pipe), settings), sum(there.values())
    needed = memory_to_decode(vae, settings.frames, settings.height, settings.width, parts)
    if weights + needed <= capacity:
        return ""
    return (
        f"Decoding takes about {_gb(needed)} beside {_gb(weights)} of weights on {device}, which has {_gb(capacity)}: "
        f"give {mention('tiling')} if it runs out of memory."
    )


def _sparse_rows(layout: VideoLayout, heads: int, head_dim: int, itemsize: int) -> list[tuple[str, str]]:
    """What the method that is taken without a choice needs beside the pass, for one guidance branch; none if dense."""
    from ..attention import METHODS

    if layout.tokens < MIN_SPARSE_TOKENS:
        return []
    method = METHODS[DEFAULT_METHOD]()
    kept = method.kept_bytes(layout, heads, head_dim)
    return [
        (f"tables of a {DEFAULT_METHOD} call", _gb(method.table_bytes(layout, heads, head_dim, itemsize))),
        ("kept during a run", f"{_gb(kept)} for each layer and guidance branch"),
    ]


def _autoencoder_config(facts: ModelFacts) -> dict[str, Any]:
    if facts.autoencoder is None:
        return _json(Path(facts.location) / "vae" / "config.json")
    local = _local(facts.autoencoder)
    if local is None:
        missing = f"a forecast needs its autoencoder {facts.autoencoder} on this machine"
        raise BadInput("model", missing, value=facts.name)
    return _json(local / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput("model", f"{file} cannot be read ({error})", value=file.parent) from error


def _weights_on_disk(facts: ModelFacts, adapter: dict[str, Any] | None) -> str:
    """Sizes of all parts; adapter-only weights come on top of those of their base model, whose autoencoder rests."""
    from ..pipelines.files.missing_weights import missing_weights

    sizes = _weights(Path(facts.location))
    lacking = missing_weights(facts.location)
    missing = f"; not whole: {lacking}" if lacking else ""
    if facts.autoencoder is not None and (local := _local(facts.autoencoder)) is not None:
        sizes["vae"] = sum(_weights(local).values())
    if adapter is not None:
        from ..pipelines.deep_compression.adapter_folder import base_location

        base = str(adapter.get("base"))
        local = _local(base_location(base))
        if local is None:
            missing += f"; without the base model {base}, which is not on this machine"
        else:
            sizes |= {f"{name} of the base": size for name, size in _weights(local).items() if name != "vae"}
    return ", ".join(f"{name} {_gb(size)}" for name, size in sizes.items()) + missing


def _local(location: str) -> Path | None:
    """Folder of a model, or of one of the hub that was downloaded before."""
    if Path(location).expanduser().is_dir():
        return Path(location).expanduser()
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hub.snapshot_download(location, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How names of files of weights begin in diffusers and in transformers."""


def _weights(folder: Path) -> dict[str, int]:
    """Bytes of the weights of each part, without adapters that lie beside them."""
    sizes: dict[str, int] = {}
    # Unlike rglob, also in folders that are links, as in the cache of converted models.
    files = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)
    for file in sorted(file for file in files if file.suffix == ".safetensors"):
        part = file.relative_to(folder).parts[0] if file.parent != folder else "adapter"
        if part != "adapter" and not file.name.startswith(_WEIGHTS):
            continue
        sizes[part] = sizes.get(part, 0) + file.stat().st_size
    return sizes


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
