"""The engine without a pipeline, on q, k and v of any transformer: torch is all it needs."""

import torch

from vidaccel import SVG2, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory

layout = VideoLayout(frames=9, height=16, width=16)
q, k, v = torch.randn(3, 1, 2, layout.tokens, 64)  # [B, H, N, D] each
memory = PlanMemory()  # keep it from step to step: centroids are warm-started from it

plan = SVG2(density=0.3).plan(q, k, v, layout, memory)
out = sparse_attention(q, k, v, plan)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
error = (out - dense).norm() / dense.norm()
print(f"{plan.density():.0%} of the pairs, relative error {error:.2f} (random tokens are the hardest case)")
