"""The command `l2d`.

Commands are named in one table and imported when they run, so that `l2d --help` needs neither torch nor plugins.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from l2d_framework.errors import Interrupted, L2DError, install, interrupt
from l2d_framework.registry import ALLOW_LIST, extensions


class _Entry(NamedTuple):
    module: str
    attribute: str
    help: str


COMMANDS = {
    "init": _Entry("init", "init", "Write a commented run file after five questions."),
    "train": _Entry("train", "train", "Train the run, or the pipeline of runs, of a file."),
    "train-reward": _Entry("train", "train_reward", "Train a reward model, for guidance, on preference pairs."),
    "generate": _Entry("generate", "generate", "Generate text with a trained model."),
    "config": _Entry("config", "app", "Check run files; print their JSON schema."),
    "help": _Entry("help", "help_", "Explain an option of run files or a component."),
    "params": _Entry("config", "params", "Count a run's trainable parameters without loading weights."),
    "doctor": _Entry("doctor", "doctor", "Examine this installation and machine for problems."),
    "plugins": _Entry("plugins", "plugins", "List what is installed, broken plugins included."),
    "convert": _Entry("convert", "convert", "Convert a checkpoint of another code base."),
    "eval": _Entry("eval", "app", "Evaluate a model on the tasks of lm_eval."),
    "tune-search": _Entry("eval", "tune_search", "Choose the settings of token search on training items."),
    "eval-text": _Entry("eval_text", "eval_text", "Measure generated text."),
    "diagnose": _Entry("diagnose", "diagnose", "Find out whether more steps will help a model."),
    "eval-steps": _Entry("eval_steps", "eval_steps", "Measure held-out tokens after each number of evaluations."),
    "plot": _Entry("plot", "plot", "Draw losses and learning rates of runs."),
    "demo": _Entry("demo", "demo", "Train, generate with and measure a tiny model."),
}
"""For each command: its module, its function or typer app in there, and what `l2d --help` says about it."""

VERBOSE = "L2D_VERBOSE"
"""Environment variable that stands for `--verbose` where it is 1."""

ELSEWHERE = {
    "bench": "l2d-framework[bench]",
}
"""Commands of other distributions of this project, and the extra that brings them."""


OTHER_NAMES = {"output": "out"}
"""Options by further names, of every command."""


@contextmanager
def _heard_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it keeps what it has and says so."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if is_main and before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if is_main and before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


class _LazyGroup(TyperGroup):
    """Lists stand-ins for the commands; the one that is called is imported then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name=name, help=entry.help))
        for name, app in extensions().commands().items():
            if name not in COMMANDS:
                self.add_command(_worded(typer.main.get_command(app)), name)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _heard_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(f"\n{stop}" if str(stop) else "\nInterrupted.", err=True)
            raise typer.Exit(getattr(stop, "exit_code", Interrupted(signal.SIGINT).exit_code)) from stop

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. {_why_missing(args[0])}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else command, rest


def _why_missing(name: str) -> str:
    if broken := extensions().broken.get(name):
        return f"Its plugin of {broken.distribution} is broken: {broken.error}"
    left_out = [source for source in extensions().disabled if source.plugin == name]
    return f"{ALLOW_LIST} leaves out {left_out[0]}." if left_out else f"Run: {install(ELSEWHERE[name])}"


def _load(name: str) -> Any:
    entry = COMMANDS[name]
    command = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.attribute)
    if isinstance(command, typer.Typer):
        return _worded(typer.main.get_command(command))
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name=name)(command)
    return _worded(typer.main.get_command(single))


_WORDS = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}
"""What help calls the values of an option, where typer shows types such as `list[str]` and `int range`."""


def _worded(command: Any) -> Any:
    """A command whose help says in words what options take, and shows arguments in capitals, unless they say how."""
    for inner in getattr(command, "commands", {}).values():
        _worded(inner)
    types = {} if command.callback is None else get_type_hints(inspect.unwrap(command.callback))
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.metavar = parameter.metavar or parameter.name.upper()
            parameter.display_type_rich = lambda ctx: None  # its name says enough
        elif parameter.metavar is None:
            words = (_WORDS.get(kind) for kind in _kinds(types.get(parameter.name)))
            parameter.metavar = next(filter(None, words), None)
    return command


def _kinds(hint: Any) -> Iterator[Any]:
    """A type, or those of which it is made."""
    yield hint
    for part in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _kinds(part)


def _main_name(option: str) -> str:
    """The name of an option that a command shows, for one that it may have, too."""
    return OTHER_NAMES.get(option, option)


app = typer.Typer(
    name="l2d",
    context_settings={"token_normalize_func": _main_name},  # which the commands inherit
    cls=_LazyGroup,
    help="Turn pretrained language models into diffusion language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut the names of options where a terminal is narrow
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from l2d_framework import __version__

        typer.echo(f"l2d-framework {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what libraries say of their own work, too.")] = False,
) -> None:
    if verbose:
        os.environ[VERBOSE] = "1"
    elif os.environ.get(VERBOSE) != "1":
        # Read when they are imported, which commands do.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; an `L2DError` ends in a message and its exit code, under L2D_DEBUG=1 in a traceback."""
    _run(app)


def run_script(script: Callable[..., None]) -> None:
    """Run a function whose arguments are the options of a script, in the same way."""
    _run(partial(typer.run, script))


def _run(command: Callable[[], Any]) -> None:
    try:
        command()
    except L2DError as error:
        if os.environ.get("L2D_DEBUG") == "1":
            raise
        _show(error)
        sys.exit(error.exit_code)


def _show(error: L2DError) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(stderr=True)
    # A frame and wrapped lines help a reader and hurt a log file.
    if console.is_terminal:
        console.print(Panel(Text(str(error)), title="Error", title_align="left", border_style="red"))
    else:
        typer.echo(f"Error: {error}", err=True)
