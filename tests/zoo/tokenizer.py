"""A byte-level tokenizer of a few hundred tokens, with the special tokens that a family names."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = "please respond to the audio. I cannot assist with that."
PAD, END = "<|endoftext|>", "<|im_end|>"


def build_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer; `special` tokens beside padding and end, `named` ones by attribute (`audio_token=...`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys([PAD, END, *special, *named.values()]))
    tokenizer.train_from_iterator(
        [SENTENCE],
        trainers.BpeTrainer(
            vocab_size=256 + len(tokens) + 20,
            special_tokens=tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=named | {f"special_{index}": token for index, token in enumerate(special)},
        padding_side="left",
    )
