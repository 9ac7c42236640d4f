"""What is asked for, its values checked, and filled in from the model and from presets."""
