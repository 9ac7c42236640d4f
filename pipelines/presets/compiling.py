"""The repeated blocks of a transformer compiled by torch, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...attention import code_generator
from ..acceleration.checks import places_of
from ..acceleration.families import Family
from ..guidance_branches import is_compiled_whole
from ..hooks.group_offloading import is_in_group
from .errors import PresetError
from .levers import Compile

VERSIONS = 64
"""Of one block's code, for shapes, dtypes and methods. torch has a limit of 8, and what it does then is to run further
ones as they are, without a word."""


class CompiledBlocks:
    """The blocks of one transformer; each is compiled when it is first called. Made by `compile_blocks`.

    Args:
        blocks: to be compiled.
        how: in which way.
        below_hooks: their `forward` alone, for hooks of diffusers' caches that come after this: a hook decides by data,
            and compiled with its block it would break the graph, or end it (MagCache's). Not of a block that has a
            hook already.
    """

    def __init__(self, blocks: list[torch.nn.Module], how: Compile, below_hooks: bool) -> None:
        options: dict[str, Any] = {"mode": how.mode, "dynamic": how.dynamic}
        self._made = blocks, how, below_hooks
        self._before: list[tuple[torch.nn.Module, str, Any]] = []
        for block in blocks:
            own = block.__dict__.get("forward")
            # Diffusers puts the method itself there when it takes a hook off.
            hooked = own is not None and getattr(own, "__func__", None) is not type(block).forward
            name = "forward" if below_hooks and not hooked else "_compiled_call_impl"
            self._before.append((block, name, block.__dict__.get(name)))
            if name == "forward":
                compiled = torch.compile(block.forward, **options)
            else:
                block.compile(**options)
                compiled = block._compiled_call_impl
            setattr(block, name, _of_many_versions(compiled))

    def remove(self) -> None:
        """Leave the blocks as they were. A second call does nothing."""
        for block, name, before in self._before:
            if before is None:
                delattr(block, name)
            else:
                setattr(block, name, before)
        self._before = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledBlocks:
        # torch leaves out of the copy of a module that it is compiled. (Beside caches, whose hooks cannot be copied,
        # a copy is refused.)
        blocks, how, below_hooks = self._made
        return CompiledBlocks(copy.deepcopy(blocks, memo), how, below_hooks)


def _of_many_versions(compiled: Callable[..., Any]) -> Callable[..., Any]:
    return torch._dynamo.config.patch(recompile_limit=VERSIONS)(compiled)


def graphs_made() -> int:
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["frames"]["ok"]


def blocks_of(transformer: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    """The blocks that a transformer repeats: those that diffusers names, and those with attention over the video.

    Args:
        transformer: without what wraps it. family: of it.
    """
    named = getattr(transformer, "_repeated_blocks", None) or ()
    found = [module for module in transformer.modules() if type(module).__name__ in named]
    inside = {part for block in found for part in block.modules()}
    paths = dict.fromkeys(_block_path(site) for site in family.modules(transformer))
    return found + [block for path in paths if (block := transformer.get_submodule(path)) not in inside]


def _block_path(site: str) -> str:
    """ "blocks.3" of "blocks.3.attn1": as far as the first number."""
    parts = site.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdecimal()) + 1])


def compile_blocks(transformer: Any, family: Family, how: Compile, below_hooks: bool) -> CompiledBlocks:
    """Have the blocks of a transformer that `check_compile` let through compiled; see `CompiledBlocks`."""
    return CompiledBlocks(blocks_of(transformer, family), how, below_hooks)


def check_compile(pipe: Any, part: str, transformer: Any, family: Family) -> None:
    """Raise PresetError where the blocks of a transformer cannot be compiled.

    Args:
        pipe: that has it. part: name of it there. transformer: without what wraps it. family: of it.
    """
    device = getattr(pipe, "_execution_device", None) or places_of(transformer)[-1]
    if why := code_generator.missing(device):
        raise PresetError("compile", f"torch's compiler {why}", "Leave it out.")
    blocks = blocks_of(transformer, family)
    if is_compiled_whole(pipe, part, transformer) or _is_compiled(transformer.__dict__.get("forward")):
        raise PresetError("compile", f"the {part} was compiled as a whole", "Leave compile out: it stays so.")
    wrapped = any(isinstance(module, torch._dynamo.eval_frame.OptimizedModule) for module in transformer.modules())
    if wrapped or any(
        block._compiled_call_impl is not None or _is_compiled(block.__dict__.get("forward")) for block in blocks
    ):
        raise PresetError("compile", f"blocks of the {part} are compiled already", "Leave compile out: they stay so.")
    if any(is_in_group(module) or hasattr(module, "_hf_hook") for block in blocks for module in block.modules()):
        problem = f"the blocks of the {part} are offloaded one by one, by hooks that would break their graphs"
        raise PresetError("compile", problem, "Offload whole parts (enable_model_cpu_offload), or leave it out.")


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")
