"""Two processes compute a branch of guidance each, on two GPUs or on the cores of a CPU.

    torchrun --nproc-per-node 2 examples/two_processes.py

Without torchrun, one process makes both, to compare with.
"""

import argparse
import contextlib
import os
import time

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

import vidaccel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(vidaccel.demo.path()))
parser.add_argument("--prompt", default="a red circle moves left on a grey background")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--frames", type=int, default=33)
parser.add_argument("--size", type=int, default=128, help="of the built-in model's video, in pixels")
wanted = parser.parse_args()

rank, on_gpu = int(os.environ.get("RANK", "0")), torch.cuda.is_available()
if "RANK" in os.environ:
    dist.init_process_group("nccl" if on_gpu else "gloo")
if on_gpu:
    torch.cuda.set_device(rank)
pipe = DiffusionPipeline.from_pretrained(wanted.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu").set_progress_bar_config(disable=True)
size = {"num_frames": wanted.frames, "height": wanted.size, "width": wanted.size}
size = size if wanted.model == str(vidaccel.demo.path()) else {}

with contextlib.ExitStack() as stack:
    shared = stack.enter_context(vidaccel.cfg_parallel(pipe)) if dist.is_initialized() else None
    call = {"prompt": wanted.prompt, "output_type": "latent", **size}
    pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0))  # shapes are learned here
    start = time.perf_counter()
    latents = pipe(**call, num_inference_steps=wanted.steps, generator=torch.Generator().manual_seed(0)).frames
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start

if rank == 0:
    print(f"{seconds:.2f} s for {wanted.steps} steps; {shared.note() if shared else 'one process'}")
    print(f"the sum of the latents: {latents.double().sum().item():.6f}")
if dist.is_initialized():
    dist.destroy_process_group()
