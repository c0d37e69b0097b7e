"""What a run would train, hold and take, found out without its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from l2d_framework.config import DataSection, DiffusionRun, LanguageModelRun, RewardRun, Run, TokenRun, check_runs
from l2d_framework.config.checks import language_model_config, stage_before
from l2d_framework.config.sections import Updates
from l2d_framework.errors import ConfigError, DataError
from l2d_framework.models.checkpoint import empty_model
from l2d_framework.training.arguments import micro_batch, total_pair_steps
from l2d_framework.training.data.collate import IGNORED
from l2d_framework.training.data.sample import EXAMPLES, Sample, count_rows, sample
from l2d_framework.training.language_model import NextToken, empty_trained_model
from l2d_framework.training.learner import Denoiser, Learner
from l2d_framework.training.memory import Part, Shard, Trial
from l2d_framework.training.reward.data import first_pairs
from l2d_framework.training.reward.inputs import as_guided
from l2d_framework.training.reward.run import empty_reward_model, padding_tokenizer
from l2d_framework.training.run import check_length, classes_of, collator, first_tokenizer, pad_id
from l2d_framework.training.shapes import NoValueError
from l2d_framework.training.sharding import check_micro_batch

_TOKENS = 2**14
"""Most tokens of a micro-batch that is tried; what longer ones hold grows with their rows."""


@dataclass(frozen=True)
class Machine:
    """On what a run is to be trained.

    Attributes:
        devices: how many, each with a process of its own.
        shard: what they divide among them.
        tokens_per_second: of all devices together; None where nobody knows.
    """

    devices: int = 1
    shard: Shard = "none"
    tokens_per_second: float | None = None


def dry_run(runs: Sequence[Run], machine: Machine) -> list[dict[str, Any]]:
    """Plan the runs of a file.

    Args:
        runs: diffusion, language model and reward runs; later ones may go on from earlier ones that are still to be
            trained.
        machine: where they would be trained.

    Returns:
        For each its `parameters`, `memory`, `examples` and `training`, JSON-ready; memory in bytes.

    Raises:
        ConfigError: if a run cannot be trained, or not on so many devices.
    """
    check_runs(runs)
    return [_plan(run, runs[:number], machine) for number, run in enumerate(runs)]


def _plan(run: Run, earlier: Sequence[Run], machine: Machine) -> dict[str, Any]:
    micro, accumulated = micro_batch(run.training, machine.devices)
    if machine.devices > 1 and machine.shard != "none":
        check_micro_batch(run.training)
    work: _Work = _PairWork(run, earlier) if isinstance(run, RewardRun) else _TokenWork(run, earlier)
    updates = work.updates()
    training: dict[str, Any] = {
        **updates,
        "batch_size": run.training.batch_size,
        "micro_batch_size": micro,
        "micro_batches_per_device": accumulated,
        "tokens_per_second": machine.tokens_per_second,
        "hours": None,
    }
    if updates["steps"] and updates["tokens_per_step"] and machine.tokens_per_second:
        seconds = updates["steps"] * updates["tokens_per_step"] / machine.tokens_per_second
        training["hours"] = seconds / 3600
    plan = {"kind": run.kind, "output_dir": run.output_dir, "base": None if run.model is None else run.model.base}
    return {
        **plan,
        "training": training,
        "examples": work.examples(),
        **_memory(run, work, machine, micro, accumulated),
    }


def trial_of(run: TokenRun, config: Any) -> Trial:
    """A diffusion or language model run, to be tried on shapes.

    Args:
        run: the run.
        config: transformers config of its language model.

    Returns:
        Its model with its loss.
    """
    learner: Learner
    if isinstance(run, DiffusionRun):
        model = empty_model(run, config)
        Denoiser.check_backbone(run, model.backbone)
        learner, vocab_size = Denoiser(model, run.training, run.seed), model.backbone.vocab_size
    else:
        nobody: Any = None  # a tokenizer is only saved
        learner = NextToken(empty_trained_model(run, config), nobody, run.training)
        vocab_size = config.get_text_config().vocab_size
    return Trial(learner.train(), lambda batch: learner(**batch)["loss"], vocab_size=vocab_size, bf16=run.training.bf16)


def _memory(run: Run, work: _Work, machine: Machine, micro: int, accumulated: int) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    parts: dict[str, Part] = {}
    reason, shard = None, machine.shard if machine.devices > 1 else "none"
    for recomputes in (False, True):
        is_own = recomputes == run.training.gradient_checkpointing
        try:
            trial = work.trial(recomputes)
            parts = parts or trial.parts()
            for length in work.lengths():
                rows = max(1, min(micro, _TOKENS // length))
                trace = trial.trace(work.batch(rows, length), accumulates=accumulated > 1, shard=shard)
                held = trial.memory(trace.times(micro / rows), devices=machine.devices, shard=shard)
                cases.append({"length": length, "gradient_checkpointing": recomputes, **asdict(held)})
                sizes = sorted({1, micro, *(2**n for n in range(run.training.batch_size.bit_length()))})
                activations += [
                    {
                        "micro_batch_size": size,
                        "length": length,
                        "gradient_checkpointing": recomputes,
                        "bytes": trace.times(size / rows).kept + trace.copied,
                    }
                    for size in sizes
                    if size <= run.training.batch_size // machine.devices or size == micro
                ]
        except NoValueError as error:
            reason = f"This run cannot be tried on shapes alone. {error}"
        except ConfigError:
            if is_own:
                raise
    own = [case for case in cases if case["gradient_checkpointing"] == run.training.gradient_checkpointing]
    return {
        "parameters": {
            "total": sum(part.total for part in parts.values()),
            "trained": sum(part.trained for part in parts.values()),
            "parts": {name: asdict(part) for name, part in parts.items()},
        },
        "memory": {
            "devices": machine.devices,
            "shard": machine.shard,
            "micro_batch_size": micro,
            "peak": own[-1]["peak"] if own else None,
            "cases": cases,
            "activations": activations,
            "unknown": reason,
        },
    }


class _Work(ABC):
    """One run: its model on shapes, its batches and its examples."""

    @abstractmethod
    def trial(self, recomputes: bool) -> Trial:
        """Its model, which computes activations again or keeps them."""

    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of the longest row that was seen, and of the longest that there may be."""

    @abstractmethod
    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        """A micro-batch of rows of a length."""

    @abstractmethod
    def examples(self) -> dict[str, Any] | None:
        """What the first examples show."""

    @abstractmethod
    def updates(self) -> dict[str, Any]:
        """Steps, epochs and tokens of each step."""


class _TokenWork(_Work):
    def __init__(self, run: TokenRun, earlier: Sequence[Run]) -> None:
        self._run, self._config = run, _config(run, earlier)
        if run.data is not None:
            check_length(run.data, self._config)
        self._tokenizer = None if run.data is None else first_tokenizer(run, earlier)
        self._sample: Sample | None = None
        if run.data is not None and self._tokenizer is not None:
            self._sample = sample(run.data, self._tokenizer, classes=classes_of(run))
        self._section = DataSection.model_construct(train=[]) if run.data is None else run.data
        self._collate = collator(
            run, self._section, 0 if self._tokenizer is None else pad_id(self._tokenizer), run.seed
        )

    @override
    def trial(self, recomputes: bool) -> Trial:
        training = self._run.training.model_copy(update={"gradient_checkpointing": recomputes})
        return trial_of(self._run.model_copy(update={"training": training}), self._config)

    @override
    def lengths(self) -> list[int]:
        section = self._section
        if self._sample is None or section.pack or self._collate.fills:
            return [section.max_length]
        return sorted({max(len(row["input_ids"]) for row in self._sample.rows), section.max_length})

    @override
    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        # As much to learn as there may be: all where masks are drawn or documents cut anew, else the largest share.
        share = 1.0
        if self._sample is not None and not self._section.pack and self._section.masking is None:
            share = max(sum(row["supervised"]) / len(row["supervised"]) for row in self._sample.rows)
        learnt = min(max(round(share * length), 1), length - 1)
        made = [_row([0] * length, [False] * (length - learnt) + [True] * learnt, place) for place in range(rows)]
        return replace(self._collate, masker=None)(made)

    @override
    def examples(self) -> dict[str, Any] | None:
        if self._sample is None or self._tokenizer is None:
            return None
        counts, section = self._counts(self._sample), self._section
        shown = self._sample.rows[0]
        return {
            "looked_at": len(self._sample.rows),
            "left_out": self._sample.left_out,
            "lengths": _spread(self._sample.lengths),
            "truncated": 0 if section.pack else sum(length > section.max_length for length in self._sample.lengths),
            "max_length": section.max_length,
            "packed": section.pack,
            "supervised_share": sum(learnt for _, learnt in counts) / sum(tokens for tokens, _ in counts),
            "shown": {"example": _spans(shown["input_ids"], self._learnt(shown), self._tokenizer)},
        }

    @override
    def updates(self) -> dict[str, Any]:
        training, section = self._run.training, self._run.data
        total = None
        if self._sample is not None:
            total = self._sample.total
        elif section is not None:
            total = count_rows(section)
        steps = training.max_steps
        if steps is None and total is not None:
            steps = max(int(-(-total * training.epochs // training.batch_size)), 1)
        tokens = supervised = None
        if self._sample is not None:
            counts = self._counts(self._sample)
            tokens, supervised = (round(training.batch_size * fmean(column)) for column in zip(*counts, strict=True))
        return _counted(steps, total, training, tokens, supervised)

    def _counts(self, of: Sample) -> list[tuple[int, int]]:
        """Tokens and supervised tokens of rows as they are trained on, padding that is learnt and masks included."""
        if self._section.pack:
            length = self._section.max_length
            if self._collate.masker is None:
                return [(length, length - 1)]
            of = Sample([_row([0] * length, [True] * length, 0)] * EXAMPLES, [], 0, None)
        counts = []
        for place, row in enumerate(of.rows):
            numbered = {**row, "index": place, "epoch": 0, "ordinal": place * self._run.training.batch_size}
            batch = self._collate([numbered])
            counts.append((int((batch["blocks"] >= 0).sum()), int((batch["labels"] != IGNORED).sum())))
        return counts

    def _learnt(self, row: Mapping[str, Any]) -> list[bool]:
        masker = self._collate.masker
        return list(row["supervised"] if masker is None else masker({**row, "index": 0, "epoch": 0, "ordinal": 0}))


class _PairWork(_Work):
    def __init__(self, run: RewardRun, earlier: Sequence[Run]) -> None:
        stage = stage_before(run.model.base, earlier)
        if stage is not None:
            raise ConfigError(
                f"model.base: {run.model.base!r} is still to be trained, so there is no tokenizer to read pairs with. "
                "Train it first."
            )
        self._run, self._config = run, _config(run, earlier)
        self._tokenizer = padding_tokenizer(run)
        pairs, self._total = first_pairs(run, self._tokenizer, EXAMPLES)
        self._pairs = [pair for pair in pairs if max(map(len, _sides(pair))) <= run.data.max_length]
        self._left_out = len(pairs) - len(self._pairs)
        if not self._pairs:
            raise DataError(
                f"Each of the first {len(pairs)} pairs has more than {run.data.max_length} tokens on a side. Raise "
                "data.max_length."
            )

    @override
    def trial(self, recomputes: bool) -> Trial:
        run = self._run
        model: Any = empty_reward_model(run, self._config, self._tokenizer).train()
        if recomputes:
            # transformers before 5.23 knows only the older name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        generator = torch.Generator()

        def loss(batch: dict[str, Tensor]) -> Tensor:
            rewards = model(**as_guided(batch, run, model, lambda: generator), use_cache=False).logits.squeeze(-1)
            chosen, rejected = rewards.chunk(2)
            return -nn.functional.logsigmoid(chosen - rejected).mean()

        size = model.get_input_embeddings().weight.shape[0]
        return Trial(model, loss, vocab_size=size, bf16=run.training.bf16, fused=True)

    @override
    def lengths(self) -> list[int]:
        data = self._run.data
        if data.pad_to is not None:
            return [data.pad_to]
        return sorted({max(max(map(len, _sides(pair))) for pair in self._pairs), data.max_length})

    @override
    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        # The end of a text is found by its padding, of which there is none.
        ids = torch.full((2 * rows, length), int(self._tokenizer.pad_token_id == 0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @override
    def examples(self) -> dict[str, Any]:
        first, lengths = self._pairs[0], [len(side) for pair in self._pairs for side in _sides(pair)]
        return {
            "looked_at": len(self._pairs),
            "left_out": self._left_out,
            "lengths": _spread(lengths),
            "truncated": 0,
            "max_length": self._run.data.max_length,
            "packed": False,
            "supervised_share": None,
            "shown": {
                name: _spans(ids, [False] * len(ids), self._tokenizer)
                for name, ids in zip(("chosen", "rejected"), _sides(first), strict=True)
            },
        }

    @override
    def updates(self) -> dict[str, Any]:
        run = self._run
        kept = len(self._pairs) / (len(self._pairs) + self._left_out)
        total = max(round(self._total * kept * (1 - run.data.eval_fraction)), 1)
        steps = total_pair_steps(run.training, total)
        mean = run.data.pad_to or fmean(len(side) for pair in self._pairs for side in _sides(pair))
        return _counted(steps, total, run.training, round(2 * run.training.batch_size * mean), None)


def _config(run: Run, earlier: Sequence[Run]) -> Any:
    """Config of the language model; of one whose tokenizer is still to be trained, with the vocabulary it will have."""
    config, root = language_model_config(run, earlier), run
    while root.model is not None and (stage := stage_before(root.model.base, earlier)) is not None:
        root, earlier = stage, earlier[: earlier.index(stage)]
    if isinstance(root, LanguageModelRun) and root.scratch is not None:
        config.vocab_size = root.scratch.tokenizer.vocab_size
    return config


def _counted(
    steps: int | None, total: int | None, training: Updates, tokens: int | None, supervised: int | None
) -> dict[str, Any]:
    return {
        "examples": total,
        "steps": steps,
        "epochs": None if steps is None or not total else steps * training.batch_size / total,
        "tokens_per_step": tokens,
        "supervised_tokens_per_step": supervised,
        "tokens": None if steps is None or tokens is None else steps * tokens,
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    return {"shortest": min(lengths), "median": median(lengths), "mean": fmean(lengths), "longest": max(lengths)}


def _row(ids: list[int], supervised: list[bool], place: int) -> dict[str, Any]:
    return {"input_ids": ids, "supervised": supervised, "class_id": -1, "index": place, "epoch": 0}


def _sides(pair: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return pair["chosen_ids"], pair["rejected_ids"]


def _spans(ids: Sequence[int], learnt: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Text in stretches that are learnt or not."""
    spans: list[dict[str, Any]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            spans.append({"text": tokenizer.decode(list(ids[start:end])), "learnt": bool(learnt[start])})
            start = end
    return spans
