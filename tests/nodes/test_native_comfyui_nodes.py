"""The sparse attention nodes themselves, on ComfyUI's own model in this process.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import asyncio
import re

import pytest
import torch
from huggingface_hub import constants
from native_comfyui import defaults, nodes, patched, sample, tiny

from vidaccel.attention import METHODS
from vidaccel.generation.tuning.store import store
from vidaccel.nodes.native.sampling import parse_layers
from vidaccel.pipelines.break_even import BreakEven, Key, limit

SPARSE = [f"VidaccelSparseAttention{name}" for name in ("SVG2", "SVG", "Radial", "Tangent", "Sparge")]


def test_every_input_and_node_is_explained():
    for name, node in nodes().items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.category.startswith("video acceleration")
        assert name.startswith("Vidaccel") and schema.display_name.startswith(
            ("Sparse Attention", "Apply SLA", "Apply VSA")
        )
        for item in schema.inputs:
            assert item.tooltip and item.tooltip.endswith("."), (name, item.id)
        assert node.GET_NODE_INFO_V1()["input"]["required"]


@pytest.mark.parametrize("name", SPARSE)
def test_a_node_starts_with_what_its_method_has_in_python(name):
    values, method = defaults(nodes()[name]), METHODS[name.removeprefix("VidaccelSparseAttention").lower()]()
    assert values["density"] == (getattr(method, "density", None) or 0.3)
    assert values["dense_start_percent"] == method.schedule.first_steps
    assert parse_layers(values["dense_layers"], 30) == frozenset(range(method.schedule.first_layers))


@pytest.mark.parametrize("name", SPARSE)
def test_a_node_patches_a_clone_and_the_report_node_shows_it(name, tmp_path):
    import folder_paths

    description, model, unpatched = tiny("wan_t2v")
    node = nodes()[name]
    values = defaults(node) | {"min_tokens": 0, "density": 0.7, "dense_start_percent": 0.25}
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
    for tolerance in (0.3, 1e-8):  # random weights attend to everything alike, so even clusters are hardly wrong
        values = {"min_tokens": 0, "budget": "tolerance", "tolerance": tolerance, "measure_error": 64}
        clone, session = node.execute(model, **(defaults(node) | values)).result
        sample(clone, description, latent=(9, 16, 16))
        report = session.report()
        assert "density" not in report.config and report.config["tolerance"] == tolerance
        assert report.measured() and all(r.predicted_error <= max(tolerance, 1e-6) for r in report.measured())
        densities.append(report.mean_density())
    assert densities[0] < densities[1]


@pytest.mark.parametrize("name", SPARSE)
def test_defaults_leave_short_videos_dense(name):
    description, model, unpatched = tiny("wan_t2v")
    clone, session = nodes()[name].execute(model, **defaults(nodes()[name])).result
    assert sample(clone, description).equal(unpatched)
    assert set(session.report().dense_reasons()) == {"min_tokens 8192, above the video's 320 tokens"}


@pytest.mark.parametrize("name", SPARSE)
def test_defaults_go_by_what_was_measured_on_this_machine(name, tmp_path, monkeypatch):
    """The key is of the heads of the model's own calls, and of the node's method."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    description, model, unpatched = tiny("wan_t2v")
    clone, session = nodes()[name].execute(model, **(defaults(nodes()[name]) | {"density": 0.7})).result
    assert sample(clone, description).equal(unpatched)
    own = model.model.diffusion_model
    method = name.removeprefix("VidaccelSparseAttention").lower()
    key = Key.here(own.num_heads, own.dim // own.num_heads, torch.device("cpu"), torch.float32, method)
    (note,) = session.report().notes
    assert f"`{limit(key).why.split('`')[1]}`" in note and f"--heads {own.num_heads} " in note
    store(key, BreakEven(40, 0))
    assert not sample(clone, description).equal(unpatched)
    assert any("min_tokens 40: On this machine" in note for note in session.report().notes)


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
        ({"precision": "fp4"}, "precision is 'fp4'"),
        ({"precision": "int8", "backend": "gather"}, "precision is int8: backend 'gather' does not compute with"),
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


def test_the_report_node_in_a_queue(monkeypatch, tmp_path):
    """This sampling's table, none of an earlier one, and what came from the cache."""
    import folder_paths
    from comfy_execution.utils import CurrentNodeContext

    folder_paths.set_temp_directory(str(tmp_path))
    description, model, _ = tiny("wan_t2v")
    node, report = nodes()["VidaccelSparseAttentionSVG2"], nodes()["VidaccelReport"]
    clone, session = node.execute(
        model, **(defaults(node) | {"min_tokens": 321, "density": 0.7, "dense_layers": "0"})
    ).result

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


def listed() -> list:
    """All nodes of the package."""
    import vidaccel

    async def asked():
        extension = await vidaccel.comfy_entrypoint()
        return await extension.get_node_list()

    return asyncio.run(asked())


def test_a_size_may_be_any_number():
    """ComfyUI's page rounds to multiples of the step, and DC-VideoGen makes 540 rows, which became 544."""
    sides = [item for node in listed() for item in node.GET_SCHEMA().inputs if item.id in ("width", "height")]
    assert len(sides) >= 4 and all(item.step in (None, 1) for item in sides)


def test_the_entry_point_lists_the_nodes():
    assert set(nodes()) <= {node.define_schema().node_id for node in listed()}


def test_a_node_with_a_file_runs_again_once_that_was_changed(tmp_path):
    """Its inputs may have links: ComfyUI then gives None, before it runs anything."""
    file, paths = tmp_path / "adapter.safetensors", {}
    for node in listed():
        names = {item.id for item in node.define_schema().inputs}
        if "path" not in names:
            continue
        empty = node.fingerprint_inputs(**dict.fromkeys(names))
        states = []
        for content in ("trained", "trained anew"):
            file.write_text(content)
            places = [str(file), f" {tmp_path} "]
            states.append([node.fingerprint_inputs(**dict.fromkeys(names) | {"path": place}) for place in places])
        assert all(one != other != empty for one, other in zip(*states, strict=True)), node.__name__
        paths[node.__name__] = empty
    assert len(paths) == 9
