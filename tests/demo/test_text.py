from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from vidaccel.demo import modeling, world
from vidaccel.demo.text import SEQUENCE_LENGTH, encode_text, ignore_padding_at_first, use_padded_cross_attention
from vidaccel.demo.tokenizer import build_tokenizer, unknown_words, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return modeling.build_text_encoder(len(vocabulary())).eval()


def test_every_caption_is_nine_words_and_an_end_mark(tokenizer):
    for attributes in world.all_attributes():
        ids = tokenizer(world.caption(*attributes)).input_ids
        assert len(ids) == 10 and ids[-1] == tokenizer.eos_token_id == 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == world.caption(*attributes)
    assert tokenizer("").input_ids == [1]


def test_case_punctuation_and_spelling_do_not_matter(tokenizer):
    expected = tokenizer("a red circle moves left on a grey background").input_ids
    assert tokenizer("A RED circle moves left, on a gray background.").input_ids == expected
    assert tokenizer("a purple circle").input_ids[1] == tokenizer.unk_token_id


def test_words_without_a_token_are_named(tokenizer):
    prompt = "A purple CIRCLE surfs, and surfs on a gray wave!"
    assert unknown_words(prompt) == ["purple", "surfs", "and", "wave"]
    for text in (prompt, *unknown_words(prompt), *world.held_out_prompts()[:3]):
        assert bool(unknown_words(text)) == (tokenizer.unk_token_id in tokenizer(text).input_ids)


def test_the_tokenizer_reloads_without_trust(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [*world.held_out_prompts()[:3], ""]
    kwargs = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    first, second = tokenizer(prompts, **kwargs), again(prompts, **kwargs)
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.attention_mask, second.attention_mask)
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)


def pipeline_states(encoder, tokenizer, prompts):
    """The states as `WanPipeline` makes them: padded tokens through the encoder, zeros after the end mark."""
    from diffusers import WanPipeline

    pipe = WanPipeline(tokenizer, encoder, vae=None, scheduler=modeling.build_scheduler())
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=SEQUENCE_LENGTH)[0]


def test_states_equal_those_of_the_pipeline(encoder, tokenizer):
    prompts = [world.held_out_prompts()[0], ""]
    with torch.no_grad():
        expected = pipeline_states(encoder, tokenizer, prompts)
        states = encode_text(encoder, tokenizer, prompts, 10)
    assert expected.shape == (2, SEQUENCE_LENGTH, modeling.TEXT_DIM) and states.shape == (2, 11, modeling.TEXT_DIM)
    torch.testing.assert_close(states, expected[:, :11], atol=1e-5, rtol=1e-5)
    assert not expected[:, 10:].any() and states[1, 0].any() and not states[1, 1:].any()


def test_a_prompt_over_the_limit_is_refused(encoder, tokenizer):
    with pytest.raises(ValueError, match="raise `length`"):
        encode_text(encoder, tokenizer, ["a a a a a a"], 4)


@pytest.mark.parametrize("lean", [False, True])
def test_one_weighted_position_equals_all_the_padding(encoder, tokenizer, lean):
    """The cross-attention used in training gives what the stock processor gives on 512 padded positions."""
    torch.manual_seed(1)
    transformer = modeling.build_transformer().eval()
    if lean:
        ignore_padding_at_first(transformer)
    video = torch.randn(2, modeling.LATENT_CHANNELS, 3, 4, 4)
    time = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        prompts = [world.held_out_prompts()[0], ""]
        stock = transformer(video, time, pipeline_states(encoder, tokenizer, prompts), return_dict=False)[0]
        states = encode_text(encoder, tokenizer, prompts, 10)
        unweighted = transformer(video, time, states, return_dict=False)[0]
        use_padded_cross_attention(transformer)
        cheap = transformer(video, time, states, return_dict=False)[0]
    torch.testing.assert_close(cheap, stock, atol=3e-5, rtol=1e-4)
    if not lean:  # where padding has weight, its count matters
        assert (unweighted - stock).abs().max() > 1e-3
