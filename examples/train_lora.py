"""Train a LoRA and load it in stock diffusers. Two steps show how; the ready settings `demo_lora` have a hundred."""

import argparse

from diffusers import WanPipeline

import vidaccel
from vidaccel.lora import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--out", default="runs/example_lora")
wanted = parser.parse_args()

run(
    "lora",
    "demo_lora",
    [
        f"out={wanted.out}",
        f"train.steps={wanted.steps}",
        "train.lr_warmup_steps=1",
        "train.batch_size=1",
        "data.cache=null",
        "data.clips=4",
        "data.sizes=[{frames: 9, height: 64, width: 64}]",
        "validation.clips=0",
        "validation.prompts=[]",
    ],
)

pipe = WanPipeline.from_pretrained(vidaccel.demo.path())
pipe.load_lora_weights(f"{wanted.out}/adapter")
print("loaded:", ", ".join(pipe.get_active_adapters()))
