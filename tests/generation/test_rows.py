"""The rows of the pipelines: held to the real classes, and what they refuse before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import cogvideo, others
from PIL import Image

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.rows import NOT_RUN, ROWS, find_row
from vidaccel.generation.rows.frames import nearest
from vidaccel.pipelines.acceleration.families import supported_pipelines
from vidaccel.pipelines.loading import call_arguments, call_defaults

PICTURE = Image.new("RGB", (64, 48))
CLIP = np.zeros((9, 64, 64, 3), np.uint8)


def asked(**given: Any) -> Settings:
    return Settings("a dot", frames=5, height=32, width=32, steps=2, guidance_scale=2.0, fps=16, **given)


@pytest.fixture(autouse=True)
def _every_class(monkeypatch):
    cogvideo.without_opencv(monkeypatch)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_names_arguments_that_its_class_has(name):
    row, arguments = ROWS[name], call_arguments(name)
    named = {*row.takes.values(), *row.steps(4)}
    named |= {row.strength, row.rate, row.true_guidance, *([] if row.guidance == "guider" else [row.guidance])} - {""}
    if row.negative_prompt:
        named.add("negative_prompt")
    if row.inputs is not None:
        fields = {"image": PICTURE.resize((32, 32)), "last_image": PICTURE.resize((32, 32))}
        fields["video"] = np.zeros((5, 32, 32, 3), np.uint8)
        named |= set(row.inputs(asked(**{field: fields[field] for field in row.takes})))
    # Those that only long videos have, and those that depend on the parts of a pipeline.
    long = Settings("a dot", frames=201, height=32, width=32, steps=2)
    named |= set(row.always(None, asked())) | set(row.always(None, long))
    assert named <= set(arguments), named - set(arguments)
    assert set().union(*map(set, row.needs)) <= set(row.takes)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_states_all_that_its_class_leaves_open(name):
    """Frames, size and steps are known, and the default is a video that the pipeline makes."""
    row, stated = ROWS[name], call_defaults(name)
    open_ = row.defaults({}, 8)
    names = {"frames": "num_frames", "steps": "num_inference_steps"}
    for field in ("frames", "height", "width", "steps"):
        in_sample = field in ("height", "width") and "sample_height" in row.defaults({"sample_height": 1}, 8)
        known = stated.get(names.get(field, field)) is not None or open_.get(field) is not None
        assert known or in_sample or field in row.defaults({f"sample_{field}": 60}, 8), field
    if row.guidance not in ("", "guider"):
        assert stated.get(row.guidance) is not None


def test_every_pipeline_that_can_be_accelerated_has_a_row():
    """Or is said not to be run, and why."""
    assert set(supported_pipelines()) <= {*ROWS, *NOT_RUN}
    assert not set(NOT_RUN) & set(ROWS)


def test_a_pipeline_that_is_not_run_says_why(configs):
    folder = configs("LTXPipeline")
    (folder / "model_index.json").write_text('{"_class_name": "Kandinsky5T2IPipeline"}')
    with pytest.raises(BadInput, match=r"a Kandinsky5T2IPipeline, which is not run: it makes images\.$"):
        inspect_model(str(folder))


def test_the_page_of_models_names_every_pipeline():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert not [name for name in (*ROWS, *NOT_RUN) if f"`{name}`" not in page]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_variant_has_a_row_that_takes_what_it_is_for(name):
    for field, variant in find_row(name, {}, {"expand_timesteps": True}).variants.items():
        assert field in find_row(variant, {}, {}).takes, (field, variant)


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if not row.pipeline.startswith("DC")], ids=lambda r: r.pipeline
)
def test_the_numbers_of_frames_that_are_offered_can_be_made(row):
    factor = row.factors({})[0]
    for wanted in range(1, 150):
        below, above = row.frames.nearest(wanted, factor)
        assert below is None or below <= wanted
        for count in filter(None, (below, above)):
            assert row.frames.makes(count, factor)
            assert row.frames.made(row.frames.asked(count, factor), factor) == count
        if row.frames.makes(wanted, factor):
            assert below == wanted


@pytest.mark.parametrize(
    ("name", "wanted", "near"),
    [
        ("WanPipeline", 34, (33, 37)),
        ("LTXPipeline", 160, (153, 161)),
        ("MochiPipeline", 20, (19, 25)),
        ("CogVideoXPipeline", 53, (49, 57)),
        ("HunyuanVideoFramepackPipeline", 129, (109, 145)),
        ("HeliosPipeline", 132, (129, 165)),
        ("AllegroPipeline", 80, (72, 88)),
        ("ChronoEditPipeline", 81, (5, None)),
        ("SkyReelsV2DiffusionForcingVideoToVideoPipeline", 17, (None, 21)),
    ],
)
def test_the_frames_next_to_those_that_cannot_be_made(name, wanted, near):
    row = ROWS[name]
    assert row.frames.nearest(wanted, row.factors({})[0]) == near


def test_nearest_gives_none_where_there_is_none():
    assert nearest(5, lambda n: n > 7) == (None, 8)
    assert nearest(5, lambda n: False) == (None, None)


# -- what is refused ---------------------------------------------------------------------------------------------------

WAN_VAE = {"_class_name": "AutoencoderKLWan", "scale_factor_temporal": 4, "scale_factor_spatial": 8}
HUNYUAN_VAE = {"_class_name": "AutoencoderKLHunyuanVideo"}
CONFIGS: dict[str, tuple[dict, dict, dict]] = {
    # class -> configs of the transformer and of the autoencoder, and others by file
    "LTXPipeline": ({"patch_size": 1, "patch_size_t": 1}, {"_class_name": "AutoencoderKLLTXVideo"}, {}),
    "HunyuanVideoPipeline": ({"patch_size": 2, "patch_size_t": 1}, HUNYUAN_VAE, {}),
    "HunyuanVideo15ImageToVideoPipeline": ({"patch_size": 1, "patch_size_t": 1, "target_size": 640}, {}, {}),
    "HunyuanVideo15Pipeline": (
        {"patch_size": 1, "patch_size_t": 1, "target_size": 640},
        {},
        {"guider/guider_config.json": {"guidance_scale": 6.0}},
    ),
    "MotifVideoPipeline": ({"patch_size": 2, "patch_size_t": 1}, WAN_VAE, {"guider/guider_config.json": {}}),
    "HeliosPipeline": ({"patch_size": [1, 2, 2]}, WAN_VAE, {}),
    "AnyFlowFARPipeline": ({"patch_size": [1, 2, 2]}, WAN_VAE, {}),
    "ChronoEditPipeline": ({"patch_size": [1, 2, 2]}, WAN_VAE, {}),
    "AllegroPipeline": ({"patch_size": 2}, {"block_out_channels": [1] * 4}, {}),
    "CosmosVideoToWorldPipeline": ({"patch_size": [1, 2, 2]}, {}, {}),
    "WanAnimatePipeline": ({"patch_size": [1, 2, 2]}, WAN_VAE, {}),
    "Kandinsky5T2VPipeline": ({"patch_size": [1, 2, 2], "attention_type": "nabla"}, HUNYUAN_VAE, {}),
    "CogVideoXImageToVideoPipeline": (
        {"patch_size": 2, "use_learned_positional_embeddings": True, "sample_height": 60, "sample_width": 90},
        {"block_out_channels": [1] * 4},
        {},
    ),
    "CogVideoXPipeline": (
        {"patch_size": 2, "patch_size_t": 2, "sample_height": 96, "sample_width": 170},
        {"block_out_channels": [1] * 4},
        {},
    ),
    "ConsisIDPipeline": ({"patch_size": 2}, {"block_out_channels": [1] * 4}, {}),
    "CogVideoXVideoToVideoPipeline": ({"patch_size": 2, "patch_size_t": 2}, {"block_out_channels": [1] * 4}, {}),
}


@pytest.fixture
def configs(tmp_path):
    """The folder of a pipeline class: its configs, and no weights."""

    def write(name: str) -> Path:
        transformer, vae, others = CONFIGS[name]
        files = {"model_index.json": {"_class_name": name}, "transformer/config.json": transformer}
        for file, content in (files | {"vae/config.json": vae} | others).items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return tmp_path / name

    return write


REFUSED = [
    (
        "LTXPipeline",
        {"frames": 160},
        r"^frames is 160: this model makes 8k\+1 frames; diffusers would round it to 153 without asking. "
        r"Give 153 or 161\.$",
    ),
    ("LTXPipeline", {"steps": 1}, r"^steps is 1: a LTXPipeline makes 2 at the least. Give 2 or more"),
    ("LTXPipeline", {"height": 48}, r"^height is 48: it must be a multiple of 32 \(autoencoder 32x, patches of 1\)"),
    ("LTXPipeline", {"strength": 0.5, "video": CLIP}, r"^video is of no use: this LTXPipeline takes no video"),
    (
        "HunyuanVideoPipeline",
        {"negative_prompt": "rain"},
        r"^negative_prompt is of no use: the guidance .* give true_cfg_scale above 1 in pipeline_options",
    ),
    ("HunyuanVideoPipeline", {"image": PICTURE}, r"^image is of no use: this HunyuanVideoPipeline takes no picture"),
    ("HunyuanVideoPipeline", {"pipeline_options": {"shift": 1}}, r"^pipeline_options is shift=1: .* no such argument"),
    ("HunyuanVideoPipeline", {"pipeline_options": {"num_frames": 9}}, r"^pipeline_options is .*: frames decides it"),
    ("HunyuanVideo15ImageToVideoPipeline", {}, r"^image is missing: this .* needs a picture to start from"),
    (
        "HunyuanVideo15ImageToVideoPipeline",
        {"image": PICTURE, "height": 480, "width": 640},
        r"^height is 480: this model does not make 640x480. Give width 720 and height 544, or neither",
    ),
    ("MotifVideoPipeline", {"guidance_scale": 4.0}, r"^guidance_scale is of no use: this Motif.* has no guidance"),
    ("HeliosPipeline", {"frames": 132}, r"^frames is 132: .* 33, 65, .* round it to 129 .*Give 129 or 165"),
    ("HeliosPipeline", {"image": PICTURE, "video": CLIP}, r"^video is of no use with image"),
    ("ChronoEditPipeline", {"image": PICTURE, "frames": 81}, r"^frames is 81: this model makes 5 frames; .*Give 5\.$"),
    (
        "AnyFlowFARPipeline",
        {"method": "tangent"},
        r"^method is tangent: the attention of a AnyFlowFAR.* cannot be",
    ),
    ("AnyFlowFARPipeline", {"compare": True}, r"^compare is of no use: the attention of a AnyFlowFARPipeline cannot"),
    ("AllegroPipeline", {"height": 640}, r"^height is 640: .* not make 1280x640. Give width 1280 and height 720"),
    ("AllegroPipeline", {"frames": 81}, r"^frames is 81: this model makes 24, 40, .*Give 72 or 88"),
    (
        "CogVideoXImageToVideoPipeline",
        {"image": PICTURE, "width": 640},
        r"^width is 640: .* not make 640x480. Give width 720 and height 480",
    ),
    (
        "CogVideoXPipeline",
        {"height": 1024, "width": 1024, "frames": 81},
        r"^height is 1024: .* not make 1024x1024. Give width 1024 and height 768",
    ),
    ("CosmosVideoToWorldPipeline", {}, r"^image is missing: .* a picture to start from or a video .*\(or video\)"),
    ("WanAnimatePipeline", {"image": PICTURE, "video": CLIP}, r"^face_video is missing"),
    ("Kandinsky5T2VPipeline", {"height": 576, "width": 768}, r"^height is 576: .*Give width 768 and height"),
    (
        "CogVideoXVideoToVideoPipeline",
        {"video": CLIP, "frames": 9},
        r"^frames is 9: this model makes 8k frames. Give 8 or 16",
    ),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_a_pipeline_cannot_do_is_refused_before_weights_are_read(loads_nothing, configs, name, given, message):
    with pytest.raises(BadInput, match=message):
        vidaccel.generate(configs(name), "a dot", device="cpu", **given)


def test_a_loaded_pipeline_that_decodes_in_tiles_alone_has_to_do_so(loads_nothing):
    with pytest.raises(BadInput, match=r"^model is AllegroPipeline: .* in tiles alone. Call enable_tiling"):
        vidaccel.generate(others.allegro(), "a dot")


def test_an_unknown_pipeline_names_the_known_ones_and_what_a_row_needs(configs):
    folder = configs("LTXPipeline")
    (folder / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    with pytest.raises(BadInput, match=r"LattePipeline, which is not supported; .*MochiPipeline.*needs a row"):
        inspect_model(str(folder))


def test_sizes_follow_from_the_picture_where_the_pipeline_takes_them_from_it(configs):
    facts = inspect_model(str(configs("HunyuanVideo15ImageToVideoPipeline")))
    picture = Image.new("RGB", (1920, 1080))
    settings = Settings("a dot", image=picture, frames=5).checked(facts)
    assert (settings.height, settings.width) == (480, 848)
    again = Settings("a dot", image=picture, frames=5, height=480, width=848).checked(facts)
    assert again.image.size == (848, 480)


def test_the_size_of_a_picture_is_the_pipeline_s_own(configs):
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    facts, processor = inspect_model(str(configs("HunyuanVideo15ImageToVideoPipeline"))), HunyuanVideo15ImageProcessor()
    for height, width in ((1080, 1920), (1920, 1080), (100, 100), (480, 640), (300, 1000), (777, 778), (90, 900)):
        own = processor.calculate_default_height_width(height, width, 640)
        assert facts.nearest_size(height, width) == own


def test_a_missing_package_is_named(configs, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(BadInput, match=r"a ConsisIDPipeline needs opencv-python, .* pip install opencv-python\.$"):
        inspect_model(str(configs("ConsisIDPipeline")))
    with pytest.raises(BadInput, match=r"a CosmosVideoToWorldPipeline needs cosmos_guardrail"):
        vidaccel.generate(configs("CosmosVideoToWorldPipeline"), "a dot", image=PICTURE, device="cpu")


def test_the_guidance_of_a_guider_is_its_own_by_default(configs):
    facts = inspect_model(str(configs("HunyuanVideo15Pipeline")))
    assert Settings("a dot").sized(facts).guidance_scale == 6.0
    assert inspect_model(str(configs("MotifVideoPipeline"))).call_defaults().get("guidance_scale") is None


@pytest.mark.parametrize(
    ("name", "frames", "height", "width", "grid"),
    [
        ("LTXPipeline", 161, 512, 704, (21, 16, 22, 0, 0)),
        ("HunyuanVideoPipeline", 129, 720, 1280, (33, 45, 80, 0, 256)),
        ("HunyuanVideo15Pipeline", 121, 480, 848, (31, 30, 53, 0, 1256)),
        ("HeliosPipeline", 129, 384, 640, (9, 24, 40, 240 + 240 + 1920, 0)),
        ("AllegroPipeline", 88, 720, 1280, (22, 45, 80, 0, 0)),
        ("CogVideoXVideoToVideoPipeline", 80, 768, 1360, (10, 48, 85, 226, 0)),
    ],
)
def test_the_sequence_of_a_published_size(configs, name, frames, height, width, grid):
    layout = inspect_model(str(configs(name))).layout(frames, height, width)
    assert (layout.frames, layout.height, layout.width, layout.text_before, layout.text_after) == grid


@pytest.mark.parametrize(
    ("reach", "made"), [((300, 300), (768, 1360)), ((96, 170), (768, 1360)), ((8, 8), (64, 64)), (None, (768, 1360))]
)
def test_cogvideox_15_makes_by_default_the_size_that_it_was_trained_on(reach, made):
    """Its published config has 300 x 300, the reach of its positions, which the pipeline would take for its size."""
    sample = {} if reach is None else dict(zip(("sample_height", "sample_width"), reach, strict=True))
    transformer = {"patch_size": 2, "patch_size_t": 2, "sample_frames": 81, **sample}
    for name in ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"):
        row = find_row(name, transformer, {})
        assert dict(row.defaults(transformer, 8)) == {"height": made[0], "width": made[1], "frames": 81}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.windows])
def test_arguments_that_change_a_window_are_those_of_the_class(name):
    assert set(ROWS[name].windows) <= set(call_defaults(name))
