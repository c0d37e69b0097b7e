"""Byte-level BPE for runs that train a language model from scratch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from l2d_framework.errors import ConfigError

EOS, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    f"{ASSISTANT}{{% generation %}}{{{{ message['content'] + eos_token }}}}{{% endgeneration %}}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
"""Special token of the speaker, then the text; answers end with the end-of-text token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, like: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with end-of-text, padding and two chat tokens, and a template with generation markers."""
    special = [EOS, PAD, USER, ASSISTANT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size must be at least {smallest} (256 bytes and special tokens); got {vocab_size}.")
    model = Tokenizer(models.BPE())
    if like is None:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        model.normalizer, model.pre_tokenizer = like.normalizer, like.pre_tokenizer
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )
