"""Models whose weights are all there once they are loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .checkpoint_file import CheckpointError
from .dtypes import resolve_dtypes

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin as _Model
else:
    _Model = object


class LoadedWhole(_Model):
    """Gives a model of diffusers a `from_pretrained` that takes dtypes by name and refuses weights that lack one."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """Load a model. Arguments are those of `ModelMixin.from_pretrained`; a dtype may be a name, such as "bfloat16".

        Raises:
            CheckpointError: parameters that the weights lack, of which diffusers only warns.
            ValueError: a dtype whose name is unknown.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Of files of FlashPack diffusers tells nothing, and warns if it is asked: what they lack stays without memory.
        told = wants_info or not kwargs.get("use_flashpack")
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=told, **resolve_dtypes(kwargs)
        )
        model, info = loaded if told else (loaded, {})
        lacking = info.get("missing_keys")
        if lacking is None:
            lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing := sorted(lacking):
            place = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "").rstrip(os.sep)
            files = "model*.flashpack" if kwargs.get("use_flashpack") else "diffusion_pytorch_model*"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"the weights in {place} ({files}) lack {missing[0]}{more}, which config.json there "
                f"asks for: download them again, or save the {cls.__name__} as a whole."
            )
        return (model, info) if wants_info else model


__all__ = ["LoadedWhole"]
