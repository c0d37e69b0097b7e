"""Reward runs from their configuration to a folder that transformers loads as a sequence classifier."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging

from l2d_framework.base_model import empty_language_model, fingerprint, load_config, load_language_model, locate
from l2d_framework.config import RewardRun, Run, check_runs
from l2d_framework.errors import ConfigError, install
from l2d_framework.models.checkpoint import save_language_model
from l2d_framework.opening import open_model
from l2d_framework.training import output_dir
from l2d_framework.training.arguments import total_pair_steps
from l2d_framework.training.reward.data import prepare_pairs
from l2d_framework.training.run_state import RunState, base_tokenizer, output_folder
from l2d_framework.training.sharding import round_to

PAD = "[PAD]"
_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, l2d-framework]
---

# A reward model

Made from `{base}` with `l2d train-reward`; the configuration, data and surroundings are
in `run.json`. Load it with `AutoModelForSequenceClassification`; its one output is the reward.

| | pairs | loss, nats per pair | accuracy | mean margin |
|---|---|---|---|---|
"""


def train_reward(
    run: RewardRun,
    *,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a reward model, going on where an earlier start was interrupted; returns the card.

    The output folder holds a transformers model with one output, `score`, its tokenizer and `run.json`.
    """
    check_ready([run], overwrite=overwrite)
    from l2d_framework.training.reward.trainer import make_reward_arguments

    arguments = make_reward_arguments(run, output_folder(run))
    with RunState(run, arguments, overwrite=overwrite, accept_changed_data=accept_changed_data) as state:
        return state.card if state.is_finished else _train(run, state, callbacks)


def _train(run: RewardRun, state: RunState, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    from l2d_framework.training.reward.trainer import PairTrainer

    arguments: Any = state.arguments
    tokenizer = padding_tokenizer(run)
    with arguments.main_process_first(local=True, desc="preparing data"):
        pairs = prepare_pairs(run, tokenizer)
    state.start(pairs.card, {"run": run.seed}, total_pair_steps(run.training, len(pairs.train)))
    model: Any = load_reward_model(run, tokenizer)
    dtype = model.dtype
    state.describe(model.parameters(), fingerprint(run.model))
    trainer = PairTrainer(
        model.float(), arguments, run=run, pairs=pairs, tokenizer=tokenizer, callbacks=[state, *callbacks]
    )
    state.train(trainer)
    # What is measured is what is saved.
    round_to(model, dtype)
    held_out = None if pairs.eval is None else trainer.evaluate()

    def write(folder: Path) -> None:
        save_language_model(model, tokenizer, folder, dtype)
        (folder / "README.md").write_text(_model_card(state.card), encoding="utf-8")
        trainer.state.save_to_json(str(folder / "trainer_state.json"))

    with trainer.whole():
        return state.finish(_result(trainer.state, held_out), write)


def check_ready(runs: Sequence[Run], *, overwrite: bool = False) -> list[RewardRun]:
    """The runs of a file, if `l2d train-reward` can train every one of them."""
    ready: list[RewardRun] = []
    for run in runs:
        if not isinstance(run, RewardRun):
            raise ConfigError(f"kind: a run of kind {run.kind!r} is trained by `l2d train`; got one for a reward model")
        if run.output_dir is None:
            raise ConfigError("output_dir: is required for training; add it")
        ready.append(run)
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(
            f"Reward models are trained with TRL, which is missing. Run: {install('l2d-framework[reward]')}"
        )
    check_runs(ready)
    for run in ready:
        if not overwrite:
            output_dir.check_free(output_folder(run), run.model_dump(mode="json"))
    return ready


def padding_tokenizer(run: RewardRun) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with a padding token."""
    # Without one of its own, the end-of-text token pads, which keeps the vocabulary that guidance compares.
    # transformers tells padding by its token, not by the mask, so a text must not end in it; `PairWriter` refuses that.
    tokenizer = base_tokenizer(run.model)
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        if run.data.add_pad_token:
            tokenizer.add_special_tokens({"pad_token": PAD})
        else:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_reward_model(run: RewardRun, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with a head of one output, new unless the base is a reward model already."""
    section = run.model
    folder, adapter = locate(section)
    config = load_config(section)
    config.num_labels = 1
    options: dict[str, Any] = {"attn_implementation": section.attn_implementation, "config": config}
    if adapter is None:
        options |= {"source": folder, "dtype": section.dtype}
    else:
        merged = load_language_model(section)
        options |= {"source": None, "state_dict": merged.state_dict(), "dtype": merged.dtype}
    verbosity = logging.get_verbosity()
    # That the head is new and the vocabulary head unused is as it should be.
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
            model: Any = open_model(kind, **options)[0]
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    finally:
        logging.set_verbosity(verbosity)
    # Only now: an embedding made with a padding token never trains it, and here it may be the end of every text.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return cast(PreTrainedModel, model)


def empty_reward_model(run: RewardRun, config: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Shapes, on the meta device, of the reward model over a language model of this config, in float32 as trained."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return empty_language_model(config, run.model.attn_implementation, dtype="float32", kind=kind)


def _result(state: Any, held_out: dict[str, float] | None) -> dict[str, Any]:
    last: dict[str, float] = {}
    for entry in state.log_history:
        last |= {name: entry[name] for name in ("loss", "accuracy", "margin") if name in entry}
    measured = {name.removeprefix("eval_"): value for name, value in (held_out or {}).items()}
    return {
        "steps": state.global_step,
        "train": last,
        "held_out": {name: measured[name] for name in ("loss", "accuracy", "margin")} if measured else None,
    }


def _model_card(card: dict[str, Any]) -> str:
    result, config = card["result"], card["config"]
    rows = []
    for which, name, where in (("train", "last training batches", "train"), ("held_out", "held out", "eval")):
        if values := result[which]:
            pairs = card["data"]["splits"][where]["pairs"]
            shown = " | ".join(f"{values[key]:.4f}" for key in ("loss", "accuracy", "margin"))
            rows.append(f"| {name} | {pairs:,} | {shown} |\n")
    return _CARD.format(base=config["model"]["base"]) + "".join(rows)
