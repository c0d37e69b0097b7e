"""Preference pairs as tokens: written, measured, split and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from l2d_framework.config import PairSource, RewardRun
from l2d_framework.errors import DataError, shown
from l2d_framework.generation import prompts
from l2d_framework.generation.chat_template import Messages, check_text
from l2d_framework.generation.prompts import encode_text, opening, read_template
from l2d_framework.training.data import chat
from l2d_framework.training.data.prepare import is_held_out
from l2d_framework.training.data.sources import describe, load_rows, require_columns, select_rows

_FEATURES = datasets.Features(
    {
        "chosen_ids": datasets.List(datasets.Value("int32")),
        "rejected_ids": datasets.List(datasets.Value("int32")),
        "margin": datasets.Value("float32"),
        "prompt": datasets.Value("string"),
    }
)
_SHIPPED = {"authors": "tess2_reward", "generation": "tulu", "tokenizer": None}
_CODE = hashlib.sha256(Path(__file__).read_bytes() + Path(prompts.__file__).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Pairs:
    """What a reward model learns from; rows hold `chosen_ids` and `rejected_ids`, and `margin` where there is one."""

    train: Any
    eval: Any | None
    card: dict[str, Any]


@dataclass(frozen=True)
class PairWriter:
    """How a conversation or a text becomes the tokens that a reward model reads."""

    encoder: chat.ChatEncoder
    around: tuple[str, str]
    """What stands in front of and behind a text without prompt."""
    front: tuple[int, ...]
    """Tokens that are put in front of such a text, as in front of a prompt."""
    pad_id: int | None
    """Token by which transformers tells padding, or None where padding counts as text."""
    code: str = _CODE
    """So that no cache outlives the code that writes."""

    @classmethod
    def of(cls, run: RewardRun, tokenizer: PreTrainedTokenizerBase) -> PairWriter:
        """Writer that a run file asks for."""
        chosen = run.data.chat_template or _SHIPPED[run.data.format]
        chat.require_eos(tokenizer)
        layout = "tokenizer" if run.data.chat_template is not None else run.data.format
        front = str(tokenizer.bos_token or "") if layout == "generation" else ""
        back = str(tokenizer.eos_token) + ("\n" if layout == "authors" else "")
        return cls(
            chat.ChatEncoder.of(tokenizer, read_template(chosen) or chat.resolve_template(None, tokenizer)),
            (front, back),
            tuple(opening(tokenizer)) if layout == "tokenizer" else (),
            tokenizer.pad_token_id if run.data.pad_to is None else None,
        )

    def ids(self, written: str | Messages) -> list[int]:
        """Tokens of one side of a pair."""
        if isinstance(written, str):
            text, front = check_text(written.removeprefix(self.around[0]).join(self.around)), self.front
        else:
            text, front = self.encoder.render(written), ()
        ids = encode_text(self.encoder.tokenizer, text, front=front)
        if self.pad_id is not None and ids[-1:] == [self.pad_id]:
            raise DataError(
                f"it ends in the padding token {self.encoder.tokenizer.pad_token!r}, before which the reward would "
                "be read. Set data.pad_to, data.add_pad_token: true, or data.format: authors."
            )
        return ids


def prepare_pairs(run: RewardRun, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """Open, write, filter and split the data of a run."""
    writer = PairWriter.of(run, tokenizer)
    cards: dict[str, list[Any]] = {"train": [], "eval": []}
    parts: dict[str, Any] = {}
    for which, sources in (("train", run.data.train), ("eval", run.data.eval)):
        encoded = [_encode(source, run, writer, cards[which]) for source in sources]
        if encoded:
            parts[which] = datasets.concatenate_datasets(encoded)
    if run.data.eval_fraction:
        part = partial(_is_in_part, seed=run.seed, fraction=run.data.eval_fraction)
        parts["eval"], parts["train"] = (
            parts["train"].filter(partial(part, held_out=which), input_columns=["prompt"]) for which in (True, False)
        )
    for which, data in parts.items():
        if not len(data):
            raise DataError(f"No pair is left for {which}: check data.eval_fraction, data.max_length and limits.")
    has_margin = run.training.margin > 0 or any("margin" in source.columns for source in run.data.train)
    unused = ["prompt"] if has_margin else ["prompt", "margin"]
    card = {
        "sources": cards,
        "splits": {which: _count(data) for which, data in parts.items()},
        "held_out": {"fraction": run.data.eval_fraction, "seed": run.seed} if run.data.eval_fraction else None,
        "max_length": run.data.max_length,
    }
    kept = {which: data.remove_columns(unused) for which, data in parts.items()}
    return Pairs(kept["train"], kept.get("eval"), card)


@dataclass(frozen=True)
class _Encoder:
    """Encodes rows; a class, so that `datasets` caches by its fields."""

    writer: PairWriter
    columns: dict[str, str]
    margin: float
    where: str

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            prompt, sides = _sides({name: row[column] for name, column in self.columns.items()})
            chosen, rejected = (self.writer.ids(side) for side in sides)
            margin = float(row[self.columns["margin"]]) if "margin" in self.columns else self.margin
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"Example {index} of {self.where}: {error}") from error
        return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": margin, "prompt": prompt}


def first_pairs(run: RewardRun, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[dict[str, Any]], int]:
    """The first training pairs, as many of each source, and how many rows there are in all."""
    writer = PairWriter.of(run, tokenizer)
    pairs, total = [], 0
    for source in run.data.train:
        rows, encoder, _ = _open(source, run, writer)
        total += len(rows)
        number = min(len(rows), -(-count // len(run.data.train)))
        pairs += [encoder(rows[index], index) for index in range(number)]
    return pairs, total


def _encode(source: PairSource, run: RewardRun, writer: PairWriter, cards: list[Any]) -> Any:
    rows, encoder, card = _open(source, run, writer)
    options = {"with_indices": True, "features": _FEATURES, "remove_columns": rows.column_names}
    encoded = rows.map(encoder, desc=f"Encoding {source.path}", **options)
    fits = partial(_fits, limit=run.data.max_length)
    kept = encoded.filter(fits, input_columns=["chosen_ids", "rejected_ids"])
    if not len(kept):
        raise DataError(
            f"Each of the {len(rows)} pairs of {describe(source)} has more than {run.data.max_length} tokens on a "
            "side. Raise data.max_length."
        )
    cards.append(card | {"columns": encoder.columns, "too_long": len(encoded) - len(kept)})
    return kept


def _open(source: PairSource, run: RewardRun, writer: PairWriter) -> tuple[Any, _Encoder, dict[str, Any]]:
    """Rows of a source, what encodes them, and facts about it."""
    data, present, files = load_rows(source)
    columns = {"chosen": "chosen", "rejected": "rejected"} | {str(name): own for name, own in source.columns.items()}
    if "prompt" in present:
        columns.setdefault("prompt", "prompt")
    require_columns(source, present, [*columns.items(), *(("exclude", name) for name in source.exclude)])
    rows, card = select_rows(source, data, files, used=list(columns.values()))
    return rows, _Encoder(writer, columns, run.training.margin, describe(source)), card


def _sides(row: dict[str, Any]) -> tuple[str, list[Any]]:
    # What tells a prompt from others, and both sides as conversations, or as texts where there is no prompt.
    prompt: Any = row.get("prompt")
    answers = [row["chosen"], row["rejected"]]
    if all(isinstance(answer, str) for answer in answers):
        if prompt is None:
            return json.dumps(answers), answers
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    for answer in answers:
        if not _is_conversation(answer) or answer[-1]["role"] != "assistant":
            raise DataError(
                f"`chosen` and `rejected` should be two texts or two lists of messages that end in an answer of the "
                f"role 'assistant', got {shown(answer)}."
            )
    if all(answer[0]["role"] == "assistant" for answer in answers):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not _is_conversation(prompt):
            raise DataError(f"`prompt` should be a text or a list of messages, got {shown(prompt)}.")
        answers = [[*prompt, *answer] for answer in answers]
    asked = [(turn["role"], turn["content"]) for turn in answers[0][:-1]]
    return json.dumps(asked), answers


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn for turn in value)
    )


def _fits(chosen: list[int], rejected: list[int], limit: int) -> bool:
    return max(len(chosen), len(rejected)) <= limit


def _is_in_part(prompt: str, seed: int, fraction: float, held_out: bool) -> bool:
    return is_held_out(prompt.encode(), seed, fraction) == held_out


def _count(data: Any) -> dict[str, int]:
    tables = data.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(batch_size=1000)
    tokens = sum(len(column.combine_chunks().flatten()) for table in tables for column in table.columns)
    return {"pairs": len(data), "tokens": tokens}
