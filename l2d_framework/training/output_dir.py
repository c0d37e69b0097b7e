"""A run's output folder: safe to kill at any moment, refused to a different run, never deleted.

Layout: the finished model and `run.json` at the top, `best/` for the model of the lowest held-out loss, `checkpoint-N/`
for resuming, `diverged/` for what an update began with that made no numbers, `.publishing/` for a model that is being
put at the top. Folders appear under their names only when they are complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from l2d_framework.base_model import fingerprint
from l2d_framework.config import ModelSection, parse_run
from l2d_framework.config.differences import differences, flat, said, told
from l2d_framework.config.files import parse_json, read_text
from l2d_framework.config.validation import validated
from l2d_framework.errors import CheckpointError, ConfigError, L2DError, OutputError
from l2d_framework.models.labels import MANIFEST
from l2d_framework.models.manifest import file_hash, opened_files
from l2d_framework.opening import PUBLISHING
from l2d_framework.training import folder_lock
from l2d_framework.writing import REPLACED, WRITING, in_bytes, naming_what_fails, size_of

RUN_FILE = "run.json"
BEST = "best"
DIVERGED = "diverged"
SEAL = "files.json"
"""In a checkpoint the SHA-256 of each other file, written last."""
_LOGGER = logging.getLogger(__name__)
_ENTRIES = ("config.json", "adapter_config.json", MANIFEST)
"""Files by which a folder is known to hold a model."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ENTRY = re.compile(r"\.\d+$")
_STEPS, _EPOCHS = "training.max_steps", "training.epochs"
_UNHEARD = {
    f"training.{name}" for name in ("logging_steps", "report_to", "eval_steps", "save_steps", "save_total_limit")
}
_FREE = {"output_dir", "training.non_finite", "training.skip_limit"} | {_STEPS, _EPOCHS} | _UNHEARD
"""Options that change nothing of what a run has learned so far."""
_PLACES = {"model.base", "model.revision", "model.adapter"}
"""Where a language model lies, which may have moved."""


def writing(target: Path, stage: Path) -> AbstractContextManager[None]:
    """Say in this package's words what of a run could not be written, and what is left to go on from."""
    return naming_what_fails(target, stage, kept(target.parent))


def kept(output: Path) -> Callable[[], str]:
    """What there is to go on from where a run could not write, and what to do."""

    def advice() -> str:
        if (left := last_whole(output)) is None:
            return "No checkpoint came before. Make room first, or choose another output_dir."
        return (
            f"Nothing is lost: {left.name}, which takes {in_bytes(size_of(left))}, is whole, and the same command goes "
            "on from it. Make room for one more first."
        )

    return advice


def seal(folder: Path) -> None:
    """Write the hashes of all files of a folder into it."""
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in _files(folder)}
    (folder / SEAL).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None if it is as it was written, or from before there were seals."""
    path = folder / SEAL
    if not path.is_file():
        return None
    try:
        hashes = dict(parse_json(read_text(path), path.name)["sha256"])
        for name, recorded in hashes.items():
            if not (folder / name).is_file():
                return f"{name!r} is missing"
            if file_hash(folder / name) != recorded:
                return f"{name!r} is truncated or changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL!r} or what it names cannot be read ({error})"
    return None


def newest_whole(output: Path, tell: Callable[[str], None]) -> Path | None:
    """Checkpoint to go on from, or None if there is none; damaged ones are left as they are, and told."""
    damaged: list[str] = []
    for folder in reversed(checkpoints(output)):
        if (wrong := damage(folder)) is None:
            if damaged:
                tell(f"{' '.join(damaged)} Going on from the older {str(folder)!r}.")
            return folder
        damaged.append(f"{str(folder)!r} is damaged: {wrong}.")
    if damaged:
        raise CheckpointError(
            f"No checkpoint is whole. {' '.join(damaged)} Restore one, or begin anew in another output_dir or with "
            "--overwrite, which moves this one aside."
        )
    return None


def last_whole(output: Path) -> Path | None:
    """Newest checkpoint that is whole, or None if none is."""
    return next((folder for folder in reversed(checkpoints(output)) if damage(folder) is None), None)


def check_room(output: Path, trained: int, limit: int) -> None:
    """Refuse a disk on which not even one checkpoint has room, and warn where not all have; `trained`: parameters."""
    size = 12 * trained  # in float32 the weights and AdamW's two moments
    there = size_of(output)
    # While one is written those before are still there; beside them stand the best model and the finished one.
    wanted = (limit + 1) * size + 2 * 4 * trained - there
    free = shutil.disk_usage(output).free
    facts = f"A checkpoint takes about {in_bytes(size)}, and {in_bytes(free)} are free for {str(output)!r}"
    if free < size:
        raise OutputError(f"{facts}. Make room first, or choose an output_dir on another disk.")
    if free < wanted:
        _LOGGER.warning(
            "%s, but training.save_total_limit %d and the finished model need %s. Training may stop when a checkpoint "
            "is to be written.",
            *(facts, limit, in_bytes(wanted)),
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """Delete a folder; killed half-way, it no longer has its name."""
    doomed = folder.with_name(folder.name + WRITING)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clean_up(output: Path) -> None:
    """Undo what a killed process left half done."""
    for path in output.glob(f"*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, target)
    for path in output.glob(f"*{WRITING}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    steps = {path: match for path in output.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def publish(stage: Path, output: Path, card: Mapping[str, Any]) -> None:
    """Make the files of a folder those of a run, and a card its own; what is killed half-way, `complete` completes."""
    with writing(output / PUBLISHING, stage):
        (stage / RUN_FILE).write_text(_text(card), encoding="utf-8")
    os.replace(stage, output / PUBLISHING)
    complete(output)


def complete(output: Path) -> None:
    """Put a new model that lies whole in a folder of its own in the place of the old one, if there is one.

    Meanwhile this package refuses the output folder, and whoever else opens it finds no model there, rather than files
    of both.
    """
    stage = output / PUBLISHING
    if (card := read_card(stage)) is None:
        return
    clean_up(output)
    files = [path.relative_to(stage) for path in _files(stage) if path != stage / RUN_FILE]
    # Such as shards, and files of another release's tokenizer, which would be opened with those of the new model.
    old = {Path(name) for name in opened_files(output)} - {*files}
    for name in (*(name for name in files if name.name in _ENTRIES), *old):
        (output / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: (name.name in _ENTRIES, -len(name.parts), name)):
        _put(stage / name, output / name, output)
    remove(stage)
    write_card(output, card)


def _put(file: Path, target: Path, output: Path) -> None:
    """Give a file a second name, in the place of what has it, or a copy where the file system knows no links."""
    temporary = output / f"{target.name}{WRITING}"
    with naming_what_fails(target, temporary, lambda: "Make room: the model is whole, and the same command goes on."):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(file):
            return
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copy2(file, temporary)
        os.replace(temporary, target)


def read_card(output: Path) -> dict[str, Any] | None:
    """Contents of the `run.json` of a folder, or None when there is none."""
    path = output / RUN_FILE
    if not path.is_file():
        return None
    try:
        card = parse_json(read_text(path), str(path))
        return dict(card) | {"config": dict(card["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} is damaged ({error!r}). Choose another output_dir, or use --overwrite."
        ) from error


def write_card(output: Path, card: Mapping[str, Any]) -> None:
    """Replace the `run.json` of a folder."""
    temporary = output / f"{RUN_FILE}{WRITING}"
    with writing(output / RUN_FILE, temporary):
        temporary.write_text(_text(card), encoding="utf-8")
    os.replace(temporary, output / RUN_FILE)


def _text(card: Mapping[str, Any]) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False) + "\n"


def check_free(output: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Refuse a folder of something else; returns the card of the same run's earlier start, or None."""
    card = read_card(output) if output.is_dir() else None
    if card is None:
        if output.exists() and not (output.is_dir() and all(_is_passing(p) for p in output.iterdir())):
            raise ConfigError(
                f"output_dir {str(output)!r} exists and holds no {RUN_FILE}, so it is not a run's. "
                "Choose another, or use --overwrite, which moves it aside."
            )
        return None
    # An entry of a list is free where the list is.
    everything = differences(_recorded(card), config)
    differing = {name: values for name, values in everything.items() if _ENTRY.sub("", name) not in _FREE}
    if not differing or (_PLACES.issuperset(differing) and _is_same_base(card, config)):
        if (steps := config["training"]["max_steps"]) is not None and not is_done(card, config):
            check_budget(output, card, steps)
        return card
    if {path.name for path in output.iterdir()} - folder_lock.FILES == {RUN_FILE} and not card.get("saved"):
        return None  # a run that was refused when its weights loaded: there is nothing to lose
    raise ConfigError(
        f"output_dir {str(output)!r} holds a run with another configuration ({told(differing)}). "
        "Choose another output_dir, or use --overwrite, which moves it aside."
    )


def _is_same_base(card: Mapping[str, Any], config: dict[str, Any]) -> bool:
    """Whether a model that lies elsewhere than before is the one that a run was begun over."""
    try:
        return bool(card.get("base_fingerprint") == fingerprint(validated(ModelSection, config["model"], "model")))
    except ConfigError:  # an earlier stage is still to make it
        return False


def is_done(card: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a card says that a run has finished, with the budget of a configuration."""
    return bool(card.get("finished")) and not budget_changes(card, config)


def budget_changes(card: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """In which options a configuration gives another number of updates than that of a card."""
    theirs, ours = flat(_recorded(card)), flat(dict(config))
    # Where the number of updates is set, that of epochs has no meaning.
    is_set = None not in (theirs.get(_STEPS), ours.get(_STEPS))
    pairs = {name: (theirs.get(name), ours.get(name)) for name in ([_STEPS] if is_set else [_STEPS, _EPOCHS])}
    return [said(name, there, now) for name, (there, now) in pairs.items() if there != now]


def place_changes(card: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Where the language model of a configuration lies elsewhere than a card says."""
    found = differences(_recorded(card), config)
    return [said(name, *values) for name, values in found.items() if name in _PLACES]


def updates_made(output: Path, card: Mapping[str, Any], *, known: int = 0) -> int:
    """Updates that a whole checkpoint or a finished model has; where it is no more than `known`, that."""
    made = max(known, *_published(card))
    newer = (folder for folder in reversed(checkpoints(output)) if updates_of(folder) > made)
    return next((updates_of(folder) for folder in newer if damage(folder) is None), made)


def updates_of(checkpoint: Path) -> int:
    """Updates after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _published(card: Mapping[str, Any]) -> list[int]:
    """Updates of the models that a run has finished, and 0."""
    results = [entry["result"] for entry in (card, *card.get("continued", [])) if "result" in entry]
    return [0, *(int(result["steps"]) for result in results)]


def check_budget(output: Path, card: Mapping[str, Any], steps: int) -> None:
    """Refuse to end a run before where it is, and to begin it anew where nothing is left to go on from."""
    if (made := updates_made(output, card, known=steps)) > steps:
        raise ConfigError(
            f"{str(output)!r} has made {made:,} updates, and training.max_steps or training.epochs ask for {steps:,}. "
            "Ask for as many at least, or begin anew in another output_dir or with --overwrite."
        )
    made = max(card.get("saved", 0), *_published(card))
    if made and not checkpoints(output) and not (output / PUBLISHING).is_dir():
        raise CheckpointError(
            f"{str(output)!r} has made {made:,} updates, but its checkpoints are gone, from which it would go on to "
            f"{steps:,}. Put one back, or begin anew in another output_dir or with --overwrite."
        )


def _is_passing(path: Path) -> bool:
    return path.name.endswith(WRITING) or path.name in folder_lock.FILES


def _recorded(card: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of an earlier start, in which options that did not exist then have their defaults."""
    try:
        return parse_run(card["config"]).model_dump(mode="json")
    except L2DError:  # of plugins that are gone, say
        return dict(card["config"])


def move_aside(output: Path) -> Path | None:
    """Rename a folder so that its name is free; returns the new name, or None if there was nothing.

    Refused while a process trains in it, or in a folder right below it.
    """
    if not output.exists():
        return None
    number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.old-{n}").exists())
    aside = output.with_name(f"{output.name}.old-{number}")
    inside = [Path(), *(path.parent.relative_to(output) for path in output.glob(f"*/{folder_lock.LOCK}"))]
    with ExitStack() as held:
        for folder in inside if output.is_dir() else ():
            held.enter_context(folder_lock.locked(output / folder))
        os.replace(output, aside)
        for folder in inside:
            folder_lock.forget(aside / folder)
    return aside
