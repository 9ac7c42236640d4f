"""How many heads the self-attention of a transformer has, and of which size, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def usual(config: Config) -> tuple[int, int]:
    """Under the names that most models have; raises a `KeyError` where they are missing."""
    return config["num_attention_heads"], config["attention_head_dim"]


def cosmos_3(config: Config) -> tuple[int, int]:
    """Of the queries: keys have fewer heads."""
    return config["num_attention_heads"], config["head_dim"]


def kandinsky(config: Config) -> tuple[int, int]:
    """The axes of the rotary embedding fill a head."""
    size = sum(config.get("axes_dims", (16, 24, 24)))
    return config["model_dim"] // size, size
