"""The nodes for native models in a real ComfyUI: its server and its samplers, on the CPU with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error

import pytest
import torch
from comfy_server import COMFYUI, PACK, PYTHON, ROOT, WHY_SKIPPED
from safetensors.torch import save_file

from vidaccel.attention import METHODS
from vidaccel.nodes.defaults import defaults_of
from vidaccel.pipelines.default_method import DEFAULT_METHOD

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMFYUI, reason=WHY_SKIPPED)]


def graph(node: str | None = None, size: int = 128, frames: int = 17, **inputs) -> dict:
    """Text to video with the tiny model, four steps, the latent saved; `node` between the loader and the sampler."""
    made = {
        "load": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"},
        },
        "yes": {"class_type": "RandomConditioning", "inputs": {"seed": 1}},
        "no": {"class_type": "RandomConditioning", "inputs": {"seed": 2}},
        "empty": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": size, "height": size, "length": frames, "batch_size": 1},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["load", 0],
                "seed": 0,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "positive": ["yes", 0],
                "negative": ["no", 0],
                "latent_image": ["empty", 0],
                "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "test"}},
    }
    if node:
        common = {"density": 0.5, "dense_start_percent": 0.2, "dense_end_percent": 0.0, "dense_layers": ""}
        if node == "SVG2":
            common |= {"compensate": False, "query_clusters": 0, "key_clusters": 0}
        if node == "Tangent":
            common |= {"budget": "density", "tolerance": 0.02, "query_clusters": 0, "key_clusters": 0}
        made["sparse"] = {
            "class_type": f"VidaccelSparseAttention{node}",
            "inputs": {"model": ["load", 0], **common, "min_tokens": 0, "backend": "auto", **inputs},
        }
        made["sample"]["inputs"]["model"] = ["sparse", 0]
        made["report"] = {"class_type": "VidaccelReport", "inputs": {"report": ["sparse", 1], "after": ["sample", 0]}}
        made["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}}
        made["map"] = {"class_type": "PreviewImage", "inputs": {"images": ["report", 1]}}
    return made


def test_the_pack_loads_quickly_and_without_a_warning(server):
    log = server.log.read_text()
    (line,) = [line for line in log.splitlines() if f"/{PACK}" in line and "seconds" in line]
    assert float(line.split("seconds")[0].split()[-1]) < 2 and "IMPORT FAILED" not in line
    assert "is already loaded" not in log and "WARNING:vidaccel" not in log


def test_every_input_of_every_node_has_a_tooltip(server):
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("Vidaccel")}
    others = ("Report", "LoadPipeline", "PipelineLoRA", "AcceleratePipeline", "GenerateVideo", "LoadDCAEV")
    others += ("ApplySLA", "PipelineSLA", "ApplyVSA", "GuidanceFree", "GuidanceFreePipeline", "RadialLength")
    others += ("LoadPreset", "ApplyPreset", "ApplyPresetNative", "Tune", "GuidanceCache", "ForecastCache")
    assert set(nodes) == {f"VidaccelSparseAttention{m}" for m in ("SVG2", "SVG", "Radial", "Tangent", "Sparge")} | {
        f"Vidaccel{name}" for name in others
    }
    for info in nodes.values():
        assert info["category"].startswith("video acceleration") and info["description"]
        for kind in {"required", "optional"} & set(info["input"]):
            assert all(options[1]["tooltip"] for options in info["input"][kind].values())


def test_the_same_input_is_the_same_in_every_node_but_for_what_methods_have_of_their_own(server):
    """Native nodes and Accelerate Pipeline; layers are counted by one and listed by the others."""
    found: dict[str, list] = {}
    known = server.get("/object_info")
    native = ("SVG2", "SVG", "Radial", "Tangent", "Sparge")
    for name in (*(f"SparseAttention{method}" for method in native), "AcceleratePipeline"):
        inputs = known[f"Vidaccel{name}"]["input"]
        for key, (kind, *options) in {**inputs["required"], **inputs.get("optional", {})}.items():
            told = {k: v for k, v in (options[0] if options else {}).items() if k not in ("tooltip", "advanced")}
            found.setdefault(key, []).append((kind if isinstance(kind, str) else "COMBO", told))
    shared = {key: specs for key, specs in found.items() if len(specs) > 1 and key not in ("model", "dense_layers")}
    assert set(shared) == {
        "density",
        "dense_start_percent",
        "dense_end_percent",
        "min_tokens",
        "compensate",
        "backend",
        "measure_error",
        "precision",
        "query_clusters",
        "key_clusters",
    }
    own = [defaults_of(METHODS[name.lower()]) for name in (*native, DEFAULT_METHOD)]
    starts = {key: [told.pop("default") for _, told in shared[key]] for key in ("density", "dense_start_percent")}
    assert starts == {"density": [d.density for d in own], "dense_start_percent": [d.start for d in own]}
    for key, specs in shared.items():
        assert all(spec == specs[0] for spec in specs), (key, specs)
    assert [told["default"] for _, told in found["dense_layers"]] == ["", "", "0", "", "", 0]


def test_density_one_gives_the_video_of_the_unpatched_model(server):
    plain = server.latent(server.queue(graph()), "save")
    patched = server.latent(server.queue(graph("SVG2", density=1.0)), "save")
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(patched, plain, atol=1e-4, rtol=1e-4)


def test_guidance_in_one_pass(server, tmp_path):
    """Whatever cfg and negative prompt the sampler has."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"beta_embedder.linear.weight": 0.1 * torch.randn(256, 64, generator=generator)}
    facts = {"recipe": "gft", "base": "tiny", "base_hash": "0", "part": "transformer", "rank": 2, "unconditional": ""}
    facts["guidance_free"] = {"loss": "white_box", "max_scale": 6.0, "gated": True, "train": "full"}
    save_file(tensors, tmp_path / "a.safetensors", {"vidaccel": json.dumps(facts)})
    made = []
    for cfg, negative, guidance in ((3.0, "no", 4.0), (7.0, "yes", 4.0), (3.0, "no", 2.0)):
        given = graph()
        given["free"] = {
            "class_type": "VidaccelGuidanceFree",
            "inputs": {
                "model": ["load", 0],
                "adapter": "the path below",
                "path": str(tmp_path / "a.safetensors"),
                "guidance": guidance,
            },
        }
        given["sample"]["inputs"] |= {"model": ["free", 0], "cfg": cfg, "negative": [negative, 0]}
        made.append(server.latent(server.queue(given), "save"))
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2], atol=1e-3)


def test_second_passes_left_out(server):
    made = []
    for node in (None, {"every": 2, "first_percent": 0.0, "extrapolation": 0.5}, {"every": 2, "first_percent": 1.0}):
        given = graph()
        if node is not None:
            inputs = {"model": ["load", 0], "extrapolation": 0.5, **node}
            given["cache"] = {"class_type": "VidaccelGuidanceCache", "inputs": inputs}
            given["sample"]["inputs"]["model"] = ["cache", 0]
        made.append(server.latent(server.queue(given), "save"))
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    assert (made[1] - made[0]).norm() < 0.3 * made[0].norm()
    assert "3 of 4 passes of the negative prompt were made" in server.log.read_text()


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("SVG2", {"density": 0.4, "compensate": True}),
        ("SVG", {"density": 0.5}),
        ("Radial", {"density": 0.8}),
        ("Tangent", {"density": 0.4, "measure_error": 32}),
        ("Tangent", {"budget": "tolerance", "tolerance": 0.05}),
        ("Sparge", {"density": 0.5}),
    ],
)
def test_each_method_runs_and_reports(server, node, inputs):
    entry = server.queue(graph(node, **inputs))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert server.latent(entry, "save").isfinite().all()
    text = entry["outputs"]["text"]["text"][0]
    assert "Mean density" in text and "dense_start_percent (" in text and f"{node}: " in text
    assert ("tolerance 0.05" in text) == ("tolerance" in inputs) and ("Measured error" in text) == (
        "measure_error" in inputs
    )
    (picture,) = entry["outputs"]["map"]["images"]
    assert server.file(picture).stat().st_size > 2000


def test_another_size_and_the_first_one_again(server):
    settings = {"density": 0.4}
    first = server.latent(server.queue(graph("SVG2", **settings)), "save")
    other = server.latent(server.queue(graph("SVG2", size=160, frames=9, **settings)), "save")
    again = server.queue(graph("SVG2", **{**settings, "dense_end_percent": 0.001}))  # not from ComfyUI's cache
    assert other.shape == (1, 16, 3, 20, 20) and first.shape == (1, 16, 5, 16, 16)
    assert again["status"]["status_str"] == "success"


def test_the_model_classes_in_comfyuis_own_python():
    """`test_native_comfyui.py`, where the Python that runs these tests cannot import ComfyUI."""
    if sys.executable == PYTHON:
        pytest.skip("this Python runs them itself")
    if subprocess.run([PYTHON, "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no pytest: install it there to run ComfyUI's model classes")
    tests = ROOT / "tests" / "nodes" / "test_native_comfyui.py"
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_report_without_its_node_says_so(server):
    made = graph("SVG2")
    del made["sparse"], made["report"]["inputs"]["report"]
    made["sample"]["inputs"]["model"] = ["load", 0]
    entry = server.queue(made)
    assert "bypassed or not connected" in entry["outputs"]["text"]["text"][0]


def test_the_report_is_of_this_sampling(server):
    """A second run that stays dense shows nothing of the first, and a cached one says that it is."""

    def text_of(made: dict) -> str:
        return server.queue(made)["outputs"]["text"]["text"][0]

    made = graph("SVG2", density=0.45)
    assert "4 of 4" in text_of(made) or "8 of 8" in text_of(made)
    dense = graph("SVG2", density=0.45, size=112)
    dense["sparse"]["inputs"]["min_tokens"] = 257
    text = text_of(dense)
    assert "No call was sparse: min_tokens 257, above the video's" in text and " of " in text
    dense["second"] = {"class_type": "VidaccelReport", "inputs": {"report": ["sparse", 1], "after": ["empty", 0]}}
    dense["text"]["inputs"]["source"] = ["second", 0]
    text = text_of(dense)  # the sampler and the first report came from the cache
    assert text.startswith("The result came from ComfyUI's cache"), text


def test_bad_values_are_refused_and_the_queue_goes_on(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.queue(graph("SVG2", density=7.0))
    assert "density" in refused.value.read().decode() and refused.value.code == 400
    for inputs, message in (
        ({"density": 0.4, "dense_start_percent": 0.9, "dense_end_percent": 0.2}, "leave no step sparse"),
        ({"density": 0.4, "dense_layers": "7"}, "the model has 2 layers"),
        ({"density": 0.4, "backend": "triton"}, "backend 'triton'"),
        ({"density": 0.01}, "Sparse Attention (SVG): density is 0.01, and with a video of 5 frames of 8x8 it must be"),
    ):
        entry = server.queue(graph("SVG", **inputs))
        assert entry["status"]["status_str"] == "error" and message in json.dumps(entry["status"])
    assert server.queue(graph())["status"]["status_str"] == "success"


def test_every_seed_says_what_happens_to_it_after_a_run(server):
    """Of one that does not, the page draws another after each run: a graph of the same values would be another."""
    known = {name: node for name, node in server.get("/object_info").items() if name.startswith("Vidaccel")}
    seeds = {
        name: options[1]
        for name, node in known.items()
        for inputs in node["input"].values()
        for field, options in inputs.items()
        if field in ("seed", "noise_seed")
    }
    assert {name: options["control_after_generate"] for name, options in seeds.items()} == {
        "VidaccelGenerateVideo": True,
        "VidaccelTune": "fixed",
    }
