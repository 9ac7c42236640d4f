"""Sparse attention in a diffusers pipeline, with what it skipped and what that cost."""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

import vidaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(vidaccel.demo.path()))
parser.add_argument("--prompt", default="a red circle moves left on a grey background")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--out", default="accelerated.mp4")
wanted = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(wanted.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")
size = {} if wanted.model != str(vidaccel.demo.path()) else {"num_frames": 33, "height": 128, "width": 128}

with vidaccel.accelerate(pipe, vidaccel.Tangent(density=0.2), measure_error=64) as handle:
    video = pipe(wanted.prompt, num_inference_steps=wanted.steps, **size).frames[0]

print(handle.report())
print(handle.report().error_in_words())
export_to_video(video, wanted.out, fps=16)
