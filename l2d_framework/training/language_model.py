"""Plain next-token training: from scratch, of all weights, or of a LoRA."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from l2d_framework.base_model import empty_language_model, load_config, load_language_model, locate
from l2d_framework.config import DataSection, LanguageModelRun, ScratchSection, TrainingSection
from l2d_framework.diffusion.loss import chunked_cross_entropy
from l2d_framework.errors import CheckpointError, ConfigError, suggest
from l2d_framework.models.checkpoint import save_language_model
from l2d_framework.opening import make_config, new_model, open_model, open_tokenizer
from l2d_framework.training.data.collate import IGNORED
from l2d_framework.training.data.sources import load_sources
from l2d_framework.training.learner import Learner
from l2d_framework.training.tokenizer import train_tokenizer

_STREAMED_TEXTS = 100_000


class NextToken(Learner):
    """Learns to predict the next token at supervised positions; what requires a gradient is trained, in float32."""

    def __init__(
        self, lm: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, training: TrainingSection
    ) -> None:
        super().__init__()
        self._dtype = lm.dtype
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.lm, self._tokenizer, self._chunk = lm, tokenizer, training.loss_chunk
        inner: Any = lm.get_base_model() if isinstance(lm, PeftModel) else lm
        self._body: tuple[nn.Module, ...] = (inner.base_model,)  # a tuple, so that no parameter is registered twice
        self._head = (_Head(inner),)
        if training.gradient_checkpointing:
            # transformers before 5.23 knows only the older name.
            enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    @override
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        labels = batch["labels"]
        hidden = self._body[0](input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        total, losses = chunked_cross_entropy(
            self._head[0], hidden[row, place], labels[row, place + 1], chunk=self._chunk
        )
        return {"loss": total, "losses": losses, "row": row}

    @override
    def save(self, folder: Path, notes: str) -> None:
        """Write a transformers folder, or a PEFT adapter folder, with the tokenizer."""
        self._write(folder, self._dtype)
        kind = "LoRA adapter" if isinstance(self.lm, PeftModel) else "language model"
        text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# A {kind}\n\n{notes}\n"
        (folder / "README.md").write_text(text, encoding="utf-8")

    @override
    def checkpoint(self, folder: Path) -> None:
        self._write(folder, torch.float32)

    @override
    def restore(self, folder: Path) -> None:
        if isinstance(self.lm, PeftModel):
            report: Any = set_peft_model_state_dict(self.lm, load_file(folder / "adapter_model.safetensors"))
            if report.unexpected_keys:
                raise CheckpointError(
                    f"{str(folder)!r} holds an adapter of another shape, with {report.unexpected_keys[0]!r}. "
                    "Use the run file it was trained with."
                )
        else:
            self.lm.load_state_dict(open_model(type(self.lm), folder, dtype=torch.float32)[0].state_dict())

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        if isinstance(self.lm, PeftModel):
            # Embeddings are never adapted, and "auto" would ask the hub for the base model's vocabulary size.
            self.lm.save_pretrained(str(folder), save_embedding_layers=False)
            self._tokenizer.save_pretrained(folder)
        else:
            save_language_model(self.lm, self._tokenizer, folder, dtype)


class _Head(nn.Module):
    """The vocabulary head of a language model, its soft caps and scales included."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = copy.copy(lm)
        self.lm._modules = {**lm._modules, lm.base_model_prefix: _Through()}

    def forward(self, features: Tensor) -> Tensor:
        return self.lm(inputs_embeds=features, use_cache=False).logits  # type: ignore[no-any-return]


class _Through(nn.Module):
    """Stands for the body of a language model whose hidden states are already there."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def scratch_config(scratch: ScratchSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    """transformers config of a model trained from nothing."""
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    return make_config("scratch", {**scratch.config, **special, "vocab_size": len(tokenizer)})


def scratch_tokenizer(data: DataSection, scratch: ScratchSection) -> PreTrainedTokenizerBase:
    """Byte-level BPE of the training texts; of a stream, of its first 100,000 rows."""
    # For some families, Qwen2 among them, transformers reads any tokenizer as the family's own class, which splits
    # texts in its own way; for those it is trained to split so, too.
    size = scratch.tokenizer.vocab_size
    made = train_tokenizer(_texts(data), size)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        scratch_config(scratch, made).save_pretrained(folder)
        read = open_tokenizer(folder).backend_tokenizer
    own, others = (json.loads(one.to_str())["pre_tokenizer"] for one in (made.backend_tokenizer, read))
    return made if own == others else train_tokenizer(_texts(data), size, like=read)


def _texts(data: DataSection) -> Iterator[str]:
    for opened in load_sources(data, "train"):
        names = opened.columns.names
        rows = islice(opened.data, _STREAMED_TEXTS) if data.streaming else opened.data
        for row in rows:
            if "messages" in names:
                yield from (str(turn.get("content") or "") for turn in row[names["messages"]])
            else:
                yield from (str(row[column]).removeprefix("\ufeff") for column in names.values())


def check_language_model(run: LanguageModelRun) -> None:
    """Refuse LoRA targets the model has not, before its weights are loaded."""
    if run.lora is None or run.model is None:
        return
    if locate(run.model, weights=False)[1] is not None:
        raise ConfigError(
            f"lora would sit on the adapter merged into {run.model.base!r}, which a PEFT folder cannot express. "
            "Save the merged model first and start from it."
        )
    empty = empty_language_model(load_config(run.model), run.model.attn_implementation)
    known = {n.rpartition(".")[2] for n, m in empty.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for target in run.lora.targets if isinstance(run.lora.targets, list) else []:
        if target.rpartition(".")[2] not in known:
            raise ConfigError(
                f"lora.targets: {type(empty).__name__} has no linear module {target!r}{suggest(target, known)} "
                f"Choose from {sorted(known)}."
            )


def build_language_model(run: LanguageModelRun, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """The model a run trains: fresh, the base model, or the base model with a fresh LoRA from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        if run.scratch is not None:
            config = scratch_config(run.scratch, tokenizer)
            return new_model(AutoModelForCausalLM, config, dtype=torch.float32)
        assert run.model is not None  # a run has one of the two
        return _adapted(load_language_model(run.model), run)


def empty_trained_model(run: LanguageModelRun, config: PreTrainedConfig) -> PreTrainedModel | PeftModel:
    """Shapes, on the meta device, of the model a run trains over a language model of this config."""
    if run.model is None:
        return empty_language_model(config, "sdpa", dtype="float32")
    with torch.device("meta"):
        return _adapted(empty_language_model(config, run.model.attn_implementation, dtype=run.model.dtype), run)


def _adapted(lm: PreTrainedModel, run: LanguageModelRun) -> PreTrainedModel | PeftModel:
    if run.lora is None or run.model is None:
        return lm
    lora = LoraConfig(
        r=run.lora.rank,
        lora_alpha=run.lora.alpha,  # type: ignore[arg-type]  # peft divides by the rank, so a float is fine
        target_modules=run.lora.targets,
        lora_dropout=run.lora.dropout,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm, lora)
    model.peft_config["default"].base_model_name_or_path = run.model.base
    return model
