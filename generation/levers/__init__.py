"""What makes a request faster, or is loaded beside its model: methods, adapters, LoRAs, presets."""
