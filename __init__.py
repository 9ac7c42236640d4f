"""vidaccel: pre-trained video diffusion models, faster.

The names of the public API are looked up on first use, so that ``import vidaccel`` loads neither torch nor diffusers.

This folder is the package, whatever the folder is called, and its modules exist once in a process, under the name
``vidaccel``. ComfyUI loads a node pack by path, under a name made from the folder's path; pytest loads the root of a
checkout under the folder's name. If submodules were then imported below that other name, each class would exist twice,
``isinstance`` would fail between the copies, and ``save_pretrained`` would record a module path of the machine. So
under any other name this file only finds (or loads) the package ``vidaccel`` and passes attribute access on to it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public API: name -> the submodule that defines it, or the submodule itself where both have one name.
_PUBLIC = {
    "AutoencoderDCV": ".autoencoders",
    "BadInput": ".generation.errors",
    "BlockPlan": ".attention",
    "Cache": ".pipelines.presets",
    "DCGenPipeline": ".pipelines",
    "DCVideoGenImageToVideoPipeline": ".pipelines",
    "DCVideoGenPipeline": ".pipelines",
    "DMDScheduler": ".pipelines.few_steps",
    "DenseSchedule": ".attention",
    "GridScheduler": ".pipelines.few_steps",
    "GuidanceCache": ".pipelines.guidance_cache",
    "Handle": ".pipelines",
    "LVSA": ".attention",
    "LoraFile": ".pipelines.presets",
    "METHODS": ".attention",
    "Method": ".attention",
    "Preset": ".pipelines.presets",
    "PresetError": ".pipelines.presets",
    "RCMScheduler": ".pipelines.few_steps",
    "Radial": ".attention",
    "RandomBlocks": ".attention",
    "Riflex": ".pipelines.length",
    "RunReport": ".attention",
    "SLA": ".attention",
    "SVG": ".attention",
    "SVG2": ".attention",
    "Sparge": ".attention",
    "SparseAttention": ".attention",
    "Tangent": ".attention",
    "VSA": ".attention",
    "VideoLayout": ".attention",
    "accelerate": ".pipelines",
    "apply": ".pipelines.presets",
    "attention": ".attention",
    "autoencoders": ".autoencoders",
    "cfg_parallel": ".pipelines.cfg_parallel",
    "demo": ".demo",
    "generate": ".generation.api",
    "generation": ".generation",
    "guidance_cache": ".pipelines.guidance_cache",
    "guidance_free": ".pipelines.guidance_free",
    "lengthen": ".pipelines.length",
    "load_preset": ".pipelines.presets",
    "lora": ".lora",
    "pipelines": ".pipelines",
    "restore": ".pipelines",
    "riflex": ".pipelines.length",
    "save_preset": ".pipelines.presets",
    "sparse_attention": ".attention",
    "tiny_decoder": ".pipelines.tiny_decoder",
    "tune": ".generation.tuning.api",
    "waterfall": ".generation.waterfall.api",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    # The same for type checkers, line by line, so that they know what each name is.
    from . import attention as attention
    from . import autoencoders as autoencoders
    from . import demo as demo
    from . import generation as generation
    from . import lora as lora
    from . import pipelines as pipelines
    from .attention import LVSA as LVSA
    from .attention import METHODS as METHODS
    from .attention import SLA as SLA
    from .attention import SVG as SVG
    from .attention import SVG2 as SVG2
    from .attention import VSA as VSA
    from .attention import BlockPlan as BlockPlan
    from .attention import DenseSchedule as DenseSchedule
    from .attention import Method as Method
    from .attention import Radial as Radial
    from .attention import RandomBlocks as RandomBlocks
    from .attention import RunReport as RunReport
    from .attention import Sparge as Sparge
    from .attention import SparseAttention as SparseAttention
    from .attention import Tangent as Tangent
    from .attention import VideoLayout as VideoLayout
    from .attention import sparse_attention as sparse_attention
    from .autoencoders import AutoencoderDCV as AutoencoderDCV
    from .generation.api import generate as generate
    from .generation.errors import BadInput as BadInput
    from .generation.tuning.api import tune as tune
    from .generation.waterfall.api import waterfall as waterfall
    from .pipelines import DCGenPipeline as DCGenPipeline
    from .pipelines import DCVideoGenImageToVideoPipeline as DCVideoGenImageToVideoPipeline
    from .pipelines import DCVideoGenPipeline as DCVideoGenPipeline
    from .pipelines import Handle as Handle
    from .pipelines import accelerate as accelerate
    from .pipelines import restore as restore
    from .pipelines.cfg_parallel import cfg_parallel as cfg_parallel
    from .pipelines.few_steps import DMDScheduler as DMDScheduler
    from .pipelines.few_steps import GridScheduler as GridScheduler
    from .pipelines.few_steps import RCMScheduler as RCMScheduler
    from .pipelines.guidance_cache import GuidanceCache as GuidanceCache
    from .pipelines.guidance_cache import guidance_cache as guidance_cache
    from .pipelines.guidance_free import guidance_free as guidance_free
    from .pipelines.length import Riflex as Riflex
    from .pipelines.length import lengthen as lengthen
    from .pipelines.length import riflex as riflex
    from .pipelines.presets import Cache as Cache
    from .pipelines.presets import LoraFile as LoraFile
    from .pipelines.presets import Preset as Preset
    from .pipelines.presets import PresetError as PresetError
    from .pipelines.presets import apply as apply
    from .pipelines.presets import load_preset as load_preset
    from .pipelines.presets import save_preset as save_preset
    from .pipelines.tiny_decoder import tiny_decoder as tiny_decoder

# Modules with classes that saved pipelines name in their `model_index.json`.
_SAVED = (
    "autoencoders.autoencoder_dc_v",
    "pipelines.few_steps.dmd",
    "pipelines.few_steps.grid",
    "pipelines.few_steps.rcm",
)

_NAME = "vidaccel"

# Where ComfyUI looks for the pages of help, below this folder.
WEB_DIRECTORY = "nodes/web"


def _version_in(init_file: str) -> str:
    """The version that a package's ``__init__.py`` states, read without running it."""
    try:
        with open(init_file, encoding="utf-8") as file:
            for line in file:
                if line.startswith("__version__"):
                    return line.split("=", 1)[1].strip().strip("\"'")
    except OSError:
        pass
    return "of unknown version"


def _same_file(first: str | None, second: str) -> bool:
    return first is not None and os.path.realpath(first) == os.path.realpath(second)


def _load_once() -> ModuleType:
    """Return the one module ``vidaccel`` of this process, loading this folder as it if there is none yet.

    Two folders cannot both be ``vidaccel``. One that is loaded already stays, since others hold its classes. One that
    is only installed gives way to this folder, which somebody asked for by path. Either way a warning names both.
    """
    log = logging.getLogger(_NAME)
    loaded = sys.modules.get(_NAME)
    if loaded is not None:
        other = getattr(loaded, "__file__", None)
        if not _same_file(other, __file__):
            log.warning(
                "vidaccel %s is already loaded from %s, so that copy is used and the one in %s (%s) is not. "
                "Keep one of them: uninstall the first (pip uninstall vidaccel) or remove the second.",
                getattr(loaded, "__version__", "of unknown version"),
                other,
                os.path.dirname(__file__),
                __version__,
            )
        return loaded

    spec = importlib.util.find_spec(_NAME)
    # A spec without an origin is a plain folder that happens to have the name and lies on sys.path.
    if spec is not None and spec.origin is not None:
        if _same_file(spec.origin, __file__):
            return importlib.import_module(_NAME)
        log.warning(
            "vidaccel %s is installed in %s, but the copy in %s (%s) was loaded by path first, so that one is used. "
            "Keep one of them: uninstall the first (pip uninstall vidaccel) or remove the second.",
            _version_in(spec.origin),
            os.path.dirname(spec.origin),
            os.path.dirname(__file__),
            __version__,
        )

    folder = os.path.dirname(os.path.realpath(__file__))
    path = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(_NAME, path, submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]
        raise
    return module


class _Later(ModuleType):
    """Stands among the loaded modules for one of `_SAVED` until something of it is asked for.

    `from_pretrained` takes the classes that a folder names from modules that are loaded already, and from no others.
    These load diffusers, which `import vidaccel` does not.
    """

    def __getattr__(self, name: str) -> object:
        # Asked of all loaded modules alike: by `inspect`, and by pickle, which seeks the module that has
        # `torch.contiguous_format` in it, and crashes where one is loaded meanwhile. torch.compile pickles its graphs.
        if name.startswith("__") or name not in _defined_in(self.__name__):
            raise AttributeError(f"module {self.__name__!r} is not loaded yet, and has no {name!r}")
        return getattr(_loaded(self), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_loaded(self), name, value)


@functools.cache
def _defined_in(module: str) -> frozenset[str]:
    """The names of a module's classes, functions and values, without loading it.

    Those that it imports from others count, such as the mixins by which diffusers knows what a class is; modules that
    it imports do not.
    """
    import ast

    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), *module.split(".")[1:]) + ".py"
    with open(file, encoding="utf-8") as source:
        statements = ast.parse(source.read()).body
    names = {each.name for each in statements if isinstance(each, ast.ClassDef | ast.FunctionDef)}
    imported = [alias for each in statements if isinstance(each, ast.ImportFrom) for alias in each.names]
    names |= {alias.asname or alias.name for alias in imported}
    for each in statements:
        targets = getattr(each, "targets", [getattr(each, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


_lock = threading.Lock()


def _loaded(later: ModuleType) -> ModuleType:
    with _lock:
        if sys.modules.get(later.__name__) is later:
            del sys.modules[later.__name__]
    return importlib.import_module(later.__name__)


async def comfy_entrypoint() -> object:
    """What ComfyUI calls when this folder lies in its `custom_nodes`."""
    return await importlib.import_module(f"{_NAME}.nodes").comfy_entrypoint()


if not TYPE_CHECKING:  # who checks types would take every name, a misspelt one too, for an object

    def __getattr__(name: str) -> object:
        if _package is not None:
            return getattr(_package, name)
        submodule = _PUBLIC.get(name)
        if submodule is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(submodule, __name__)
        value = module if submodule == f".{name}" else getattr(module, name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return dir(_package) if _package is not None else sorted(__all__)


# The module that this one stands for, or None in `vidaccel` itself.
_package: ModuleType | None = None
if __name__ != _NAME:
    _package = _load_once()
    del __version__, __all__  # so that these, too, are the package's
    # No submodule can be imported below another name: that would be its second copy.
    __path__ = []
else:
    for _module in _SAVED:
        sys.modules.setdefault(f"{_NAME}.{_module}", _Later(f"{_NAME}.{_module}"))
