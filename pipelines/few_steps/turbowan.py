"""TurboDiffusion's Wan models (arXiv 2512.16093) as folders of diffusers, with SLA and the sampler of rCM."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel, __version__
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ...attention import SLA
from ...autoencoders.checkpoint_file import CheckpointError
from ..acceleration.sla_weights import TrainedSLA, write_config
from ..deep_compression.adapter_folder import DEFAULTS_FILE
from ..deep_compression.published_files import base_folder, read_json
from ..files.drafts import beside, take
from ..files.json_files import write_json
from ..files.weight_files import WEIGHTS
from .rcm import RCMScheduler
from .turbowan_checkpoint import Checkpoint, read_checkpoint

logger = logging.getLogger(__name__)

BASES = {
    (1536, False): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (5120, False): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    (5120, True): "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
}
"""(width, image to video) of a published model -> the Wan pipeline that has its other components."""
BOUNDARY = 0.9
"""Time at which Wan 2.2 changes to its second transformer."""
SIGMA_MAX = {False: 80.0, True: 200.0}
"""Where sampling starts, by image to video or not."""
SHARD = "2GB"
"""Of a file of weights, and so of what is in memory at a time."""
_SIZES = {True: (720, 1280), False: (480, 832)}
_COMPONENTS = {  # -> the file that says its class, and where
    "text_encoder": ("config.json", "architectures", "transformers"),
    "tokenizer": ("tokenizer_config.json", "tokenizer_class", "transformers"),
    "vae": ("config.json", "_class_name", "diffusers"),
}


def published_sla() -> TrainedSLA:
    """What TurboDiffusion's models were trained for; their files do not say it."""
    method = SLA(topk=0.1, block=(64, 64), linear_scope="all", feature_map="softmax")
    return TrainedSLA.of(method, ())


def convert_turbowan(
    source: str | Path,
    target: str | Path,
    *,
    low_noise: str | Path | None = None,
    base: str | Path | None = None,
    weights: str | None = None,
    ode: bool = False,
    link: bool = False,
) -> Path:
    """Write a TurboDiffusion checkpoint as a folder that `from_pretrained` of a Wan pipeline loads.

    Keys and shapes are checked before anything is written; `target` appears at the end, whole. In memory are at most
    2 GB of weights.

    Args:
        source: a file, the folder of a transformer, or that of a pipeline (which may have both stages); in the layout
            of TurboDiffusion, sglang, FastVideo or LightX2V. For Wan 2.2 the model for high noise.
        target: the new folder; must not exist.
        low_noise: the other model of Wan 2.2.
        base: folder or hub id of the Wan pipeline that has text encoder, tokenizer and autoencoder. None for `source`,
            where that has them, and for the published model of the same size, where it has one.
        weights: "net" or "net_ema", of a checkpoint of a training that has both.
        ode: let the sampler keep its noise; see `RCMScheduler`.
        link: link the components of the base instead of copying them.

    Raises:
        CheckpointError: a checkpoint that is not one whole model in one layout, or a stage that is missing.
        LayoutError: the base cannot be had.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: give a new folder, or delete it first.")
    stages = _stages(source, None if low_noise is None else Path(low_noise), weights)
    first = stages["transformer"]
    image = is_image_to_video(first)
    _check_stages(stages, image)
    components = _components(source, base, first, image)
    with beside(target) as draft:
        for part, checkpoint in stages.items():
            _write_transformer(checkpoint, draft / part)
        for name, folder in components.items():
            take(folder, draft / name, link)
        RCMScheduler(sigma_max=SIGMA_MAX[image], ode=ode).save_pretrained(draft / "scheduler")
        height, width = _SIZES["720" in source.name]
        defaults = {"frames": 81, "height": height, "width": width, "steps": 4, "guidance_scale": 1.0}
        write_json(draft / DEFAULTS_FILE, defaults)
        write_json(draft / "model_index.json", _model_index(stages, components, image))
    return target


def is_image_to_video(checkpoint: Checkpoint) -> bool:
    """Whether a model sees the latents of a picture, and a mask, beside those that it denoises.

    Raises:
        CheckpointError: it sees something else.
    """
    ins, outs = checkpoint.config["in_channels"], checkpoint.config["out_channels"]
    if ins not in (outs, 2 * outs + 4):
        raise CheckpointError(
            f"{checkpoint.where} takes {ins} channels and makes {outs}: text to video takes {outs}, image to video "
            f"{2 * outs + 4}."
        )
    return ins != outs


def _stages(source: Path, low_noise: Path | None, weights: str | None) -> dict[str, Checkpoint]:
    if (source / "transformer").is_dir():
        if low_noise is None and (source / "transformer_2").is_dir():
            low_noise = source / "transformer_2"
        source = source / "transformer"
    places = {"transformer": source, **({} if low_noise is None else {"transformer_2": low_noise})}
    if low_noise is not None and "low" in source.name and "high" in low_noise.name:
        raise CheckpointError(
            f"{source.name} is given for high noise, and {low_noise.name} for low noise: exchange them."
        )
    return {part: read_checkpoint(place, weights) for part, place in places.items()}


def _check_stages(stages: Mapping[str, Checkpoint], image: bool) -> None:
    first, second = stages["transformer"], stages.get("transformer_2")
    if image and second is None:
        raise CheckpointError(f"{first.where} is one of the two models of Wan 2.2 I2V: give the other as low_noise=.")
    if second is None:
        return
    if not image:
        raise CheckpointError(f"{first.where} makes videos of texts with one model: leave low_noise= out.")
    for key, value in first.config.items():
        if second.config[key] != value:
            raise CheckpointError(
                f"{second.where} has {key} {second.config[key]}, and {first.where} {value}: they are not of one model."
            )


def _components(source: Path, base: str | Path | None, first: Checkpoint, image: bool) -> dict[str, Path]:
    """The folders of what is no transformer."""
    dim = first.config["num_attention_heads"] * first.config["attention_head_dim"]
    if base is None and all((source / name / file[0]).is_file() for name, file in _COMPONENTS.items()):
        base = source
    if base is None:
        base = BASES.get((dim, image))
        if base is None:
            raise CheckpointError(
                f"{first.where} has the transformer alone, of no published size: give the Wan pipeline that has the "
                "rest with base=."
            )
        logger.warning("No base is given, so text encoder, tokenizer and autoencoder are those of %s.", base)
    folder = base_folder(base, list(_COMPONENTS), {})
    found = {name: folder / name for name in _COMPONENTS}
    missing = [name for name, (file, _, _) in _COMPONENTS.items() if not (folder / name / file).is_file()]
    if missing:
        raise CheckpointError(f"base {base} lacks {', '.join(missing)}: give a whole Wan pipeline.")
    own = {
        "vae": ("z_dim", "out_channels", "latent channels"),
        "text_encoder": ("d_model", "text_dim", "channels of text"),
    }
    for name, (theirs, ours, what) in own.items():
        value = read_json(found[name] / "config.json").get(theirs)
        if value != first.config[ours]:
            raise CheckpointError(
                f"base {base} has {value} {what} ({theirs}), and {first.where} needs {first.config[ours]}: give the "
                "Wan pipeline that it was made of."
            )
    return found


def _write_transformer(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    with torch.device("meta"):
        WanTransformer3DModel(**checkpoint.config).save_config(folder)
    write_config(folder, published_sla())
    plan = {
        name: torch.empty(shape, dtype=checkpoint.dtypes[name], device="meta")
        for name, shape in checkpoint.shapes.items()
    }
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    shards = split_torch_state_dict_into_shards(plan, filename_pattern=pattern, max_shard_size=SHARD)
    for file, names in shards.filename_to_tensors.items():
        _write_shard(checkpoint, names, folder / file)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / f"{WEIGHTS}.index.json", index)


def _write_shard(checkpoint: Checkpoint, names: Iterable[str], path: Path) -> None:
    """In a function of its own, so that the tensors of one file are gone before those of the next are made."""
    tensors = {name: checkpoint.tensor(name).contiguous() for name in names}
    save_file(tensors, path, metadata={"format": "pt"})


def _model_index(stages: Mapping[str, Checkpoint], components: Mapping[str, Path], image: bool) -> dict[str, Any]:
    classes: dict[str, Any] = {name: ["diffusers", WanTransformer3DModel.__name__] for name in stages}
    classes.setdefault("transformer_2", [None, None])
    for name, (file, key, library) in _COMPONENTS.items():
        stated = read_json(components[name] / file).get(key)
        classes[name] = [library, stated[0] if isinstance(stated, list) else stated]
    if image:
        classes |= {"image_encoder": [None, None], "image_processor": [None, None]}
    classes["scheduler"] = [RCMScheduler.__module__, RCMScheduler.__name__]
    return {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": __version__,
        "boundary_ratio": BOUNDARY if image else None,
        "expand_timesteps": False,
        **classes,
    }
