"""The code of the Markdown pages: its blocks, its command lines, and what stands in for the files that they name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import gft_adapters
import length_adapters
import sla_models
import tiny_adapter
import tiny_dc
import tiny_images
import vsa_models
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import save_file

from vidaccel import Radial, demo
from vidaccel.pipelines.deep_compression.text_to_image import DCGenFluxPipeline
from vidaccel.pipelines.few_steps import convert_fastwan

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
# What makes a call long: each becomes as small as the built-in model takes it.
_SMALL = {"num_frames": 9, "height": 96, "width": 96}


def pages() -> dict[str, str]:
    """Text of every page, by its path in the repository."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*.md")]
    files += (ROOT / "nodes" / "web" / "docs").rglob("*.md")
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, indented ones too."""
    found = (match for match in _BLOCK.finditer(text) if match["language"] == language)
    return [re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE) for match in found]


def commands(text: str) -> list[list[str]]:
    """The command lines of the `bash` blocks, in words; lines of comments alone are none."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def small(code: str) -> str:
    """Python code with two steps, short videos and a CPU, so that it runs in a second; four steps stay four."""
    for name, value in _SMALL.items():
        code = re.sub(rf"\b{name}=\d\d+", f"{name}={value}", code)
    code = re.sub(r"\bnum_inference_steps=(?!4\b)\d+", "num_inference_steps=2", code)
    code = re.sub(r"\bsteps=\d+", "steps=2, frames=9, height=96, width=96", code)
    return code.replace('"cuda"', '"cpu"')


def make_files(folder: Path) -> None:
    """What the examples of the pages read, by the names that they have there; the weights are random."""
    base = demo.path()
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    for kind, name in (
        ("gft", "runs/gft"),
        ("gft", "runs/my_gft"),
        ("few", "runs/few_steps"),
        ("few", "runs/my_few_steps"),
        ("length", "runs/length"),
        ("length", "runs/my_length"),
    ):
        (folder / name / "adapter").mkdir(parents=True)
        if kind == "gft":
            written = gft_adapters.write_adapter(folder / name / "adapter", base, transformer)
        elif kind == "few":
            scales = {"min_scale": 2.0, "max_scale": 5.0, "gated": False}
            few = {"sigmas": [1.0, 0.9, 0.75, 0.5], "objective": "segments", "teacher_steps": 4}
            header = {"recipe": "consistency", "guidance_free": scales, "few_steps": few}
            written = gft_adapters.write_adapter(folder / name / "adapter", base, transformer, **header)
        else:
            method = Radial(16, decay=0.3, min_window=0, sink=False)
            written = length_adapters.write_length(folder / name / "adapter", base, transformer, method=method)
        written.rename(written.with_name("pytorch_lora_weights.safetensors"))  # as a training names it
    trained = sla_models.write_model(folder / "turbowan-1.3b", base)
    convert_fastwan(vsa_models.write_gates(folder / "FastWan", base), folder / "fastwan-1.3b", link=True)
    (folder / "runs" / "my_sla").mkdir()
    shutil.copytree(trained, folder / "runs" / "my_sla" / "pipeline")
    _, lora = gft_adapters.random_lora(transformer, "transformer")
    save_file(lora, folder / "lightx2v_4step.safetensors")
    (folder / "runs" / "my_wan").mkdir()
    (folder / "runs" / "my_wan" / "pipeline").symlink_to(demo.path("demo-dc"))
    tiny_adapter.write_adapter(folder / "runs" / "my_wan" / "adapter")
    (folder / "runs" / "my_autoencoder").mkdir()
    (folder / "runs" / "my_autoencoder" / "autoencoder").symlink_to(demo.path("demo-dc") / "vae")
    text = tiny_dc.make_text()
    DCGenFluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_images.autoencoder_dc(4, 4),
        transformer=tiny_images.flux_transformer(),
        **text,
        **{f"{name}_2": part for name, part in text.items()},
    ).save_pretrained(folder / "runs" / "my_flux" / "pipeline")
