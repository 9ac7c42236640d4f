"""The token grids of native models, from the shapes that ComfyUI gives them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidaccel import VideoLayout
from vidaccel.nodes.native.geometry import Inputs, StaysDense, grid
from vidaccel.nodes.native.models import DENSE, GEOMETRIES, find_geometry, supported_models, why_dense

ROOT = Path(__file__).resolve().parents[2]


def layout(family: str, latent: tuple[int, ...], text: int = 512, model: dict | None = None, **conditions: Any):
    attributes = {"patch_size": (1, 2, 2), "blocks": [None] * 3} | (model or {})
    geometry = GEOMETRIES[family]
    return geometry.layout(Inputs(SimpleNamespace(**attributes), (1, 16, *latent), text, conditions))


def test_sizes_of_published_models():
    """81 frames at 480x832 and 720x1280, HunyuanVideo's 129 frames, LTX-Video's 97 at 512x768."""
    assert layout("WanModel", (21, 60, 104)) == VideoLayout(21, 30, 52)
    assert layout("WanModel", (21, 90, 160)).tokens == 75_600
    hunyuan = {"double_blocks": [SimpleNamespace()], "patch_size": [1, 2, 2]}
    assert layout("HunyuanVideo", (33, 90, 160), 256, hunyuan) == VideoLayout(33, 45, 80, text_before=256)
    assert layout("LTXVModel", (13, 16, 24)) == VideoLayout(13, 16, 24)
    cosmos = {"patch_temporal": 1, "patch_spatial": 2}
    assert layout("MiniTrainDIT", (24, 88, 160), model=cosmos) == VideoLayout(24, 44, 80)
    assert layout("AsymmDiTJoint", (28, 60, 106), 256, {"patch_size": 2}, num_tokens=31) == VideoLayout(
        28, 30, 53, text_after=31
    )


@pytest.mark.parametrize(
    ("size", "tokens"), [((21, 60, 104), (21, 30, 52)), ((1, 61, 105), (1, 31, 53)), ((5, 1, 1), (5, 1, 1))]
)
def test_odd_sizes_are_padded(size, tokens):
    assert grid((1, 16, *size), (1, 2, 2)) == tokens


def test_wan_reference_before_and_context_behind():
    latent = torch.zeros(1, 16, 8, 8)
    conditions = {"reference_latent": latent, "context_latents": [latent[:, :, None], torch.zeros(1, 16, 2, 4, 6)]}
    with_reference = {"ref_conv": object()}
    found = layout("WanModel", (5, 8, 8), model=with_reference, **conditions)
    assert found == VideoLayout(5, 4, 4, text_before=16, text_after=16 + 12)
    # A model without the layer for it ignores a reference.
    assert layout("WanModel", (5, 8, 8), model={"ref_conv": None}, reference_latent=latent) == VideoLayout(5, 4, 4)


def test_wan_subject_frames_are_not_video():
    subject = torch.zeros(1, 16, 3, 8, 8)
    assert layout("WanModel", (5, 8, 8), time_dim_concat=subject) == VideoLayout(5, 4, 4, text_after=48)


def hunyuan(**attributes: Any) -> dict[str, Any]:
    return {"patch_size": [1, 2, 2], "double_blocks": [SimpleNamespace()], **attributes}


def test_a_reference_of_odd_size_loses_what_is_no_whole_patch():
    reference = torch.zeros(1, 16, 9, 7)
    made = layout("WanModel", (5, 9, 7), 8, {"ref_conv": object()}, reference_latent=reference)
    assert made == VideoLayout(5, 5, 4, text_before=4 * 3)


def test_hunyuan_text_is_the_sum_of_its_encoders():
    extra = {"txt_byt5": torch.zeros(1, 20, 4), "clip_fea": torch.zeros(1, 9, 4)}
    assert layout("HunyuanVideo", (5, 8, 8), 30, hunyuan(byt5_in=object()), **extra).text_before == 59
    assert layout("HunyuanVideo", (5, 8, 8), 30, hunyuan(byt5_in=None), **extra).text_before == 39


def test_hunyuan_text_behind_the_video_in_old_versions():
    old = hunyuan(double_blocks=[SimpleNamespace(flipped_img_txt=True)])
    reference = torch.zeros(1, 16, 1, 8, 8)
    assert layout("HunyuanVideo", (5, 8, 8), 30, old, ref_latent=reference) == VideoLayout(5, 4, 4, 16, 30)


def test_hunyuan_images_are_no_video():
    """HunyuanImage has the same class with a patch of two numbers and a latent without frames."""
    with pytest.raises(StaysDense, match="a latent of 1x16x8x8 is no video"):
        layout("HunyuanVideo", (8, 8), 30, hunyuan(patch_size=[2, 2]))


def test_mochi_text_is_cut_to_its_tokens():
    for text, given, tokens in ((256, {}, 256), (256, {"num_tokens": 9}, 9), (5, {"num_tokens": 9}, 5)):
        assert layout("AsymmDiTJoint", (5, 8, 8), text, {"patch_size": 2}, **given).text_after == tokens


def ltxv(mask: torch.Tensor | None, guides: int, frames: int = 5):
    """`guides` tokens of guide frames of 16 tokens each."""
    return layout("LTXVModel", (frames, 4, 4), keyframe_idxs=torch.zeros(1, 3, guides, 2), denoise_mask=mask)


def test_ltxv_guides_are_behind_the_video():
    mask = torch.ones(1, 1, 5, 4, 4)
    assert ltxv(mask, 16) == VideoLayout(4, 4, 4, text_after=16)
    assert ltxv(mask, 32) == VideoLayout(3, 4, 4, text_after=32)
    mask[:, :, -1, 0] = -1
    assert ltxv(mask, 32) == VideoLayout(3, 4, 4, text_after=28)
    assert ltxv(torch.ones(1, 1, 5, 1, 1), 16) == VideoLayout(4, 4, 4, text_after=16)
    assert ltxv(None, 0) == VideoLayout(5, 4, 4)


def test_ltxv_guides_that_cannot_be_placed_give_no_layout():
    mask = torch.ones(1, 1, 5, 4, 4)
    # Which of their tokens are there is not known, made for another resolution, nothing but guides.
    for given, guides in ((None, 16), (mask, 17), (mask, 80)):
        with pytest.raises(StaysDense, match="guides without a mask, or made for another resolution"):
            ltxv(given, guides)
    mask[:, :, 0, 0, 0] = -1
    with pytest.raises(StaysDense, match="drops tokens of the video itself"):
        ltxv(mask, 16)


def test_ltxv_guides_that_are_weighted():
    for entry in ({"strength": 0.5}, {"strength": 1.0, "pixel_mask": torch.ones(1)}):
        conditions = {"keyframe_idxs": torch.zeros(1, 3, 16, 2), "denoise_mask": torch.ones(1, 1, 5, 4, 4)}
        with pytest.raises(StaysDense, match="weights the attention"):
            layout("LTXVModel", (5, 4, 4), guide_attention_entries=[{"strength": 1.0}, entry], **conditions)


def test_the_video_of_packed_latents_is_the_first_of_them():
    shapes = [(1, 16, 5, 4, 4), (1, 8, 6, 16)]
    x = torch.zeros(2, 1, 16 * 80 + 8 * 6 * 16)
    inputs = Inputs.of(None, x, torch.zeros(2, 7, 4), {"latent_shapes": shapes})
    assert inputs.latent == (2, 16, 5, 4, 4) and inputs.audio == (1, 8, 6, 16) and inputs.text == 7
    alone = Inputs.of(None, x[:1], None, {"latent_shapes": [(1, 16, 5, 4, 4)]})
    assert alone.latent == (1, 16, 5, 4, 4) and alone.audio == () and alone.text == 0
    window = Inputs.of(None, torch.zeros(1, 16, 2, 4, 4), None, {"latent_shapes": [(1, 16, 5, 4, 4)]})
    assert window.latent == (1, 16, 2, 4, 4)


def test_minimax_has_text_references_and_audio_before_the_video():
    table = SimpleNamespace(
        segments=[(0, 7, "text"), (7, 23, "cond"), (23, 43, "ref_audio"), (43, 63, "audio"), (63, 143, "video")]
    )
    shapes = [(1, 24, 5, 8, 8), (1, 32, 2, 10)]
    for payload, before in (({"layout": table}, 7 + 36 + 20), ({}, 7 + 20)):
        found = layout("MiniMaxH3Model", (5, 8, 8), 7, latent_shapes=shapes, minimax_payload=payload)
        assert found == VideoLayout(5, 4, 4, text_before=before)


def test_s2v_motion_is_in_larger_patches_the_older_it_is():
    """19 latent frames before the video: 1 in patches of 2x2, 2 of 2x4x4 and 16 of 4x8x8, cut to whole patches."""
    model = {"frame_packer": SimpleNamespace(zip_frame_buckets=[1, 2, 16])}
    reference, motion = torch.zeros(1, 16, 1, 60, 104), torch.zeros(1, 16, 19, 60, 104)
    found = layout("WanModel_S2V", (20, 60, 104), model=model, reference_latent=reference, reference_motion=motion)
    assert found == VideoLayout(20, 30, 52, text_after=30 * 52 + 30 * 52 + 15 * 26 + 4 * 7 * 13)


def test_scail_references_before_and_the_pose_behind():
    conditions = {"reference_latent": torch.zeros(1, 20, 2, 9, 7), "pose_latents": torch.zeros(1, 20, 5, 5, 4)}
    assert layout("SCAILWanModel", (5, 9, 7), **conditions) == VideoLayout(
        5, 5, 4, text_before=2 * 5 * 4, text_after=5 * 3 * 2
    )


def test_text_as_long_as_the_video_is_ambiguous_where_text_is_apart():
    for family, text, image, ambiguous in (
        ("WanModel", 80, None, True),
        ("WanModel", 79, None, False),
        ("WanModel", 7, 80, True),
        ("WanModel", 30, 50, True),
        ("HunyuanVideo", 80, None, False),
    ):
        conditions = {} if image is None else {"clip_fea": torch.zeros(1, image, 4)}
        assert (80 in GEOMETRIES[family].elsewhere(Inputs(None, (1, 16, 5, 8, 8), text, conditions))) is ambiguous
    with pytest.raises(StaysDense, match=r"as long as the video \(80 tokens\)"):
        layout("WanModel", (5, 8, 8), 80)


def test_ltx2_audio_as_long_as_the_video_is_ambiguous():
    reference = {"tokens": torch.zeros(1, 20, 128)}
    for audio, more, ambiguous in ((80, {}, True), (60, {}, False), (60, {"ref_audio": reference}, True)):
        shapes = [(1, 16, 5, 4, 4), (1, 8, audio, 16)]
        inputs = Inputs(None, (1, 16, 5, 4, 4), 7, {"latent_shapes": shapes, **more})
        assert (80 in GEOMETRIES["LTXAVModel"].elsewhere(inputs)) is ambiguous


def test_layers_are_counted_over_all_blocks():
    model = SimpleNamespace(double_blocks=[None] * 20, single_blocks=[None] * 40)
    geometry = GEOMETRIES["HunyuanVideo"]
    assert geometry.layers(model) == 60 and geometry.block_offsets(model) == {"double": 0, "single": 20}
    vace = SimpleNamespace(blocks=[None] * 30, vace_blocks=[None] * 15)
    assert GEOMETRIES["VaceWanModel"].layers(vace) == 45 and GEOMETRIES["VaceWanModel"].main_layers(vace) == 30


def test_a_subclass_is_another_model():
    """Wan's models with a cache of keys inherit from WanModel."""
    wan = type("WanModel", (), {})
    assert find_geometry(wan()) is GEOMETRIES["WanModel"]
    for name in (*DENSE, "TomorrowsModel"):
        assert find_geometry(type(name, (wan,), {})()) is None


def test_a_model_that_stays_dense_is_told_why():
    for name, reason in DENSE.items():
        assert why_dense(type(name, (), {})()) == f"{name} stays dense: {reason}."
    assert "TomorrowsModel is no model that" in why_dense(type("TomorrowsModel", (), {})())


def test_the_page_of_models_has_their_rows():
    """docs/comfyui-models.md, as the table and the list of this module say."""
    page = (ROOT / "docs" / "comfyui-models.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    served = [f"| {g.family} | {g.serves} | `{name}` | {g.sequence} |" for name, g in GEOMETRIES.items()]
    assert rows == served + [f"| `{name}` | {reason} |" for name, reason in DENSE.items()]


def test_messages_name_every_family():
    assert supported_models().split(", ") == [geometry.family for geometry in GEOMETRIES.values()]
