"""What the measurements of a `tune` are of: of something else they are not to be mixed with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.files.plain_content import object_in
from ...pipelines.files.run_folder import FILE
from ...pipelines.files.weight_files import (
    adapter_folder,
    add_samples,
    stated_config,
    transformer_file,
    transformer_files,
)
from ...pipelines.hooks.group_offloading import is_on_disk
from ..machine import environment, version_of
from ..models.schedulers import stated, stated_in_files

if TYPE_CHECKING:
    from ..job import Job

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")
NUMBERS = 64
"""Of each weight of a loaded pipeline that count, spread evenly over it."""


def identity_of(job: Job, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Name -> value, equal for what may share a journal.

    Args:
        job: the dense video of the first prompt. prompts, seeds: of all videos.
    """
    import torch

    size = job.settings
    told = environment(job.device)
    return {
        "model": job.facts.name,
        "pipeline": job.facts.pipeline_class,
        "transformer": hashlib.sha256(repr(sorted(job.facts.transformer.items())).encode()).hexdigest()[:16],
        "scheduler": stated_in_files(job.facts.location) if job.pipe is None else stated(job.pipe.scheduler),
        "size": [size.frames, size.height, size.width],
        "steps": size.steps,
        "guidance_scale": size.guidance_scale,
        "negative_prompt": size.negative_prompt,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "dtype": str(job.dtype),
        "offload": job.offload,
        "tiling": job.tiling,
        "device": told.get("GPU", told["CPU"]),
        "torch": torch.__version__,
        "vidaccel": told["vidaccel"],
        "packages": {name: version_of(name) for name in ("diffusers", "transformers", "triton", "torchao")},
        "weights": weights_in_files(job.facts.location) if job.pipe is None else weights_of_transformers(job.pipe),
        "other weights": others_in_files(job.facts.location) if job.pipe is None else weights_of_others(job.pipe),
    }


def weights_in_files(location: str) -> str:
    """A hash of some of each file of the transformers of a model by name or folder, which may be trained in place."""
    names = [name for name in ("transformer", "transformer_2") if stated_config(location, name) is not None]
    return " ".join(transformer_files(location, name) for name in names)


def others_in_files(location: str) -> str:
    """A hash of some of each file of the other parts: autoencoder, encoders of text and pictures, tokenizers.

    Of a model on the hub the revision, which its files are of.
    """
    folder = adapter_folder(location)
    if folder is None and not Path(location).is_dir():
        found = transformer_file(location, "model_index.json", "")
        return "" if found is None else found.parent.name
    digest = hashlib.sha256()
    for path in sorted(_files_of_parts(Path(location) if folder is None else folder)):
        digest.update(path.name.encode())
        add_samples(digest, path)
    if folder is not None:
        from ...pipelines.deep_compression.adapter_folder import base_location, read_facts

        digest.update(others_in_files(base_location(read_facts(folder)["base"])).encode())
    return digest.hexdigest()[:16]


def _files_of_parts(folder: Path) -> Iterator[Path]:
    """Those of a model's or an adapter's own parts: a README, checkpoints, or this very journal may lie beside them."""
    index = folder / "model_index.json"
    if index.is_file():
        own = [index]
        parts = [name for name, entry in object_in(index).items() if isinstance(entry, list)]
    else:
        own = [file for file in (folder / "adapter.json", folder / FILE) if file.is_file()]
        parts = [each.name for each in folder.iterdir() if (each / "config.json").is_file()]
    yield from own
    for part in parts:
        if not part.startswith("transformer") and part != "scheduler":
            yield from (path for path in (folder / part).rglob("*") if path.suffix in SUFFIXES and path.is_file())


def weights_of_transformers(pipe: Any) -> str:
    """A hash of some of each weight of a loaded pipeline's transformers, LoRAs among them, and of how strong these are:
    its name does not tell them."""
    from ...pipelines.acceleration.families import find_transformers

    digest = hashlib.sha256()
    for transformer, _family in find_transformers(pipe).values():
        _add(digest, transformer)
        strengths = {path: part.scaling for path, part in transformer.named_modules() if hasattr(part, "lora_A")}
        digest.update(repr(sorted((path, sorted(value.items())) for path, value in strengths.items())).encode())
    return digest.hexdigest()[:16]


def weights_of_others(pipe: Any) -> str:
    """The same of its other parts: autoencoder, encoders of text and pictures."""
    import torch

    from ...pipelines.acceleration.families import find_transformers

    transformers = find_transformers(pipe)
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module) and name not in transformers:
            digest.update(name.encode())
            _add(digest, part)
            config = getattr(part, "config", None)  # of an autoencoder: how its latents are scaled
            if isinstance(config, dict):
                digest.update(repr(sorted((k, v) for k, v in config.items() if k[0] != "_")).encode())
    return digest.hexdigest()[:16]


def _add(digest: Any, module: Any) -> None:
    """Take some numbers of each weight of a module, and of the buffers that belong to it.

    Of one that diffusers has offloaded to a disk, the shapes alone: what lies in memory in their place is anything.
    """
    on_disk = any(map(is_on_disk, module.modules()))
    for path, part in module.named_modules():
        lasting = {name for name in part._buffers if name not in part._non_persistent_buffers_set}
        there = {**part._parameters, **{name: part._buffers[name] for name in lasting}}
        elsewhere = getattr(getattr(part, "_hf_hook", None), "weights_map", None)  # offloaded one by one
        for name, weight in there.items():
            if weight is None:
                continue
            if weight.is_meta and elsewhere is not None:
                weight = elsewhere[name]
            digest.update(repr((path, name, tuple(weight.shape), [] if on_disk else _some(weight))).encode())


def _some(weight: Any) -> list[Any]:
    """Some numbers of a weight, without a copy of it; of one in few bits, those of what it consists of."""
    import torch

    if hasattr(weight, "__tensor_flatten__"):
        return [_some(getattr(weight, name)) for name in weight.__tensor_flatten__()[0]]
    if weight.is_meta or not weight.numel():
        return []
    places = torch.linspace(0, weight.numel() - 1, min(NUMBERS, weight.numel()), dtype=torch.float64).round().long()
    at = torch.unravel_index(places.to(weight.device), weight.shape)
    return weight.detach()[at].float().tolist()
