"""Start a recipe: settings checked first, then models and data, then training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipes.base import Recipe


def config_folder() -> Path:
    """The folder of the ready settings (`*.yaml`)."""
    return Path(__file__).resolve().parent / "configs"


def run(
    recipe: str,
    config_file: str | Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    encode_only: bool = False,
) -> dict[str, Any]:
    """Train.

    Args:
        recipe: a name of `recipes.RECIPES`.
        config_file: YAML; the bare name of a file in `config_folder()` is found there.
        overrides: "a.b=value".
        resume: None, "latest", "auto" (latest, or from the start without any), or the folder of a checkpoint.
        encode_only: fill the caches of clips and captions, and end; the folder of the run is left alone.

    Returns:
        Paths and numbers of the result; empty in processes other than the main one.

    Raises:
        ConfigError: settings that cannot be used.
        CheckpointError: a checkpoint that cannot be written, read or continued.
        Stopped: on SIGINT, SIGTERM, SIGHUP or SIGUSR1; where training had begun, after a checkpoint.
        Diverged: the loss or a weight is no number any more.
        OutOfMemory: of a GPU; the message says what takes less.
        OSError: the result cannot be written, or a clip that is measured is gone.
    """
    from .config import ConfigError, build, nearest, read
    from .places import absent
    from .recipes import find

    if encode_only and resume is not None:
        raise ConfigError("--encode-only continues no run: leave --resume out; what is encoded already stays.")
    cls = find(recipe)
    file = Path(config_file)
    if not file.exists() and file.parent == Path():
        ready = {known.stem: known for known in sorted(config_folder().glob("*.yaml"))}
        name = file.name.removesuffix(".yaml")
        if name not in ready:
            raise ConfigError(f"{file}: no such file, and no ready settings of that name: {nearest(name, ready)}")
        file = ready[name]
    content = read(file, overrides)
    # First, or the settings of another recipe would be a long list of unknown names.
    stated = content.get("recipe")
    if isinstance(stated, str) and find(stated) is not cls:
        raise ConfigError(f"{file} is for the recipe {stated}, not for {recipe}.")
    config = build(cls.Config, content, str(file), absent(content, resume is not None))
    if config.loop.threads:
        import torch

        torch.set_num_threads(config.loop.threads)
    import diffusers
    import transformers

    # Bars of two libraries, which say nothing about training.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    from .distributed.fsdp import plugin_of
    from .distributed.processes import Process, host_group
    from .trainer import Trainer, make_accelerator

    accelerator = make_accelerator(config)
    count = accelerator.num_processes
    sharded = plugin_of(accelerator) is not None
    process = Process(accelerator.device, accelerator.process_index, count, host_group(count), sharded=sharded)
    if encode_only:
        return _encode(cls(config, process))
    return Trainer(cls(config, process), accelerator).run(resume)


def _encode(recipe: Recipe) -> dict[str, Any]:
    """Fill the caches of a recipe; what it says of them."""
    import torch

    from .footprint.memory import out_of_memory
    from .stopping import Stopped, StopRequested

    process = recipe.process
    try:
        with process.stop.listening(), process.stop.at_once():
            facts = recipe.encode()
    except StopRequested:
        kept = f"; what was encoded is kept in {recipe.encodings}" if recipe.encodings else ""
        raise Stopped(f"stopped while clips were encoded{kept}.") from None
    except torch.cuda.OutOfMemoryError as error:
        again = "what is encoded is used again by the same command."
        raise out_of_memory(recipe.config, "while clips were encoded", again) from error
    finally:
        process.progress.close()
    return facts if process.is_main else {}
