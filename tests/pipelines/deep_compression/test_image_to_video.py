from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from tiny_dc import (
    DEEP,
    generate_dc,
    make_autoencoder,
    make_clip,
    make_dc_pipe,
    make_dc_transformer,
    make_picture,
    seen_by_transformer,
)

from vidaccel.pipelines import DCVideoGenImageToVideoPipeline
from vidaccel.pipelines.deep_compression.image_to_video import OnCanvas, image_condition


@pytest.fixture
def image_pipe() -> DCVideoGenImageToVideoPipeline:
    return make_dc_pipe(DCVideoGenImageToVideoPipeline)


def test_the_transformer_sees_mask_and_image(image_pipe):
    """As published: 4 mask channels, 1 in the first latent frame; the image 4 times, then mid-grey."""
    picture = make_picture(32, 64)
    seen = seen_by_transformer(image_pipe, frames=12, image=picture)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    video = torch.zeros(1, 3, 12, 32, 64)
    video[:, :, :4] = pixels[:, None]
    wanted = image_pipe.vae.encode(video).latent * DEEP["scaling_factor"]
    assert len(seen) == 4 and seen[0].shape == (1, 12, 3, 1, 2)
    for given in seen:
        assert (given[:, 4:8, 0] == 1).all() and (given[:, 4:8, 1:] == 0).all()
        torch.testing.assert_close(given[:, 8:], wanted, atol=1e-4, rtol=1e-4)


def test_on_a_larger_canvas_the_edge_of_the_picture_is_repeated(image_pipe):
    pixels = torch.rand(1, 3, 20, 48)
    canvas = image_pipe._canvas(8, 20, 48)
    left, right, top, bottom = canvas.margins
    on_canvas = OnCanvas.of(canvas, image_pipe.video_processor).preprocess(pixels) / 2 + 0.5
    wanted = pixels.numpy()
    wanted = np.pad(wanted, ((0, 0), (0, 0), (top, bottom), (left, right)), mode="edge")
    np.testing.assert_allclose(on_canvas.numpy(), wanted, atol=1e-6)
    whole = generate_dc(image_pipe, 8, 32, 64, image=on_canvas)
    torch.testing.assert_close(generate_dc(image_pipe, 8, 20, 48, image=pixels), canvas.crop(whole))


@pytest.mark.parametrize(("height", "width"), [(50, 60), (70, 33), (64, 40)])
def test_a_picture_of_the_asked_size_is_not_resized(image_pipe, height, width):
    picture, canvas = make_picture(height, width), image_pipe._canvas(8, height, width)
    on_canvas = OnCanvas.of(canvas, image_pipe.video_processor).preprocess(picture)
    assert on_canvas.shape == (1, 3, canvas.height, canvas.width)
    cropped = canvas.crop(on_canvas[:, None])[0, 0].permute(1, 2, 0)
    np.testing.assert_allclose((cropped.numpy() + 1) * 127.5, np.asarray(picture), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (20, 48)])
def test_pictures_and_tensors_give_the_same(image_pipe, height, width):
    picture = make_picture(height, width)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    from_tensor, from_picture = (
        seen_by_transformer(image_pipe, height=height, width=width, image=i)[0] for i in (tensor, picture)
    )
    torch.testing.assert_close(from_tensor, from_picture, atol=1e-4, rtol=1e-4)


def test_one_image_for_each_prompt(image_pipe):
    images = torch.rand(2, 3, 32, 64)
    for size in ((8, 32, 64), (8, 30, 60)):
        both = generate_dc(image_pipe, *size, prompts=2, image=images, generator=_two())
        single = [generate_dc(image_pipe, *size, image=images[n : n + 1], seed=n) for n in range(2)]
        torch.testing.assert_close(both, torch.cat(single), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(both[0], both[1], atol=1e-2)
    with pytest.raises(ValueError, match="2 images for 3 videos: give one, or one for each prompt"):
        generate_dc(image_pipe, prompts=3, image=images)


def _two() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


def test_the_video_depends_on_the_image(image_pipe):
    first = generate_dc(image_pipe, image=make_picture(seed=0))
    assert not torch.allclose(generate_dc(image_pipe, image=make_picture(seed=1)), first, atol=1e-3)


@pytest.mark.parametrize("height", [32, 24])
def test_a_last_image(image_pipe, height):
    first, last = make_picture(height, 64, seed=0), make_picture(height, 64, seed=1)
    more = {"frames": 12, "height": height, "image": first}
    given, without = (seen_by_transformer(image_pipe, **more, last_image=image)[0] for image in (last, None))
    assert (given[:, 4:8, [0, 2]] == 1).all() and (given[:, 4:8, 1] == 0).all()
    assert not torch.allclose(given[:, 8:, 2], without[:, 8:, 2], atol=1e-3)
    torch.testing.assert_close(given[:, 8:, 0], without[:, 8:, 0])
    if height == 32:
        video = torch.zeros(1, 3, 12, 32, 64)
        for place, picture in ((slice(4), first), (slice(8, None), last)):
            video[:, :, place] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None].float() / 127.5 - 1
        wanted = image_pipe.vae.encode(video).latent * DEEP["scaling_factor"]
        torch.testing.assert_close(given[:, 8:], wanted, atol=1e-4, rtol=1e-4)
    assert generate_dc(image_pipe, 10, height, 64, image=first, last_image=last).shape == (1, 10, 3, height, 64)


def test_a_last_image_needs_a_second_latent_frame(image_pipe):
    with pytest.raises(ValueError, match="4 frames, of which the first image takes 4.*num_frames of at least 5"):
        generate_dc(image_pipe, 4, image=make_picture(), last_image=make_picture())


def test_a_last_image_leaves_the_first_its_frames():
    """Padding of more than a latent frame leaves the first image one frame, which the padding repeats."""
    vae, videos = make_autoencoder(**DEEP, pad_frames=5), []
    encode = vae.encode
    vae.encode = lambda x, **more: (videos.append(x), encode(x, **more))[1]
    first, last = torch.full((1, 3, 32, 32), -0.5), torch.full((1, 3, 32, 32), 0.5)
    for latent_frames, wanted in ((2, [-0.5, 0.5, 0.5]), (3, [-0.5, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5])):
        image_condition(vae, first, latent_frames, last)
        assert videos.pop()[0, 0, :, 0, 0].tolist() == wanted
    vae = make_autoencoder(**DEEP, pad_frames=7)
    with pytest.raises(ValueError, match="has 1 frames, of which the first image takes 1: .* at least 2"):
        image_condition(vae, first, 2, last)


@pytest.mark.parametrize(("pad", "shown"), [(0, 4), (3, 1), (1, 3)])
def test_the_mask_says_which_frames_are_given(pad, shown):
    """Frames of the first latent frame show the image, and no frame behind it."""
    vae, videos = make_autoencoder(**DEEP, pad_frames=pad), []
    encode = vae.encoder.forward
    vae.encoder.forward = lambda x, *args: (videos.append(x), encode(x, *args))[1]
    condition = image_condition(vae, torch.full((1, 3, 32, 32), 0.5), 2)
    assert condition.shape == (1, 8, 2, 1, 1) and condition[0, 0, :, 0, 0].tolist() == [1, 0]
    (video,) = videos
    assert video[0, 0, :, 0, 0].tolist() == [0.5] * 4 + [0.0] * 4
    assert shown == 4 - pad


def test_an_image_encoder_is_used():
    clip = make_clip()
    transformer = make_dc_transformer(image=True, image_dim=80)
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline, transformer=transformer, **clip)
    seen = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states_image"]), with_kwargs=True
    )
    for height, width in ((32, 64), (30, 60)):
        assert generate_dc(pipe, 8, height, width).shape == (1, 8, 3, height, width)
    pixels = clip["image_processor"](images=make_picture(), return_tensors="pt").pixel_values
    wanted = clip["image_encoder"](pixels, output_hidden_states=True).hidden_states[-2]
    for states in (seen[0], seen[-1]):  # on a larger canvas, too, it is the picture as it was given
        torch.testing.assert_close(states, wanted)


def test_states_of_the_image_encoder_may_be_given_beside_the_picture():
    """diffusers refuses them with the picture, and fails without it."""
    transformer = make_dc_transformer(image=True, image_dim=80, pos_embed_seq_len=10)
    pipe = make_dc_pipe(DCVideoGenImageToVideoPipeline, transformer=transformer, **make_clip())
    both = {"image": make_picture(), "last_image": make_picture(seed=1)}
    wanted, states = generate_dc(pipe, **both), pipe.encode_image(list(both.values()))
    pipe.image_encoder = None
    torch.testing.assert_close(generate_dc(pipe, **both, image_embeds=states), wanted)
    for wrong, words in (
        (states[:1], r"image_embeds is \[1, 5, 80\]: give a tensor \[2, N, 80\], the states of each picture"),
        (states[..., 1:], r"image_embeds is \[2, 5, 79\]: give"),
        (states.numpy(), "image_embeds is ndarray: give a tensor"),
        (states / 0, "image_embeds has NaN or infinite values"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_dc(pipe, **both, image_embeds=wrong)


def test_states_of_the_image_encoder_alone_are_refused(image_pipe):
    states = torch.zeros(1, 5, 80)
    with pytest.raises(ValueError, match="image is None: the transformer sees the picture itself .* image_embeds"):
        generate_dc(image_pipe, image=None, image_embeds=states)
    with pytest.raises(ValueError, match="does not look at states of an image encoder: leave image_embeds out"):
        generate_dc(image_pipe, image_embeds=states)


def test_the_image_is_encoded_where_the_autoencoder_runs():
    """With model offloading the weights lie elsewhere until they are needed; "meta" stands for the accelerator."""
    vae = make_autoencoder(**DEEP)
    _, hook = cpu_offload_with_hook(vae, execution_device="meta")
    hook.offload()
    assert vae.device == torch.device("cpu")
    assert image_condition(vae, torch.zeros(1, 3, 32, 32), 2).device == torch.device("meta")
