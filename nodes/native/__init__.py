"""Native models of ComfyUI: what each is, and what is put into a MODEL; imported without ComfyUI."""
