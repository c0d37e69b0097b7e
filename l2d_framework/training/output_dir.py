"""A run's output folder: safe to kill at any moment, refused to a different run, never deleted.

Layout: the finished model and `run.json` at the top, `best/` for the model of the lowest held-out loss, `checkpoint-N/`
for resuming. Folders appear under their names only when they are complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l2d_framework.config import parse_run
from l2d_framework.config.files import parse_json, read_text
from l2d_framework.errors import ConfigError, L2DError

RUN_FILE = "run.json"
BEST = "best"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITING, _REPLACED = ".writing", ".replaced"


@contextmanager
def staged(target: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Write a folder under a temporary name and give it its own when the block ends without an error.

    One process `writes`, that is, makes and renames it; `wait` waits for the others.
    """
    stage = target.with_name(target.name + _WRITING)
    if writes:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    wait()
    yield stage
    wait()
    if writes:
        # Whatever had the name is removed once the new one is in place.
        replaced = target.with_name(target.name + _REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.replace(target, replaced)
        os.replace(stage, target)
        shutil.rmtree(replaced, ignore_errors=True)
    wait()


def remove(folder: Path) -> None:
    """Delete a folder; killed half-way, it no longer has its name."""
    doomed = folder.with_name(folder.name + _WRITING)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clean_up(output: Path) -> None:
    """Undo what a killed process left half done."""
    for path in output.glob(f"*{_REPLACED}"):
        target = path.with_name(path.name.removesuffix(_REPLACED))
        if target.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, target)
    for path in output.glob(f"*{_WRITING}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    steps = {path: match for path in output.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]))


def publish(stage: Path, output: Path) -> None:
    """Move the files of a folder into another, each at once."""
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            target = output / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(stage)


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
    temporary = output / f"{RUN_FILE}{_WRITING}"
    temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, output / RUN_FILE)


def check_free(output: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Refuse a folder of something else; returns the card of the same run's earlier start, or None."""
    card = read_card(output) if output.is_dir() else None
    if card is None:
        if output.exists() and not (output.is_dir() and all(p.name.endswith(_WRITING) for p in output.iterdir())):
            raise ConfigError(
                f"output_dir {str(output)!r} exists and holds no {RUN_FILE}, so it is not a run's. "
                "Choose another, or use --overwrite, which moves it aside."
            )
        return None
    ours, theirs = _flat(config), _flat(_recorded(card))
    keys = sorted((ours.keys() | theirs.keys()) - {"output_dir"})
    differing = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not differing:
        return card
    if [path.name for path in output.iterdir()] == [RUN_FILE]:
        return None  # a run that was refused when its weights loaded: there is nothing to lose
    shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in differing[:8])
    raise ConfigError(
        f"output_dir {str(output)!r} holds a run with another configuration ({shown}). "
        "Choose another output_dir, or use --overwrite, which moves it aside."
    )


def _recorded(card: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of an earlier start, in which options that did not exist then have their defaults."""
    try:
        return parse_run(card["config"]).model_dump(mode="json")
    except L2DError:  # of plugins that are gone, say
        return dict(card["config"])


def move_aside(output: Path) -> Path | None:
    """Rename a folder so that its name is free; returns the new name, or None if there was nothing."""
    if not output.exists():
        return None
    number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.old-{n}").exists())
    aside = output.with_name(f"{output.name}.old-{number}")
    os.replace(output, aside)
    return aside


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {path: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= _flat(inner, f"{path}.{key}" if path else str(key))
    return out
