"""What several processes share of a request, as it is known before weights are read."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from vidaccel import GuidanceCache, Preset
from vidaccel.generation import crew
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.processes import Process, Sharing, check_count, share_out
from vidaccel.generation.requests.settings import Settings
from vidaccel.pipelines.presets import Cache, Compile

WAN = inspect_model("demo")
WIDE = replace(WAN, transformer={**WAN.transformer, "num_attention_heads": 12})


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def shared(count, wanted="auto", facts=WIDE, *, one_pass=False, beside=None, device=CPU, **settings) -> Sharing:
    checked = Settings("a dot", **settings).sized(facts)
    return share_out(count, wanted, facts, checked, checked.layout(facts), one_pass, beside, device)


def other(pipeline: str, transformer: str):
    """The facts of a model of another class, as far as they count here."""
    row = SimpleNamespace(heads=lambda config: (12, 64))
    return SimpleNamespace(
        pipeline_class=pipeline,
        transformer={"_class_name": transformer},
        row=row,
        name=pipeline,
        most_steps=None,
    )


def out_of(count, wanted, facts) -> Sharing:
    layout = WAN.layout(33, 128, 128)
    return share_out(count, wanted, facts, Settings("a dot", guidance_scale=5.0), layout, False, None, CPU)


@pytest.mark.parametrize(
    ("count", "wanted", "more", "made"),
    [
        (1, "auto", {}, Sharing(1, 1)),
        (2, "auto", {}, Sharing(2, 1)),
        (3, "auto", {}, Sharing(1, 3)),
        (4, "auto", {}, Sharing(2, 2)),
        (2, "sequence", {}, Sharing(1, 2)),
        (4, "sequence", {}, Sharing(1, 4)),
        (2, "sequence", {"facts": WAN}, Sharing(1, 2, anything=True)),  # 3 heads
        (8, "both", {}, Sharing(2, 4)),
        (2, "sequence", {"facts": inspect_model("demo-dc")}, Sharing(1, 2, anything=True)),
        (4, "auto", {"guidance_scale": 1.0}, Sharing(1, 4)),
        (4, "auto", {"one_pass": True}, Sharing(1, 4)),
        (2, "auto", {"beside": Preset(guidance_cache=GuidanceCache(every=4))}, Sharing(1, 2)),
        (2, "auto", {"beside": Preset(cache=Cache("first_block"))}, Sharing(2, 1)),
        (4, "auto", {"beside": Preset(cache=Cache("forecast"))}, Sharing(2, 2)),
        (3, "auto", {"frames": 5, "height": 64, "width": 64, "device": GPU}, Sharing(1, 3, anything=True)),
        (2, "auto", {"frames": 1, "height": 48, "width": 48}, Sharing(2, 1)),  # 9 tokens, of which none are shared
    ],
)
def test_what_is_shared(count, wanted, more, made):
    assert shared(count, wanted, **more) == made
    assert made.processes == count
    assert made.in_words().startswith("one process" if count == 1 else f"{count} processes share ")


@pytest.mark.parametrize(
    ("count", "wanted", "more", "message"),
    [
        (1, "guidance", {}, "^share is of no use: one process has nothing to share. Give processes"),
        (2, "all", {}, "^share is all: it must be auto, guidance, sequence or both"),
        (4, "guidance", {}, "^processes is 4: guidance has two branches, .* Give 2"),
        (3, "both", {}, "^processes is 3: .* Give an even number"),
        (2, "both", {}, "^processes is 2: guidance alone takes two. Give 4"),
        (2, "guidance", {"guidance_scale": 1.0}, "^share is guidance: there is no guidance to share. Give sequence"),
        (2, "guidance", {"one_pass": True}, "guidance is in one pass"),
        (7, "sequence", {"facts": WAN}, "^processes is 7: .* the model has 3. Give fewer"),
        (2, "sequence", {"beside": Preset(cache=Cache("seacache"))}, "^share is sequence: the cache seacache goes by"),
        (4, "auto", {"beside": Preset(cache=Cache("first_block"))}, "^processes is 4: the cache first_block .* by 2"),
        (
            3,
            "auto",
            {"frames": 5, "height": 64, "width": 64},
            "^processes is 3: 3 share each sequence, on a CPU in equal parts alone, and the video has 32 tokens. Give "
            "a size or length whose tokens are a multiple of 3, or 2 processes",
        ),
        (2, "sequence", {"frames": 1, "height": 48, "width": 48}, "has 9 tokens. Give a .* multiple of 2.$"),
        (4, "auto", {"beside": Preset(compile=Compile())}, "^processes is 4: compiled blocks have not been run"),
    ],
)
def test_what_cannot_be_shared(count, wanted, more, message):
    with pytest.raises(BadInput, match=message):
        shared(count, wanted, **more)


def test_families_whose_sequence_or_guidance_cannot_be_shared():
    hunyuan = other("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel")
    with pytest.raises(BadInput, match="diffusers cannot share the sequence of a HunyuanVideoTransformer3DModel"):
        out_of(2, "sequence", hunyuan)
    with pytest.raises(BadInput, match="^share is guidance: a HunyuanVideoPipeline .*embedded.* Give sequence"):
        out_of(2, "guidance", hunyuan)
    ltx = other("LTXPipeline", "LTXVideoTransformer3DModel")
    with pytest.raises(BadInput, match="the sequence of LTX-Video: not with a text mask.* Guidance can be shared, by"):
        out_of(4, "auto", ltx)
    assert out_of(2, "auto", ltx) == Sharing(2, 1)
    assert out_of(2, "auto", other("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel")) == Sharing(2, 1)
    cosmos = other("Cosmos2VideoToWorldPipeline", "CosmosTransformer3DModel")
    with pytest.raises(BadInput, match="works on what the first pass of a step gave before it makes the second"):
        out_of(2, "guidance", cosmos)


def test_each_process_has_a_device(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    gpu = torch.device("cuda")
    check_count(2, gpu, 2)
    check_count(16, gpu, 2)  # of eight machines
    check_count(16, torch.device("cpu"), 16)
    with pytest.raises(BadInput, match="^processes is 4: each has a device of its own, and there are 2. Give 2"):
        check_count(4, gpu, 4)
    with pytest.raises(BadInput, match="^device is cuda:1: each of the processes has its own. Give cuda"):
        check_count(2, torch.device("cuda:1"), 2)


def test_the_process_is_that_of_the_environment(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Process.this() == Process() and Process().first
    for name, value in zip((*names, *MEETING_PLACE), (5, 1, 8, 4, *MEETING_PLACE.values()), strict=True):
        monkeypatch.setenv(name, str(value))
    assert Process.this() == Process(5, 1, 8, 4) and not Process.this().first


MEETING_PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"RANK": "abc"}, "RANK is 'abc': it must be a whole number. torchrun sets it"),
        ({"RANK": "-1"}, "RANK is '-1': it must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: it must be at least 1"),
        ({"RANK": "5"}, "RANK is 5: it must be below WORLD_SIZE, which is 2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2: it must be below LOCAL_WORLD_SIZE, which is 2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3: it must be at most WORLD_SIZE, which is 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set, and WORLD_SIZE is above 1"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x': it must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000: it must be from 1 to 65535"),
    ],
)
def test_an_environment_that_cannot_be(changed, told, monkeypatch):
    sane = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    for name, value in (sane | MEETING_PLACE | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as refused:
        Process.this()
    assert str(refused.value).startswith(told)


def test_processes_that_do_not_come(monkeypatch):
    monkeypatch.setattr(crew, "MEETING", timedelta(seconds=2))
    for name, value in (MEETING_PLACE | {"MASTER_PORT": str(get_free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"^WORLD_SIZE is 2: they cannot meet at 127\.0\.0\.1:\d+, MASTER_ADDR and"):
        crew._meet(Process(1, 1, 2, 2))
