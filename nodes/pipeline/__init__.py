"""Diffusers pipelines under ComfyUI; imported without it."""
