"""How strong the LoRAs of a layer were when they were merged into its weight, which peft forgets."""

from __future__ import annotations

from typing import Any


class NotedMerges:
    """Stands for `merge` of a layer of peft, until the last who asked for it is gone.

    `unmerge` subtracts a LoRA as strong as it is then; `set_adapters` may have changed that since.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._users = 0
        self._scaling: dict[str, float] = {}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, whose names these are: it looks at them."""
        layer = self._layer
        before = set(layer.merged_adapters)
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
        new = (name for name in layer.merged_adapters if name not in before)
        self._scaling.update({name: layer.scaling[name] for name in new})

    def unmerge(self) -> None:
        """Take all that are merged out of the weight, as strong as they were put in."""
        now = dict(self._layer.scaling)
        self._layer.scaling.update({name: scale for name, scale in self._scaling.items() if name in now})
        try:
            self._layer.unmerge()
        finally:
            self._layer.scaling.update(now)

    def release(self) -> None:
        """Leave the layer as it was, where nobody else uses this. Once for each `note_merges`."""
        self._users -= 1
        if not self._users:
            del self._layer.merge


def note_merges(layer: Any) -> NotedMerges:
    """Have the merges of a layer noted from now on; one object for all who ask."""
    noted = getattr(vars(layer).get("merge"), "__self__", None)
    if not isinstance(noted, NotedMerges):
        noted = NotedMerges(layer)
        layer.merge = noted.merge
    noted._users += 1
    return noted
