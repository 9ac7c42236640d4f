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
        if kwargs.get("use_flashpack"):  # which tells nothing of what is loaded, and assigns whole models alone
            return super().from_pretrained(pretrained_model_name_or_path, **resolve_dtypes(kwargs))
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **resolve_dtypes(kwargs)
        )
        if missing := sorted(info["missing_keys"]):
            place = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "").rstrip(os.sep)
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"the weights in {place} (diffusion_pytorch_model*) lack {missing[0]}{more}, which config.json there "
                f"asks for: download them again, or save the {cls.__name__} as a whole."
            )
        return (model, info) if wants_info else model


__all__ = ["LoadedWhole"]
