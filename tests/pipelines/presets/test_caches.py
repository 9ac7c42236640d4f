"""What a cache makes of a pass that it skips: of the same input, what the computed one made. And what it leaves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from composition import FAMILY_BUILDS, read
from composition.cells import NEVER_DENSE, SPARSE
from eager_caches import EAGER
from tiny_families import Tiny, build
from tiny_pipelines import hunyuan, wan
from tiny_wan import make_pipe, make_transformer
from torch.utils._pytree import tree_leaves

import vidaccel
from vidaccel import Preset
from vidaccel.attention import StepInfo
from vidaccel.pipelines import find_transformers
from vidaccel.pipelines.acceleration.clock import StepClock
from vidaccel.pipelines.acceleration.left_out import pass_was_left_out
from vidaccel.pipelines.hooks.diffusers_hooks import hooks_of
from vidaccel.pipelines.presets import measure_mag_ratios
from vidaccel.pipelines.presets.caches import check_cache, install_cache
from vidaccel.pipelines.presets.errors import PresetError

COLUMNS = {"first_block": "first-block cache", "magcache": "MagCache", "cache_dit": "cache-dit"}  # of the table
MENDED = [
    ("wan_vace", {"control": [0]}),
    ("wan_vace", {"control": [0, 1, 3]}),
    ("motif_video", {"decoders": 0}),
    ("motif_video", {"decoders": 1}),
    ("motif_video", {"decoders": 2}),
]
"""Models whose loop does more than hand states on, with the caches of diffusers that keep what blocks add."""
keeps_residuals = pytest.mark.parametrize("name", ["first_block", "magcache"])


class AtWork:
    """A cache in a model, whose passes are made one by one."""

    def __init__(self, tiny: Tiny, name: str) -> None:
        ((self.model, family),) = find_transformers(tiny.model).values()
        check_cache("transformer", self.model, len(family.modules(self.model)), EAGER[name])
        self.given, self.cache = (
            tiny.given,
            install_cache("transformer", self.model, EAGER[name], family, StepClock(None)),
        )

    def run(self, step: int, branch: str = "cond", **changes: Any) -> list[torch.Tensor]:
        """What the model makes in a step that is skipped unless it is the first."""
        context = getattr(self.model, "cache_context", None)
        with torch.no_grad(), context(branch) if context else contextlib.nullcontext():
            self.cache.enter(StepInfo(0, step, 4, 1.0 - step / 4, branch), keep=False)
            made = outputs(self.model, self.given | changes)
            assert pass_was_left_out(self.model) is (step > 0)
        return made


@torch.no_grad()
def outputs(model: torch.nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    return [x.clone() for x in tree_leaves(model(**given, return_dict=False)) if isinstance(x, torch.Tensor)]


def assert_close(made: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def other(tiny: Tiny) -> dict[str, Any]:
    """An input that differs from that of a tiny model."""
    return {tiny.latent: tiny.given[tiny.latent] + 0.1}


def told_to_serve(cache: str, family: str) -> bool:
    """What the table of `docs/presets.md` says of a family; "wan" is that of text to video."""
    page = (Path(__file__).parents[3] / "docs" / "presets.md").read_text(encoding="utf-8")
    table = page.partition("| cache | serves |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (cell,) = (cell for caches, cell in rows if f"`{cache}`" in caches.split(", "))
    listed = cell.removeprefix("all but ").split(", ")
    assert {*listed} <= {*FAMILY_BUILDS, "Wan 2.1 / 2.2 from text"}
    named = family in listed or (family == "wan" and any(each.startswith("Wan 2.1 / 2.2") for each in listed))
    return named is not cell.startswith("all but ")


@pytest.mark.parametrize("name", [name for name in EAGER if name != "forecast"])
@pytest.mark.parametrize("family", [*FAMILY_BUILDS, "wan"])
def test_of_the_same_input_a_skipped_pass_makes_what_the_computed_one_made(family, name):
    if name == "cache_dit":
        pytest.importorskip("cache_dit")
    tiny = build(FAMILY_BUILDS.get(family, family), 4)
    plain = outputs(tiny.model, tiny.given)
    try:
        at_work = AtWork(tiny, name)
    except PresetError:  # which no family is that is said to work
        cells = read()["cells"].get(family, {})
        assert not cells.get(COLUMNS.get(name, ""), "").startswith("works")
        assert name == "cache_dit" or not told_to_serve(name, family)
    else:
        assert name == "cache_dit" or told_to_serve(name, family)  # that one is in the matrix
        assert_close(at_work.run(0), plain)
        assert_close(at_work.run(1), plain)
        at_work.cache.remove()
    assert all(a.equal(b) for a, b in zip(outputs(tiny.model, tiny.given), plain, strict=True))


def test_kandinsky_6_without_sound():
    """Its blocks make None beside the video then."""
    tiny = build("kandinsky6", 4)
    tiny.given["audio_hidden_states"] = None
    branches = {"cond": {}, "uncond": other(tiny)}
    plain = {branch: outputs(tiny.model, tiny.given | changes) for branch, changes in branches.items()}
    at_work = AtWork(tiny, "taylorseer")
    for step in range(2):
        for branch, changes in branches.items():
            assert_close(at_work.run(step, branch, **changes), plain[branch])
    at_work.cache.remove()
    assert outputs(tiny.model, tiny.given)[0].equal(plain["cond"][0])


@keeps_residuals
@pytest.mark.parametrize(("family", "more"), MENDED)
def test_models_whose_loop_does_more(family, more, name):
    """Whatever of their blocks does what, under sparse attention, and with branches that take turns."""
    tiny = build(family, 4, **more)
    branches = {"cond": {}, "uncond": other(tiny)}
    with vidaccel.accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE):
        plain = {branch: outputs(tiny.model, tiny.given | changes) for branch, changes in branches.items()}
        at_work = AtWork(tiny, name)
        for step in range(3):
            for branch, changes in branches.items():
                assert_close(at_work.run(step, branch, **changes), plain[branch])
        # Nor is it only the output that was there before.
        assert not at_work.run(3, **other(tiny))[0].allclose(plain["cond"][0], rtol=1e-3)
        at_work.cache.remove()
        assert all(a.equal(b) for a, b in zip(outputs(tiny.model, tiny.given), plain["cond"], strict=True))
    assert not any(hooks_of(module) for module in tiny.model.modules())


@keeps_residuals
def test_the_control_of_vace_in_a_skipped_pass_is_that_of_its_own_step(name):
    """Of each layer with control once: twice as strong, it adds to the video once more what it added before."""
    tiny = build("wan_vace", 4, control=[0, 1, 3])
    video, hints = [], []
    tiny.model.norm_out.register_forward_pre_hook(lambda _, args: video.append(args[0].clone()))
    for block in tiny.model.vace_blocks:
        block.register_forward_hook(lambda _, args, output: hints.append(output[0].clone()))
    at_work = AtWork(tiny, name)
    for step, scale in enumerate((1.0, 2.0)):
        at_work.run(step, control_hidden_states_scale=torch.full((3,), scale))
    torch.testing.assert_close(video[1] - video[0], sum(hints[:3]), rtol=1e-4, atol=1e-5)


def test_the_ratios_that_are_measured_for_vace_are_of_what_is_kept():
    """Without its control, that is."""
    tiny = build("wan_vace", 4)
    inputs = [tiny.given, tiny.given | other(tiny)]

    def passes() -> None:
        with tiny.model.cache_context("cond"):
            for given in inputs:
                outputs(tiny.model, given)

    measured = measure_mag_ratios(make_pipe(transformer=tiny.model), passes)
    at_work, kept = AtWork(tiny, "magcache"), []
    with torch.no_grad(), tiny.model.cache_context("cond"):
        for step, given in enumerate(inputs):
            at_work.cache.enter(StepInfo(0, step, 4), keep=True)
            tiny.model(**given)
            kept.append(at_work.cache.state().previous_residual.norm(dim=-1))
    assert measured == pytest.approx([1.0, (kept[1] / kept[0]).mean().item()], abs=1e-4)


def wan_pipeline() -> tuple[Any, dict[str, Any]]:
    return wan(transformer=make_transformer(num_layers=3))


@pytest.mark.parametrize("family", [wan_pipeline, hunyuan])
def test_a_run_knows_nothing_of_the_one_before(family, cache):
    """Of another text, size and number of steps, and with what was skipped in it still kept."""
    pipe, options = family()
    given = options | {"prompt_embeds": options["prompt_embeds"].flip(1), "height": 128}
    if cache.name == "seacache" and family is hunyuan:
        pytest.skip("diffusers' SeaCache does not read HunyuanVideo")
    made = []
    for before in (False, True):
        with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
            if before:
                latents(pipe, options, 7)
            made.append(latents(pipe, given, 5))
            assert handle.report().last().counts()["skipped"] >= 2
    assert made[0].equal(made[1])


def test_two_transformers_keep_what_is_their_own(cache):
    """Each computes its own first step, and what it skips is what it would skip alone."""
    pipe, options = wan(transformer=make_transformer(), transformer_2=make_transformer(1), boundary_ratio=0.8)
    with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
        latents(pipe, options, 8)
        passes = [each for watch in handle._watches for each in watch.passes]
    by_model = {model: [p for p in passes if p.model == model] for model in ("transformer", "transformer_2")}
    for model, those in by_model.items():
        first = min(p.step for p in those)
        assert [p.skipped for p in those if p.step == first] == [False, False], model
        assert sum(p.skipped for p in those) >= 2, model


def latents(pipe: Any, options: dict[str, Any], steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(**options, num_inference_steps=steps, output_type="latent", generator=generator).frames


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("ltx2", "cache-dit's own forward pass of a LTX2VideoTransformer3DModel does not take sigma"),
        ("cosmos_3", "cache-dit's own forward pass of a Cosmos3OmniTransformer does not take return_dict"),
        ("consisid", "cache-dit has no place for faces in a ConsisIDTransformer3DModel"),
        ("cosmos_25_picture", "cache-dit has no place for a picture beside the text in a CosmosTransformer3DModel"),
    ],
)
def test_models_that_cache_dit_would_compute_wrongly_or_not_at_all(family, message):
    if "forward pass" in message:
        pytest.importorskip("cache_dit")
    tiny = build(family, 4)
    plain = outputs(tiny.model, tiny.given)
    with pytest.raises(PresetError, match=message):
        AtWork(tiny, "cache_dit")
    assert all(a.equal(b) for a, b in zip(outputs(tiny.model, tiny.given), plain, strict=True))


def test_cache_dit_leaves_no_code_of_its_own_in_vace():
    """Another cache finds the model's."""
    pytest.importorskip("cache_dit")
    tiny = build("wan_vace", 4)
    at_work = AtWork(tiny, "cache_dit")
    at_work.run(0)
    at_work.cache.remove()
    for module in tiny.model.modules():
        assert module.forward.__module__.startswith(("diffusers", "torch")), type(module)
    assert AtWork(tiny, "cache_dit").run(0)[0].equal(outputs(build("wan_vace", 4).model, tiny.given)[0])
