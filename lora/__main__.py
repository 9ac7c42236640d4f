"""`python -m vidaccel.lora RECIPE --config FILE`, or the same after `accelerate launch -m`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print the result; 130 when stopped.

    2 for settings or checkpoints that cannot be used, 1 for a loss of NaN, too little memory of a GPU, or a file that
    cannot be read or written.
    """
    # Before torch is imported: OpenMP threads that spin between small operations make a small model many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from . import run
    from .recipes import RECIPES

    parser = argparse.ArgumentParser(prog="vidaccel.lora", description="Train one of the recipes.")
    parser.add_argument("recipe", help=", ".join(RECIPES))
    parser.add_argument("--config", required=True, help="YAML file, or the name of a ready one")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a setting; repeatable")
    parser.add_argument("--resume", help='"latest", "auto", or the folder of a checkpoint')
    parser.add_argument("--encode-only", action="store_true", help="fill the caches of clips and captions, and end")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", handlers=[_CurrentStderr()])
    logging.getLogger("vidaccel").setLevel(logging.INFO)
    from .checkpoints.checkpoint import CheckpointError
    from .config import ConfigError
    from .footprint.memory import OutOfMemory
    from .trainer import Diverged, Stopped

    try:
        result = run(given.recipe, given.config, given.set, given.resume, given.encode_only)
    except (ConfigError, CheckpointError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except (Diverged, OutOfMemory, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped)
        return 130
    except KeyboardInterrupt:
        print("ended at once, as asked for twice; the last whole checkpoint is kept.")
        return 130
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


class _CurrentStderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time: a progress bar stands in for it while it is shown."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
