"""A row of somebody's own: it serves a model that diffusers has not, and mistakes in it are named."""

from __future__ import annotations

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from vidaccel import DenseSchedule, VideoLayout, accelerate
from vidaccel.attention import RandomBlocks
from vidaccel.pipelines import FAMILIES, Family, find_transformers
from vidaccel.pipelines.acceleration.layouts import video_alone
from vidaccel.pipelines.acceleration.support import support_rows, unshared_sequence

SITES = ("blocks.*.attn1",)


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, heads=2, dim_head=width // 2)
        self.feed = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(x)
        return x + self.feed(x)


class MyVideoTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_attention_heads: int = 2, attention_head_dim: int = 16, patch_size: int = 2) -> None:
        super().__init__()
        self.enter = torch.nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.blocks = torch.nn.ModuleList([Block(32), Block(32)])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model(monkeypatch) -> MyVideoTransformer:
    before = list(FAMILIES)
    yield MyVideoTransformer().eval()
    FAMILIES[:] = before


def served(model: MyVideoTransformer, **fields):
    """One step, sparse, with a row that is appended for it."""
    row = {"name": "Mine", "transformers": ("MyVideoTransformer",), "pipelines": (), "layout": video_alone}
    FAMILIES.append(Family(**row | {"sites": SITES} | fields))
    with accelerate(model, RandomBlocks(density=0.5), schedule=DenseSchedule()) as handle, torch.no_grad():
        model(torch.randn(1, 4, 5, 16, 16), torch.tensor([999.0]))
    return handle.report()


def test_it_is_served(model):
    with pytest.raises(TypeError, match=r"MyVideoTransformer.*vidaccel\.pipelines\.FAMILIES\.append\(Family"):
        find_transformers(model)
    report = served(model)
    assert [record.layer for record in report.records] == [0, 1] and report.mean_density() < 0.7
    assert support_rows()[-1]["several GPUs"] == "no" and unshared_sequence("", "MyVideoTransformer")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"transformers": "MyVideoTransformer"},
            r"\.transformers is 'MyVideoTransformer': it must be a tuple of texts",
        ),
        ({"sites": ()}, r"\.sites is \(\): it must have at least one"),
        ({"branches": ()}, r"\.branches is \(\): it must have at least one"),
        ({"sites": ("blocks.0.attn1",)}, r"\.sites is .*: 'blocks\.0\.attn1' needs one \"\*\" for the number"),
        ({"layout": None}, r"\.layout is None: it must be a function"),
    ],
)
def test_a_row_that_cannot_be(model, fields, message):
    with pytest.raises(ValueError, match=r"^Family\('Mine'\)" + message):
        served(model, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ("blocks.*.attnX",)}, r"sites has 'blocks\.\*\.attnX', but .*attnX"),
        ({"sites": ("bloks.*.attn1",)}, r"sites has 'bloks\.\*\.attn1', but .*bloks"),
        ({"sites": ("blocks.*.feed",)}, r"sites is .*, but blocks\.0\.feed has no processor"),
        ({"sites": ("enter.*.attn1",)}, r"sites is .*, but it has no such blocks"),
        ({"left_out": "nope"}, r"left_out names the setting 'nope', but its config has none"),
        ({"feeds": {"blocks": "nope"}}, r"feeds names the setting 'nope', but its config has none"),
    ],
)
def test_a_row_that_does_not_fit(model, fields, message):
    with pytest.raises(TypeError, match=r"^Family\('Mine'\) does not fit MyVideoTransformer: " + message):
        served(model, **fields)


@pytest.mark.parametrize("found", [VideoLayout(5, 8, 8), None, (), "", (1,)])
def test_a_layout_is_one_or_a_reason(model, found):
    with pytest.raises(TypeError, match=r"^the layout of Family\('Mine'\) returned .*: it must return a tuple"):
        served(model, layout=lambda transformer, given: found)
