"""Random language models and tokenizers of a few kilobytes, made without downloads."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|turn|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# A sliding window shorter than the usual test sequence, so that it is felt.
LOCAL_AND_GLOBAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {**LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    "gemma3_text": {**LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {},
    "olmo2": {},
    "gpt2": {},
    # One more place than a position, which the family keeps for padding.
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 130},
    "bert": {},
}

MASKED = ("roberta", "bert")
"""Families pretrained to fill in masks, served by transformers' causal classes all the same."""


def tiny_lm(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Random causal language model in float32, in evaluation mode, whose layers matter.

    Fresh initialisations are so small that a missing attention path hides in rounding; here every matrix keeps the
    scale of its input and every norm and bias is perturbed.

    `family` is a transformers `model_type`; `overrides` are fields of its configuration.
    """
    options = {**SIZES, **FAMILIES.get(family, {}), **overrides}
    attention = options.pop("attn_implementation", None)
    config = CONFIG_MAPPING[family](**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embedding:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


ADDING = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "two": "<|turn|> <s> $A"}
"""What tokenizers put around a text; `both` as those of the RoBERTa family do."""


def tiny_tokenizer(*, chat: bool = False, adding: str = "nothing") -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: any text round-trips, one token a byte, left padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adding != "nothing":
        special = [(token, vocabulary[token]) for token in SPECIAL_TOKENS]
        tokenizer.post_processor = processors.TemplateProcessing(single=ADDING[adding], special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|turn|>"],
        padding_side="left",
        model_max_length=SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
