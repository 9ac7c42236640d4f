"""What is taken where no method is asked for, by every front end."""

DEFAULT_METHOD = "tangent"
MIN_SPARSE_TOKENS = 8192
"""Videos with fewer tokens stay dense unless a method is asked for: planning would cost more than it saves.
`generate` and *Accelerate Pipeline* take what was measured on the machine instead, see `generation/tuning/store.py`."""
