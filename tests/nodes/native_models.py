"""Run by `test_comfyui.py` with ComfyUI's Python: its model classes at tiny sizes with random weights; prints JSON.

For each: whether density 1 gives what the unpatched model gives, how many calls were sparse at density 0.6, and whether
the text lies where `nodes/geometry.py` says: queries that change with the prompt in the first joint attention are text.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

root = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("pack", root / "__init__.py")  # by path, as ComfyUI loads it
spec.loader.exec_module(importlib.util.module_from_spec(spec))
sys.path.insert(0, sys.argv.pop(1))  # the folder of ComfyUI
import comfy.options  # noqa: E402 (before anything else of ComfyUI: it reads the command line)
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import torch  # noqa: E402

torch.set_num_threads(1)
import comfy.ops  # noqa: E402
from comfy.ldm.cosmos.predict2 import MiniTrainDIT  # noqa: E402
from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo  # noqa: E402
from comfy.ldm.lightricks.model import LTXVModel  # noqa: E402
from comfy.ldm.wan.model import VaceWanModel, WanModel  # noqa: E402

from vidaccel import SVG  # noqa: E402
from vidaccel.nodes import native  # noqa: E402

PLACE = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
WAN = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_dim": 32, "in_dim": 16}
HUNYUAN = {
    **{
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 24,
        "context_in_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
    },
    **{"num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 256},
    **{"patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": False, "byt5": False, "meanflow": False},
    **{"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False},
}
COSMOS = {
    **{"max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2},
    **{"patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 32},
    **{"pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16, "concat_padding_mask": False},
}
MOCHI = {"in_channels": 12, "hidden_size_x": 64, "hidden_size_y": 48, "depth": 2, "num_heads": 2, "t5_feat_dim": 32}
MOCHI |= {"mlp_ratio_x": 192, "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0}
LTXV = {
    "in_channels": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
}
# name -> the model, channels of its latent, the other inputs of a forward pass for a prompt `[1, 9, 32]`
MODELS = {
    "Wan": (lambda: WanModel(model_type="t2v", out_dim=16, **WAN, **PLACE), 16, lambda text: {}),
    "VACE": (
        lambda: VaceWanModel(model_type="t2v", out_dim=16, vace_layers=1, vace_in_dim=96, **WAN, **PLACE),
        16,
        lambda text: {"vace_context": torch.zeros(1, 1, 96, 3, 12, 16), "vace_strength": [1.0]},
    ),
    "HunyuanVideo": (lambda: HunyuanVideo(**HUNYUAN, **PLACE), 16, lambda text: {"y": text[:, 0, :24]}),
    "Mochi": (
        lambda: AsymmDiTJoint(use_t5=True, t5_token_length=9, learn_sigma=False, rope_theta=1e4, **MOCHI, **PLACE),
        12,
        lambda text: {"attention_mask": torch.ones(1, 9, dtype=torch.bool), "num_tokens": 9},
    ),
    "LTXV": (lambda: LTXVModel(caption_channels=32, **LTXV, **PLACE), 16, lambda text: {"attention_mask": None}),
    "Cosmos Predict2": (lambda: MiniTrainDIT(**COSMOS, **PLACE), 16, lambda text: {}),
}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if wide else 0.1) + (not wide))
    return model.eval()


def run(model, latent, text, inputs, density=None):
    """The output of a forward pass, the session, and the queries of the joint calls."""
    seen, options = [], {}
    session = native.NativeSession(SVG(density=density or 1.0, tile=8), model, lambda percent: 1 - percent)
    override = native.make_override(session, None)

    def recording(func, q, k, v, heads, *rest, **kwargs):
        if k.shape == q.shape:
            split = kwargs.get("skip_reshape", False)
            seen.append(q.transpose(1, 2).flatten(2) if split else q)
        return override(func, q, k, v, heads, *rest, **kwargs) if density else func(q, k, v, heads, *rest, **kwargs)

    options["optimized_attention_override"] = recording
    options[native.KEY] = session.begin_pass(latent, torch.tensor([0.5]), options, inputs)
    with torch.no_grad():
        out = model(latent, torch.tensor([500.0]), text, transformer_options=options, **inputs)
    return out, session, seen


def check(name: str) -> dict:
    build, channels, more = MODELS[name]
    model = fill(build())
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, channels, 3, 12, 16, generator=generator)
    texts = torch.randn(2, 1, 9, 32, generator=generator)
    inputs = more(texts[0])
    plain, session, first = run(model, latent, texts[0], inputs)
    same, _, _ = run(model, latent, texts[0], inputs, density=1.0)
    sparse, session, _ = run(model, latent, texts[0], inputs, density=0.6)
    _, _, second = run(model, latent, texts[1], inputs)
    video = session.engine.layout.video_tokens
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.shape[1] >= video]
    changed = (pairs[0][0] - pairs[0][1]).abs().amax((0, 2)) > 1e-6
    layout = session.engine.layout
    expected = torch.ones(layout.tokens, dtype=torch.bool)
    expected[layout.video] = False
    return {
        "difference": float((same - plain).abs().max() / plain.abs().max()),
        "changed by sparsity": float((sparse - plain).abs().max()),
        "sparse calls": sum(not r.reason for r in session.report().records),
        "layers": session.engine.num_layers,
        "text where it was expected": changed.equal(expected),
        "text tokens": layout.text_tokens,
        "notes": [n for n in session.report().notes if not n.startswith("backend auto")],
    }


print(json.dumps({name: check(name) for name in (sys.argv[1:] or MODELS)}))
