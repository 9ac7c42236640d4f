"""The repeated blocks of a transformer compiled by torch, and back."""

from __future__ import annotations

from typing import Any

import torch

from ...attention import code_generator
from ..acceleration.checks import places_of
from ..acceleration.families import Family
from ..group_offloading import is_in_group
from ..guidance_branches import is_compiled_whole
from .errors import PresetError
from .levers import Compile


class CompiledBlocks:
    """The blocks of one transformer; each is compiled when it is first called. Made by `compile_blocks`.

    Args:
        blocks: to be compiled.
        how: in which way.
        below_hooks: their `forward` alone, for hooks of diffusers' caches that come after this: a hook decides by data,
            and compiled with its block it would break the graph, or end it (MagCache's).
    """

    def __init__(self, blocks: list[torch.nn.Module], how: Compile, below_hooks: bool) -> None:
        options: dict[str, Any] = {"mode": how.mode, "dynamic": how.dynamic}
        self._blocks, self._below_hooks = blocks, below_hooks
        for block in blocks:
            if below_hooks:
                block.forward = torch.compile(block.forward, **options)
            else:
                block.compile(**options)

    def remove(self) -> None:
        """Leave the blocks as they were. A second call does nothing."""
        for block in self._blocks:
            if self._below_hooks:
                block.__dict__.pop("forward", None)
            else:
                block._compiled_call_impl = None
        self._blocks = []


def blocks_of(transformer: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    """The blocks that a transformer repeats: those that diffusers names, else those with attention over the video.

    Args:
        transformer: without what wraps it. family: of it.
    """
    named = getattr(transformer, "_repeated_blocks", None)
    if named:
        return [module for module in transformer.modules() if type(module).__name__ in named]
    paths = dict.fromkeys(block_path(site) for site in family.modules(transformer))
    return [transformer.get_submodule(path) for path in paths]


def block_path(site: str) -> str:
    """ "blocks.3" of "blocks.3.attn1": as far as the first number."""
    parts = site.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdecimal()) + 1])


def compile_blocks(transformer: Any, family: Family, how: Compile, below_hooks: bool) -> CompiledBlocks:
    """Have the blocks of a transformer that `check_compile` let through compiled; see `CompiledBlocks`."""
    return CompiledBlocks(blocks_of(transformer, family), how, below_hooks)


def check_compile(pipe: Any, part: str, transformer: Any, family: Family, how: Compile) -> None:
    """Raise PresetError where the blocks of a transformer cannot be compiled.

    Args:
        pipe: that has it. part: name of it there. transformer: without what wraps it. family: of it.
        how: in which way.
    """

    def refuse(problem: str, fix: str) -> PresetError:
        return PresetError("compile", problem, fix, how.mode)

    device = places_of(transformer)[-1]  # offloaded weights lie on the CPU between calls
    if why := code_generator.missing(device):
        raise refuse(f"torch's compiler {why}", "Leave compile out.")
    blocks = blocks_of(transformer, family)
    if is_compiled_whole(pipe, part, transformer):
        raise refuse(f"the {part} was compiled as a whole", "Leave compile out, or load the pipeline anew.")
    if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        raise refuse(f"the blocks of the {part} are compiled already", "Leave compile out.")
    if any(is_in_group(module) or hasattr(module, "_hf_hook") for block in blocks for module in block.modules()):
        problem = f"the blocks of the {part} are offloaded one by one, by hooks that would break their graphs"
        raise refuse(problem, "Offload whole parts (enable_model_cpu_offload), or leave compile out.")
