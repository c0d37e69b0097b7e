"""A GGUF file of a few kilobytes."""

from pathlib import Path
from typing import Any

import gguf
import torch
from tiny_models import tiny_tokenizer
from transformers import PreTrainedModel

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _stored_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    _, _, number, part = module.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.{kind}"


def write_gguf(lm: PreTrainedModel, path: Path, kind: str = "Q8_0") -> dict[str, Any]:
    """Write a Qwen2 model with the tiny tokenizer, its matrices quantized; returns the weights that it keeps.

    The model has two tokens more than the tokenizer.
    """
    config, tokenizer = lm.config, tiny_tokenizer(chat=True)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    # A merge, without which transformers reads no byte-pair encoding, and the family's own token, which it would add.
    vocabulary += [("Ġt", len(vocabulary)), ("<|endoftext|>", len(vocabulary) + 1)]
    writer.add_token_list([token for token, _ in vocabulary])
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for _, n in vocabulary])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    kept = {}
    for name, weight in lm.state_dict().items():
        wanted = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(weight.numpy(), wanted)
        writer.add_tensor(_stored_name(name), packed, raw_dtype=wanted)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(packed, wanted).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
