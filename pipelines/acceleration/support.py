"""What is served of each family of models, as a table; and which models several processes can share."""

from __future__ import annotations

import diffusers

from .families import FAMILIES, Family
from .ulysses import shares_sequences


def support_rows() -> list[dict[str, str]]:
    """The table of families, for the command line and the docs."""
    return [
        {
            "family": family.name,
            "diffusers pipelines": ", ".join(family.pipelines) or "none yet: its transformer alone",
            "transformer": ", ".join(family.transformers),
            "stays dense": family.stays_dense or "nothing",
            "several GPUs": _several_gpus(family),
        }
        for family in FAMILIES
    ]


# What diffusers 0.42.1 itself gets wrong when these share a sequence, with sparse attention or without.
_SHARING_FAULTS = {
    "LTX-Video": "not with a text mask, which its pipelines give",
    "LTX-2": "no: its plan leaves out a rotary embedding",
    "Helios": "not with amplified history",
}


def _several_gpus(family: Family) -> str:
    """Whether processes can share a sequence, as diffusers' classes say."""
    classes = {name: getattr(diffusers, name, None) for name in family.transformers}
    able = [name for name, cls in classes.items() if shares_sequences(cls)]
    if not able:
        return "no"
    if family.name in _SHARING_FAULTS:
        return _SHARING_FAULTS[family.name]
    return "yes" if len(able) == len(classes) else f"yes: {', '.join(able)}"


def unshared_sequence(pipeline: str, transformer: str) -> str:
    """Why processes cannot share the sequence of a model with diffusers; "" where they can.

    Args:
        pipeline: class of the pipeline. transformer: class of its transformer; "" where that is not known.
    """
    family = next((f for f in FAMILIES if transformer in f.transformers or pipeline in f.pipelines), None)
    if family is None or not shares_sequences(getattr(diffusers, transformer or family.transformers[0], None)):
        return f"diffusers cannot share the sequence of a {transformer or pipeline}"
    why = _SHARING_FAULTS.get(family.name)
    return f"diffusers cannot share the sequence of {family.name}: {why}" if why else ""
