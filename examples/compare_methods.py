"""Several settings beside the dense video of the same seed: numbers here, pictures in `report.html`."""

import argparse

import vidaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--prompt", default="a green square moves up on a black background")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--report", default="report.html")
wanted = parser.parse_args()

made = vidaccel.generate(
    wanted.model,
    wanted.prompt,
    steps=wanted.steps,
    compare=True,
    method=[vidaccel.Tangent(density=0.2), vidaccel.SVG2(density=0.2, compensate=True)],
    warm_up=wanted.model != "demo",  # there is nothing to compile at its size
    report=wanted.report,
)
for name, metrics in made.metrics.items():
    print(f"{name}: {metrics.mean_psnr:.1f} dB from dense")
