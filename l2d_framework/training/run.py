"""Training runs from their configuration to their output folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from l2d_framework.base_model import load_config
from l2d_framework.config import DiffusionRun, LanguageModelRun, RewardRun, Run, TokenRun, check_runs
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import add_ends, context_length, read_template
from l2d_framework.models import checkpoint
from l2d_framework.opening import open_tokenizer
from l2d_framework.training import output_dir
from l2d_framework.training.arguments import TrainingData, make_arguments
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.masking import Masker
from l2d_framework.training.data.prepare import PreparedData, check_first_rows, prepare
from l2d_framework.training.language_model import (
    NextToken,
    build_language_model,
    check_language_model,
    scratch_config,
    scratch_tokenizer,
)
from l2d_framework.training.learner import Denoiser, Learner
from l2d_framework.training.run_record import model_card_table
from l2d_framework.training.run_state import CardKeeper, Job, base_tokenizer, output_folder, resolved, wait
from l2d_framework.training.trainer import TokenTrainer

_TOKENIZER = "tokenizer"


def train_runs(
    runs: Sequence[Run],
    *,
    overwrite: bool = False,
    callbacks: Callable[[Run], Sequence[TrainerCallback]] = lambda run: (),
) -> list[dict[str, Any]]:
    """Train the runs of a file in order, skipping those that are finished."""
    token_runs = _ready(runs)
    for run in token_runs:
        if not overwrite:
            output_dir.check_free(output_folder(run), resolved(run))
    return [_train(run, overwrite=overwrite, callbacks=callbacks(run)) for run in token_runs]


def check_rows(runs: Sequence[Run]) -> list[str]:
    """Encode the first rows of the data of runs, without weights; says what a user should know of them."""
    notes = []
    for number, run in enumerate(runs):
        if run.data is not None and not isinstance(run, RewardRun):
            classes = run.classes if isinstance(run, DiffusionRun) else []
            notes += check_first_rows(run.data, _first_tokenizer(run, runs[:number]), classes=classes)
    return notes


def _first_tokenizer(run: Run, earlier: Sequence[Run]) -> PreTrainedTokenizerBase | None:
    # That of the base; none while it is still to be trained. A stage takes that of the stage it goes on from.
    if run.model is None:
        return None
    for stage in reversed(earlier):
        if stage.output_dir is not None and Path(stage.output_dir).absolute() == Path(run.model.base).absolute():
            return _first_tokenizer(stage, earlier[: earlier.index(stage)])
    return base_tokenizer(run.model)


def _ready(runs: Sequence[Run]) -> list[TokenRun]:
    found: list[TokenRun] = []
    for number, run in enumerate(runs):
        where = f"Stage {number}" if len(runs) > 1 else "The run"
        if isinstance(run, RewardRun):
            raise ConfigError(f"{where} is of kind {run.kind!r}. Train it with `l2d train-reward`, from its own file.")
        if run.data is None or run.output_dir is None:
            missing = "data" if run.data is None else "output_dir"
            raise ConfigError(f"{where} has no `{missing}`, which training needs. Add it to the run file.")
        found.append(run)
    check_runs(runs)
    return found


def _train(run: TokenRun, *, overwrite: bool, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    job = Job(run, make_arguments(run.training, output_folder(run), seed=run.seed))
    earlier = job.earlier(overwrite=overwrite)
    if earlier is not None and earlier["finished"]:
        return earlier
    if isinstance(run, LanguageModelRun):
        check_language_model(run)
    else:
        Denoiser.check(run)
    with job.arguments.main_process_first(local=True, desc="preparing data"):
        tokenizer = _tokenizer(run, job.output)
        data = _prepare(run, tokenizer)
    wait()
    job.start(data.card, _seeds(run), earlier)
    if job.writes:
        job.claim()
        if run.model is None and not (job.output / _TOKENIZER).is_dir():
            with output_dir.staged(job.output / _TOKENIZER) as folder:
                tokenizer.save_pretrained(folder)
    wait()
    learner = _learner(run, tokenizer, data.ends)
    trained = [p.numel() for p in learner.parameters() if p.requires_grad]
    job.card["parameters"] = {"trainable": sum(trained), "total": sum(p.numel() for p in learner.parameters())}
    if isinstance(learner, Denoiser):
        job.card["base_fingerprint"] = learner.model.origin.fingerprint
    found = output_dir.checkpoints(job.output)
    keeper = CardKeeper(job)
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


def _tokenizer(run: TokenRun, output: Path) -> PreTrainedTokenizerBase:
    assert run.data is not None  # `train_runs` has refused runs without
    if run.model is not None:
        return base_tokenizer(run.model)
    assert run.scratch is not None  # a run has one of the two
    if (output / _TOKENIZER).is_dir():
        return open_tokenizer(output / _TOKENIZER)
    return scratch_tokenizer(run.data, run.scratch)


def _prepare(run: TokenRun, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    assert run.data is not None
    if run.model is not None:
        config = load_config(run.model)
    else:
        assert run.scratch is not None  # a run has one of the two
        config = scratch_config(run.scratch, tokenizer)
    limit = context_length(config)
    if limit is not None and run.data.max_length > limit:
        raise ConfigError(
            f"data.max_length {run.data.max_length} exceeds the {limit} tokens this language model was made for. "
            f"Set it to at most {limit}."
        )
    classes = run.classes if isinstance(run, DiffusionRun) else []
    return prepare(run.data, tokenizer, classes=classes, seed=run.seed)


def _training_data(run: TokenRun, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    assert run.data is not None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    masking, seed = run.data.masking, _seeds(run)["order"]
    collate = Collator(
        pad or 0,
        run.block_size if isinstance(run, DiffusionRun) else 1,
        padding=run.data.padding,
        max_length=run.data.max_length,
        masker=None
        if masking is None
        else Masker(tuple(masking.objectives), run.training.batch_size, seed, exact_lengths=masking.exact_lengths),
    )
    return TrainingData(data.train, data.eval, collate, seed)


def _seeds(run: TokenRun) -> dict[str, int]:
    assert run.data is not None
    order = run.seed if run.data.shuffle_seed is None else run.data.shuffle_seed
    return {"run": run.seed, "order": order}


def _learner(run: TokenRun, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Learner:
    if isinstance(run, DiffusionRun):
        model = checkpoint.build_model(run)
        model.origin = replace(model.origin, ends=ends)
        return Denoiser(model, run.training, run.seed)
    if run.data is not None and run.data.chat_template is not None:
        tokenizer.chat_template = read_template(run.data.chat_template)
    lm = build_language_model(run, tokenizer)
    add_ends(lm.generation_config, ends)
    return NextToken(lm, tokenizer, run.training)


def _finish(job: Job, trainer: TokenTrainer) -> None:
    losses: dict[str, float] = {}
    speeds = []
    for entry in trainer.state.log_history:
        losses |= {key: value for key, value in entry.items() if "loss" in key and key != "train_loss"}
        speeds += [entry["tokens_per_second"]] if "tokens_per_second" in entry else []
    result = {
        "steps": trainer.state.global_step,
        "losses": losses,
        "best_eval_loss": trainer.state.best_metric,
        "tokens_per_second": median(speeds or [0.0]),
    }

    def write(folder: Path) -> None:
        trainer.learner.save(folder, model_card_table(job.card))
        trainer.state.save_to_json(str(folder / "trainer_state.json"))

    job.finish(result, write)
