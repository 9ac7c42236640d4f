"""What a training is said to take of a GPU, against what real models hold."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from lora_runs import recipe, write
from trainable import saved

from vidaccel.lora import run
from vidaccel.lora.distributed.generators import Generators, Place
from vidaccel.lora.footprint.memory import training_memory
from vidaccel.lora.settings import PhaseSettings

WAN_14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
}


@pytest.mark.parametrize("kind", ["wan", "hunyuan", "ltx", "cogvideox 5b"])
def test_it_is_what_the_model_holds(tmp_path, text_base, kind):
    base = text_base if kind == "wan" else saved(kind, tmp_path)
    size = {"frames": 9, "height": 64, "width": 96}
    half, on = {"dtype": "bfloat16"}, {"mixed_precision": "bf16", "gradient_checkpointing": True}
    made = recipe(write(tmp_path, base, model=half, loop=on, data={"sizes": [size]}, train={"ema_decay": 0.9}))
    layout = made.backbone.layout(9, 64, 96)
    told = made.memory(made.backbone.skeleton(), [layout])
    phase = made.phases()[0]
    model = phase.setup({})
    trained = [p for p in model.parameters() if p.requires_grad]
    assert told.trained == sum(p.numel() for p in trained) * (4 + 4 + 8 + 4)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert told.frozen == pytest.approx(frozen, rel=0.1)  # norms and the like stay in float32

    if kind == "wan":  # the video alone goes from layer to layer
        latents = torch.randn(2, 8, 3, 8, 12)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = phase.loss(model, {"latents": latents, "caption": ["a red circle"] * 2}, Generators(
                [Place(0, number, 2, number) for number in range(2)]
            ))  # fmt: skip
        gc.collect()
        held = {
            x.data_ptr(): x.nbytes
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.shape == (2, layout.tokens, 24) and x.dtype == torch.bfloat16
        }
        assert told.kept == len(model.blocks) * 2 * layout.tokens * 24 * 2 == sum(held.values())
        loss.backward()


def test_a_published_size():
    """Wan 14B at 81 frames of 720p, with a LoRA of rank 32 on all projections: more than an H100 has, and with its
    weights spread over eight it is not."""
    with init_empty_weights():
        skeleton = WanTransformer3DModel(**WAN_14B)
    given = {
        "weight_bytes": 2,
        "layers": 40,
        "width": 5120,
        "sizes": [(32_760, 1), (75_600, 1)],
        "activation_bytes": 2,
    }
    phase = PhaseSettings(steps=1)
    one = training_memory(skeleton, 153_000_000, phase, **given)
    assert str(one) == (
        "memory of each process, at least 62.0 GB: 28.6 GB of frozen weights, 2.4 GB of what is trained (weights, "
        "gradients, optimiser), 31.0 GB kept for the gradients (40 layers, 75,600 tokens, 1 clip); and what a layer "
        "works with."
    )
    assert training_memory(skeleton, 153_000_000, phase, shared_by=8, **given).total < 36e9
    small = PhaseSettings(steps=1, optimizer="adamw_8bit_torchao")
    quantised = training_memory(skeleton, 153_000_000, small, linear_bytes=1, **given)
    assert quantised.frozen == pytest.approx(one.frozen / 2, rel=0.01) and quantised.trained == 153_000_000 * 10
    loose = training_memory(skeleton, 1, phase, checkpointed=False, **given)
    assert "without loop.gradient_checkpointing many times that" in str(loose)


def test_it_is_said_before_clips_are_encoded_and_a_step_after_it(tmp_path, text_base, capsys):
    run("lora", write(tmp_path, text_base, loop={"log_every": 2}), ["validation.prompts=[]"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("memory of each process, at least") and "2 layers, 12 tokens, 2 clips" in lines[0]
    [first] = [number for number, line in enumerate(lines) if "the first step took" in line]
    assert "phase train: 2 steps" in lines[first - 1] and "train 2/2" in lines[first + 1]
    assert "The log has a line every 2 steps" in lines[first]
