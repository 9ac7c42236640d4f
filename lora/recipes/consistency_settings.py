"""Settings of the recipe `consistency`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from .lora_settings import FlowSettings, LoraSettings


@dataclass(frozen=True)
class ConsistencySettings(Settings):
    """Which few steps the model learns, and from whom.

    Args:
        teacher: file or folder of an adapter of the recipe `gft` of the same base, or that of its run, or "own" for the
            one that the base has itself; it makes the guided velocity in one pass and is also what the student starts
            as. None for the frozen base with guidance in two passes.
        steps: of the sampler that is learned. Their noise levels are those of the samplers of flow models, with
            `flow.shift`, and go into the file.
        objective: "segments" regresses where the teacher comes to at the end of a step, from the beginning of the step;
            "consistency" where the student itself comes to after one step of the teacher, from any place within.
        teacher_steps: of the teacher in each step of the student.
        guidance_scale: what the teacher is guided with.
        max_guidance_scale: None, or the guidance of the clips is uniform between `guidance_scale` and this.
        own_states: share of the steps of training whose clips are taken where the student comes to from noise, instead
            of clips with noise.
    """

    teacher: str | None = setting(None, free=True, place=True)
    steps: int = setting(4, low=1, high=64)
    objective: Literal["segments", "consistency"] = "segments"
    teacher_steps: int = setting(4, low=2)
    guidance_scale: float = setting(5.0, low=1)
    max_guidance_scale: float | None = setting(None, low=1)
    own_states: float = setting(0.0, low=0, high=1)

    @property
    def highest(self) -> float:
        """The highest guidance scale of the training."""
        return self.guidance_scale if self.max_guidance_scale is None else self.max_guidance_scale

    def check(self) -> Iterator[str]:
        if self.highest < self.guidance_scale:
            yield (
                f"max_guidance_scale is {self.highest:g}, below guidance_scale {self.guidance_scale:g}: give more, or "
                "leave it out for one scale."
            )
        if self.own_states and self.objective == "consistency":
            yield "own_states is for the objective segments, which begins where steps do: set that, or leave it out."


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoraSettings(LoraSettings):
    """Settings of the recipe `consistency`: those of `lora` (one has another default), and of the steps."""

    flow: FlowSettings = field(default_factory=lambda: FlowSettings(caption_dropout=0.0))
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)

    def check(self) -> Iterator[str]:
        yield from super().check()
        few, flow, validation = self.consistency, self.flow, self.validation
        if self.model.stage is not None and validation.prompts:
            yield (
                f"validation.prompts are of no use with model.stage {self.model.stage}: a video needs both "
                "transformers, and the other one has not learned its few steps. Leave them out."
            )
        if self.model.stage == "low_noise" and few.own_states:
            yield (
                "consistency.own_states is for model.stage high_noise: what the other one begins with is not of its "
                "own making. Set it to 0."
            )
        if flow.density is not None or (flow.logit_mean, flow.logit_std) != (0.0, 1.0):
            yield (
                "flow.density, flow.logit_mean and flow.logit_std are of no use: the noise levels are those of the "
                "steps. Leave them out, and set flow.shift."
            )
        if (flow.min_level, flow.max_level) != (0.0, 1.0):
            yield "flow.min_level and flow.max_level are of no use here: all steps are learned. Leave them out."
        if flow.guidance_preserving is not None:
            yield "flow.guidance_preserving is of no use here: guidance comes from the teacher. Leave it out."
        if validation.negative_prompt:
            yield (
                f'validation.negative_prompt is "{validation.negative_prompt}", which a model with few steps cannot be '
                "given: set flow.unconditional to it, and leave it out here."
            )
        scale = validation.guidance_scale
        if validation.prompts and not few.guidance_scale <= scale <= few.highest:
            yield (
                f"validation.guidance_scale is {scale:g}, and the training has {few.guidance_scale:g} to "
                f"{few.highest:g} (consistency.guidance_scale): give one of these."
            )
        if validation.prompts and validation.steps != few.steps:
            yield f"validation.steps is {validation.steps}, and consistency.steps {few.steps}: give the same."
