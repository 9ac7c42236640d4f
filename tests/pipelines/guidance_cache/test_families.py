"""Second passes left out of every family's pipelines: what stands for them is what the rule says."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import cogvideo
from fast_set import fast
from no_torchvision import without_torchvision
from torch.utils._pytree import tree_map

import vidaccel
from vidaccel.pipelines import find_transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "acceleration"))
from test_family_pipelines import ALL, CASES, ONE, THREE, TWO, built, latents

GUIDED = [case for case in CASES if case.branches != ONE and case.steps == (4,)]
# With a pass for each branch, that of a guider, a batch, a batch whose samples have texts of their own, and one beside
# other passes, with sound.
FAST = [
    next(case for case in GUIDED if case.runs == name)
    for name in ("WanPipeline", "HunyuanVideo15Pipeline", "CogVideoXPipeline", "MochiPipeline", "LTX2Pipeline")
]
WITHOUT = {"AnyFlowPipeline": {"guidance_scale": 4.0}}  # it is distilled, and guides where it is asked to alone
LEFT_OUT = 2
"""The step of four that makes one pass, with two in the first steps and one in two then."""


@pytest.fixture(autouse=True)
def _without_packages(monkeypatch):
    without_torchvision(monkeypatch)
    cogvideo.without_opencv(monkeypatch)


def by_hand(module: torch.nn.Module, branches: tuple[str, ...]) -> Callable[..., Any]:
    """A forward pass that computes everything, and gives what the rule says where a second pass would be left out."""
    forward, number = module.forward, itertools.count()
    firsts: list[Any] = []
    differences: list[list[torch.Tensor]] = []

    def extrapolated(first: Any) -> Iterator[torch.Tensor]:
        older, newer = differences
        return iter([x - (b + 0.5 * (b - a)) for x, a, b in zip(first, older, newer, strict=True)])

    def leaves(made: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        tree_map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else x, made)
        return found

    def in_passes(*args: Any, **kwargs: Any) -> Any:
        step, second = divmod(next(number), 2)
        made = forward(*args, **kwargs)
        if not second:
            firsts.append(leaves(made))
        elif step < LEFT_OUT:
            differences.append([a - b for a, b in zip(firsts[-1], leaves(made), strict=True)])
        elif step == LEFT_OUT:
            stand_ins = extrapolated(firsts[-1])
            return tree_map(lambda x: next(stand_ins) if isinstance(x, torch.Tensor) else x, made)
        return made

    def in_a_batch(*args: Any, **kwargs: Any) -> Any:
        step, which = divmod(next(number), len(branches))
        made = forward(*args, **kwargs)
        if which:
            return made
        halves = [x.chunk(2) for x in leaves(made)]
        if step < LEFT_OUT:
            differences.append([positive - negative for negative, positive in halves])
        elif step == LEFT_OUT:
            stand_ins = extrapolated([positive for _, positive in halves])
            joined = iter([torch.cat([next(stand_ins), positive]) for _, positive in halves])
            return tree_map(lambda x: next(joined) if isinstance(x, torch.Tensor) else x, made)
        return made

    return in_passes if branches == TWO else in_a_batch


@pytest.mark.parametrize("case", fast(FAST, GUIDED), ids=str)
def test_what_stands_for_a_pass_is_what_the_rule_says(case, monkeypatch):
    pipe = built(case)

    def run(size: int = 0) -> torch.Tensor:
        return latents(pipe, case, case.sizes[size], **WITHOUT.get(case.runs, {}))

    plain = run()
    ((module, _),) = find_transformers(pipe).values()
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", by_hand(module, case.branches))
        wanted = run()
    with vidaccel.guidance_cache(pipe, 2, first_steps=0) as handle:
        made, notes = run(), handle.notes()
        other = run(1)
        again = run()
    # In a batch of one sample products are added up in another order than in one of two.
    torch.testing.assert_close(made, wanted, atol=2e-4, rtol=1e-4)
    assert (made - plain).abs().max() > 10 * (made - wanted).abs().max()
    assert notes == ["guidance cache: the transformer made 3 of 4 second passes of guidance"]
    assert made.equal(again) and not made.equal(plain)
    assert run().equal(plain)
    if case.sizes[1] != case.sizes[0]:
        assert other.shape != made.shape


def test_there_are_families_of_both_kinds():
    assert {case.branches for case in GUIDED} == {TWO, ALL, THREE}
