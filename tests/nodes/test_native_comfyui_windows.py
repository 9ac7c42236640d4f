"""Context windows, many layouts in one sampling, skipped blocks and two models in a guider, in a real ComfyUI."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from native_comfyui import ANCHORED, models, patched, sample, tiny, windowed

from vidaccel import SVG, Tangent
from vidaccel.nodes.native.override import KEPT_LAYOUTS

METHOD = Tangent(density=0.6, q_clusters=4, k_clusters=6)


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_what_is_kept_of_windows_is_what_was_announced(schedule, monkeypatch):
    """Where they move from step to step, the states of all of them would be many times those of one step."""
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(windowed(model, schedule, 5, 2), METHOD)
    kept, end = [], session.end

    def count() -> None:
        kept.append(sum(len(engine.memory.calls) for engine in session._engines.values()))
        end()

    monkeypatch.setattr(session, "end", count)
    sample(clone, description, latent=(15, *description.latent[1:]), steps=10)
    (note,) = [note for note in session.report().notes if "announced" in note]
    windows = int(note.split(" context windows")[0].rsplit(" ", 1)[1])
    assert 0 < kept[0] <= 2 * description.layers * windows
    assert windows <= 16


@pytest.mark.parametrize("name", models("ltxav"))
def test_a_model_with_one_packed_latent_is_sparse_in_windows(name):
    description, model, _ = tiny(name)
    alone = replace(description, audio=None)
    clone, session = patched(windowed(model, "standard_static", 4, 1), SVG(density=0.6), dense_start_percent=0.0)
    sample(clone, alone, latent=(8, *description.latent[1:]), steps=1)
    records = session.report().records
    assert records and not any(record.reason for record in records)


def test_more_layouts_than_are_kept_lose_nothing_within_a_sampling():
    """Where text is in the sequence, every length of a prompt is a layout, and windows double them."""
    from comfy_models import comfy, randn

    description, model, _ = tiny("hunyuan")
    clone, session = patched(windowed(model, "standard_static", 3, 1), SVG(density=0.9), dense_start_percent=0.0)

    def text(tokens: int, seed: int) -> list:
        return [[randn(1, tokens, description.text_dim, seed=seed), {"pooled_output": randn(1, 24, seed=seed + 50)}]]

    empty = torch.zeros(1, description.channels, 7, *description.latent[1:])
    noise = comfy.sample.prepare_noise(empty, 0)
    positive, negative = text(8, 1) + text(9, 3) + text(10, 4) + text(12, 5), text(11, 2)
    with torch.inference_mode():
        comfy.sample.sample(
            clone, noise, 2, 4.0, "euler", "simple", positive, negative, empty, seed=0, disable_pbar=True
        )
    records = session.report().records
    assert len(session._engines) == 5 * (1 + ANCHORED) > KEPT_LAYOUTS  # five texts, with and without the frame in front
    assert {record.step for record in records} == {0, 1}
    assert Counter(record.step for record in records)[0] == Counter(record.step for record in records)[1]


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("name", models("ltxv", "wan_t2v", "wan_vace"))
def test_skipped_blocks_do_not_shift_the_layers(name, skipped):
    """Also of models that do not say their `block_index`, and where a block of VACE runs under the same index."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    description, model, _ = tiny(name)
    execute = getattr(SkipLayerGuidanceDiT, "execute", None) or SkipLayerGuidanceDiT().skip_guidance
    found = execute(model, double_layers=str(skipped), single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0)
    clone, session = patched(found.args[0] if hasattr(found, "args") else found[0], SVG(density=0.6))
    sample(clone, description, steps=1)
    calls = Counter(record.layer for record in session.report().records)
    assert [calls[layer] for layer in range(description.layers)] == [
        3 - (layer == skipped) for layer in range(description.layers)
    ]
    assert "cond, 1 block replaced" in {record.branch for record in session.report().records}


def test_the_second_model_of_a_guider_stays_as_it_is():
    """Its wrappers are those of the first: the projections of SLA, say, would be of other weights."""
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, SVG(density=0.6), dense_start_percent=0.0)
    passed = []

    class Executor:
        class_obj = torch.nn.Linear(1, 1)  # another model than the one that is sampled with

        def __call__(self, x, t, c_concat, c_crossattn, control, options):
            passed.append(options)
            return x

    options = {"sigmas": torch.ones(1)}
    session.begin(None, clone.model)
    session.forward(Executor(), torch.zeros(1), torch.ones(1), transformer_options=options)
    session.end()
    assert passed == [options] and list(options) == ["sigmas"]
    assert any("second model of the guider" in note for note in session.report().notes)
    sample(clone, description, steps=1)
    assert any(not record.reason for record in session.report().records)
