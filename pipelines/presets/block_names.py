"""Blocks that call their states otherwise than `hidden_states`, for hooks of caches that ask for that name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata

from ..hooks.diffusers_hooks import hooks_of


class _ByOwnNames(TransformerBlockMetadata):
    """Finds the states of a block by the block's own names for them.

    diffusers 0.42 registers these names (Kandinsky 5: `visual_embed`, Cosmos 3: `gen_seq`, `und_seq`), and its first
    block cache, and MagCache for text, ask for the usual ones all the same.
    """

    def _get_parameter_from_args_kwargs(self, identifier: str, args: tuple = (), kwargs: Any = None) -> Any:
        own = {
            "hidden_states": self.hidden_states_argument_name,
            "encoder_hidden_states": self.encoder_hidden_states_argument_name,
        }
        return super()._get_parameter_from_args_kwargs(own.get(identifier, identifier), args, kwargs)


def use_own_names(transformer: torch.nn.Module) -> None:
    """Have the hooks of a cache in a transformer find the states of blocks that have other names for them.

    What is registered for the classes stays as it is: it is changed in these hooks alone, and goes with them.
    """
    for module in transformer.modules():
        for hook in hooks_of(module).values():
            known = getattr(hook, "_metadata", None)
            if isinstance(known, TransformerBlockMetadata):
                hook._metadata = _ByOwnNames(**{field.name: getattr(known, field.name) for field in fields(known)})
