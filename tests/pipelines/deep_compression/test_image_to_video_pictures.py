"""Image to video with an image encoder: pictures, tensors and arrays are the same to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_dc import generate_dc, make_clip, make_dc_pipe, make_dc_transformer, make_picture, make_text

from vidaccel.pipelines import DCVideoGenImageToVideoPipeline


@pytest.mark.parametrize("last", [False, True])
def test_the_image_encoder_sees_the_same_picture_in_every_form(last):
    """Its own processor would divide numbers in [0, 1] by 255."""
    transformer = make_dc_transformer(image=True, image_dim=80)
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline, transformer=transformer, **make_clip())
    picture = make_picture(32, 64)
    array = np.array(picture).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    wanted = pipe.encode_image([picture, picture] if last else picture)
    assert wanted.shape[0] == 1 + last
    for image in (tensor, tensor[0], tensor * 2 - 1, tensor.double(), array, array[None]):
        torch.testing.assert_close(pipe.encode_image([image, image] if last else image), wanted)
    if not last:
        video = generate_dc(pipe, 8, 32, 64, image=picture)
        torch.testing.assert_close(generate_dc(pipe, 8, 32, 64, image=tensor), video, atol=1e-4, rtol=1e-4)


def with_clip(**changes) -> DCVideoGenImageToVideoPipeline:
    transformer = make_dc_transformer(image=True, image_dim=80, **changes)
    return make_dc_pipe(DCVideoGenImageToVideoPipeline, transformer=transformer, **make_clip())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("size", [(8, 32, 64), (8, 30, 60)])
def test_every_video_of_a_batch_has_the_states_of_its_own_picture(size):
    """A batch gives what its videos give one by one."""
    pipe, pictures = with_clip(), [make_picture(seed=0), make_picture(seed=1)]
    pipe.register_modules(**make_text())

    def generate(prompt: list[str], images: list, *noise: int, **more) -> torch.Tensor:
        more = {"generator": seeds(*noise), "max_sequence_length": 8, **more}
        return generate_dc(pipe, *size, prompt=prompt, image=[pictures[n] for n in images], **more)

    alone = {(image, seed): generate(["a"], [image], seed) for image in range(2) for seed in range(4)}
    for prompts, images, videos, wanted in (
        (1, [0], 2, [(0, 0), (0, 1)]),
        (2, [0, 1], 1, [(0, 0), (1, 1)]),
        (2, [0, 1], 2, [(0, 0), (0, 1), (1, 2), (1, 3)]),
        (2, [0], 2, [(0, 0), (0, 1), (0, 2), (0, 3)]),
    ):
        made = generate(["a"] * prompts, images, *range(prompts * videos), num_videos_per_prompt=videos)
        torch.testing.assert_close(made, torch.cat([alone[one] for one in wanted]), atol=1e-4, rtol=1e-3)


def test_both_of_two_transformers_have_the_states_of_each_picture():
    second = make_dc_transformer(image=True, image_dim=80, seed=5)
    pipe = with_clip()
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.9)
    pictures = [make_picture(seed=0), make_picture(seed=1)]
    used = []
    second.register_forward_pre_hook(lambda *_: used.append(True))
    both = generate_dc(pipe, image=pictures, prompts=2, generator=seeds(0, 1), num_inference_steps=4)
    assert used
    single = [generate_dc(pipe, image=pictures[n], seed=n, num_inference_steps=4) for n in range(2)]
    torch.testing.assert_close(both, torch.cat(single), atol=1e-4, rtol=1e-3)
    assert not pipe.transformer._forward_pre_hooks and len(second._forward_pre_hooks) == 1


@pytest.mark.parametrize("size", [(8, 32, 64), (8, 30, 60)])
def test_lists_and_arrays_of_pictures(size):
    pictures = [make_picture(*size[1:], seed=0), make_picture(*size[1:], seed=1)]
    array = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    tensor = torch.from_numpy(array).movedim(-1, 1)
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline)
    wanted = generate_dc(pipe, *size, image=tensor, prompts=2)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
    for images in (pictures, array):
        torch.testing.assert_close(generate_dc(pipe, *size, image=images, prompts=2), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(8, 32, 64), (8, 30, 60)])
def test_a_list_of_one_is_the_picture_itself(size):
    """To the image encoder, too, which sees it before it is resized."""
    pipe, picture = with_clip(), make_picture(40, 50)
    alone = generate_dc(pipe, *size, image=picture)
    for same in ([picture], (picture,), picture.convert("RGBA")):
        torch.testing.assert_close(generate_dc(pipe, *size, image=same), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 32, 64), (8, 30, 60)])
def test_bytes_are_not_taken_for_numbers_up_to_1(size):
    picture = make_picture(*size[1:])
    pipe, array = make_dc_pipe(DCVideoGenImageToVideoPipeline), np.asarray(picture)
    wanted = generate_dc(pipe, *size, image=picture)
    for image in (array, array[None], torch.from_numpy(array.copy()).permute(2, 0, 1)):
        torch.testing.assert_close(generate_dc(pipe, *size, image=image), wanted, atol=1e-4, rtol=1e-3)
    grey = picture.convert("L")
    wanted = generate_dc(pipe, *size, image=grey.convert("RGB"))
    torch.testing.assert_close(generate_dc(pipe, *size, image=grey), wanted)


def test_floats_of_8_bits_and_numbers_with_gradients(recwarn):
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline)
    image = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    wanted = generate_dc(pipe, 8, 32, 64, image=image.float())
    torch.testing.assert_close(generate_dc(pipe, 8, 32, 64, image=image), wanted)
    torch.testing.assert_close(generate_dc(pipe, 8, 32, 64, image=image.float().requires_grad_()), wanted)
    assert not [told for told in recwarn if "requires_grad" in str(told.message)]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((32, 64), np.uint8), r"image is \[32, 64\]: a tensor must be \[3, H, W\]"),
        (torch.zeros(1, 4, 32, 64), r"image is \[1, 4, 32, 64\]: a tensor must be"),
        (torch.zeros(3, 32, 64, dtype=torch.int64), "image has numbers of int64: give floats"),
        (np.full((32, 64, 3), 255.0), r"image has numbers up to 255: give floats in \[0, 1\]"),
        ("a.png", "image is a str: give a PIL picture"),
        (torch.full((3, 32, 64), float("nan")), "image has NaN or infinite numbers: give floats"),
        (np.full((32, 64, 3), -np.inf, np.float32), "image has NaN or infinite numbers: give floats"),
        (torch.linspace(-2.1, 1.9, 3 * 32 * 64).reshape(3, 32, 64), "image has numbers down to -2.1, as one that was"),
        (torch.zeros(0, 3, 32, 64), r"image is \[0, 3, 32, 64\], which has no pixels"),
    ],
)
def test_images_whose_meaning_is_not_clear(image, message, monkeypatch):
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline)
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: pytest.fail("the text encoder ran"))
    with pytest.raises(ValueError, match=message):
        generate_dc(pipe, 8, 32, 64, image=image)
    with pytest.raises(ValueError, match=f"last_{message}"):
        generate_dc(pipe, 8, 32, 64, last_image=image)


def test_pictures_that_were_resized_may_go_a_little_beyond():
    generate_dc(make_dc_pipe(DCVideoGenImageToVideoPipeline), image=torch.linspace(-1.3, 1.3, 6144).reshape(3, 32, 64))


def test_first_and_last_picture_of_every_video():
    """Models for both have a position for each of their states; here those of 5 patches a picture."""
    pipe, pictures = with_clip(pos_embed_seq_len=10), [make_picture(seed=n) for n in range(4)]
    images, lasts = pictures[:2], pictures[2:]
    both = generate_dc(pipe, 12, image=images, last_image=lasts, prompts=2, generator=seeds(0, 1))
    pairs = zip(images, lasts, strict=True)
    single = [generate_dc(pipe, 12, image=[a], last_image=[b], seed=n) for n, (a, b) in enumerate(pairs)]
    torch.testing.assert_close(both, torch.cat(single), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="looks at a first and a last image: give last_image"):
        generate_dc(pipe, 12, image=images, prompts=2)


def test_pictures_that_do_not_fit_are_refused_before_anything_runs():
    pipe, picture = with_clip(), make_picture()
    with pytest.raises(ValueError, match="looks at one image: leave last_image out"):
        generate_dc(pipe, 12, image=picture, last_image=picture)
    with pytest.raises(ValueError, match="There are 2 images for 1 videos"):
        generate_dc(pipe, 12, image=[picture, picture])
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline)
    with pytest.raises(ValueError, match="There are 3 last images for 2 images"):
        generate_dc(pipe, 12, image=[picture] * 2, last_image=[picture] * 3, prompts=2)
    with pytest.raises(ValueError, match="image is None: the transformer sees the picture itself"):
        generate_dc(pipe, 12, image=None)


def test_a_list_may_hold_pictures_of_several_sizes_and_kinds():
    """Each becomes what it becomes alone."""
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline)
    tall, wide = torch.rand(3, 30, 20), torch.rand(2, 3, 20, 40) * 2 - 1
    images = [tall, make_picture(24, 24), wide]
    made = generate_dc(pipe, 8, prompts=4, image=images, generator=seeds(1, 2, 3, 4))
    for number, image in enumerate((tall, images[1], wide[0], wide[1])):
        alone = generate_dc(pipe, 8, image=image, generator=seeds(number + 1))
        torch.testing.assert_close(made[number], alone[0], atol=1e-4, rtol=1e-4)
