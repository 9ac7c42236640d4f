"""Checkpoints: written whole, read back, and what a run that goes on from one must have as it was."""
