"""Where the video tokens are in the attention calls of ComfyUI's native models, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..attention import VideoLayout

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """The self-attention calls of one class of native models.

    Args:
        family: its name in messages.
        patch: the attributes of the model that hold the patch size `(frames, height, width)`, or the size itself.
        blocks: the attributes that hold its lists of transformer blocks; together they are its layers.
        others: where tokens lie that are not of the latent video: "none", "before" or "after" it, or "wan": reference
            frames before it, context latents after it, both told by the conditioning.
    """

    family: str
    patch: str | tuple[str, ...] | Patch
    blocks: tuple[str, ...]
    others: str

    def patch_of(self, model: Any) -> Patch:
        """The patch size of a model in latent frames, rows and columns."""
        if isinstance(self.patch, str):
            value = getattr(model, self.patch)
            return (1, value, value) if isinstance(value, int) else tuple(int(x) for x in value)
        if isinstance(self.patch[0], str):
            time, *space = (int(getattr(model, name)) for name in self.patch)
            return (time, space[0], space[-1])
        return self.patch

    def layers_of(self, model: Any) -> int:
        """The number of self-attention calls over the video in one forward pass."""
        return sum(len(getattr(model, name, ())) for name in self.blocks)


# By the name of the class of `model.diffusion_model`, so that nothing of ComfyUI is imported. A class that is not here
# stays dense: subclasses of a known one (Wan's audio and animation models) add tokens of their own.
GEOMETRIES = {
    "WanModel": Geometry("Wan", "patch_size", ("blocks",), "wan"),
    "CameraWanModel": Geometry("Wan camera", "patch_size", ("blocks",), "wan"),
    "VaceWanModel": Geometry("Wan VACE", "patch_size", ("blocks", "vace_blocks"), "wan"),
    "HunyuanVideo": Geometry("HunyuanVideo", "patch_size", ("double_blocks", "single_blocks"), "before"),
    "AsymmDiTJoint": Geometry("Mochi", "patch_size", ("blocks",), "after"),
    "LTXVModel": Geometry("LTX-Video", (1, 1, 1), ("transformer_blocks",), "after"),
    "MiniTrainDIT": Geometry("Cosmos Predict2", ("patch_temporal", "patch_spatial"), ("blocks",), "none"),
}


@dataclass(frozen=True)
class Grid:
    """The token grid of one forward pass, and how many tokens of other kinds may surround it.

    Args:
        frames, height, width: in patches.
        before: tokens before the video, None where the length of the call tells.
        others: as in `Geometry`.
    """

    frames: int
    height: int
    width: int
    others: str
    before: int = 0
    after: bool = False

    @property
    def tokens(self) -> int:
        """Video tokens."""
        return self.frames * self.height * self.width

    def layout(self, length: int) -> VideoLayout | None:
        """The layout of a call over `length` tokens; None where it cannot be a self-attention over this video."""
        extra = length - self.tokens
        if extra < 0:
            return None
        before = {"none": 0, "before": extra, "after": 0, "wan": self.before}[self.others]
        after = extra - before
        allowed = self.others == "after" or (self.others == "wan" and self.after)
        if after < 0 or (after and not allowed):
            return None
        return VideoLayout(self.frames, self.height, self.width, text_before=before, text_after=after)


def grid_of(geometry: Geometry, model: Any, latent: Any, conditioning: dict[str, Any]) -> Grid | None:
    """The grid of a forward pass.

    Args:
        geometry: of the model. model: the diffusion model.
        latent: `[B, C, T, H, W]`, the noisy latent; None is returned for any other shape (packed latents, images).
        conditioning: the keyword arguments of the pass.
    """
    if getattr(latent, "ndim", 0) != 5:
        return None
    time, height, width = geometry.patch_of(model)
    frames = latent.shape[2]
    joined = conditioning.get("time_dim_concat")
    if joined is not None:
        frames += joined.shape[2]
    grid = (-(-frames // time), -(-latent.shape[3] // height), -(-latent.shape[4] // width))
    before = 0
    reference = conditioning.get("reference_latent")
    if geometry.others == "wan" and reference is not None and getattr(model, "ref_conv", None) is not None:
        before = (reference.shape[-2] // height) * (reference.shape[-1] // width)
    return Grid(*grid, geometry.others, before, conditioning.get("context_latents") is not None)
