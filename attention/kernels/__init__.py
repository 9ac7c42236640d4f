"""Triton kernels over a `BlockPlan`. Imported by the `triton` backend when it runs, never with the package."""
