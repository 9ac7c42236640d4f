"""Every row of the table of families, on the real transformer with random weights."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep
from tiny_families import BUILDERS, Tiny, build
from tiny_families.base import mask
from tiny_families.others import minimax_h3_at, minimax_h3_packed
from tiny_families.wan_kin import WAN
from torch.utils._pytree import tree_map_only

from vidaccel import SVG2, DenseSchedule, Radial, SparseAttention, VideoLayout, accelerate
from vidaccel.attention import RandomBlocks
from vidaccel.pipelines import FAMILIES, find_transformers
from vidaccel.pipelines.acceleration.layouts import packed

ALL_DENSE, NEVER_DENSE = DenseSchedule(first_steps=10**6), DenseSchedule()
SPARSE = RandomBlocks(density=0.5, redraw=False)
MASKED = {"skyreels_v2_causal", "ltx2_masked"}  # attention masks of all pairs, with which all calls stay dense
# Text is padded in these. A pass that drops the padding differs from stock in rounding.
PADDED = {"hunyuan_video", "hunyuan_video_i2v", "hunyuan_framepack", "hunyuan_video_15", "hunyuan_video_15_i2v",
          "motif_video"}  # fmt: skip


@pytest.fixture(params=BUILDERS)
def name(request) -> str:
    return request.param


def calls_of(monkeypatch) -> list[tuple[int, torch.Tensor]]:
    """Layer and queries of every call that reaches an engine from now on."""
    calls, call = [], SparseAttention.__call__

    def spy(self, q, k, v, layer, **more):
        calls.append((layer, q.clone()))
        return call(self, q, k, v, layer, **more)

    monkeypatch.setattr(SparseAttention, "__call__", spy)
    return calls


def test_every_class_of_every_row_is_tested():
    tested = {type(build(name).model).__name__ for name in BUILDERS}
    assert tested == {cls for family in FAMILIES for cls in family.transformers}


def test_the_layout_is_that_of_the_sequence(name, monkeypatch):
    """Another content in one token of the video changes the queries of that token alone, where the layout has it."""
    tiny = build(name)
    calls = calls_of(monkeypatch)
    first = 1 if name == "wan_vace" else 0  # the first block of VACE reads the control video
    with accelerate(tiny.model, SPARSE, schedule=ALL_DENSE) as handle:
        tiny.run()
        assert handle._installed[0].engine.layouts == (tiny.layout,)
        before = next(q for layer, q in calls if layer == first)
        grid = tiny.layout
        for frame, row, column in [(0, 0, 0), (0, 1, 2), (1, 2, 3), (grid.frames - 1, grid.height - 1, grid.width - 1)]:
            calls.clear()
            tiny.run(**tiny.changed(frame, row, column))
            after = next(q for layer, q in calls if layer == first)
            rows = (after - before).abs().amax((0, 1, 3)).gt(1e-6).nonzero().flatten().tolist()
            place = grid.text_before + (frame * grid.height + row) * grid.width + column
            assert rows == [place] if first == 0 else place in rows
    assert before.shape[2] == grid.tokens or name in MASKED


def test_what_stands_for_the_prefix_of_cosmos_3_is_counted_nowhere():
    """Its queries are zeros: with them, less would seem to be skipped than is, and nearer to dense."""
    tiny = build("cosmos_3")
    text = tiny.layout.text_before
    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
        tiny.run()
        calls = handle._installed[0].engine.memory.calls
        plans = {call[0]: kept.drawn["random"] for call, kept in calls.items()}
        densities = {r.layer: r.density for r in handle.report().records}
    masks = {layer: plan.to_dense_mask()[:, :, text:] for layer, plan in plans.items()}
    assert text and densities == pytest.approx({layer: float(mask.double().mean()) for layer, mask in masks.items()})


def test_dense_passes_are_stock_and_sparse_ones_run_in_every_layer(name):
    tiny = build(name)
    before = tiny.run()
    with accelerate(tiny.model, SPARSE, schedule=ALL_DENSE):
        dense = tiny.run()
    if name in PADDED or name == "cosmos_3":
        torch.testing.assert_close(dense, before, atol=5e-6, rtol=1e-5)
    else:
        assert dense.equal(before)

    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
        sparse = tiny.run()
        tiny.run()
        report = handle.report()
    done = [record.layer for record in report.records if not record.reason]
    assert sorted(set(done)) == list(range(tiny.layers)) and len(done) == 2 * tiny.layers
    assert all(record.density < 0.75 for record in report.records if not record.reason)
    if tiny.layers:
        assert not sparse.equal(before) and (sparse - before).abs().max() < 10 * before.abs().max()
    assert {record.reason for record in report.records} == ({"attention mask"} if name in MASKED else {""})
    silent = [note for note in report.notes if "made no attention call" in note]
    assert len(silent) == (name == "ltx2_3_guided")
    assert tiny.run().equal(before)


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox_5b", "hunyuan_video", "cosmos_1"], indirect=True)
def test_under_autocast_with_the_norms_of_a_gpu(name, monkeypatch):
    """There norms are computed in float32 under autocast, so that q and k come in another dtype than v."""

    def in_float32(norm):
        def call(x, *rest, **named):
            with torch.autocast("cpu", enabled=False):
                return norm(*tree_map_only(torch.Tensor, torch.Tensor.float, (x, *rest)), **named)

        return call

    for name_of_norm in ("layer_norm", "rms_norm"):
        norm = getattr(torch.nn.functional, name_of_norm)
        monkeypatch.setattr(torch.nn.functional, name_of_norm, in_float32(norm))
    tiny = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        before = tiny.run()
        with accelerate(tiny.model, SPARSE, schedule=ALL_DENSE):
            dense = tiny.run()
        with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
            sparse = tiny.run()
            assert {record.reason for record in handle.report().records} == {""}
    torch.testing.assert_close(dense, before, atol=2e-2, rtol=2e-2)
    assert sparse.dtype == before.dtype and not sparse.equal(before)


def test_full_density_is_dense_attention(name):
    tiny = build(name)
    before = tiny.run()
    with accelerate(tiny.model, SVG2(top_p=1.0), schedule=NEVER_DENSE):
        torch.testing.assert_close(tiny.run(), before, atol=2e-5, rtol=1e-4)


def two_prompts(name: str, tiny: Tiny) -> tuple[dict, list[dict]]:
    """The arguments of a batch of two videos with texts of different length, and of each alone."""
    lengths = {"encoder_attention_mask": (5, 3), "encoder_attention_mask_2": (2, 4)}
    both, alone = {}, ({}, {})
    for key, value in tiny.given.items():
        if key in lengths:
            padded = value.shape[1]
            both[key] = mask(*lengths[key], padded=padded).to(value.dtype)
        elif isinstance(value, torch.Tensor) and value.shape[:1] == (1,) and not key.startswith("indices_"):
            other = torch.randn_like(value) if value.ndim > 2 else value
            both[key] = torch.cat([value, other if value.any() else value])
        else:
            both[key] = value
        for i, one in enumerate(alone):
            one[key] = both[key] if both[key] is value else both[key][i : i + 1]
    return both, list(alone)


@pytest.mark.parametrize("name", sorted(PADDED | {"mochi"}))
def test_texts_of_different_length_in_one_batch(name):
    tiny = build(name)
    both, alone = two_prompts(name, tiny)
    stock = tiny.run(**both)
    with accelerate(tiny.model, SPARSE, schedule=ALL_DENSE):
        torch.testing.assert_close(tiny.run(**both), stock, atol=5e-6, rtol=1e-5)
    method = Radial(decay=0.05, block_size=8, near=0.25, min_window=0.0)
    with accelerate(tiny.model, method, schedule=NEVER_DENSE) as handle:
        batch = tiny.run(**both)
        assert {r.reason for r in handle.report().records} == {""}
        singles = torch.cat([tiny.run(**one) for one in alone])
    torch.testing.assert_close(batch, singles, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(batch, stock, atol=1e-5)


@pytest.mark.parametrize("second", [5, 3])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_samples_with_calls_of_their_own_have_plans_of_their_own(second, gradients):
    """Two videos whose texts are equally long had one memory, and in a pass with gradients one plan."""
    tiny = build("mochi")
    given = {"encoder_attention_mask": mask(5, second, padded=8).bool(), "timestep": torch.tensor([500, 500])}
    for key in ("hidden_states", "encoder_hidden_states"):
        given[key] = torch.cat([tiny.given[key], torch.randn_like(tiny.given[key])])

    def second_pass(**given):
        with torch.set_grad_enabled(gradients), accelerate(tiny.model, SVG2(density=0.4), schedule=NEVER_DENSE):
            tiny.model(**given)
            return tiny.model(**given | {"timestep": given["timestep"] - 100}).sample

    singles = [second_pass(**{key: value[i : i + 1] for key, value in given.items()}) for i in range(2)]
    torch.testing.assert_close(second_pass(**given), torch.cat(singles), atol=1e-5, rtol=1e-4)


def test_latents_of_another_rank_are_refused_in_words():
    """A video without its batch."""
    tiny = build("wan")
    given = {**tiny.given, "hidden_states": tiny.given["hidden_states"][0]}
    words = r"latents of a WanTransformer3DModel have 5 axes, .* these have 4, of shape"
    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE), pytest.raises(ValueError, match=words):
        tiny.model(**given)


@pytest.mark.parametrize("name", ["hunyuan_video", "mochi", "cogvideox_2b"])
def test_an_argument_that_is_missing_is_named_as_by_the_model(name):
    tiny = build(name)
    missing = "encoder_hidden_states" if name == "cogvideox_2b" else "encoder_attention_mask"
    given = {key: value for key, value in tiny.given.items() if key != missing}
    for accelerated in (False, True):
        handle = accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) if accelerated else contextlib.nullcontext()
        with handle, pytest.raises(TypeError, match=f"missing .*required .*argument: '{missing}'"):
            tiny.model(**given)


@pytest.mark.parametrize("fps", [24.0, 29.97])
@pytest.mark.parametrize("pixel_frame", [0, 9, 16])
def test_a_keyframe_of_the_last_picture_is_no_frame_of_the_video(fps, pixel_frame):
    """LTX-2 puts it behind the video, at a picture in the middle of the last latent frame or elsewhere."""
    model = build("ltx2").model
    video, keyframe = (model.rope.prepare_video_coords(1, frames, 4, 6, "cpu", fps=fps) for frames in (3, 1))
    keyframe[:, 0, :, 0], keyframe[:, 0, :, 1] = pixel_frame / fps, (pixel_frame + 1) / fps
    given = {"hidden_states": torch.zeros(1, 96, 4), "video_coords": torch.cat([video, keyframe], 2)}
    assert packed(model, given) == (VideoLayout(3, 4, 6, text_after=24),)


@pytest.mark.parametrize("keyframes", [(), ("first",), ("last",), ("first", "last")], ids="+".join)
def test_minimax_has_keyframes_and_sound_before_the_video(keyframes):
    """In the order of diffusers' own blocks, with a keyframe at the time of a frame of the video."""
    torch.manual_seed(0)
    tiny = minimax_h3_packed(2, keyframes)
    before = 5 + 24 * len(keyframes) + 2 * 3
    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
        tiny.run()
        assert handle._installed[0].engine.layouts == (VideoLayout(3, 4, 6, text_before=before),)
        assert {record.reason for record in handle.report().records} == {""}


def test_minimax_has_reference_videos_with_their_sound_before_the_video():
    """A reference of the video's own size, and a picture of another."""
    kinds = [SimpleNamespace(kind="video", has_audio=True), SimpleNamespace(kind="image")]
    sizes = [torch.zeros(1, 4, 3, 8, 12), torch.zeros(1, 4, 1, 4, 4)]
    packed = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(5, dtype=torch.long), kinds, sizes, [torch.zeros(4, 4)], 3, 8, 12, 3, (1, 2, 2), 2, 2, 0
    )
    tiny = minimax_h3_at(2, packed)
    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
        tiny.run()
        assert handle._installed[0].engine.layouts == (VideoLayout(3, 4, 6, text_before=5 + 72 + 4 + 4 + 6),)


@pytest.mark.parametrize(
    ("schedule", "dense"),
    [
        ({"first_layers": 1}, {("vace_blocks", 0), ("blocks", 0)}),
        ({"last_layers": 1}, {("vace_blocks", 1), ("blocks", 2)}),
        ({"first_layers": 0.5}, {("vace_blocks", 0), ("blocks", 0), ("blocks", 1)}),  # of 3 main blocks
    ],
    ids=["first", "last", "half"],
)
def test_a_control_block_of_vace_counts_as_the_main_block_that_it_feeds(schedule, dense):
    tiny = build("wan_vace")
    model = type(tiny.model)(**WAN, num_layers=3, vace_layers=[0, 2], vace_in_channels=6)
    with torch.no_grad(), accelerate(model, SPARSE, schedule=DenseSchedule(**schedule)) as handle:
        model(**tiny.given)
        records = handle.report().records
    sites = [("vace_blocks", 0), ("vace_blocks", 1), ("blocks", 0), ("blocks", 1), ("blocks", 2)]
    assert [r.layer for r in records] == list(range(5))
    assert {sites[r.layer] for r in records if r.reason} == dense


def test_a_text_mask_with_holes_stays_dense_and_is_stock():
    tiny = build("hunyuan_video")
    holes = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0]])
    before = tiny.run(encoder_attention_mask=holes)
    with accelerate(tiny.model, SPARSE, schedule=NEVER_DENSE) as handle:
        assert tiny.run(encoder_attention_mask=holes).equal(before)
        report = handle.report()
    assert {r.reason for r in report.records} == {"text mask with holes"}
    assert any("text mask with holes" in note for note in report.notes)


def test_hunyuan_15_makes_no_mask_of_all_pairs(monkeypatch):
    """Stock makes one in every layer: 12.5 GB at 720p."""
    tiny = build("hunyuan_video_15")
    sizes, repeat = [], torch.Tensor.repeat

    def spy(self, *times):
        out = repeat(self, *times)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "repeat", spy)
    tokens = 72 + 8 + 6 + 4  # padding included
    tiny.run()
    assert tokens**2 in sizes
    for schedule in (ALL_DENSE, NEVER_DENSE):
        sizes.clear()
        with accelerate(tiny.model, SPARSE, schedule=schedule):
            tiny.run()
        assert tokens**2 not in sizes


def test_motif_leaves_its_decoder_alone():
    tiny = build("motif_video")
    ((model, family),) = find_transformers(tiny.model).values()
    assert list(family.modules(model)) == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def test_models_that_are_not_served_say_why():
    import diffusers

    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=32, patch_size=2, caption_channels=16, norm_type="ada_norm_single",
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"factorised.*Known families: Wan 2.1 / 2.2.*A new one is a row"):
        accelerate(model, SPARSE)
