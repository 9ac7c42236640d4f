"""What changes in the midst of a sampling, ControlNets and hooks, beside the caches, with ComfyUI's own models.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import pytest
import torch
from native_comfyui import conditioning, sample, tiny

from vidaccel import GuidanceCache
from vidaccel.nodes.native.forecast import cache_steps, forecast_log
from vidaccel.nodes.native.guidance_cache import cache_guidance, guidance_log
from vidaccel.pipelines.forecast.settings import ForecastSettings

STEPS = 20
LOGS = {"forecast": forecast_log, "guidance": guidance_log}
CACHES = {
    "forecast": lambda model, log=None: cache_steps(model, ForecastSettings(1e6, most=0), log or forecast_log()),
    "guidance": lambda model, log=None: cache_guidance(model, GuidanceCache(5, first_steps=0), log or guidance_log()),
}


def control(ends: float, before: object = None):
    """A ControlNet with a residual of nothing, up to a share of the sampling, behind another one."""
    from comfy.controlnet import ControlBase

    class Net(ControlBase):
        def get_control(self, x, t, cond, batched_number, transformer_options):
            at_work = self.timestep_range is None or self.timestep_range[0] >= t[0] >= self.timestep_range[1]
            found = [torch.zeros(())] if at_work else []
            if self.previous_controlnet is not None:
                found += self.previous_controlnet.get_control(x, t, cond, batched_number, transformer_options)["input"]
            return {"input": found}

        def copy(self):
            made = Net()
            self.copy_to(made)
            return made

        def get_models(self):
            return []

    return Net().set_cond_hint(torch.zeros(1, 3, 8, 8), 1.0, (0.0, ends)).set_previous_controlnet(before)


def hook(frames: dict[float, float]):
    """A LoRA of strengths that change at shares of the sampling."""
    import comfy.hooks

    lora = {"lora_A": torch.ones(8, 1), "lora_B": torch.ones(1, 8)}
    made = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for share, strength in frames.items():
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=share))
    made.set_keyframes_on_hooks(keyframes)
    return made


def prompt(description, **beside):
    ((text, values),) = conditioning(description, 1, {})
    return [[text, values | beside]]


def passes(model, description, beside) -> list[tuple[object, int]]:
    """Of each forward pass with the positive prompt: what changes, as it is there, and how many prompts it is of."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        sides = transformer_options["cond_or_uncond"]
        if 0 in sides:
            hooks = beside.get("hooks")
            seen.append((len(control["input"]) if hooks is None else hooks.hooks[0].strength, len(sides)))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **more)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", wrapper)
    prompts = {name: prompt(description, **beside) for name in ("positive", "negative")}
    sample(clone, description, steps=STEPS, **prompts)
    return seen


CHANGES = {
    "control": lambda: {"control": control(0.55)},
    "chain": lambda: {"control": control(1.0, control(0.55))},
    "hook": lambda: {"hooks": hook({0.0: 1.0, 0.55: 0.0})},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cache", CACHES)
def test_the_first_steps_after_a_change_are_computed(cache, change):
    """Both caches need two steps to go on from; they went straight over the change."""
    description, model, _ = tiny("wan_t2v")
    every = [what for what, _ in passes(model, description, CHANGES[change]())]
    assert every[0] != every[-1]
    made = passes(CACHES[cache](model), description, CHANGES[change]())
    if cache == "guidance":  # which makes all passes of the positive prompt
        assert [what for what, _ in made] == every
        assert [sides for what, sides in made if what == every[-1]][:2] == [2, 2]
        assert [sides for _, sides in made].count(1) > STEPS / 4
    else:
        assert [what for what, _ in made].count(every[-1]) >= 3  # and the last step
        assert len(made) < STEPS


@pytest.mark.parametrize("cache", CACHES)
def test_what_changes_in_each_step_is_told(cache):
    description, model, _ = tiny("wan_t2v")
    log = LOGS[cache]()
    beside = {"hooks": hook({n / STEPS: 1 - n / STEPS for n in range(STEPS)})}
    passes(CACHES[cache](model, log), description, beside)
    (note,) = log.news().report.notes
    assert "all " in note and "a ControlNet, a hook, a prompt or a node of guidance changed 18 times" in note


@pytest.mark.parametrize("cache", CACHES)
def test_one_change_in_few_steps_is_told_as_one(cache):
    description, model, _ = tiny("wan_t2v")
    log = LOGS[cache]()
    prompts = {name: prompt(description, control=control(0.5)) for name in ("positive", "negative")}
    sample(CACHES[cache](model, log), description, steps=3, **prompts)
    (note,) = log.news().report.notes
    assert "all 3 " in note and "changed once" in note and "make more steps" in note


@pytest.mark.parametrize("cache", CACHES)
def test_what_stays_as_it_is_costs_nothing(cache):
    description, model, _ = tiny("wan_t2v")
    told = []
    for beside in ({}, {"control": control(1.0), "hooks": hook({0.0: 0.5})}):
        log = LOGS[cache]()
        sample(CACHES[cache](model, log), description, steps=STEPS, positive=prompt(description, **beside))
        told.append(log.news().report.notes)
    assert told[0] == told[1]
