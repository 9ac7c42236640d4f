"""Methods, families and whole pipelines on a GPU that is not there: what they launch can be launched, and the host
waits for little."""

from __future__ import annotations

import json

import pytest
import tiny_families
from fast_set import slow
from gpu_compiler import run_with_compiler

SCRIPT = """
from pretended_gpu import families, methods, pipelines
print(json.dumps({name: globals()[name].run(**given) for name, given in json.loads(sys.argv[1]).items()}))
"""

ARCHITECTURES = (80, 89, 90, 100, 120)
WITH_FP8 = (89, 100, 120)
# The model itself takes as many tokens as a mask has, which only values tell.
DYNAMIC = {"mochi", "hunyuan_video_15", "hunyuan_video_15_i2v"}
DENSE = {"skyreels_v2_causal", "ltx2_masked"}
FAMILIES = {name for name in tiny_families.BUILDERS if name not in DYNAMIC}
PIPELINES = {"tangent", "radial", "svg2, int8", "cache", "longer"}
PIPELINES |= {"deep compression, few steps", "deep compression, guidance-free"}
FAST_FAMILIES, FAST_PIPELINES = {"hunyuan_video"}, {"radial"}

STEPS, BRANCHES = 4, 2
# The table of timesteps, once; q and k for NaN, in the first layer of a step; what caches decide by.
KNOWN = {"read_table": STEPS, "call_checks.py finite": 2 * STEPS, "> sea_cache.py": 10 * STEPS * BRANCHES}
KNOWN |= {"forecasts.py jumps": 2 * STEPS, "postprocess_video": 1}


def rehearse(folder, **asked):
    return run_with_compiler(SCRIPT, folder, json.dumps(asked))


@pytest.fixture(scope="module")
def fast_ones(tmp_path_factory):
    """All that is fast, in one process, since imports take the longest."""
    asked = {"families": {"names": sorted(FAST_FAMILIES)}, "pipelines": {"names": sorted(FAST_PIPELINES)}}
    return rehearse(tmp_path_factory.mktemp("rehearsal"), methods={"capability": (9, 0)}, **asked)


def check_methods(results, architecture):
    assert len(results) == 13 * (5 if architecture in WITH_FP8 else 4)
    for result in results:
        assert result["launches"], result
        assert not result["problems"] and not result["waits"], result
        # A kernel that is compiled anew holds up a run for a second or two: in the first steps alone.
        assert not result.get("late"), result


def test_methods(fast_ones):
    check_methods(fast_ones["methods"], 90)


@pytest.mark.parametrize("architecture", [slow(architecture) for architecture in ARCHITECTURES])
def test_what_methods_launch_compiles(architecture, tmp_path):
    given = {"capability": divmod(architecture, 10), "compile": True}
    check_methods(rehearse(tmp_path, methods=given)["methods"], architecture)


def check_families(results, names):
    assert {result["name"] for result in results} == names
    for result in results:
        assert bool(result["launches"]) == (result["name"] not in DENSE), result
        assert not result["problems"] and not result["waits"], result


def test_families(fast_ones):
    check_families(fast_ones["families"], FAST_FAMILIES)


@pytest.mark.slow
def test_other_families(tmp_path):
    names = FAMILIES - FAST_FAMILIES
    check_families(rehearse(tmp_path, families={"names": sorted(names)})["families"], names)


def check_pipelines(results, names):
    assert {result["name"] for result in results} == names
    for result in results:
        frames = 32 if "deep" in result["name"] else 33
        assert (result["shape"], result["device"]) == ([1, frames, 3, 128, 128], "cuda:0"), result
        assert not result["problems"], result
        for wait, count in result["waits"].items():
            assert count <= max((most for known, most in KNOWN.items() if known in wait), default=0), (wait, count)


def test_pipelines(fast_ones):
    check_pipelines(fast_ones["pipelines"], FAST_PIPELINES)


@pytest.mark.slow
def test_other_pipelines(tmp_path):
    names = PIPELINES - FAST_PIPELINES
    check_pipelines(rehearse(tmp_path, pipelines={"names": sorted(names)})["pipelines"], names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"method": "radial"}, {"method": "radial", "offload": True}, {"method": "svg", "measure_error": 4}],
    ids=str,
)
def test_generate(options, tmp_path):
    script = "from pretended_gpu import pipelines\n"
    script += "print(json.dumps(pipelines.generate(sys.argv[1], **json.loads(sys.argv[2]))))"
    seen = run_with_compiler(script, tmp_path, tmp_path, json.dumps(options))
    assert seen["size"] > 500 and seen["launches"] and not seen["problems"], seen
