"""A method of your own: which keys each block of queries reads. It then works with every model and backend.

This one reads the frame itself and the ones beside it. Some models have text before or after the video in the sequence:
it reads all and is read by all.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel.attention import BlockPlan, DenseSchedule, Method, PlanMemory, VideoLayout


@dataclass(frozen=True, kw_only=True)
class NearFrames(Method):
    """A window over frames.

    Args:
        reach: frames to either side that are read.
    """

    name: ClassVar[str] = "near-frames"
    summary: ClassVar[str] = "each frame reads itself and its neighbours"
    good_for: ClassVar[str] = "an example"
    costs: ClassVar[str] = "frames further away are never seen"
    source: ClassVar[str] = "-"

    reach: int = 1
    schedule: DenseSchedule = field(default_factory=lambda: DenseSchedule(first_steps=0.4))

    def expected_density(self, layout: VideoLayout) -> float | None:
        return None

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        if "plan" not in memory.layout:  # it depends on nothing but the layout, so all layers and steps share it
            frame = torch.arange(layout.frames)
            sizes = [layout.text_before, *[layout.tokens_per_frame] * layout.frames, layout.text_after]
            reads = torch.ones(len(sizes), len(sizes), dtype=torch.bool)
            reads[1:-1, 1:-1] = (frame[:, None] - frame).abs() <= self.reach
            tiles, n = torch.tensor(sizes).view(1, 1, -1), layout.tokens
            plan = BlockPlan.from_clusters(tiles, tiles, reads[None, None], n_q=n, n_kv=n)
            memory.layout["plan"] = plan.to(q.device)
        return memory.layout["plan"]


if __name__ == "__main__":
    pipe = WanPipeline.from_pretrained(vidaccel.demo.path())
    with vidaccel.accelerate(pipe, NearFrames(reach=2), measure_error=64) as handle:
        pipe(
            "a red circle moves left on a grey background",
            num_frames=33,
            height=128,
            width=128,
            num_inference_steps=5,
        )
    print(handle.report())
    print(handle.report().error_in_words())
