"""What stays dense in ComfyUI's own models, and that it says why, once, in the log and in the report.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from comfy_tiny import randn
from native_comfyui import MODELS, Calls, build, missing, models, patched, sample, tiny, with_override

from vidaccel import SVG2
from vidaccel.nodes.native.models import why_dense

WAN = MODELS["wan_t2v"]


def notes_of(model, description, caplog, **options) -> tuple[torch.Tensor, list[str]]:
    """What a patched clone samples, and its warnings, each of which was logged once. What is announced to ComfyUI is
    none: it is asked before the first forward pass can say that all stays dense."""
    clone, session = patched(model)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vidaccel"):
        out = sample(clone, description, **options)
    notes = [note for note in session.report().notes if not note.startswith("announced to ComfyUI")]
    assert [r.getMessage() for r in caplog.records] == [f"Sparse Attention (test): {note}" for note in notes]
    assert all(record.reason for record in session.report().records)
    return out, notes


def test_a_model_that_is_not_known_is_sampled_as_it_is(caplog):
    """A class that ComfyUI adds tomorrow, with Wan's calls: no guess is made."""
    model = build(WAN)
    unpatched = sample(model, WAN)
    model.model.diffusion_model.__class__ = type("TomorrowsModel", (type(model.model.diffusion_model),), {})
    out, (note,) = notes_of(model, WAN, caplog)
    assert out.equal(unpatched) and note.startswith("TomorrowsModel is no model that sparse attention knows")


CAUSAL = replace(WAN, config="WAN21_CausalAR_T2V", unet={**WAN.unet, "causal_ar": True}, needs="WAN21_CausalAR")
ANIMATE2 = replace(
    MODELS["wan_i2v"], config="WAN_Animate2", unet={**MODELS["wan_i2v"].unet, "model_type": "animate2"},
    needs="WAN_Animate2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("description", "why"),
    [
        (CAUSAL, "CausalWanModel stays dense: it makes one group of frames after another and keeps the keys"),
        (ANIMATE2, "WanAnimate2Model stays dense: each of its frames reads the whole video and a pose frame"),
    ],
    ids=["causal", "animate2"],
)
def test_a_model_whose_calls_are_not_of_a_whole_video_says_why(description, why, caplog):
    if missing(description):
        pytest.skip(missing(description))
    model = build(description)
    out, (note,) = notes_of(model, description, caplog)
    assert note.startswith(why) and out.equal(sample(model, description))


def test_an_upscaler_in_windows_says_why():
    """SeedVR2's class; its attention gets no options, so that no override could see it."""
    seedvr = pytest.importorskip("comfy.ldm.seedvr.model", reason="this ComfyUI has no SeedVR2 yet")
    assert why_dense(seedvr.NaDiT.__new__(seedvr.NaDiT)).startswith("NaDiT stays dense: it upscales a video in windows")


def test_a_padded_text_masks_every_call():
    description, model, _ = tiny("hunyuan")
    description = replace(description, cfg=1.0)  # ComfyUI cannot do such a mask with two prompts in a batch
    mask = torch.ones(1, description.text, dtype=torch.long)
    mask[:, -2:] = 0
    clone, session = patched(model, dense_start_percent=0.0)
    out = sample(clone, description, conditions={"attention_mask": mask})
    assert out.equal(sample(model, description, conditions={"attention_mask": mask}))
    assert session.report().dense_reasons() == {"attention mask": 4 * description.layers}


@pytest.mark.parametrize("name", models("ltxv_guide", "ltxav_guide"))
def test_a_guide_with_a_strength_of_its_own_masks_the_attention(name, caplog):
    """ComfyUI weights each layer's scores then, and splits the queries: no call is plain attention of the video."""
    description, model, _ = tiny(name)
    _, height, width = description.latent
    entry = {
        "pre_filter_count": height * width,
        "strength": 0.5,
        "pixel_mask": None,
        "latent_shape": [1, height, width],
    }
    conditions = {"guide_attention_entries": [entry]}
    out, (note,) = notes_of(model, description, caplog, conditions=conditions)
    assert (
        note
        == "a guide with a strength other than 1 or a mask weights the attention of every layer, so all stayed dense."
    )
    assert out.equal(sample(model, description, conditions=conditions))
    clone, session = patched(model)
    sample(clone, description, conditions={"guide_attention_entries": [{**entry, "strength": 1.0}]})
    assert session.report().density_by_step()[3] < 0.7


def test_an_image_of_a_video_model_stays_dense(caplog):
    """Kandinsky 5 makes images of latents without frames."""
    name = "kandinsky5"
    description, model, _ = tiny(name)
    image = replace(description, latent=(14, 18))
    out, (note,) = notes_of(model, image, caplog)
    assert "a latent of 2x16x14x18 is no video" in note and out.shape == (1, 16, 14, 18)


def test_an_image_of_one_latent_frame_is_a_video():
    description, model, _ = tiny("wan_t2v")
    clone, session = patched(model)
    sample(clone, description, latent=(1, 24, 24))
    assert session.report().density_by_step()[3] < 0.7


@pytest.mark.parametrize("name", models("ltxav", "wan_t2v", "kandinsky5"))
def test_a_text_as_long_as_the_video(name, caplog):
    description, model, _ = tiny(name)
    same = replace(description, text=description.tokens)
    out, (note,) = notes_of(model, same, caplog)
    assert f"as long as the video ({description.tokens} tokens)" in note and out.equal(sample(model, same))


@pytest.mark.parametrize("name", models("ltxav"))
def test_audio_as_long_as_the_video(name, caplog):
    description, model, _ = tiny(name)
    same = replace(description, audio=(1, 8, description.tokens, 16))
    out, (note,) = notes_of(model, same, caplog)
    assert f"as long as the video ({description.tokens} tokens)" in note and out.equal(sample(model, same))


def test_blocks_that_guidance_skips_do_not_shift_the_layers(caplog):
    """LTX-2's spatio-temporal guidance: a further pass, in which one block has no self-attention."""
    from comfy_extras import nodes_lt

    node = getattr(nodes_lt, "LTXVSpatioTemporalGuidance", None)
    if node is None:
        pytest.skip("this ComfyUI has no spatio-temporal guidance yet")
    description, model, _ = tiny("ltxav")
    guided = node.execute(model, 1.0, "1", 0.0, 1.0).result[0]
    clone, session = patched(guided, dense_layers="0", dense_start_percent=0.0)
    assert sample(clone, description, steps=1).isfinite().all()
    records = session.report().records
    # cond, uncond and the further pass
    assert [record.layer for record in records].count(0) == [record.layer for record in records].count(2) == 3
    assert [record.layer for record in records].count(1) == 2
    assert {record.layer for record in records if record.reason} == {0}


def test_the_calls_of_a_face_are_not_the_videos():
    """Wan Animate's adapter calls attention without options, so no override sees it; the layers count as without it."""
    description, model, _ = tiny("wan_animate")
    alone = replace(description, cfg=1.0)
    face = {"face_video_pixels": randn(1, 3, 1, 512, 512)}
    seen = Calls()
    stock = sample(with_override(model, seen.override()), alone, steps=1, conditions=face)
    assert seen.lengths == [(189, 189), (189, 7), (189, 7)] * description.layers  # cross-attention to text and image
    assert not stock.equal(sample(model, alone, steps=1))
    clone, session = patched(model, SVG2(density=1.0), dense_start_percent=0.0)
    torch.testing.assert_close(sample(clone, alone, steps=1, conditions=face), stock, rtol=1e-3, atol=1e-3)
    assert [record.layer for record in session.report().records] == list(range(description.layers))
