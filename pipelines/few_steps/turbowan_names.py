"""What TurboDiffusion's Wan checkpoints call their parameters, in each of the layouts in which they are found.

The rest of a model has one of three sets of names (`wan_names.NAMINGS`), and the projection of its sparse-linear
attention one of four places (`PROJECTIONS`). Our own names are those of `WanTransformer3DModel`, with `proj_l` in
`attn1`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...autoencoders.checkpoint_file import CheckpointError
from .wan_names import BLOCK, NAMINGS, renamed

PROJECTIONS = {
    "original": "self_attn.attn_op.local_attn.proj_l",
    "LightX2V": "self_attn.proj_l",
    "sglang": "attn1.attn_op.local_attn.proj_l",
    "FastVideo": "attn1.attn_impl.proj_l",
}
OWN_PROJECTION = "attn1.proj_l"
WRAPPER = "_checkpoint_wrapped_module."
"""Stands in names where activations were checkpointed when the file was saved."""

_PUBLISHED_DEPTHS = {1536: 30, 5120: 40}
"""Width of a published model -> its blocks."""


def clean(name: str) -> str:
    """A name without what says nothing: the wrapper, and FastVideo's module round the convolution."""
    return name.replace(WRAPPER, "").replace("patch_embedding.proj.", "patch_embedding.")


def naming_of(names: Iterable[str], where: str) -> str:
    """Which of `NAMINGS` a checkpoint has.

    Raises:
        CheckpointError: none, or several.
    """
    names = set(names)
    marker = "condition_embedder.text_embedder.linear_1"
    found = [naming for naming in NAMINGS if renamed(f"{marker}.weight", naming) in names]
    if not found:
        raise CheckpointError(
            f"{where} is no checkpoint of a Wan model: it has no text_embedding.0.weight (nor what that is called in "
            f"diffusers or FastVideo). Its keys begin with {', '.join(sorted(names)[:3]) or 'nothing'}."
        )
    if len(found) > 1:
        raise CheckpointError(f"{where} mixes the names of {' and '.join(found)}: give a file in one layout.")
    return found[0]


def projection_of(names: Iterable[str], where: str) -> str:
    """In which of `PROJECTIONS` a checkpoint has its projections.

    Raises:
        CheckpointError: in none, in several, or somewhere else.
    """
    found: dict[str, str] = {}
    for name in names:
        match = BLOCK.fullmatch(name)
        if "proj_l." not in name:
            continue
        place = match[2].rpartition(".")[0] if match else ""
        layout = next((layout for layout, known in PROJECTIONS.items() if known == place), None)
        if layout is None:
            raise CheckpointError(
                f"{where} has the key {name}, and proj_l is known as blocks.N. and one of "
                f"{', '.join(PROJECTIONS.values())}."
            )
        found.setdefault(layout, name)
    if not found:
        raise CheckpointError(
            f"{where} has no proj_l, the trained part of TurboDiffusion's attention. Early merged files lack it, and "
            "so do models that were distilled without sparse attention: download the file anew."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{where} mixes layouts: {' and '.join(f'{name} ({layout})' for layout, name in found.items())}. Give a "
            "file in one of them."
        )
    return next(iter(found))


def published_name(own: str, naming: str, projection: str) -> str:
    """What a parameter of ours is called in a checkpoint."""
    block = BLOCK.fullmatch(own)
    if block is not None and block[2].startswith(f"{OWN_PROJECTION}."):
        return f"blocks.{block[1]}.{PROJECTIONS[projection]}{block[2].removeprefix(OWN_PROJECTION)}"
    return renamed(own, naming)


def infer_config(shapes: Mapping[str, Sequence[int]], naming: str, projection: str, where: str) -> dict[str, Any]:
    """The arguments of `WanTransformer3DModel` for a checkpoint, from the shapes of its parameters.

    Raises:
        CheckpointError: a key that tells one is missing or has another rank, or blocks are missing at the end.
    """

    def shape(own: str, *ranks: int) -> Sequence[int]:
        name = published_name(own, naming, projection)
        if name not in shapes:
            raise CheckpointError(f"{where} lacks {name}: it was not written as a whole.")
        if len(shapes[name]) not in ranks:
            raise CheckpointError(f"{name} is {list(shapes[name])} in {where}: this is no TurboDiffusion model.")
        return shapes[name]

    first = shape("patch_embedding.weight", 2, 5)
    dim, head = first[0], shape(f"blocks.0.{OWN_PROJECTION}.weight", 2)[0]
    if dim % head:
        raise CheckpointError(f"{where} is {dim} wide, which heads of {head} (by proj_l) do not divide.")
    blocks = {int(match[1]) for match in map(BLOCK.fullmatch, shapes) if match}
    depth = 1 + max(blocks)
    if len(blocks) < depth:
        absent = next(block for block in range(depth) if block not in blocks)
        raise CheckpointError(
            f"{where} has blocks.{depth - 1} and lacks blocks.{absent}: it was not written as a whole."
        )
    if depth != _PUBLISHED_DEPTHS.get(dim, depth):
        raise CheckpointError(
            f"{where} has {depth} blocks, and the published model of width {dim} has {_PUBLISHED_DEPTHS[dim]}: it was "
            "not written as a whole."
        )
    return {
        "num_attention_heads": dim // head,
        "attention_head_dim": head,
        "num_layers": depth,
        "in_channels": first[1] if len(first) == 5 else first[1] // 4,
        "out_channels": shape("proj_out.bias", 1)[0] // 4,
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.bias", 1)[0],
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
    }
