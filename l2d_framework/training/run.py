"""Training runs from their configuration to their output folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from l2d_framework.base_model import fingerprint, load_config
from l2d_framework.config import DataSection, DiffusionRun, LanguageModelRun, RewardRun, Run, TokenRun, check_runs
from l2d_framework.config.checks import language_model_config, stage_before
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import add_ends, context_length, read_template
from l2d_framework.models import checkpoint
from l2d_framework.opening import open_tokenizer
from l2d_framework.training import output_dir
from l2d_framework.training.arguments import make_arguments, total_steps
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
from l2d_framework.training.run_state import RunState, base_tokenizer, output_folder
from l2d_framework.training.token_trainer import TokenTrainer
from l2d_framework.writing import staged


def train_runs(
    runs: Sequence[Run],
    *,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    callbacks: Callable[[Run], Sequence[TrainerCallback]] = lambda run: (),
) -> list[dict[str, Any]]:
    """Train the runs of a file in order, skipping those that are finished."""
    token_runs = _ready(runs)
    for number, run in enumerate(token_runs):
        if not overwrite:
            output_dir.check_free(output_folder(run), run.model_dump(mode="json"))
            _check_stage_before(run, token_runs[:number])
    cards = []
    for run in token_runs:
        arguments = make_arguments(run.training, output_folder(run), seed=run.seed)
        with RunState(run, arguments, overwrite=overwrite, accept_changed_data=accept_changed_data) as state:
            # A progress report of a run that is finished would never end.
            cards.append(state.card if state.is_finished else _train(run, state, callbacks(run)))
    return cards


def check_rows(runs: Sequence[Run]) -> list[str]:
    """Encode the first rows of the data of runs, without weights; says what a user should know of them."""
    notes = []
    for number, run in enumerate(runs):
        if run.data is not None and not isinstance(run, RewardRun):
            check_length(run.data, language_model_config(run, runs[:number]))
            notes += check_first_rows(run.data, first_tokenizer(run, runs[:number]), classes=classes_of(run))
    return notes


def check_length(section: DataSection, config: Any) -> None:
    """Refuse sequences that are longer than a language model of this config reads."""
    limit = context_length(config)
    if limit is not None and section.max_length > limit:
        raise ConfigError(
            f"data.max_length {section.max_length} exceeds the {limit} tokens this language model was made for. "
            f"Set it to at most {limit}."
        )


def first_tokenizer(run: Run, earlier: Sequence[Run]) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the base, or of the base of the stage that a run goes on from; None while it is to be trained."""
    if run.model is None:
        return None
    stage = stage_before(run.model.base, earlier)
    return base_tokenizer(run.model) if stage is None else first_tokenizer(stage, earlier[: earlier.index(stage)])


def _ready(runs: Sequence[Run]) -> list[TokenRun]:
    ready: list[TokenRun] = []
    for number, run in enumerate(runs):
        where = f"Stage {number}" if len(runs) > 1 else "The run"
        if isinstance(run, RewardRun):
            raise ConfigError(f"{where} is of kind {run.kind!r}. Train it with `l2d train-reward`, from its own file.")
        if run.data is None or run.output_dir is None:
            missing = "data" if run.data is None else "output_dir"
            raise ConfigError(f"{where} has no `{missing}`, which training needs. Add it to the run file.")
        ready.append(run)
    check_runs(runs)
    return ready


def _check_stage_before(run: TokenRun, earlier: Sequence[TokenRun]) -> None:
    """Refuse to train a stage further over which a later one has begun."""
    below = None if run.model is None else stage_before(run.model.base, earlier)
    if below is None or output_dir.read_card(output_folder(run)) is None:
        return
    card = output_dir.read_card(output_folder(below))
    if card is not None and not output_dir.is_done(card, below.model_dump(mode="json")):
        raise ConfigError(
            f"{below.output_dir!r} would be trained further, but {run.output_dir!r} has begun over it as it is. Name "
            f"another output_dir for {run.output_dir!r}, or leave the stage before it as it was."
        )


def _train(run: TokenRun, state: RunState, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    if isinstance(run, LanguageModelRun):
        check_language_model(run)
    else:
        Denoiser.check(run)
    assert run.data is not None  # `_ready` has refused runs without
    saved = state.output / "tokenizer"
    with state.arguments.main_process_first(local=True, desc="preparing data"):
        tokenizer, data = _read(run, run.data, saved)
    steps = total_steps(run.training, data.train)
    state.start(data.card, {"run": run.seed, "order": data.order_seed}, steps)
    if state.writes and run.model is None and not saved.is_dir():
        with staged(saved, advice=output_dir.kept(state.output)) as folder:
            tokenizer.save_pretrained(folder)
    learner = _learner(run, tokenizer, data.ends)
    if isinstance(learner, Denoiser):
        mark = learner.model.origin.fingerprint
    else:
        mark = None if run.model is None else fingerprint(run.model)
    state.describe(learner.parameters(), mark)
    trainer = TokenTrainer(
        learner,
        state.arguments,
        training=run.training,
        data=data,
        collate=collator(run, run.data, pad_id(tokenizer), data.order_seed),
        callbacks=[state, *callbacks],
    )
    state.train(trainer)

    def write(folder: Path) -> None:
        learner.save(folder, model_card_table(state.card))
        trainer.state.save_to_json(str(folder / "trainer_state.json"))

    with trainer.whole():
        return state.finish(_result(trainer.state), write)


def _read(run: TokenRun, section: DataSection, saved: Path) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    if run.model is not None:
        tokenizer, config = base_tokenizer(run.model), load_config(run.model)
    else:
        assert run.scratch is not None  # a run has one of the two
        tokenizer = open_tokenizer(saved) if saved.is_dir() else scratch_tokenizer(section, run.scratch)
        config = scratch_config(run.scratch, tokenizer)
    check_length(section, config)
    return tokenizer, prepare(section, tokenizer, classes=classes_of(run), seed=run.seed)


def classes_of(run: Run) -> list[str]:
    """Names of the labels that a run knows."""
    return run.classes if isinstance(run, DiffusionRun) else []


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token that fills rows up."""
    return int((tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id) or 0)


def collator(run: TokenRun, section: DataSection, pad: int, seed: int) -> Collator:
    """Makes the batches of a run."""
    masker = None
    if (masking := section.masking) is not None:
        objectives = tuple(masking.objectives)
        masker = Masker(objectives, run.training.batch_size, seed, exact_lengths=masking.exact_lengths)
    size = run.block_size if isinstance(run, DiffusionRun) else 1
    return Collator(pad, size, padding=section.padding, max_length=section.max_length, masker=masker)


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


def _result(state: TrainerState) -> dict[str, Any]:
    losses: dict[str, float] = {}
    for entry in state.log_history:
        losses |= {key: value for key, value in entry.items() if "loss" in key and key != "train_loss"}

    def logged(name: str) -> list[float]:
        return [entry[name] for entry in state.log_history if name in entry]

    return {
        "steps": state.global_step,
        "losses": losses,
        "best_eval_loss": state.best_metric,
        "tokens_per_second": median(logged("tokens_per_second") or [0.0]),
        "padding": median(logged("padding") or [0.0]),
        **({"micro_batch_size": sizes[-1]} if (sizes := logged("micro_batch_size")) else {}),
        **({"skipped_updates": sum(skipped)} if (skipped := logged("skipped_updates")) else {}),
    }
