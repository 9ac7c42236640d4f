"""diffusers' own hooks (layer skip, perturbed attention) beside sparse attention.

They look attention processors up by their exact class, and replace `scaled_dot_product_attention` in a block's call.
"""

from __future__ import annotations

import weakref

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

# diffusers' registry is one for the process, so who needs an entry is known for the process too.
_users: dict[type, weakref.WeakSet[object]] = {}


def register_like(own: type, replaced: type, user: object) -> None:
    """Make diffusers' hooks treat a processor as they do the one it replaces, if they know that one.

    Args:
        own, replaced: classes of the processors.
        user: who needs this until `unregister`; held weakly.
    """
    AttentionProcessorRegistry._register()
    known = AttentionProcessorRegistry._registry
    if replaced not in known or (own in known and own not in _users):
        return
    known[own] = known[replaced]
    _users.setdefault(own, weakref.WeakSet()).add(user)


def unregister(user: object) -> None:
    """Undo all that was registered for a user; the last one takes the entry away."""
    for own, users in list(_users.items()):
        users.discard(user)
        if not users:
            del _users[own]
            AttentionProcessorRegistry._registry.pop(own, None)


def scores_are_skipped() -> bool:
    """Whether perturbed attention guidance is at work here: values then pass through, which dense calls know about."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(
        isinstance(m, AttentionScoreSkipFunctionMode) for m in torch.overrides._get_current_function_mode_stack()
    )
