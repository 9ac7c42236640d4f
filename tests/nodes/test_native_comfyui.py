"""ComfyUI's own native models, at tiny sizes and in this process, with and without sparse attention.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re

import pytest
import torch

from vidaccel import SVG, SVG2, Radial, VideoLayout

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("set COMFYUI_PATH to the folder of a ComfyUI to run its models", allow_module_level=True)
try:
    import comfy_models
    from comfy_models import MODELS, build, sample
except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
    reason = f"this Python cannot import ComfyUI ({error}): run pytest with the one that ComfyUI runs with"
    pytest.skip(reason, allow_module_level=True)
from vidaccel.nodes.native import KEY
from vidaccel.nodes.patch import sparsify

NAMES = list(MODELS)
_built: dict[str, tuple] = {}


def tiny(name: str):
    """The description of a model, its MODEL, and what it samples unpatched."""
    if name not in _built:
        model = build(MODELS[name])
        _built[name] = model, sample(model, MODELS[name])
    return MODELS[name], *_built[name]


@pytest.fixture(scope="module", autouse=True)
def _forget_models():
    """Before Python ends: a MODEL that outlives ComfyUI's modules complains."""
    yield
    _built.clear()


def patched(model, method=None, **options):
    method = method or SVG2(density=0.6)
    settings = {"dense_start_percent": 0.25, **options}
    return sparsify(model, method if callable(method) else lambda layout: method, name="test", settings={}, **settings)


def layouts(session) -> list[VideoLayout]:
    return list(session._engines)


@pytest.mark.parametrize("name", NAMES)
def test_density_one_is_the_unpatched_model(name):
    description, model, unpatched = tiny(name)
    clone, session = patched(model, SVG2(density=1.0))
    torch.testing.assert_close(sample(clone, description), unpatched, rtol=1e-3, atol=1e-3)
    assert any(not record.reason for record in session.report().records)


@pytest.mark.parametrize("name", NAMES)
def test_density_below_one_is_sparse_where_the_video_is(name):
    description, model, unpatched = tiny(name)
    clone, session = patched(model)
    out = sample(clone, description)
    assert out.isfinite().all() and not torch.allclose(out, unpatched, atol=1e-3)
    (layout,) = layouts(session)
    assert (layout.text_before, layout.video_tokens, layout.text_after) == description.tokens
    report = session.report()
    assert {record.layer for record in report.records} == set(range(description.layers))
    assert report.density_by_step() == pytest.approx({0: 1.0, 1: 0.6, 2: 0.6, 3: 0.6}, abs=0.03)
    branches = 1 if description.cfg == 1 else 2
    assert report.dense_reasons() == {"dense_start_percent": description.layers * branches}
    assert len(report.records) == 4 * description.layers * branches


@pytest.mark.parametrize("name", NAMES)
def test_the_video_is_where_the_noise_is(name):
    """In the first layer only video tokens depend on the noise: text, references and guides do not."""
    description, model, _ = tiny(name)
    before, video, after = description.tokens
    found = []

    def record(func, q, k, v, heads, *args, **kwargs):
        apart = kwargs.get("skip_reshape", False)
        if q.shape[2 if apart else 1] == before + video + after and q.shape == k.shape:
            found.append((q.transpose(1, 2).flatten(2) if apart else q)[0])
        return func(q, k, v, heads, *args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = record
    for seed in (0, 1):
        sample(clone, description, steps=1, seed=seed)
    first, second = found[0], found[len(found) // 2]
    changed = (first != second).any(dim=-1)
    assert changed[before : before + video].all()
    assert not changed[:before].any() and not changed[before + video :].any()


@pytest.mark.parametrize("method", [SVG(density=0.6, sink=False), Radial(block_size=16, decay=0.1, near=0.4)])
@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan", "mochi", "ltxv", "cosmos_predict2"])
def test_the_other_methods_are_sparse_too(name, method):
    description, model, unpatched = tiny(name)
    clone, session = patched(model, method)
    assert not torch.allclose(sample(clone, description), unpatched, atol=1e-3)
    assert session.report().density_by_step()[3] < 0.9


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan", "mochi", "ltxv", "cosmos_predict2"])
def test_the_original_model_is_as_it_was(name):
    description, model, unpatched = tiny(name)
    before = dict(model.model_options["transformer_options"])
    clone, _ = patched(model)
    sample(clone, description)
    assert sample(model, description).equal(unpatched)
    assert model.model_options["transformer_options"] == before
    assert not any(KEY in kinds for kinds in (*model.wrappers.values(), *model.callbacks.values()))


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan", "mochi", "ltxv"])
def test_guidance_in_one_batch_equals_guidance_in_two_calls(name, monkeypatch):
    description, model, _ = tiny(name)
    clone, together = patched(model)
    batched = sample(clone, description)
    clone, apart = patched(model)
    monkeypatch.setattr(comfy_models.comfy.model_management, "get_free_memory", lambda *args, **kwargs: 0)
    torch.testing.assert_close(sample(clone, description), batched, rtol=1e-3, atol=1e-3)
    assert sorted(r.branch for r in together.report().records) == sorted(r.branch for r in apart.report().records)


def test_a_second_run_is_the_first_again_also_after_another_size():
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model, lambda layout: SVG2(density=0.6))
    first = sample(clone, description)
    assert sample(clone, description).equal(first)
    sample(clone, description, latent=(4, 12, 20))
    assert sample(clone, description).equal(first)
    assert layouts(session) == [VideoLayout(5, 8, 8), VideoLayout(4, 6, 10)]
    assert session.report().runs() == [0, 1, 2, 3]


def test_two_patched_clones_do_not_meet():
    description, model, _ = tiny("wan_t2v")
    svg2, one = patched(model)
    radial, other = patched(model, Radial(block_size=16, decay=0.1, near=0.4))
    alone = sample(svg2, description)
    sample(radial, description)
    assert sample(svg2, description).equal(alone)
    assert one.report().runs() == [0, 1] and other.report().runs() == [0]


def test_an_interrupted_run_can_be_queued_again():
    description, model, _ = tiny("wan_t2v")
    clone, _ = patched(model)
    first = sample(clone, description)

    def interrupt(step, *args):
        if step == 1:
            raise comfy_models.comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy_models.comfy.model_management.InterruptProcessingException):
        sample(clone, description, callback=interrupt)
    assert sample(clone, description).equal(first)


def test_two_samplers_share_the_scale_of_percentages():
    """Wan 2.2: one model up to step 2, another from there; only the first step of four is dense."""
    description, model, _ = tiny("wan_t2v")
    (high, first), (low, second) = (patched(model, dense_start_percent=0.25) for _ in range(2))
    sample(high, description, last_step=2)
    sample(low, description, start_step=2, disable_noise=True)
    assert [d == 1 for d in first.report().density_by_step().values()] == [True, False]
    assert [d == 1 for d in second.report().density_by_step().values()] == [False, False]


@pytest.mark.parametrize("sampler", ["heun", "res_multistep", "dpmpp_2s_ancestral"])
def test_samplers_of_higher_order_keep_their_steps(sampler):
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model)
    sample(clone, description, sampler=sampler)
    report = session.report()
    assert sorted(report.density_by_step()) == [0, 1, 2, 3] and {r.num_steps for r in report.records} == {4}


def test_a_latent_batch_of_two():
    description, model, _ = tiny("hunyuan")
    clone, session = patched(model)
    assert sample(clone, description, batch=2).shape[0] == 2
    assert session.report().density_by_step()[3] == pytest.approx(0.6, abs=0.03)


def test_an_override_of_another_node_gets_the_other_calls():
    description, model, _ = tiny("wan_t2v")
    seen = []

    def former(func, q, k, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return func(q, k, *args, **kwargs)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = former
    clone, _ = patched(other)
    out = sample(clone, description)
    assert seen.count((320, 320)) == 3 and seen.count((320, 7)) == 12  # one dense step, four of cross-attention
    without, _ = patched(model)
    assert sample(without, description).equal(out)
    # And with the other node behind ours.
    clone, _ = patched(model)
    clone.model_options["transformer_options"]["optimized_attention_override"] = former
    assert sample(clone, description).equal(out)


def test_beside_easycache():
    from comfy_extras.nodes_easycache import EasyCacheNode

    description, model, _ = tiny("wan_t2v")
    for order in (0, 1):
        clone, session = patched(model)
        if order:
            clone, session = patched(EasyCacheNode.execute(model, 5.0, 0.3, 0.9, False)[0])
        else:
            clone = EasyCacheNode.execute(clone, 5.0, 0.3, 0.9, False)[0]
        assert sample(clone, description, steps=8).isfinite().all()
        steps = session.report().density_by_step()
        assert len(steps) < 8 and min(steps.values()) < 0.7  # the cache skipped some, the others were sparse
        assert not any("no attention call" in note for note in session.report().notes)


def test_a_compiled_model_is_sparse():
    """`TorchCompileModel` wraps the diffusion model; dynamo must not trace into the choice of keys."""
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model)
    eager = sample(clone, description)
    compiled = clone.clone()
    diffusion_model = torch.compile(compiled.model.diffusion_model, backend="eager")
    compiled.add_object_patch("diffusion_model", diffusion_model)
    torch.testing.assert_close(sample(compiled, description), eager, rtol=1e-3, atol=1e-3)
    assert session.report().last().density_by_step()[3] == pytest.approx(0.6, abs=0.03)


def test_a_model_that_is_not_known_is_sampled_as_it_is(caplog):
    """A class that ComfyUI adds tomorrow, with Wan's calls: no guess is made."""
    description = MODELS["wan_t2v"]
    model = build(description)
    unpatched = sample(model, description)
    wan = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = type("TomorrowsModel", (wan,), {})
    with caplog.at_level(logging.WARNING, "vidaccel"):
        clone, session = patched(model)
        assert sample(clone, description).equal(unpatched)
    assert [r.getMessage() for r in caplog.records if "TomorrowsModel" in r.getMessage()] == [
        f"Sparse Attention (test): {note}" for note in session.report().notes
    ]


# -- the nodes ---------------------------------------------------------------------------------------------------------


def nodes() -> dict:
    from vidaccel.nodes import report_node, sparse_nodes

    return {node.define_schema().node_id: node for node in [*sparse_nodes.NODES, *report_node.NODES]}


def defaults(node) -> dict:
    return {i.id: i.default for i in node.define_schema().inputs if hasattr(i, "default")}


SPARSE = [f"VidaccelSparseAttention{name}" for name in ("SVG2", "SVG", "Radial", "Tangent", "Sparge")]


def test_every_input_and_node_is_explained():
    for name, node in nodes().items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.category.startswith("video acceleration")
        assert name.startswith("Vidaccel") and schema.display_name.startswith("Sparse Attention")
        for item in schema.inputs:
            assert item.tooltip and item.tooltip.endswith("."), (name, item.id)
        assert node.GET_NODE_INFO_V1()["input"]["required"]


@pytest.mark.parametrize("name", SPARSE)
def test_a_node_patches_a_clone_and_the_report_node_shows_it(name, tmp_path):
    import folder_paths

    description, model, unpatched = tiny("wan_t2v")
    node = nodes()[name]
    values = defaults(node) | {"min_tokens": 0, "density": 0.7}
    clone, session = node.execute(model, **values).result
    out = sample(clone, description, latent=(9, 16, 16))
    assert out.isfinite().all() and sample(model, description).equal(unpatched)
    folder_paths.set_temp_directory(str(tmp_path))
    result = nodes()["VidaccelReport"].execute(after=out, report=session)
    text, picture, after = result.result
    assert after is out and picture.ndim == 4 and list(tmp_path.iterdir())
    assert text.startswith(f"{name.removeprefix('VidaccelSparseAttention')}: density 0.7")
    assert "4/4" in text and "dense_start_percent (" in text and 0.5 < session.report().density_by_step()[3] < 0.85


def test_tangent_by_tolerance_follows_the_content():
    description, model, _ = tiny("wan_t2v")
    node = nodes()["VidaccelSparseAttentionTangent"]
    densities = []
    for tolerance in (0.3, 1e-5):  # random weights attend to everything alike, so even clusters are hardly wrong
        values = {"min_tokens": 0, "budget": "tolerance", "tolerance": tolerance, "measure_error": 64}
        clone, session = node.execute(model, **(defaults(node) | values)).result
        sample(clone, description, latent=(9, 16, 16))
        report = session.report()
        assert "density" not in report.config and report.config["tolerance"] == tolerance
        assert report.measured() and all(r.predicted_error <= tolerance for r in report.measured())
        densities.append(report.mean_density())
    assert densities[0] < densities[1]


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_measured_in_every_model_and_change_nothing(name):
    description, model, _ = tiny(name)
    plain, _ = patched(model)
    expected = sample(plain, description)
    clone, session = patched(model, measure_error=16)
    assert sample(clone, description).equal(expected)
    sparse = [record for record in session.report().records if not record.reason]
    assert sparse and all(0 < record.error < 2 for record in sparse)


@pytest.mark.parametrize("name", SPARSE)
def test_defaults_leave_short_videos_dense(name):
    description, model, unpatched = tiny("wan_t2v")
    clone, session = nodes()[name].execute(model, **defaults(nodes()[name])).result
    assert sample(clone, description).equal(unpatched)
    assert set(session.report().dense_reasons()) == {"min_tokens 8192, above the video's 320 tokens"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density is 0.0: it must be above 0"),
        ({"density": 1.2}, "density is 1.2"),
        ({"dense_start_percent": 0.7, "dense_end_percent": 0.5}, "leave no step sparse"),
        ({"dense_layers": "0-99"}, "the model has 3 layers"),
        ({"dense_layers": "first"}, "numbers and ranges"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"measure_error": -1}, "measure_error is -1"),
        ({"backend": "sdpa"}, "computes dense attention only"),
        ({"backend": "nothing"}, "unknown backend"),
    ],
)
@pytest.mark.parametrize("name", SPARSE)
def test_bad_input_is_one_readable_error(name, change, message):
    description, model, unpatched = tiny("wan_t2v")
    with pytest.raises(ValueError, match=message):
        nodes()[name].execute(model, **(defaults(nodes()[name]) | change))
    assert sample(model, description).equal(unpatched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here every backend may run")
def test_a_backend_that_this_machine_lacks_is_an_error():
    _, model, _ = tiny("wan_t2v")
    node = nodes()["VidaccelSparseAttentionSVG"]
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run this model: it .*Choose another, or auto"):
        node.execute(model, **(defaults(node) | {"backend": "triton"}))


def test_a_backend_that_cannot_compensate_is_told_before_anything_is_sampled():
    _, model, _ = tiny("wan_t2v")
    node = nodes()["VidaccelSparseAttentionSVG2"]
    said = "backend is flex: it cannot compute compensate on cpu. Choose auto or .*gather.*, or switch compensate off"
    with pytest.raises(ValueError, match=said):
        node.execute(model, **(defaults(node) | {"backend": "flex"}))
    node.execute(model, **(defaults(node) | {"backend": "flex", "compensate": False}))


@pytest.mark.parametrize("name", SPARSE)
def test_what_a_method_cannot_do_with_a_video_is_told_by_the_name_of_the_node(name):
    description, model, unpatched = tiny("wan_t2v")
    values = defaults(nodes()[name]) | {"min_tokens": 0, "density": 0.01}
    clone, _ = nodes()[name].execute(model, **values).result
    title = nodes()[name].define_schema().display_name
    said = (
        rf"^{re.escape(title)}: density is 0.01, and with a video of 5 frames of 8x8 it must be at least 0\.\d+. Raise"
    )
    with pytest.raises(ValueError, match=said):
        sample(clone, description)
    assert sample(model, description).equal(unpatched)


def test_a_dense_backend_of_another_node_computes_the_dense_steps():
    """ModelAttentionBackend of ComfyUI's core, in either order."""
    from comfy_extras import nodes_model_advanced

    chooser = getattr(nodes_model_advanced, "ModelAttentionBackend", None)
    if chooser is None:
        pytest.skip("this ComfyUI has no ModelAttentionBackend yet")
    description, model, _ = tiny("wan_t2v")
    alone, _ = patched(model)
    expected = sample(alone, description)
    before, session = patched(chooser().patch(model, "pytorch attention")[0])
    behind, other = patched(model)
    (behind,) = chooser().patch(behind, "pytorch attention")
    for clone, its in ((before, session), (behind, other)):
        torch.testing.assert_close(sample(clone, description), expected, rtol=1e-3, atol=1e-3)
        assert its.report().density_by_step() == pytest.approx({0: 1.0, 1: 0.6, 2: 0.6, 3: 0.6}, abs=0.03)


def test_cross_attention_as_long_as_the_video_is_not_taken_for_self_attention():
    """NAG: another node attends in each block to a text of its own, here with as many tokens as the video has."""
    description, model, _ = tiny("wan_t2v")
    text = torch.randn(1, 320, 48, generator=torch.Generator().manual_seed(3))

    def nag(model) -> None:
        for number, block in enumerate(model.model.diffusion_model.blocks):
            own = block.cross_attn

            class Guided(type(own)):
                def forward(self, x, context, transformer_options=None, **kwargs):
                    out = super().forward(x, context, transformer_options=transformer_options, **kwargs)
                    away = super().forward(
                        x, text.expand(len(x), -1, -1), transformer_options=transformer_options, **kwargs
                    )
                    return out + 0.5 * (out - away)

            guided = Guided.__new__(Guided)
            guided.__dict__.update(own.__dict__)
            model.add_object_patch(f"diffusion_model.blocks.{number}.cross_attn", guided)

    dense_model = model.clone()
    nag(dense_model)
    clone, session = patched(dense_model, SVG2(density=1.0))
    torch.testing.assert_close(sample(clone, description), sample(dense_model, description), rtol=1e-3, atol=1e-3)
    clone, session = patched(dense_model)
    sample(clone, description)
    assert {record.layer for record in session.report().records} == {0, 1, 2}
    assert len(session.report().records) == 4 * 3 * 2
    assert any("no block of Wan makes it" in note for note in session.report().notes)


def test_the_report_node_in_a_queue(monkeypatch, tmp_path):
    """This sampling's table, none of an earlier one, and what came from the cache."""
    import folder_paths
    from comfy_execution.utils import CurrentNodeContext

    folder_paths.set_temp_directory(str(tmp_path))
    description, model, _ = tiny("wan_t2v")
    node, report = nodes()["VidaccelSparseAttentionSVG2"], nodes()["VidaccelReport"]
    clone, session = node.execute(model, **(defaults(node) | {"min_tokens": 321, "density": 0.7})).result

    def queued(entry: str, latent: tuple[int, int, int] | None) -> str:
        with CurrentNodeContext(entry, "1"):
            if latent is not None:
                sample(clone, description, latent=latent)
            return report.execute(after=None, report=session).result[0]

    assert "4 of 6" in queued("long", (9, 16, 16))
    text = queued("short", (5, 16, 16))
    assert "No call was sparse: min_tokens 321, above the video's 320 tokens (24 calls)." in text
    assert "4 of 6" not in text
    text = queued("cached", None)
    assert text.startswith("The result came from ComfyUI's cache") and "min_tokens 321, above" in text
    clone, session = node.execute(model, **defaults(node)).result
    assert queued("never", None).startswith("The model was not sampled")


@pytest.mark.parametrize("empty", [None, object()])
def test_no_model_is_an_error(empty):
    node = nodes()["VidaccelSparseAttentionSVG2"]
    with pytest.raises(ValueError, match="model is empty: connect"):
        node.execute(empty, **defaults(node))


def test_a_second_node_on_one_model_is_an_error():
    _, model, _ = tiny("wan_t2v")
    clone, _ = patched(model)
    node = nodes()["VidaccelSparseAttentionRadial"]
    for taken in (clone, clone.clone()):
        with pytest.raises(ValueError, match="has sparse attention already"):
            node.execute(taken, **defaults(node))


def test_the_entry_point_lists_the_nodes():
    import vidaccel

    async def listed():
        extension = await vidaccel.comfy_entrypoint()
        return await extension.get_node_list()

    assert set(nodes()) <= {node.define_schema().node_id for node in asyncio.run(listed())}
