"""A model in a deep-compression latent space, with sparse attention on top."""

import argparse

from diffusers.utils import export_to_video

import vidaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(vidaccel.demo.path("demo-dc")))
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--out", default="deep_compression.mp4")
wanted = parser.parse_args()

pipe = vidaccel.DCVideoGenPipeline.from_pretrained(wanted.model)
with vidaccel.accelerate(pipe, vidaccel.SVG2(density=0.5, compensate=True)) as handle:
    video = pipe(
        "a blue triangle moves right on a white background",
        num_frames=32,
        height=128,
        width=128,
        num_inference_steps=wanted.steps,
        guidance_scale=2.0,
    ).frames[0]
print(handle.report())
export_to_video(video, wanted.out, fps=16)
