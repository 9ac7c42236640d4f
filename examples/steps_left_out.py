"""Steps that can be foretold are not computed: alone, and together with sparse attention."""

import argparse
import time

import torch
from diffusers import DiffusionPipeline

import vidaccel
from vidaccel import Preset, Tangent
from vidaccel.pipelines.presets import Cache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(vidaccel.demo.path()), help="a folder or hub id of a diffusers pipeline")
parser.add_argument("--prompt", default="a red circle moves left on a grey background")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--threshold", type=float, default=0.1, help="how far off a forecast may be; more is faster")
wanted = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(wanted.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")
pipe.set_progress_bar_config(disable=True)
size = {} if wanted.model != str(vidaccel.demo.path()) else {"num_frames": 33, "height": 128, "width": 128}
cache = Cache("forecast", wanted.threshold)
presets = {
    "all steps": Preset(name="all steps"),
    "forecast": Preset(name="forecast", cache=cache),
    "forecast and tangent": Preset(name="forecast and tangent", cache=cache, method=Tangent()),
}
for name, preset in presets.items():
    with vidaccel.apply(pipe, preset) as handle:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        pipe(wanted.prompt, num_inference_steps=wanted.steps, generator=generator, **size)
        print(f"{name}: {time.perf_counter() - began:.1f} s, {handle.report().in_words()}")
        for note in handle.report().own_notes:
            print(" ", note)
