"""Training: one trainer (`trainer`), one file a recipe (`recipes`), settings in YAML (`configs` has ready ones).

    accelerate launch -m vidaccel.lora ae_adapt --config my.yaml --set phases.lora.steps=2000 --resume latest

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from .launch import config_folder, run

__all__ = ["config_folder", "run"]
