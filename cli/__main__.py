"""`python -m vidaccel.cli`."""

from . import main

main()
