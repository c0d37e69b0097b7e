"""A masked language model from nothing, which no run file trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from l2d_bench.data.tess_data import TessTexts

_MASK, _SHARE = "<|mask|>", 0.15


class MaskedModel(TessTexts):
    """A small masked language model such as RoBERTa, trained by transformers on the corpus of `TessTexts`.

    The folder is the model.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1, for the masks.
    """

    kind: Literal["masked_model"] = "masked_model"  # type: ignore[assignment]
    config: dict[str, Any]
    """Fields of its transformers config, `model_type` among them."""
    vocab_size: int = Field(default=512, ge=257)
    """Of the tokenizer, the mask aside."""
    length: int = Field(default=64, ge=8)
    """Tokens of a training text, which holds several documents."""
    max_steps: int = Field(default=500, gt=0)
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float = Field(default=4e-3, gt=0)

    def make(self, folder: Path) -> None:
        """Train and save.

        Args:
            folder: exists and is empty.
        """
        import tempfile

        from transformers import (
            AutoModelForMaskedLM,
            DataCollatorForLanguageModeling,
            Trainer,
            TrainingArguments,
            set_seed,
        )

        from l2d_framework.opening import make_config, new_model
        from l2d_framework.training.tokenizer import train_tokenizer

        texts = self.corpus(self.tuning(self.splits()))
        tokenizer = train_tokenizer(texts, self.vocab_size)
        tokenizer.add_special_tokens({"mask_token": _MASK})
        set_seed(self.seed)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = make_config("masked_model", {**self.config, **sizes})
        model = new_model(AutoModelForMaskedLM, config)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                max_steps=self.max_steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup_steps=min(30, self.max_steps),
                weight_decay=0.0,
                seed=self.seed,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                logging_strategy="no",
                disable_tqdm=True,
            )
            Trainer(
                model=model,
                args=arguments,
                train_dataset=_packed(texts, tokenizer, self.length),
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=_SHARE),
            ).train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _packed(texts: list[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    ids: list[int] = []
    for each in tokenizer(texts)["input_ids"]:
        ids += [*each, tokenizer.eos_token_id]
    return [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length + 1, length)]
