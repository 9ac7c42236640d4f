"""What ComfyUI is told before it loads a native model: the memory of sparse attention beside a forward pass."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from huggingface_hub import constants
from native_comfyui import ANCHORED, conditioning, management, models, patched, sample, tiny, with_override

from vidaccel import SVG, Tangent, VideoLayout
from vidaccel.generation.tuning.break_even import BreakEven
from vidaccel.generation.tuning.store import Key, store
from vidaccel.nodes.native.patch import sparsify

METHOD = Tangent(density=0.95)


@pytest.fixture
def loads(monkeypatch) -> list[tuple[float, float]]:
    """What ComfyUI reserves in each of its loads: `(memory_required, minimum_memory_required)`."""
    asked, load = [], management.load_models_gpu

    def record(models, memory_required=0, minimum_memory_required=None, **options):
        asked.append((memory_required, minimum_memory_required))
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **options)

    monkeypatch.setattr(management, "load_models_gpu", record)
    return asked


def more(loads: list, model, clone, description, **options) -> float:
    """Bytes that ComfyUI reserves for a clone beside what it does for the model, the same in both of its figures."""
    loads.clear()
    for one in (model, clone):
        sample(one, description, steps=1, **options)
    (before, least_before), (after, least_after) = loads
    assert after - before == pytest.approx(least_after - least_before, abs=1)
    return after - before


def notes(session) -> list[str]:
    return [note for note in session.news().report.notes if "announced" in note]


def heads_of(model, description) -> tuple[int, int]:
    """Heads and their channels in the model's own calls over the video."""
    found = []

    def override(func, q, k, v, heads, *args, **kwargs):
        split = kwargs.get("skip_reshape", False)
        if q.shape[2 if split else 1] == k.shape[2 if split else 1] == description.tokens:
            found.append((heads, q.shape[-1] // (1 if split else heads)))
        return func(q, k, v, heads, *args, **kwargs)

    sample(with_override(model, override), description, steps=1)
    (one,) = set(found)
    return one


@pytest.mark.parametrize("name", models())
def test_tables_and_what_is_kept_are_reserved_in_every_model(name, loads):
    description, model, _ = tiny(name)
    clone, session = patched(model, METHOD, dense_layers="0")
    announced = more(loads, model, clone, description)
    heads, head_dim = heads_of(model, description)
    frames, height, width = description.grid
    if description.mask is not None:  # guides are frames of the latent, and known only later
        frames = description.latent[0]
    layout = VideoLayout(frames, height, width)
    # Both prompts are counted, also where a guidance of 1 leaves one out: ComfyUI's estimate counts them, too.
    calls = 2 * (description.layers - 1)
    tables, kept = METHOD.table_bytes(layout, heads, head_dim, 4), METHOD.kept_bytes(layout, heads, head_dim)
    assert kept > 0 and announced == pytest.approx(tables + calls * kept, abs=1)
    (note,) = notes(session)
    layers = "1 sparse layer" if description.layers == 2 else f"{description.layers - 1} sparse layers"
    assert note.endswith(f"for {layers}, 2 conditions and {layout.tokens} tokens.")


def test_every_video_of_a_batch_counts(loads):
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, METHOD)
    one = more(loads, model, clone, description)
    assert more(loads, model, clone, description, batch=2) == pytest.approx(2 * one, abs=1)
    notes(session)
    sample(clone, description, steps=1)
    sample(clone, description, steps=1, latent=description.other)
    assert len(notes(session)) == 2  # of both samplings, and of the last in the next report
    sample(clone, description, steps=1)
    assert len(notes(session)) == 1


@pytest.mark.parametrize("order", ["windows first", "windows last"])
def test_in_context_windows_the_tables_are_of_one_and_each_keeps_its_own(order, loads):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    description, model, _ = tiny("wan_t2v")
    frames, height, width = description.latent
    latent = (2 * frames, height, width)

    def windowed(one):
        settings = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False}
        settings |= {"context_length": frames, "context_overlap": 0, "fuse_method": "pyramid"}
        return ContextWindowsManualNode.execute(one, **settings, dim=2, freenoise=False).args[0]

    plain = windowed(model)
    clone, session = patched(plain if order == "windows first" else model, METHOD)
    clone = clone if order == "windows first" else windowed(clone)
    heads, head_dim = heads_of(model, description)
    grid = description.grid  # of a window
    layout, calls = VideoLayout(grid[0] + ANCHORED, *grid[1:]), 2 * 2 * description.layers
    assert more(loads, plain, clone, description, latent=latent) == pytest.approx(
        METHOD.run_bytes(layout, heads, head_dim, 4, calls), abs=1
    )
    assert "2 conditions, 2 context windows and" in notes(session)[0]
    assert len({record.branch for record in session.report().records}) == 4


def test_prompts_for_areas_have_a_pass_of_either_side(loads):
    description, model, _ = tiny("wan_t2v")
    frames, height, width = description.latent
    half = {"strength": 1.0, "set_area_to_bounds": False}
    areas = [(frames, height, width // 2, 0, 0, place) for place in (0, width // 2)]
    prompts = [
        conditioning(description, seed, {**half, "area": area}) for seed, area in zip((1, 3), areas, strict=True)
    ]
    clone, session = patched(model, METHOD)
    sample(clone, description, steps=1, positive=[*prompts[0], *prompts[1]])
    records = session.report().records
    assert {record.branch for record in records} == {"cond", "cond #2", "uncond", "uncond #2", "uncond #3"}
    assert len(records) == 5 * description.layers
    assert "5 conditions and" in notes(session)[0]
    # What both sides have is not added.
    sample(clone, description, steps=1, positive=prompts[0], negative=prompts[0])
    assert "2 conditions and" in notes(session)[0]


def test_a_comfyui_that_cannot_be_told_is_said_so(loads, monkeypatch):
    from comfy.controlnet import ControlBase

    description, model, _ = tiny("wan_t2v")
    with monkeypatch.context() as older:
        older.delattr(ControlBase, "inference_memory_requirements")
        clone, session = patched(model, METHOD)
    assert more(loads, model, clone, description) == 0
    (note,) = notes(session)
    assert "has no way to be told" in note and "--reserve-vram" in note


def test_what_stays_dense_or_keeps_nothing_reserves_nothing(loads):
    description, model, _ = tiny("wan_t2v")
    every_layer = f"0-{description.layers - 1}"
    for method, options in ((METHOD, {"min_tokens": 10**6}), (METHOD, {"dense_layers": every_layer}), (SVG(), {})):
        clone, session = patched(model, method, **options)
        assert more(loads, model, clone, description) == 0 and notes(session) == []


def test_min_tokens_at_its_default_goes_by_what_was_measured_on_this_machine(loads, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    description, model, _ = tiny("wan_t2v")
    clone, _ = patched(model, METHOD, min_tokens=8192, by_length="tangent")
    assert more(loads, model, clone, description) == 0
    key = Key.here(*heads_of(model, description), torch.device("cpu"), torch.float32, "tangent")
    store(key, BreakEven(description.tokens, 40))
    assert more(loads, model, clone, description) > 0


@pytest.mark.parametrize("name", models("wan_t2v", "wan_subject", "hunyuan"))
def test_what_the_method_cannot_do_is_refused_once_by_the_first_pass_that_knows_its_bound(name, caplog):
    """Of the video alone, without text and references, the bound was too low, and what it named was refused again."""
    description, model, _ = tiny(name)
    refused = (
        r"^Sparse Attention \(test\): density is 0\.01, and with a video of .* must be at least (0\.\d+)\. Raise it"
    )
    clone, _ = sparsify(model, lambda layout: SVG(density=0.01), name="test", settings={"density": 0.01})
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=refused) as error:
        sample(clone, description, steps=1)
    assert "announced" not in caplog.text
    bound = float(re.match(refused, str(error.value))[1])
    clone, _ = sparsify(model, lambda layout: SVG(density=bound), name="test", settings={"density": bound})
    sample(clone, description, steps=1)


def test_what_stays_dense_is_not_refused(caplog):
    """Too short a video, and guides that weight the attention of every layer."""
    few = SVG(density=0.01)
    description, model, _ = tiny("wan_t2v")
    sample(patched(model, few, min_tokens=10**6)[0], description, steps=1)
    description, model, _ = tiny("ltxv_guide")
    _, rows, columns = description.latent
    guide = {
        "pre_filter_count": rows * columns,
        "strength": 0.5,
        "pixel_mask": None,
        "latent_shape": [1, rows, columns],
    }
    clone, session = patched(model, few)
    with caplog.at_level(logging.WARNING):
        sample(clone, description, steps=1, conditions={"guide_attention_entries": [guide]})
    assert any("weights the attention of every layer" in note for note in session.report().notes)
    assert "announced" not in caplog.text


def test_an_unknown_model_reserves_nothing_and_says_so_once(loads, caplog):
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, METHOD)
    diffusion_model = clone.model.diffusion_model
    name, kind = type(diffusion_model).__name__, type(diffusion_model)
    diffusion_model.__class__ = type("Other" + name, (kind,), {})
    try:
        with caplog.at_level(logging.WARNING):
            assert more(loads, model, clone, description) == 0
            sample(clone, description, steps=1)
    finally:
        diffusion_model.__class__ = kind
    assert caplog.text.count("is no model that sparse attention knows") == 1 and notes(session) == []


def test_heads_that_cannot_be_told_reserve_nothing_and_say_so_once(loads, caplog, monkeypatch):
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, METHOD)
    monkeypatch.delattr(model.model.diffusion_model, "num_heads")
    with caplog.at_level(logging.WARNING):
        assert more(loads, model, clone, description) == 0
        sample(clone, description, steps=1)
    assert caplog.text.count("its memory was not announced to ComfyUI: it cannot be computed") == 1
    assert len(notes(session)) == 1
    assert any(not record.reason for record in session.report().records)
