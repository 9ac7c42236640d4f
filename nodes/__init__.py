"""ComfyUI nodes. `geometry` and `native` hold the logic and need no ComfyUI; the rest is loaded by ComfyUI alone."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls for the list of nodes."""
    from comfy_api.latest import ComfyExtension

    from . import report_node, sparse_nodes

    class VidaccelExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [*sparse_nodes.NODES, *report_node.NODES]

    return VidaccelExtension()
