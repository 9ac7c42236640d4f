"""ComfyUI nodes. The logic is in plain modules; only files named `*_nodes.py` or `*_node.py` import ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """The nodes of this package, as ComfyUI asks for them when it starts."""
    from comfy_api.latest import ComfyExtension, io

    from . import autoencoder_nodes, pipeline_nodes, report_node, sparse_nodes

    class VideoAcceleration(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [*sparse_nodes.NODES, *pipeline_nodes.NODES, *autoencoder_nodes.NODES, *report_node.NODES]

    return VideoAcceleration()
