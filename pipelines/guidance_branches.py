"""What is known of the branches of guidance in pipelines: a pass each, or samples of one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .acceleration.copies import CopiedNotPickled
from .acceleration.families import BOTH, Family
from .hooks.diffusers_hooks import hooks_of
from .hooks.running_pipeline import PipelineOfPass, running_pipeline

TWO = ("cond", "uncond")
"""Branches that have a pass each."""

_OF_ALL_SAMPLES = ("image_rotary_emb", "rope")
"""Beginnings of names of arguments that are of all samples, whatever their shape."""


def guidance_of(pipe: Any) -> Callable[[Any], bool] | None:
    """What says of a pipeline, within a step of its call, whether that has both branches; None where nothing does."""
    if hasattr(getattr(pipe, "guider", None), "num_conditions"):
        return _guider_says
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        return _pipeline_says
    if type(pipe).__name__.startswith("Kandinsky5"):
        return _scale_says
    return None


def _guider_says(pipe: Any) -> bool:
    return bool(pipe.guider.num_conditions == 2)


def _pipeline_says(pipe: Any) -> bool:
    return bool(pipe.do_classifier_free_guidance)


def _scale_says(pipe: Any) -> bool:
    return bool(pipe.guidance_scale > 1.0)


class StepIsGuided(CopiedNotPickled):
    """Whether the step that goes on has both branches, as the pipeline says whose call it is of.

    Outside of calls, the pipeline that was given says what it last knew. One that was not called yet knows nothing: the
    step counts as one without guidance then, and its passes are counted.

    Args:
        given: the pipeline that hooks were put on.
    """

    def __init__(self, given: Any) -> None:
        self._pipeline = PipelineOfPass(given)
        self.unknown = 0
        """Passes outside of calls, of which nobody said whether they are of a step with both branches."""

    def __call__(self, otherwise: Callable[[Any], bool] = lambda pipe: False) -> bool:
        """Ask it.

        Args:
            otherwise: says it of a pipeline of which `guidance_of` knows nothing.
        """
        pipe = self._pipeline()
        try:
            return (guidance_of(pipe) or otherwise)(pipe)
        except AttributeError:
            if running_pipeline() is not None:
                raise
            self.unknown += 1
            return False

    def notes(self, model: str) -> list[str]:
        """What to say of passes of which it is not known; nothing where there are none.

        Args:
            model: the component that made them.
        """
        if not self.unknown:
            return []
        return [
            f"{self.unknown} passes of the {model} were made outside of a call of the pipeline, which has not said yet "
            "whether it guides: they were computed in full. Call the pipeline once before a loop of your own"
        ]


def tells_guidance(kind: type) -> bool:
    """Whether a pipeline of a class has what `guidance_of` asks."""
    guided = hasattr(kind, "do_classifier_free_guidance") or kind.__name__.startswith("Kandinsky5")
    return guided or "guider" in inspect.signature(kind).parameters


def check_branches(kind: str, family: Family) -> None:
    """Raise TypeError for a family whose steps have other branches than two of guidance.

    Args:
        kind: class of the pipeline. family: of its transformer.
    """
    if why := other_branches(kind, family):
        raise TypeError(f"{why}.")


def other_branches(kind: str, family: Family) -> str:
    """What is wrong with the branches of a family, in words; "" where there are two of guidance."""
    if family.branches == TWO or family.branches[0] in BOTH:
        return ""
    return f"a {kind} has other branches than two of guidance: {', '.join(family.branches)}"


def apart_from_caches(parts: Mapping[str, tuple[Any, Family]], cache: str) -> str | None:
    """Why a guidance cache cannot be beside a cache over steps; None where it can.

    Args:
        parts: the transformers by name, each with its family.
        cache: what the other is called.
    """
    for _, family in parts.values():
        if family.branches != TWO:
            problem = f"{family.name} has both branches in a batch, of which the guidance cache takes one out in some"
            return f"{problem} steps, and {cache} compares batches of one size"
    return None


def is_compiled_whole(pipe: Any, name: str, transformer: torch.nn.Module) -> bool:
    """Whether a transformer was compiled as one, and not block by block.

    Args:
        pipe: that has it. name: of it there.
        transformer: without what wraps it.
    """
    wrapped = hasattr(getattr(pipe, name, None), "_orig_mod")
    return wrapped or getattr(transformer, "_compiled_call_impl", None) is not None


def check_not_compiled(pipe: Any, name: str, transformer: torch.nn.Module, why: str) -> None:
    """Raise RuntimeError for a transformer that was compiled as a whole.

    Args:
        pipe: that has it. name: of it there.
        transformer: without what wraps it.
        why: it cannot be, as the end of a sentence.
    """
    if is_compiled_whole(pipe, name, transformer):
        raise RuntimeError(
            f"{name} was compiled as a whole, and {why}: use pipe.{name}.compile_repeated_blocks(fullgraph=True) "
            "instead."
        )


def check_outermost(transformer: torch.nn.Module, hook: str, name: str, function: str) -> None:
    """Raise RuntimeError where a hook of diffusers was put on a transformer after this one.

    Args:
        transformer: that has the hook. hook: its name in diffusers.
        name: of the transformer in its pipeline.
        function: of this package, which the hook is of.
    """
    last = list(hooks_of(transformer))[-1]
    if last != hook:
        raise RuntimeError(
            f"{last} was put on {name} after {function}, and would see passes that are not made here: remove() the "
            f"handle and call {function} again, last."
        )


def latents_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a forward pass is given to work on, by name or first."""
    return kwargs.get("hidden_states", args[0] if args else None)


def are_of_one_video(latents: Any, others: Any) -> bool:
    """Whether what two passes, or two halves of a batch, are given may be two branches of guidance: they work on the
    same latents. Within calls the pipeline says what they are, and nothing is compared, for which a GPU is waited for.
    """
    if running_pipeline() is not None or not isinstance(latents, torch.Tensor) or latents is others:
        return True
    return isinstance(others, torch.Tensor) and latents.shape == others.shape and torch.equal(latents, others)


def samples_in(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Samples of the batch of a forward pass."""
    latents = latents_of(args, kwargs)
    return latents.shape[0] if isinstance(latents, torch.Tensor) and latents.ndim else 1


def tensors_in(made: Any) -> list[torch.Tensor]:
    """The tensors of what a forward pass is given, or gives."""
    return [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]


def with_tensors(made: Any, tensors: list[torch.Tensor]) -> Any:
    """What a forward pass gives, with others in the place of `tensors_in` it."""
    those = iter(tensors)
    return tree_map(lambda x: next(those) if isinstance(x, torch.Tensor) else x, made)


def of_samples(
    signature: inspect.Signature, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], part: slice
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward pass, of a part of its batch.

    Args:
        signature: of the module's `forward` with `self`.
        module: that is called. args, kwargs: what with.
        part: of the batch.
    """
    batch = samples_in(args, kwargs)
    given = signature.bind(module, *args, **kwargs)

    def own(x: Any) -> Any:
        return x[part] if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == batch else x

    for name, value in given.arguments.items():
        if value is not module and not name.startswith(_OF_ALL_SAMPLES):
            given.arguments[name] = tree_map(own, value)
    return given.args[1:], given.kwargs
