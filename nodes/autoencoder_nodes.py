"""The node that loads DC-AE-V as a ComfyUI VAE, for ComfyUI's own VAE Encode and VAE Decode."""

from __future__ import annotations

from comfy_api.latest import io

from . import autoencoder
from .schema import accepted
from .watched import Fingerprint, fingerprint, read, state_of


class VidaccelLoadDCAEV(io.ComfyNode):
    """DC-AE-V as a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        import folder_paths

        return io.Schema(
            node_id="VidaccelLoadDCAEV",
            display_name="Load DC-AE-V",
            category="video acceleration/autoencoders",
            description="Loads a deep-compression autoencoder (DC-AE-V of DC-VideoGen: 32x or 64x in space, 4x in "
            "time) as a VAE, for ComfyUI's own VAE Encode, VAE Decode and their tiled siblings. Its latents fit models "
            "that were adapted to it, and no others.",
            inputs=[
                io.Combo.Input(
                    "autoencoder",
                    options=autoencoder.choices(folder_paths.get_filename_list("vae")),
                    default=autoencoder.BUILT_IN,
                    tooltip="The built-in one, or a file in models/vae whose name contains dc-ae-v.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Path of a published file (.pt, .safetensors) or of a diffusers folder of an "
                    "AutoencoderDCV; it is taken instead of the one above.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Encode and VAE Decode.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "deep compression", "dc-videogen", "dcae"]),
        )

    @classmethod
    def fingerprint_inputs(cls, path: str | None, **chosen: str | None) -> Fingerprint:
        """Read a file anew once it was changed, such as one that was trained further."""
        import folder_paths

        menu = chosen.get("autoencoder")
        named = menu or autoencoder.BUILT_IN
        own = None if named == autoencoder.BUILT_IN else folder_paths.get_full_path("vae", named)
        return fingerprint(state_of((path or "").strip() or own), menu, path)

    @classmethod
    def execute(cls, path: str, **chosen: str) -> io.NodeOutput:
        return io.NodeOutput(_as_vae(_located(chosen["autoencoder"], path)))


def _located(choice: str, path: str) -> str:
    import folder_paths

    if not path.strip() and choice == autoencoder.BUILT_IN:
        return choice
    place = path.strip() or folder_paths.get_full_path_or_raise("vae", choice)
    read(place)
    return place


def _as_vae(location: str) -> object:
    """ComfyUI's VAE around the autoencoder. Its constructor knows other families only, so the fields are set here."""
    import comfy.model_patcher
    import comfy.sd
    import torch
    from comfy import model_management

    module = autoencoder.LatentScale(autoencoder.load(location)).eval()
    config, factor = module.autoencoder.config, module.autoencoder.spatial_compression_ratio
    vae = comfy.sd.VAE.__new__(comfy.sd.VAE)
    vae.first_stage_model = module
    vae.latent_channels, vae.latent_dim, vae.output_channels = config.latent_channels, 3, config.in_channels
    vae.upscale_ratio = (lambda frames: 4 * frames - config.pad_frames, factor, factor)
    vae.downscale_ratio = (lambda frames: -(-(frames + config.pad_frames) // 4), factor, factor)
    vae.upscale_index_formula = vae.downscale_index_formula = (4, factor, factor)
    vae.memory_used_encode = module.working_memory
    vae.memory_used_decode = lambda shape, dtype: module.working_memory(
        (4 * shape[-3] - config.pad_frames, factor * shape[-2], factor * shape[-1]), dtype
    )
    vae.process_input = lambda image: image * 2.0 - 1.0
    vae.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    vae.working_dtypes = [torch.bfloat16, torch.float32]
    vae.not_video = vae.handles_tiling = False
    vae.disable_offload = True  # loaded whole: these modules cannot run with a part of their weights elsewhere
    vae.crop_input = True
    vae.size = vae.pad_channel_value = vae.extra_1d_channel = vae.format_encoded = None
    vae.audio_sample_rate = 44100
    vae.device = model_management.vae_device()
    vae.vae_dtype = model_management.vae_dtype(vae.device, vae.working_dtypes)
    vae.output_device = model_management.intermediate_device()
    module.to(vae.vae_dtype)
    model_management.archive_model_dtypes(module)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        module, load_device=vae.device, offload_device=model_management.vae_offload_device()
    )
    vae.model_size()
    return vae


NODES: list[type[io.ComfyNode]] = [VidaccelLoadDCAEV]
