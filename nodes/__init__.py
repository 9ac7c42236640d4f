"""ComfyUI nodes. The logic is in plain modules; only files named `*_nodes.py` or `*_node.py` need ComfyUI at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """The nodes of this package, as ComfyUI asks for them when it starts."""
    from comfy_api.latest import ComfyExtension, io

    from . import (
        autoencoder_nodes,
        forecast_node,
        guidance_cache_node,
        guidance_nodes,
        length_nodes,
        lora_nodes,
        pipeline_nodes,
        preset_nodes,
        report_node,
        sla_nodes,
        sparse_nodes,
        tune_node,
        vsa_nodes,
    )

    class VideoAcceleration(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            native = (
                sparse_nodes,
                sla_nodes,
                vsa_nodes,
                length_nodes,
                guidance_nodes,
                guidance_cache_node,
                forecast_node,
            )
            modules = (*native, pipeline_nodes, preset_nodes, tune_node, lora_nodes, autoencoder_nodes, report_node)
            return [node for module in modules for node in module.NODES]

    return VideoAcceleration()
