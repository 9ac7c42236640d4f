"""A method that is not of the package: what is asked of it, and what is told where it is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from vidaccel import SVG, BlockPlan, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import Method, StepInfo, resolve_method

LAYOUT = VideoLayout(3, 4, 4)
N = LAYOUT.tokens


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    name: ClassVar[str] = "own"
    reach: int = 1

    def plan(self, q, k, v, layout, memory):
        return BlockPlan.dense(layout.tokens, layout.tokens)


def of(plan) -> Method:
    """A method whose plan is what a function makes."""

    @dataclass(frozen=True, kw_only=True)
    class Wrong(Own):
        def plan(self, *given):
            return plan()

    return Wrong()


def run(method: Method | str, layer: int = 0, **options) -> SparseAttention:
    engine = SparseAttention(method, **{"num_layers": 2, "schedule": DenseSchedule(), **options})
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    engine(*torch.randn(3, 1, 2, N, 16), layer)
    return engine


def tiles(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32).view(1, 1, -1)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (lambda: None, TypeError, r"Wrong\.plan returned None: it must return a BlockPlan"),
        (
            lambda: BlockPlan(N, N, tiles(0), tiles(N), tiles(0, 0)[:, :, None], tiles(N, N)[:, :, None]),
            ValueError,
            r"Wrong\.plan, for .*: two runs of one tile of this BlockPlan overlap",
        ),
        (
            lambda: BlockPlan(N, N, tiles(0), tiles(N), tiles(0)[..., None], tiles(N + 5)[..., None]),
            ValueError,
            rf"Wrong\.plan, for .*: a run of this BlockPlan leaves the {N} keys",
        ),
        (
            lambda: BlockPlan(N, N, tiles(0), tiles(N // 2), tiles(0)[..., None], tiles(N)[..., None]),
            ValueError,
            r"Wrong\.plan, for .*: the tiles of this BlockPlan do not cover each query exactly once",
        ),
    ],
)
def test_a_plan_that_breaks_its_promises_is_refused(plan, error, message):
    with pytest.raises(error, match=message):
        run(of(plan))


def test_plans_are_looked_at_once_a_layout_and_those_of_the_package_never(monkeypatch):
    looked = []
    monkeypatch.setattr(BlockPlan, "validate", lambda plan: looked.append(plan))
    engine = run(Own())
    engine(*torch.randn(3, 1, 2, N, 16), 1)
    assert len(looked) == 1
    run(SVG(density=0.5))
    assert len(looked) == 1


def test_a_name_and_a_schedule_are_asked_for():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Method):
        def plan(self, *given): ...

    @dataclass(frozen=True, kw_only=True)
    class Dense(Own):
        name: ClassVar[str] = "dense"

    with pytest.raises(TypeError, match=r'^Nameless has no name: write name: ClassVar\[str\] = "my-method" in it\.$'):
        resolve_method(Nameless())
    with pytest.raises(TypeError, match="Dense has the name 'dense', which stands for attention to all"):
        resolve_method(Dense())
    for method in (Own(schedule=None), SVG(schedule={"first_steps": 1})):
        with pytest.raises(TypeError, match=r"schedule is .*: give a DenseSchedule"):
            resolve_method(method)


def test_it_needs_no_setting_density():
    with pytest.raises(
        ValueError, match=r"^Own has no density, it has schedule, reach: give these and not density 0\.3"
    ):
        Own.for_density(LAYOUT, 0.3)


@pytest.mark.parametrize("wrong", [0, "3", True, 1.0])
def test_the_number_of_layers_is_a_count(wrong):
    with pytest.raises(ValueError, match=r"num_layers is .*: it must be a whole number of blocks, 1 or more"):
        run("svg", num_layers=wrong)


def test_layers_are_counted_from_0():
    with pytest.raises(ValueError, match=r"layer is -1: blocks are counted from 0"):
        run("svg", -1)


def test_a_schedule_of_an_engine_is_one():
    with pytest.raises(TypeError, match=r"schedule is 0\.2: give a DenseSchedule"):
        run("svg", schedule=0.2)


def test_a_report_of_its_facts_is_strict_json():
    facts = {"array": np.arange(2), "number": np.float32(0.5), "nan": float("nan"), "device": torch.device("cpu")}
    report = run(of(lambda: BlockPlan.dense(N, N).with_details(tensor=torch.ones(2), **facts))).report()
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["version"] == 1 and told["config"]["schedule"]["first_steps"] == 0
    details = told["records"][0]["details"]
    assert details == {"tensor": [1, 1], "array": [0, 1], "number": 0.5, "nan": None, "device": "cpu"}


def test_a_report_is_nobodys_but_the_readers():
    engine = run(Own())
    engine.report().records[0].details["mine"] = object()
    assert not engine.report().records[0].details
