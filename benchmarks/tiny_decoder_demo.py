"""The tiny decoder of the built-in DC-VideoGen model beside its autoencoder's own, on 64 prompts in four steps.

    python benchmarks/tiny_decoder_demo.py                # some minutes on a CPU

Each held-out prompt is made once with each decoder from the same noise, by the distilled model: whether the video shows
all that the prompt says, how far the one is from the other, and CPU-seconds. Results go to
`benchmarks/results/tiny_decoder_demo.*`, and the accuracy to `demo/accuracy_decoder.json`, which `vidaccel demo`
quotes.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, environment_line, write_markdown
from gft_demo import MODELS, loaded, made, psnr

OWN, TINY = DECODERS = "autoencoder", "tiny"
SCALE = 2.0


def rows_of(pipe: Any, steps: int, number: int) -> dict[str, dict[str, Any]]:
    """A prompt with each decoder; they take turns in which comes first."""
    import vidaccel
    from vidaccel import demo

    videos, rows = {}, {}
    for name in DECODERS if number % 2 else DECODERS[::-1]:
        with vidaccel.tiny_decoder(pipe) if name == TINY else contextlib.nullcontext() as handle:
            prompt = demo.HELD_OUT_PROMPTS[number]
            videos[name], rows[name] = made(pipe, MODELS[demo.DC][1], prompt, number, SCALE, steps)
            if handle is not None:
                rows[name]["decode"] = handle.seconds[-1]
    rows[TINY]["psnr"] = psnr(videos[TINY], videos[OWN])
    return rows


def write(found: list[dict[str, dict[str, Any]]], steps: int, out: Path, accuracy: Path | None, digest: str) -> None:
    """The table, and what `vidaccel demo` quotes."""
    from vidaccel import demo
    from vidaccel.generation.showcase.measured import own_decoder

    parameters = sum(file.stat().st_size for file in (demo.path(demo.DC) / "tiny_decoder").glob("*.safetensors")) // 2
    table = []
    for name in DECODERS:
        rows = [each[name] for each in found]
        distances = [row["psnr"] for row in rows if "psnr" in row]
        table.append(
            {
                "decoder": name,
                "right": f"{sum(row['right'] for row in rows)} of {len(rows)}",
                "PSNR to the autoencoder's, dB": f"{statistics.fmean(distances):.1f}" if distances else "",
                "lowest": f"{min(distances):.1f}" if distances else "",
                "CPU-s a video": f"{statistics.median(row['video'] for row in rows):.2f}",
            }
        )
    both = sum(each[OWN]["right"] and each[TINY]["right"] for each in found)
    write_markdown(
        out / "tiny_decoder_demo.md",
        "The tiny decoder of the built-in DC-VideoGen model",
        f"`python benchmarks/tiny_decoder_demo.py`; {environment_line()}, one thread, on a machine with other work.\n\n"
        f"{len(found)} held-out prompts, each from its own seed, {steps} steps of one pass (an adapter of "
        f"`consistency`), guidance {SCALE:g}; the latents are the same for both decoders. *Right* is whether shape, "
        f"colour, motion and background are read from the video as the prompt says; {both} are right with both. "
        "CPU-seconds are the median of a whole call, text and decoding included. The tiny decoder has "
        f"{parameters / 1e6:.1f} million parameters; how it was trained: `lora/configs/demo_dc_tiny_decoder.yaml`.",
        table,
    )
    (out / "tiny_decoder_demo.json").write_text(
        json.dumps({"steps": steps, "adapter": digest, "decoder": own_decoder(), "rows": found}, indent=1) + "\n"
    )
    if accuracy is not None:
        told = {
            "model": demo.DC,
            "steps": steps,
            "guidance_scale": SCALE,
            "adapter": digest,
            "decoder": own_decoder(),
            "right": sum(each[TINY]["right"] for each in found),
            "prompts": len(found),
        }
        stated = {"made_by": "benchmarks/tiny_decoder_demo.py", "checker": "shape, colour, motion and background"}
        accuracy.write_text(json.dumps({**stated, "rows": [told]}, indent=1) + "\n")


def main(
    prompts: int = 64,
    out: Path = RESULTS,
    accuracy: Annotated[Path | None, typer.Option(help="What vidaccel demo quotes; else that of the package.")] = None,
) -> None:
    """Make all prompts with both decoders, and write the table."""
    import torch

    import vidaccel
    from vidaccel import demo
    from vidaccel.generation.showcase.measured import file_digest
    from vidaccel.pipelines.guidance_free import read_adapter

    torch.set_num_threads(1)
    adapter = demo.few_steps()[-1]
    steps = len(read_adapter(adapter).sigmas)
    pipe = loaded(demo.DC)
    found = []
    with vidaccel.guidance_free(pipe, adapter):
        for number in range(prompts):
            found.append(rows_of(pipe, steps, number))
            told = found[-1][TINY]
            print(f"{number}: {told['psnr']:.1f} dB, right {told['right']}, {told['decode']:.3f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    table = demo.path(demo.WAN).parent / "accuracy_decoder.json" if accuracy is None else accuracy
    write(found, steps, out, table, file_digest(adapter))


if __name__ == "__main__":
    typer.run(main)
