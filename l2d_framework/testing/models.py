"""Language models small enough to be made afresh for every check."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

HIDDEN_SIZE = 32


def tiny_llama(seed: int = 0, *, vocab_size: int = 37, layers: int = 2) -> PreTrainedModel:
    """Random Llama of width 32 with grouped keys, its weights large enough that every token matters to every later one.

    Args:
        seed: of the weights.
        vocab_size: V.
        layers: number of decoder layers.

    Returns:
        A float32 model on the CPU, in evaluation mode, that takes up to 128 tokens.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: PreTrainedModel = LlamaForCausalLM(config)
    lm.eval()
    return lm
