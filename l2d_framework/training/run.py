"""Training runs from their configuration to their output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from l2d_framework import checkpoint
from l2d_framework.base_model import load_config
from l2d_framework.config import DiffusionRun, LanguageModelRun, Run, check_runs, config_hash, resolved_json
from l2d_framework.errors import ConfigError
from l2d_framework.prompts import read_template
from l2d_framework.training import folders
from l2d_framework.training.arguments import TrainingData, make_arguments
from l2d_framework.training.card import environment, model_card_table
from l2d_framework.training.collate import Collator
from l2d_framework.training.data import PreparedData, prepare
from l2d_framework.training.language_model import (
    NextToken,
    build_language_model,
    check_language_model,
    scratch_config,
    scratch_tokenizer,
)
from l2d_framework.training.learner import Denoiser, Learner
from l2d_framework.training.meter import Stopwatch, peak_memory
from l2d_framework.training.trainer import TokenTrainer

_TOKENIZER = "tokenizer"


def train_runs(
    runs: Sequence[Run],
    *,
    overwrite: bool = False,
    callbacks: Callable[[Run], Sequence[TrainerCallback]] = lambda run: (),
) -> list[dict[str, Any]]:
    """Train the runs of a file in order, skipping those that are finished.

    Args:
        runs: what `load_run` returned.
        overwrite: move output folders that exist aside.
        callbacks: further callbacks of each run, such as a progress bar.

    Returns:
        The card of each run, the contents of its `run.json`.

    Raises:
        ConfigError: if a run cannot be started; no weights have been loaded then.
    """
    for number, run in enumerate(runs):
        if run.data is None or run.output_dir is None:
            missing = "data" if run.data is None else "output_dir"
            where = f"Stage {number}" if len(runs) > 1 else "The run"
            raise ConfigError(f"{where} has no `{missing}`, which training needs. Add it to the run file.")
    check_runs(runs)
    for run in runs:
        if not overwrite:
            folders.check_free(_output(run), _resolved(run))
    return [_train(run, overwrite=overwrite, callbacks=callbacks(run)) for run in runs]


def _output(run: Run) -> Path:
    return Path(str(run.output_dir)).expanduser()


def _resolved(run: Run) -> dict[str, Any]:
    return dict(json.loads(resolved_json(run)))


@dataclass
class _Job:
    """A run on its way: where it writes, how it is launched, and its card."""

    run: Run
    output: Path
    arguments: TrainingArguments
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        return bool(self.arguments.process_index == 0)


def _train(run: Run, *, overwrite: bool, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    output = _output(run)
    job = _Job(run, output, make_arguments(run.training, output, seed=run.seed))
    wait = PartialState().wait_for_everyone
    if overwrite:
        wait()
        if job.writes:
            folders.move_aside(output)
        wait()
    earlier = folders.check_free(output, _resolved(run))
    if earlier is not None and earlier["finished"]:
        return earlier
    if isinstance(run, LanguageModelRun):
        check_language_model(run)
    else:
        Denoiser.check(run)
    with job.arguments.main_process_first(local=True, desc="preparing data"):
        tokenizer = _tokenizer(job)
        data = _prepare(job, tokenizer)
    wait()
    job.card = _start(job, data, earlier)
    if job.writes:
        _claim(job, tokenizer)
    wait()
    learner = _learner(run, tokenizer)
    trained = [p.numel() for p in learner.parameters() if p.requires_grad]
    job.card["parameters"] = {"trainable": sum(trained), "total": sum(p.numel() for p in learner.parameters())}
    if isinstance(learner, Denoiser):
        job.card["base_fingerprint"] = learner.model.origin.fingerprint
    found = folders.checkpoints(output)
    keeper = _CardKeeper(job)
    trainer = TokenTrainer(
        learner,
        job.arguments,
        training=run.training,
        data=_training_data(run, data, tokenizer),
        callbacks=[keeper, *callbacks],
    )
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    keeper.keep()
    _finish(job, trainer)
    wait()
    return job.card


def _tokenizer(job: _Job) -> PreTrainedTokenizerBase:
    run = job.run
    assert run.data is not None  # `train_runs` has refused runs without
    if run.model is not None:
        found = checkpoint.load_tokenizer(run.model)
        if found is None:
            raise ConfigError(f"model.base: {run.model.base!r} has no tokenizer_config.json. Save its tokenizer there.")
        return found
    assert run.scratch is not None  # a run has one of the two
    if (job.output / _TOKENIZER).is_dir():
        return AutoTokenizer.from_pretrained(job.output / _TOKENIZER)
    return scratch_tokenizer(run.data, run.scratch.tokenizer.vocab_size)


def _prepare(job: _Job, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    run = job.run
    assert run.data is not None
    if run.model is not None:
        config = load_config(run.model)
    else:
        assert run.scratch is not None  # a run has one of the two
        config = scratch_config(run.scratch, tokenizer)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and run.data.max_length > limit:
        raise ConfigError(
            f"data.max_length {run.data.max_length} exceeds the {limit} tokens this language model was made for. "
            f"Set it to at most {limit}."
        )
    classes = run.classes if isinstance(run, DiffusionRun) else []
    return prepare(run.data, tokenizer, classes=classes, seed=run.seed)


def _training_data(run: Run, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    assert run.data is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = Collator(pad or 0, run.block_size if isinstance(run, DiffusionRun) else 1)
    return TrainingData(data.train, data.eval, collate, _seeds(run)["order"])


def _seeds(run: Run) -> dict[str, int]:
    assert run.data is not None
    order = run.seed if run.data.shuffle_seed is None else run.data.shuffle_seed
    return {"run": run.seed, "order": order}


def _learner(run: Run, tokenizer: PreTrainedTokenizerBase) -> Learner:
    if isinstance(run, DiffusionRun):
        return Denoiser(checkpoint.build_model(run), run.training, run.seed)
    if run.data is not None and run.data.chat_template is not None:
        tokenizer.chat_template = read_template(run.data.chat_template)
    return NextToken(build_language_model(run, tokenizer), tokenizer, run.training)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _start(job: _Job, data: PreparedData, earlier: dict[str, Any] | None) -> dict[str, Any]:
    before = earlier or {}
    return {
        "finished": False,
        "kind": job.run.kind,
        "config_hash": config_hash(job.run),
        "config": _resolved(job.run),
        "seeds": _seeds(job.run),
        "data": data.card,
        **environment(int(job.arguments.world_size)),
        "started": before.get("started", _now()),
        "sessions": before.get("sessions", 0) + 1,
        "seconds": before.get("seconds", 0.0),
        "peak_memory": before.get("peak_memory", 0),
    }


def _claim(job: _Job, tokenizer: PreTrainedTokenizerBase) -> None:
    job.output.mkdir(parents=True, exist_ok=True)
    folders.clean_up(job.output)
    folders.write_card(job.output, job.card)
    if job.run.model is None and not (job.output / _TOKENIZER).is_dir():
        with folders.staged(job.output / _TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)


class _CardKeeper(TrainerCallback):
    """Keeps the time and memory a run has taken so far in its card, for a session that may be killed."""

    def __init__(self, job: _Job) -> None:
        self._job, self._watch = job, Stopwatch()
        self._watch.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.keep()

    def keep(self) -> None:
        card = self._job.card
        card["seconds"] += self._watch.lap()
        self._watch.start()
        card["peak_memory"] = max(card["peak_memory"], peak_memory(self._job.arguments.device))
        if self._job.writes:
            folders.write_card(self._job.output, card)


def _finish(job: _Job, trainer: TokenTrainer) -> None:
    """Write the model, and the card last: it says that the run is finished."""
    losses: dict[str, float] = {}
    speeds = []
    for entry in trainer.state.log_history:
        losses |= {key: value for key, value in entry.items() if "loss" in key and key != "train_loss"}
        speeds += [entry["tokens_per_second"]] if "tokens_per_second" in entry else []
    job.card |= {"finished": True, "ended": _now()}
    job.card["result"] = {
        "steps": trainer.state.global_step,
        "losses": losses,
        "best_eval_loss": trainer.state.best_metric,
        "tokens_per_second": median(speeds or [0.0]),
        "peak_memory": job.card["peak_memory"],
    }
    if not job.writes:
        return
    stage = job.output / "final.writing"
    trainer.learner.save(stage, model_card_table(job.card))
    trainer.state.save_to_json(str(stage / "trainer_state.json"))
    folders.publish(stage, job.output)
    folders.write_card(job.output, job.card)
