"""LoRAs in the transformers of a pipeline: their files, their layers, and out again without a trace."""
