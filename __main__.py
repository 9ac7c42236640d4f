"""`python -m vidaccel`: the command line, also where the package was not installed but copied, as into ComfyUI."""

from __future__ import annotations

import sys

from .generation.packages import SHOWING, MissingPackages, check_command_line

try:
    check_command_line(SHOWING)
except MissingPackages as error:
    sys.exit(f"Error: {error}")

from .cli import main  # it imports what was asked for above

main()
