"""What several commands share: options, checks, a bar, tables, and a folder that is never overwritten."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from l2d_framework.cli import VERBOSE
from l2d_framework.cli.completion import run_keys, sampling_keys, values
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation import plots, tables
from l2d_framework.writing import write_whole

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file, YAML or JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Replaced values, such as training.max_steps=100.", autocompletion=run_keys
    ),
]
Base = Annotated[str | None, typer.Option(help="Where the base model lies now, if it has moved.")]
_DTYPES = ("float32", "bfloat16", "float16")
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16.", autocompletion=values(*_DTYPES))
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cuda; the GPU when there is one.", autocompletion=values("cpu", "cuda", "mps")),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help='For a model larger than the device: auto, or JSON such as {"model.layers.0": "disk"}.',
        autocompletion=values("auto"),
    ),
]
OffloadFolder = Annotated[Path | None, typer.Option(help="Where layers on the disk are kept meanwhile.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Other sampling setting, such as estimate.mode=argmax.", autocompletion=sampling_keys),
]


def check_dtype(dtype: str | None) -> None:
    """Refuse a type of weights that there is not."""
    if dtype not in (None, *_DTYPES):
        raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")


def place() -> tuple[int, int]:
    """Number of this process, and how many work together, as the launcher of accelerate or torch says."""
    # Accelerate knows by the first; some launchers set nothing else.
    is_launched = {"LOCAL_RANK", "RANK", "WORLD_SIZE"} <= os.environ.keys()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if is_launched else (0, 1)


def check_device(device: str | None) -> str:
    """The device, or for None the GPU where there is one, of several processes each its own; refused if unusable."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and place()[1] > 1:
        from l2d_framework.training.peers import own_gpu

        device = own_gpu()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used here ({error}). Try cpu, or leave it out.") from error
    if torch.device(device).type == "meta":
        raise ConfigError("--device 'meta' computes nothing. Try cpu, or leave it out.")
    return device


def check_folder(folder: Path | None, option: str) -> None:
    """Refuse a folder for results that is taken or cannot be written; `option` names it."""
    if folder is None:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} exists and is not empty. Name another {option}, so that nothing is lost.")
    existing = next(above for above in (folder.resolve(), *folder.resolve().parents) if above.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{str(existing)!r} cannot be written. Name another {option}.")


def check_file(file: Path | None, option: str) -> None:
    """Refuse a file for results that is there already or cannot be written; `option` names it."""
    if file is None:
        return
    if file.exists():
        raise ConfigError(f"{str(file)!r} exists. Name another {option}, so that nothing is lost.")
    folder = file.resolve().parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{str(folder)!r} is missing or cannot be written. Name another {option}.")


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by their last names, where these tell them apart; one that is given twice is refused."""
    if len(set(paths)) < len(paths):
        raise ConfigError(f"One is named twice among {[str(path) for path in paths]}. Name each once.")
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}


def quieten() -> None:
    """Switch off the bars of transformers, which tear ours apart; `l2d --verbose` leaves them."""
    if os.environ.get(VERBOSE) == "1":
        return
    from transformers.utils import logging

    logging.disable_progress_bar()


def show(rows: tables.Rows, notes: Sequence[str], *, title: str) -> None:
    """Print a table, whose first row is its heading, and notes below it."""
    console = Console()
    console.print(tables.terminal(rows, title))
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def can_draw() -> bool:
    """Whether pictures can be drawn; says what is missing if not."""
    if not plots.can_plot():
        typer.echo(f"No picture: matplotlib is missing. {plots.INSTALL}", err=True)
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Write results for readers and programs."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sampling(settings: list[str] | None, solver: str | None, **given: Any) -> dict[str, Any]:
    """Fields of the sampling section that options name; refused at once if nothing installed has such names."""
    from l2d_framework.config.files import override
    from l2d_framework.config.sampling import check_request

    named = given | {"solver": None if solver is None else {"name": solver}}
    chosen = override({name: value for name, value in named.items() if value is not None}, settings or [])
    check_request(chosen)
    return chosen


@contextmanager
def naming_options(*names: str, **others: str) -> Iterator[None]:
    """Call arguments of Python in errors what the options are called that they are from; `others` are called so."""
    try:
        yield
    except ConfigError as error:
        spelled = {name: name.replace("_", "-") for name in names} | others
        # Without an underscore they are words, too; behind a dot and in lists they are fields of a section.
        known = "|".join(rf"{name}(?=[ =.]|, got)" if "_" in name else rf"{name}(?= should|=)" for name in spelled)
        text = re.sub(rf"(?<![\w.-])({known})(=True)?", lambda found: f"--{spelled[found[1]]}", str(error))
        raise type(error)(text) from error


def component(kind: str, text: str) -> dict[str, Any]:
    """Section of a component that an option names, or gives as `{name: ..., ...}`; an unknown name is refused."""
    from l2d_framework.config.files import parse_yaml
    from l2d_framework.registry import declared

    section = parse_yaml(text, f"--{kind}") if text.lstrip().startswith("{") else {"name": text}
    if isinstance(section.get("name"), str):
        declared().check_name(kind, section["name"])
    return dict(section)
