"""What is taken where no method is asked for, by every front end."""

DEFAULT_METHOD = "tangent"
MIN_SPARSE_TOKENS = 8192
"""Videos with fewer tokens stay dense unless a method is asked for: planning would cost more than it saves.
What was measured on the machine goes before it, see `break_even.py`."""
