"""The tokenizer of the demo model: one token a word of the world, and an end mark, as T5 has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SIGNS, _OTHER_GREY = r"[^\w\s]", r"\bgray\b"
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def vocabulary() -> dict[str, int]:
    """Token -> id; the padding is 0 and the end mark 1, as the text encoder's config says."""
    words = ["a", "moves", "on", "background", *SHAPES, *COLOURS, *MOTIONS, *BACKGROUNDS]
    return {token: i for i, token in enumerate([PAD, EOS, UNK, *words])}


def unknown_words(text: str) -> list[str]:
    """The words of a text that are all one to the model, each once: those that its tokenizer has no token of."""
    words = re.sub(_OTHER_GREY, "grey", re.sub(_SIGNS, " ", text.lower())).split()
    known = vocabulary()
    return [word for word in dict.fromkeys(words) if word not in known]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ignores case and punctuation, and reads "gray" as "grey"."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(_SIGNS), " "),
            normalizers.Replace(Regex(_OTHER_GREY), "grey"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, words[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=512,
        padding_side="right",
    )
