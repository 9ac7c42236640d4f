"""What one chunk of a video knows of the others, and what is held in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_dc import make_autoencoder, make_latents, make_video

TAILS = ["cached", "replicate", "independent"]
CHUNK = 8  # pixel frames; 2 latent frames


def _both(model, frames: int) -> list[tuple]:
    """Encoder and decoder as functions of a whole input, with that input and the length of its chunks and outputs'."""
    return [
        (lambda x: model.encode(x).latent, make_video(frames), CHUNK, CHUNK // 4),
        (lambda z: model.decode(z).sample, make_latents(frames // 4), CHUNK // 4, CHUNK),
    ]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("frames", [4, 8, 12, 16, 20, 28])
def test_side_by_side_is_one_after_the_other(tail, frames):
    model, video = make_autoencoder(tail=tail), make_video(frames, batch=2)
    latent, sample = model.encode(video).latent, model(video).sample
    assert latent.shape[2] * 4 == sample.shape[2] == frames
    model.use_framewise_encoding = model.use_framewise_decoding = False
    torch.testing.assert_close(model.encode(video).latent, latent)
    torch.testing.assert_close(model(video).sample, sample)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pad_frames", [0, 3, 8, 11])
def test_decode_chunks_is_decode(tail, pad_frames):
    model, latents = make_autoencoder(tail=tail, pad_frames=pad_frames), make_latents(7)
    chunks = list(model.decode_chunks(latents))
    assert all(0 < chunk.shape[2] <= CHUNK for chunk in chunks)
    torch.testing.assert_close(torch.cat(chunks, dim=2), model.decode(latents).sample)


def test_decode_chunks_decodes_when_asked():
    model, calls = make_autoencoder(), []
    model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    chunks = model.decode_chunks(make_latents(6))
    assert calls == []
    next(chunks)
    assert calls == [1]


# -- causality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("framewise", [True, False])
def test_a_later_chunk_does_not_change_what_came_before(tail, framewise):
    model = make_autoencoder(tail=tail)
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    for function, x, size, out in _both(model, 28):
        before = function(x)
        for chunk in (1, 2, 3):
            changed = x.clone()
            changed[:, :, chunk * size] += 1
            after = function(changed)
            assert after[:, :, : chunk * out].equal(before[:, :, : chunk * out])
            assert not torch.allclose(after[:, :, chunk * out :][:, :, :out], before[:, :, chunk * out :][:, :, :out])


@pytest.mark.parametrize("framewise", [True, False])
def test_an_earlier_chunk_changes_what_comes_after(framewise):
    model = make_autoencoder()
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    for function, x, size, out in _both(model, 24):
        before, changed = function(x), x.clone()
        changed[:, :, size - 1] += 1
        assert (function(changed) - before)[:, :, out : 2 * out].abs().max() > 1e-4


@pytest.mark.parametrize(("tail", "reaches"), [("cached", True), ("replicate", True), ("independent", False)])
@pytest.mark.parametrize("framewise", [True, False])
def test_what_the_tail_knows_of_the_chunk_before(tail, reaches, framewise):
    model = make_autoencoder(tail=tail)
    model.use_framewise_encoding = model.use_framewise_decoding = framewise
    for function, x, size, out in _both(model, 20):
        before, changed = function(x), x.clone()
        changed[:, :, 2 * size - 1] += 1
        tail_changes = (function(changed) - before)[:, :, 2 * out :].abs().max()
        assert (tail_changes > 1e-4) if reaches else (tail_changes == 0)


def test_an_independent_tail_is_a_video_of_its_own():
    """The behaviour of the published code for lengths that are no multiple of the chunk."""
    model, video = make_autoencoder(tail="independent"), make_video(20)
    torch.testing.assert_close(model.encode(video).latent[:, :, 4:], model.encode(video[:, :, 16:]).latent)


def test_a_replicated_tail_is_the_start_of_a_whole_chunk():
    model, video = make_autoencoder(tail="replicate"), make_video(20)
    whole = torch.cat([video, video[:, :, -1:].expand(-1, -1, 4, -1, -1)], dim=2)
    torch.testing.assert_close(model.encode(video).latent, model.encode(whole).latent[:, :, :5])


@pytest.mark.parametrize("frames", [8, 16, 32])
def test_without_a_tail_its_kind_does_not_matter(frames):
    video = make_video(frames)
    first, *others = [make_autoencoder(tail=tail)(video).sample for tail in TAILS]
    assert all(other.equal(first) for other in others)


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_any_length_of_4k(tail):
    model = make_autoencoder(tail=tail)
    for frames in range(4, 45, 4):
        video = make_video(frames)
        latent = model.encode(video).latent
        assert latent.shape[2] == frames // 4
        assert model.decode(latent).sample.shape == video.shape


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 21])
def test_with_3_padding_frames_4k_plus_1_come_back(frames):
    model, video = make_autoencoder(pad_frames=3), make_video(frames)
    latent = model.encode(video).latent
    assert latent.shape[2] == (frames + 3) // 4
    assert model.decode(latent).sample.shape == video.shape
    padded = torch.cat([video[:, :, :1]] * 3 + [video], dim=2)
    plain = make_autoencoder()
    torch.testing.assert_close(latent, plain.encode(padded).latent)
    torch.testing.assert_close(model.decode(latent).sample, plain.decode(latent).sample[:, :, 3:])


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_the_encoder_sees_at_most_a_chunk(tail):
    model, lengths, batches = make_autoencoder(tail=tail), [], []

    def record(module, args):
        lengths.append(args[0].shape[2])
        batches.append(args[0].shape[0])

    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(record)
    model.encode(make_video(44))
    assert lengths == [CHUNK] * 5 + [CHUNK if tail == "replicate" else 4]
    lengths.clear()
    model.decode(make_latents(11))
    assert lengths == [CHUNK // 4] * 5 + [CHUNK // 4 if tail == "replicate" else 1]
    assert set(batches) == {1}


def test_nothing_of_a_chunk_outlives_it():
    """When a chunk starts, the features inside the chunks before are gone: only their last frames are kept."""
    model, alive, most = make_autoencoder(), weakref.WeakValueDictionary(), []

    def keep(module, args, output):
        alive[id(output[0])] = output[0]

    for module in model.modules():
        if type(module).__name__ in ("ChunkConv3d", "ResBlock", "Downsample"):
            module.register_forward_hook(keep)

    def count(module, args):
        gc.collect()
        most.append(sum(tensor.numel() for tensor in alive.values()))

    model.encoder.register_forward_pre_hook(count)
    with torch.no_grad():
        latent = model.encode(make_video(40)).latent
    # What is left is the latents of each chunk.
    of_chunk = latent[:, :, : CHUNK // 4].numel()
    assert most == [number * of_chunk for number in range(5)]


def test_what_is_remembered_is_a_frame_and_not_a_view_of_its_chunk():
    model = make_autoencoder()
    with torch.no_grad():
        _, past = model.encoder(make_video(8))
    for frame in (tensor for part in past for tensor in part):
        assert frame.shape[2] == 1 and frame.untyped_storage().nbytes() == frame.numel() * 4
