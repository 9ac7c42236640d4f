"""diffusers' perturbed attention beside sparse attention: it replaces `scaled_dot_product_attention` in a block's call.

Its hooks look attention processors up by their exact class, and diffusers 0.42 refuses Wan's own: it knows an alias
only. So there is nothing to take over when a processor is replaced; who registers Wan's processor and applies the
hooks before `accelerate` gets what they do to dense attention.
"""

from __future__ import annotations

import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode


def scores_are_skipped() -> bool:
    """Whether perturbed attention guidance is at work here: values then pass through, which dense calls know about."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(
        isinstance(m, AttentionScoreSkipFunctionMode) for m in torch.overrides._get_current_function_mode_stack()
    )
