"""`python -m vidaccel`: the command line, also where the package was not installed but copied, as into ComfyUI."""

from __future__ import annotations

from .cli import main

main()
