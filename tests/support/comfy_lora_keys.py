"""Loads a LoRA onto a tiny model of ComfyUI's with ComfyUI's own code: `python comfy_lora_keys.py FILE MODEL SETTINGS`.

MODEL is the name of a class in `comfy.supported_models`, SETTINGS its `unet_config` as JSON. Prints as JSON the layers
that were patched, the keys of the file that none of them took, and how far the patched weights of all layers are from
the product of the file's matrices, relative to it. Needs ComfyUI's own Python, and COMFYUI_PATH.
"""

from __future__ import annotations

import json
import logging
import os
import sys

sys.path.insert(0, os.environ["COMFYUI_PATH"])

from comfy.cli_args import args

args.cpu = True

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402


class Kept(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(file: str, name: str, settings: str) -> None:
    unet = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(settings).items()}
    config = getattr(supported, name)(unet)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.zero_()
    kept = Kept()
    logging.getLogger().addHandler(kept)
    weights = comfy.utils.load_torch_file(file)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(weights), comfy.lora.model_lora_keys_unet(model, {}))
    total, state = {}, model.state_dict()
    for key, patch in patches.items():
        key, part = (key, None) if isinstance(key, str) else (key[0], key[1])
        made = comfy.lora.calculate_weight([(1.0, patch, 1.0, part, None)], state[key].clone().float(), key)
        total[key] = total.get(key, 0) + float(made.square().sum())
    wanted = 0.0
    for key, value in weights.items():
        if ".lora_A." in key:
            wanted += float((weights[key.replace(".lora_A.", ".lora_B.")].flatten(1) @ value.flatten(1)).square().sum())
    print(json.dumps({"layers": sorted(total), "log": kept.lines, "of": sum(total.values()) / wanted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
