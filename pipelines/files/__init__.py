"""Folders and files of models, adapters and trainings: where they are, what they hold, and how they are written."""
