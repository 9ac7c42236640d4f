"""cache-dit's DBCache at work in a transformer, and the models that it computes wrongly."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch

from ...attention import StepInfo
from ..hooks.beside_hooks import beside_hooks
from .errors import PresetError, UnfitCacheError
from .levers import Cache
from .only_cache import library_cache


class DBCache:
    """cache-dit's DBCache.

    It knows the step and the branch of guidance by counting passes, and is wrong where a pipeline makes another number
    of them than it was told, or a transformer takes over in the middle of a run. So what it keeps is held here for each
    branch, and a step that is kept is computed whatever it counts.

    Raises:
        ValueError: cache-dit's own forward pass of the model does not take what diffusers' pipelines give.
    """

    one_context: ClassVar[bool] = False

    def __init__(self, transformer: Any, cache: Cache) -> None:
        import cache_dit

        self._transformer: Any = transformer
        self._library: Any = cache_dit
        settings = {"residual_diff_threshold": cache.limit, **cache.settings}
        self._config = cache_dit.DBCacheConfig(**settings, enable_separate_cfg=False)
        self._branches: dict[str, dict[str, Any]] = {}  # branch -> stack of blocks -> what cache-dit keeps of it
        self._keep = False
        self._forwards = {module: module.__dict__.get("forward") for module in transformer.modules()}
        cache_dit.enable_cache(transformer, cache_config=self._config)
        missing = _not_taken(transformer)
        if missing:
            self.remove()
            names = ", ".join(missing)
            raise ValueError(f"cache-dit's own forward pass of a {type(transformer).__name__} does not take {names}")
        self._manager: Any = transformer._context_manager
        decide = self._manager.can_cache
        # Of this manager alone, which goes with the cache.
        self._manager.can_cache = torch.compiler.disable(lambda *a, **k: not self._keep and decide(*a, **k))

    def begin(self, steps: int | None) -> None:
        if not library_cache(self._transformer):
            return  # it was taken out by somebody else, which the account says, see `OnlyCache`
        # Not enabled anew: a forward pass that has begun would run without it.
        self._branches = {}
        self._library.refresh_context(self._transformer, cache_config=self._config)

    def enter(self, step: StepInfo, keep: bool) -> None:
        self._keep = keep
        if not library_cache(self._transformer):
            return
        contexts = self._manager._cached_context_manager
        if step.branch not in self._branches:
            fresh = {n: self._manager.new_context(**contexts[n]._init_kwargs) for n in self._transformer._context_names}
            self._branches[step.branch] = fresh
        contexts.update(self._branches[step.branch])

    def notes(self) -> list[str]:
        return []

    def remove(self) -> None:
        if self._transformer is not None:
            with beside_hooks(self._transformer):
                self._library.disable_cache(self._transformer)
                self._give_back()
        self._transformer, self._branches, self._forwards = None, {}, {}

    def _give_back(self) -> None:
        """The forward passes of models that cache-dit has code of its own for (Wan VACE): it leaves that in them."""
        for module, before in self._forwards.items():
            if _is_cache_dits(module.__dict__.get("forward")):
                del module.forward
                if before is not None:
                    module.forward = before
        self._transformer.__dict__.pop("_is_patched", None)


def check_dbcache(part: str, transformer: Any, layers: int, cache: Cache) -> None:
    """Raise PresetError where cache-dit would leave nothing out, or make something else than the model.

    Args:
        part: name of the transformer.
        transformer: without what wraps it.
        layers: blocks of it with self-attention.
        cache: for it.
    """
    kind, config = type(transformer).__name__, transformer.config
    # It puts all blocks in one: the model's loop turns once, and gives all of them what the first one gets.
    left_out = {
        "faces": kind == "ConsisIDTransformer3DModel" and config.is_train_face,
        "the control of each block": kind == "CosmosTransformer3DModel" and config.controlnet_block_every_n,
        "a picture beside the text": kind == "CosmosTransformer3DModel" and config.img_context_dim_in,
    }
    for what, there in left_out.items():
        if there:
            problem = f"cache-dit has no place for {what} in a {kind} ({part})"
            raise UnfitCacheError(problem, cache.name)
    first, last = cache.settings.get("Fn_compute_blocks", 8), cache.settings.get("Bn_compute_blocks", 0)
    if first + last >= layers:  # it computes 8 blocks of each step unless it is told otherwise
        problem = (
            f"Fn_compute_blocks {first} and Bn_compute_blocks {last} leave nothing of the {part}'s {layers} to skip"
        )
        raise PresetError("cache", problem, "Lower cache.settings.Fn_compute_blocks, to 1 for example.", cache.name)


def _not_taken(transformer: Any) -> list[str]:
    """Arguments of a model's forward pass that cache-dit's own does not have, where it has one for the model."""
    own = transformer._original_forward  # what cache-dit calls
    if not _is_cache_dits(own):
        return []
    taken = inspect.signature(getattr(own, "__func__", own)).parameters
    return [name for name in inspect.signature(type(transformer).forward).parameters if name not in taken]


def _is_cache_dits(forward: Any) -> bool:
    return getattr(forward, "__module__", "").startswith("cache_dit.")
