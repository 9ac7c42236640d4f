"""What the report node shows: what was done, and in which words; imported without ComfyUI."""
