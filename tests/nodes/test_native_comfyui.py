"""Each of ComfyUI's native video models, the real class at a tiny size in this process, with and without sparse
attention.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from native_comfyui import MODELS, Calls, layouts, missing, models, patched, sample, tiny, with_override

from vidaccel import SVG, SVG2, Radial, VideoLayout
from vidaccel.nodes.native.models import GEOMETRIES


def layout_of(description) -> VideoLayout:
    return VideoLayout(*description.grid, text_before=description.before, text_after=description.after)


def test_every_row_of_the_table_is_run_here():
    """Except for those whose class is not in this ComfyUI yet."""
    runnable = {name: description for name, description in MODELS.items() if not missing(description)}
    classes = {type(tiny(name)[1].model.diffusion_model).__name__ for name in runnable}
    assert classes <= set(GEOMETRIES)
    absent = set(GEOMETRIES) - classes
    assert absent <= {"SCAIL2WanModel", "WanDancerModel", "CogVideoXTransformer3DModel", "MiniMaxH3Model"}
    assert bool(absent) == (len(runnable) < len(MODELS))


@pytest.mark.parametrize("name", models())
def test_density_one_is_the_unpatched_model(name):
    description, model, unpatched = tiny(name)
    clone, session = patched(model, SVG2(density=1.0))
    torch.testing.assert_close(sample(clone, description), unpatched, rtol=2e-4, atol=5e-4)
    assert any(not record.reason for record in session.report().records)


@pytest.mark.parametrize("name", models())
def test_density_below_one_is_sparse_where_the_video_is(name):
    description, model, unpatched = tiny(name)
    density = description.density
    clone, session = patched(model, SVG2(density=density))
    out = sample(clone, description)
    assert out.isfinite().all() and not torch.allclose(out, unpatched, atol=1e-3)
    assert layouts(session) == [layout_of(description)] and not session._notes
    report = session.report()
    assert {record.layer for record in report.records} == set(range(description.layers))
    assert report.density_by_step() == pytest.approx({0: 1.0, 1: density, 2: density, 3: density}, abs=0.03)
    branches = 1 if description.cfg == 1 else 2
    assert report.dense_reasons() == {"dense_start_percent": description.layers * branches}
    assert len(report.records) == 4 * description.layers * branches


def first_queries(model, description, add: torch.Tensor) -> torch.Tensor:
    """`[tokens, H * D]` of the first self-attention call over the video in one step."""
    calls = Calls()
    sample(with_override(model, calls.override()), description, steps=1, add=add)
    return next(q for q in calls.queries if len(q) == description.tokens)


@pytest.mark.parametrize("name", models())
def test_a_patch_of_the_latent_is_the_token_that_the_layout_says(name):
    """In the first layer a token depends on its own patch alone. Text, references and guides depend on none."""
    description, model, _ = tiny(name)
    patch = [-(-size // tokens) for size, tokens in zip(description.latent, description.grid, strict=True)]
    if description.mask is not None:
        patch[0] = 1  # guides are frames of the latent, behind those of the video
    nothing = torch.zeros(description.channels, *description.latent)
    before = first_queries(model, description, nothing)
    for token in ((1, 1, 2), tuple(size - 1 for size in description.grid)):
        add = nothing.clone()
        add[(slice(None), *(slice(n * step, (n + 1) * step) for n, step in zip(token, patch, strict=True)))] = 1.0
        after = first_queries(model, description, add)
        _, rows, columns = description.grid
        place = description.before + (token[0] * rows + token[1]) * columns + token[2]
        assert (before != after).any(dim=-1).nonzero().flatten().tolist() == [place]


@pytest.mark.parametrize("name", models())
def test_calls_over_the_video_are_taken_and_no_others(name):
    description, model, _ = tiny(name)
    stock, left = Calls(), Calls()
    sample(with_override(model, stock.override()), description, steps=1)
    method = SVG2(density=description.density)
    clone, session = patched(with_override(model, left.override()), method, dense_start_percent=0.0)
    sample(clone, description, steps=1)
    taken = Counter(stock.lengths) - Counter(left.lengths)
    assert not Counter(left.lengths) - Counter(stock.lengths)
    assert set(taken) == {(description.tokens, description.tokens)}
    # The two guidance branches are one call where the model can have them in one batch.
    assert sum(taken.values()) in (description.layers, len(session.report().records))
    # Of what is left, nothing is as long as the video: it is cross-attention, text or audio.
    assert left.lengths or name in ("mochi", "minimax", "minimax_references", "cogvideox", "cogvideox15")
    assert all(one != (description.tokens, description.tokens) for one in left.lengths)


@pytest.mark.parametrize("name", models())
def test_a_second_run_at_another_size(name):
    description, model, _ = tiny(name)
    clone, session = patched(model, SVG2(density=0.8), dense_start_percent=0.0)
    first = sample(clone, description, steps=2)
    assert sample(clone, description, steps=2, latent=description.other).isfinite().all()
    assert sample(clone, description, steps=2).equal(first)
    other, one = layouts(session)  # the one used last is the last
    assert one == layout_of(description) and (other.height, other.width) != (one.height, one.width)
    report = session.report()
    assert report.runs() == [0, 1, 2] and not session._notes
    assert all(len([r for r in report.records if r.run == run]) == len(report.records) // 3 for run in (0, 1, 2))


@pytest.mark.parametrize("name", models(*(name for name, model in MODELS.items() if not model.one_only)))
def test_a_batch_of_two(name):
    """Two videos of one prompt, side by side."""
    description, model, _ = tiny(name)
    dense, session = patched(model, SVG2(density=1.0), dense_start_percent=0.0)
    out = sample(dense, description, batch=2, steps=1)
    assert out.shape[0] == 2 and not out[0].equal(out[1])
    torch.testing.assert_close(out, sample(model, description, batch=2, steps=1), rtol=2e-4, atol=5e-4)
    clone, session = patched(model, SVG2(density=description.density), dense_start_percent=0.0)
    assert (sample(clone, description, batch=2, steps=1) - out).abs().max() > 5e-4
    report = session.report()
    assert {record.layer for record in report.records} == set(range(description.layers))
    assert report.density_by_step() == pytest.approx({0: description.density}, abs=0.03)


@pytest.mark.parametrize("name", models())
def test_errors_are_measured_in_every_model_and_change_nothing(name):
    description, model, _ = tiny(name)
    options = {"method": SVG2(density=description.density), "dense_start_percent": 0.0}
    plain, _ = patched(model, **options)
    expected = sample(plain, description, steps=1)
    clone, session = patched(model, **options, measure_error=16)
    assert sample(clone, description, steps=1).equal(expected)
    sparse = [record for record in session.report().records if not record.reason]
    assert sparse and all(0 < record.error < 2 for record in sparse)


@pytest.mark.parametrize("method", [SVG(density=0.6, sink=False), Radial(block_size=16, decay=0.1, near=0.4)])
@pytest.mark.parametrize("name", models("wan_t2v", "hunyuan", "mochi", "ltxv", "ltxav", "cosmos_predict2"))
def test_the_other_methods_are_sparse_too(name, method):
    description, model, unpatched = tiny(name)
    clone, session = patched(model, method)
    assert not torch.allclose(sample(clone, description), unpatched, atol=1e-3)
    assert session.report().density_by_step()[3] < 0.9
