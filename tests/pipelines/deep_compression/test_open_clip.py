from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dc import make_clip, published_clip
from transformers import CLIPImageProcessor, CLIPVisionModel

from vidaccel.autoencoders.convert import CheckpointError
from vidaccel.pipelines.deep_compression.open_clip import build_image_encoder, convert_image_encoder, vision_state_dict


@pytest.fixture
def encoder() -> CLIPVisionModel:
    return make_clip()["image_encoder"]


def _states(encoder: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """What Wan reads: the states before the last layer."""
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]


def test_it_becomes_the_model_it_was_made_from(encoder):
    built = build_image_encoder(vision_state_dict(published_clip(encoder)))
    assert type(built) is CLIPVisionModel and not built.training
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"):
        assert getattr(built.config, key) == getattr(encoder.config, key), key
    assert (built.config.patch_size, built.config.hidden_act) == (14, "gelu")
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(_states(built, pixels), _states(encoder, pixels))


def test_every_parameter_is_used_once(encoder):
    published = published_clip(encoder)
    state = vision_state_dict(published)
    own = {n.removeprefix("vision_model."): v for n, v in encoder.state_dict().items() if "position_ids" not in n}
    assert state.keys() == own.keys() and all(state[name].equal(value) for name, value in own.items())


def test_queries_keys_and_values_are_told_apart(encoder):
    """The comparison above can fail: with two of the three exchanged the states are others."""
    published = published_clip(encoder)
    name = "visual.transformer.1.attn.to_qkv.weight"
    published[name] = published[name].roll(80, dims=0)
    built, pixels = build_image_encoder(vision_state_dict(published)), torch.randn(1, 3, 28, 28)
    assert not torch.allclose(_states(built, pixels), _states(encoder, pixels), atol=1e-3)


def test_files_are_written(encoder, tmp_path):
    torch.save(published_clip(encoder), tmp_path / "clip.pth")
    convert_image_encoder(tmp_path / "clip.pth", tmp_path / "out")
    loaded = CLIPVisionModel.from_pretrained(tmp_path / "out" / "image_encoder")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out" / "image_processor")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = processor(images=picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 28, 28)
    torch.testing.assert_close(pixels, make_clip()["image_processor"](images=picture, return_tensors="pt").pixel_values)
    torch.testing.assert_close(_states(loaded, pixels), _states(encoder, pixels))


def test_the_type_is_kept(encoder, tmp_path):
    half = {name: value.half() for name, value in published_clip(encoder).items()}
    torch.save(half, tmp_path / "clip.pth")
    convert_image_encoder(tmp_path / "clip.pth", tmp_path)
    assert CLIPVisionModel.from_pretrained(tmp_path / "image_encoder", dtype="auto").dtype == torch.float16


def test_a_file_of_the_older_format(encoder, tmp_path):
    torch.save(published_clip(encoder), tmp_path / "clip.pth", _use_new_zipfile_serialization=False)
    convert_image_encoder(tmp_path / "clip.pth", tmp_path)
    loaded, pixels = CLIPVisionModel.from_pretrained(tmp_path / "image_encoder"), torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(_states(loaded, pixels), _states(encoder, pixels))


def test_an_unknown_parameter_is_named(encoder):
    with pytest.raises(CheckpointError, match="not known: visual.transformer.0.extra.weight"):
        vision_state_dict({**published_clip(encoder), "visual.transformer.0.extra.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not known: visual.extra"):
        vision_state_dict({**published_clip(encoder), "visual.extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("visual.patch_embedding.weight", "becomes embeddings.patch_embedding.weight"),
        ("visual.pos_embedding", "becomes embeddings.position_embedding.weight"),
        ("visual.transformer.0.mlp.0.weight", "becomes encoder.layers.0.mlp.fc1.weight"),
        ("visual.transformer.2.norm1.bias", "does not fit: .*encoder.layers.2.layer_norm1.bias"),
        ("visual.cls_embedding", "does not fit: .*class_embedding"),
    ],
)
def test_a_missing_parameter_is_named(encoder, name, ours):
    published = published_clip(encoder)
    del published[name]
    with pytest.raises(CheckpointError, match=ours):
        build_image_encoder(vision_state_dict(published))


def test_a_wrong_shape_is_named(encoder):
    published = published_clip(encoder)
    published["visual.transformer.1.norm2.bias"] = torch.zeros(79)
    with pytest.raises(CheckpointError, match="does not fit: .*layers.1.layer_norm2.bias.*79.*80"):
        build_image_encoder(vision_state_dict(published))


def test_a_file_of_something_else_is_refused(encoder, tmp_path):
    file = tmp_path / "clip.pth"
    torch.save(published_clip(encoder), file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="clip.pth .1,000 bytes. cannot be read, .*download it again"):
        convert_image_encoder(file, tmp_path)
    torch.save({"model": 1}, file)
    with pytest.raises(CheckpointError, match="lacks the parameter that becomes embeddings.patch_embedding"):
        convert_image_encoder(file, tmp_path)
    torch.save([1], file)
    with pytest.raises(CheckpointError, match="clip.pth holds a list, not parameters by name"):
        convert_image_encoder(file, tmp_path)
    assert not (tmp_path / "image_encoder").exists()
