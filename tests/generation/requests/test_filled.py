"""A request and its preset as one: what goes before what, and whose fault an error tells."""

from __future__ import annotations

import pytest

import vidaccel
from vidaccel import SLA, SVG, SVG2, Preset, Radial
from vidaccel.generation.errors import BadInput
from vidaccel.generation.job import prepare
from vidaccel.generation.requests.filled import filled
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.requests.sparse import Sparse
from vidaccel.pipelines.presets import Cache, load_preset

PROMPT = "a red circle moves left on a grey background"
SMALL = {"frames": 9, "height": 64, "width": 64, "device": "cpu", "progress": False}
ADAPTERS = {"lora": (), "guidance_free": (), "sla": ()}


def of(preset, sparse=None, *, levers=None, **adapters):
    return filled(preset, levers or {}, Settings(PROMPT), sparse or Sparse(), {**ADAPTERS, **adapters})


@pytest.mark.parametrize("name", ["", "a"])
def test_a_preset_of_any_name_brings_its_method(name):
    """Without a name, too: what is given beside the method alone is told apart by no preset being there."""
    preset = Preset(name=name, method=SVG2(density=0.5), backend="gather", precision="int8")
    made = of(preset).sparse
    assert (made.methods, made.backend, made.precision) == ((preset.method,), "gather", "int8")
    assert of(Preset(name=name, cache="forecast")).sparse.methods == ("dense",)
    alone = of(None, levers={"cache": "forecast"})
    assert alone.preset.cache == Cache("forecast") and alone.sparse.methods == () and not alone.of_preset
    radial = Preset(name=name, method=Radial())
    assert list(prepare("demo", Settings(PROMPT), Sparse(), device="cpu", preset=radial).methods) == ["radial"]


def test_none_leaves_out_what_a_preset_has():
    preset = Preset(name="a", method=SLA(), sla="s", loras="l", guidance_free="own")
    whole = of(preset)
    assert (whole.lora, whole.guidance_free, whole.sla) == (preset.loras, True, ("s",))
    assert {"lora", "guidance_free", "sla", "method"} <= whole.of_preset
    bare = of(preset, levers={"guidance_cache": 2}, lora=["none"], guidance_free="none", sla=["none"])
    assert (bare.lora, bare.guidance_free, bare.sla) == ((), (), ())
    assert not {"lora", "guidance_free", "sla", "method"} & bare.of_preset and bare.preset.guidance_free == ()
    assert of(None, lora="none").lora == ()


def test_without_its_adapters_a_method_that_needs_them_goes_too():
    """The run ended after the weights were loaded."""
    preset = Preset(name="a", method=SLA(), sla="gone", backend="gather", precision="int8")
    bare = of(preset, sla="none")
    assert (bare.sparse, bare.method) == (Sparse(methods=("dense",)), None)
    assert [note.partition(";")[0] for note in bare.notes] == [
        "Without its adapters the preset's method sla is left out, too"
    ]
    assert prepare("demo", Settings(PROMPT), Sparse(), device="cpu", preset=preset, sla="none").methods == {
        "dense": None
    }
    given = of(preset, Sparse(methods=("sla",)), sla="none")
    assert given.sparse.methods == ("sla",) and not given.notes
    untrained = of(Preset(method=SLA(linear_scope="none"), sla="gone"), sla="none")
    assert untrained.method == SLA(linear_scope="none") and not untrained.notes


def test_loras_that_go_before_those_of_a_preset_are_told():
    made = of(Preset(name="a", loras=["x.safetensors", "y.safetensors"]), lora=["z.safetensors"])
    assert made.lora == ["z.safetensors"] and "lora" not in made.of_preset
    (note,) = made.notes
    assert note.startswith("What the preset has as loras (x.safetensors, y.safetensors) is not loaded: ")


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ({"loras": "gone.safetensors"}, {}, "^preset cannot be used: loras is gone.safetensors: there is no such file"),
        ({"guidance_free": "gone"}, {}, "^preset cannot be used: guidance_free: .*gone"),
        ({"method": SLA(), "sla": "gone"}, {}, "^preset cannot be used: attention.adapters: .*gone"),
        ({"decoder": "gone.safetensors"}, {}, "^preset cannot be used: decoder: gone.safetensors: there is no such"),
        ({"method": SVG2(), "backend": "triton"}, {}, "^preset cannot be used: attention.backend is triton: "),
        ({"num_inference_steps": 2}, {"guidance_cache": 2}, "^guidance_cache cannot be used: it makes both passes in"),
        (
            {"method": SVG()},
            {"density": 0.01},
            "^density cannot be used with svg, the method of preset: SVG density 0.01",
        ),
        ({"method": SVG()}, {"settings": {"svg": {"density": 0.01}}}, "^settings cannot be used with svg, the "),
        (
            {"guidance_scale": 1.0},
            {"negative_prompt": "x"},
            "^negative_prompt is of no use: preset's guidance_scale is 1",
        ),
        ({"loras": "gone.safetensors"}, {"lora": "gone"}, "^lora is gone: there is no such file"),
        ({"decoder": "gone.safetensors"}, {"decoder": "nowhere"}, "^decoder cannot be used: nowhere: there is no such"),
    ],
)
def test_what_is_wrong_is_said_of_what_the_request_has(preset, given, message, loads_nothing):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate("demo", PROMPT, preset=Preset(name="a", **preset), **given, **SMALL)


def test_a_value_of_a_preset_that_is_wrong_for_its_adapter_is_told_as_the_presets():
    other = load_preset("demo-dc-four-steps").replace(num_inference_steps=6)
    with pytest.raises(BadInput, match="^preset cannot be used: num_inference_steps is 6: few_steps_4.* 4 steps"):
        vidaccel.generate("demo-dc", PROMPT, preset=other, **SMALL)
    with pytest.raises(BadInput, match="^steps is 6: few_steps_4"):
        vidaccel.generate("demo-dc", PROMPT, preset="demo-dc-four-steps", steps=6, **SMALL)
