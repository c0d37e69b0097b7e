"""The commands and the code of README and `docs/`, as they are written there; further options only cut their size.

What reads the real model or takes long is marked slow; the rest is run on models of a few kilobytes.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import doc_pages
import pytest
import typer
from doc_pages import Snippet
from fake_plugins import FakeEntryPoint, installed
from tiny_models import tiny_lm, tiny_tokenizer
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.config import load_run
from l2d_framework.hooks import GROUP
from l2d_framework.testing import checks_for

pytestmark = pytest.mark.filterwarnings("ignore")  # as for whoever types the commands

STANDS_FOR = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "mistralai/Mistral-7B-v0.1", "gpt2")
"""Hub ids of the pages' run files; here folders with small models."""

L2D = ["docs/tutorials/finetune.md", "docs/generate.md", "README.md", "docs/trackers.md"]
TESS = ["docs/tutorials/tess.md", "docs/tutorials/blocks.md"]
PLUGINS = ["docs/tutorials/plugins.md"]
EVALUATION = ["docs/tutorials/evaluate.md", "docs/papers.md"]
"""Pages whose snippets are run one after the other, in one folder."""

SMALLER = {
    "l2d train my_run.yaml": "training.batch_size=4 training.micro_batch_size=4 training.max_steps=2",
    "l2d train run.yaml": "training.batch_size=4 training.max_steps=2",
    "l2d train tracked.yaml": "training.batch_size=4 training.max_steps=2 training.logging_steps=1",
    "l2d train blocks.yaml": "training.batch_size=2 training.max_steps=1 data.max_length=256",
    "l2d train tess.yaml": "stages.0.training.max_steps=1 stages.0.training.batch_size=2"
    " stages.0.training.warmup_steps=0 stages.0.data.max_length=64"
    " stages.1.training.epochs=1 stages.1.training.batch_size=2 stages.1.data.max_length=128",
    "l2d train bits.yaml": "training.batch_size=4 training.max_steps=1",
    "l2d train-reward": "training.max_steps=1 training.batch_size=2 training.micro_batch_size=2",
    "l2d generate my_model": "--max-new-tokens 4",
    "l2d generate my_guided_model": "--max-new-tokens 4",
    "l2d generate first_model": "--max-new-tokens 4",
    "l2d generate with_bits": "--max-new-tokens 2",
    "l2d generate in_blocks": "--max-new-tokens 32 --num-inference-steps 3",
    "l2d generate tuned --infill": "--num-inference-steps 3",
    "l2d generate tuned": "--num-inference-steps 3 --max-new-tokens 8",
    "lm_eval --model l2d --model_args": "--limit 1 --num_fewshot 0 --gen_kwargs max_gen_toks=2",
    "L2D_PRETRAINED=": "--limit 1 --num_fewshot 0 --gen_kwargs max_gen_toks=2",
    "l2d eval --model_args": "--limit 2",
    "l2d eval --tasks": "--limit 1 --gen_kwargs max_gen_toks=2",
    "l2d tune-search": "--limit 1 --beams 2 --length-powers 0 --repetition-penalties 1 --temperatures 0"
    " --model_args pretrained=my_model,num_inference_steps=0",
    "l2d diagnose": "--times 3 --max-length 128",
    "l2d bench l2d_table1": "--check --data .",
}
"""Options for the first key that a command begins with."""

LONG = ("l2d train-reward", "l2d generate tuned --prompt", "l2d eval-text")
"""Begins of commands that the quick tests leave out, since TRL or a judge takes its time."""

OTHERS = ("accelerate", "make", "pip", "pytest", "python", "torchrun")
"""Programs that no test here runs; the commands of l2d behind `-m` are looked at all the same."""

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} {'plus' if number % 2 else 'minus'} one?"},
            {"role": "assistant", "content": f"It is {number + 1 if number % 2 else number - 1}."},
        ],
        "topic": "math" if number % 2 else "coding",
    }
    for number in range(200)
]
TEXT = "The old wall fell into the garden, and nobody had heard it fall, for the night was loud with rain. " * 4


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder: Path, model: Path) -> None:
    """What the pages take for granted, models and data, and the files that they spell out."""
    for name in STANDS_FOR:
        (folder / name).mkdir(parents=True)
        for file in model.iterdir():
            (folder / name / file.name).symlink_to(file)
        short = folder / name / "generation_config.json"
        settings = json.loads(short.read_text(encoding="utf-8")) | {"max_new_tokens": 3}
        short.unlink()
        short.write_text(json.dumps(settings), encoding="utf-8")
    write_lines(folder / "my_chats.jsonl", ROWS)
    write_lines(folder / "held_out.jsonl", ROWS[:2])
    write_lines(folder / "allenai/tulu-v2-sft-mixture/train.jsonl", ROWS[:2])
    write_lines(folder / "my_corpus/part.jsonl", [{"text": TEXT}] * 3)
    pairs = [{"chosen": f"The answer is {i}.", "rejected": f"No idea about {i}."} for i in range(200)]
    write_lines(folder / "my_pairs.jsonl", pairs)
    for name, text in doc_pages.files(doc_pages.PAGES).items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model of a few kilobytes that reads conversations of any length."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_lm(max_position_embeddings=4096).save_pretrained(folder)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which tiny models stand for those of the pages."""
    write_inputs(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real_folder(shallow_model: Path, datasets_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with the real model's first layers, and data sets named as on the hub."""
    write_inputs(tmp_path, shallow_model)
    for data in datasets_dir.glob("*/*/"):
        link = tmp_path / data.relative_to(datasets_dir)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def smaller(line: str) -> str:
    """The command with its options of `SMALLER`."""
    return f"{line} {next((more for start, more in SMALLER.items() if line.startswith(start)), '')}"


def invoke(line: str) -> None:
    """Runs a command that is ours in this process, which has paid for the imports."""
    program, *arguments = shlex.split(smaller(line))
    assert program == "l2d"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def execute(line: str) -> None:
    """Runs a command in a shell."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", smaller(line)],
        env=os.environ | {"PATH": path, "PYTHONSAFEPATH": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def run(pages: list[str], command: Callable[[str], None], *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs all snippets of pages in order; returns what their Python has named."""
    known: dict[str, Any] = {}
    for snippet in [snippet for page in pages for snippet in doc_pages.snippets(page)]:
        if snippet.program in ("l2d", "lm_eval") and not snippet.text.startswith(leave_out):
            command(snippet.text)
        elif snippet.language == "python" and not snippet.file:
            exec(snippet.text, known)
    return known


def commands() -> list[Snippet]:
    return [snippet for page in doc_pages.PAGES for snippet in doc_pages.snippets(page) if not snippet.language]


def test_what_the_pages_say_of_l2d(folder):
    known = run(L2D, invoke)
    assert len(known["out"].sequences) == 1
    assert (folder / "folder" / "l2d.json").is_file()
    assert (folder / "tracked.png").stat().st_size > 1000


def test_what_the_pages_say_of_tess(folder):
    run(TESS, invoke, leave_out=LONG)
    assert (folder / "brick.html").stat().st_size > 1000


@pytest.fixture
def mine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tutorial's module, installed."""
    monkeypatch.syspath_prepend(folder)
    module = importlib.import_module("l2d_mine")
    built_in = metadata.entry_points(group=GROUP)
    with installed(*built_in, FakeEntryPoint("mine", lambda: module, value="l2d_mine")):
        yield module
    sys.modules.pop("l2d_mine")


def test_what_the_pages_say_of_plugins(mine):
    run(PLUGINS, invoke)


def test_the_plugins_of_the_pages_keep_every_law(mine):
    known = {}
    exec(doc_pages.files(PLUGINS)["test_mine.py"], known)
    readme = run_code("README.md", "class Ralston")
    (mark,) = known["test_conformance"].pytestmark
    for case in mark.args[1]:
        known["test_conformance"](*case.values)
    for check in checks_for(readme["Ralston"]()):
        check(readme["Ralston"]())


def run_code(page: str, part: str) -> dict[str, Any]:
    """What the Python of a page that holds these words has named."""
    known: dict[str, Any] = {}
    (code,) = (snippet.text for snippet in doc_pages.snippets(page) if part in snippet.text)
    exec(code, known)
    return known


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pages", [L2D, TESS], ids=["l2d", "tess"])
def test_what_the_pages_say_of_a_real_model(real_folder, pages):
    run(pages, invoke)


@pytest.mark.slow  # each of its commands opens data sets; the others' tests run them on tiny models
@pytest.mark.real
@pytest.mark.timeout(1800)  # eleven commands, about a minute each
def test_what_the_pages_say_of_evaluation(real_folder):
    (train,) = (snippet.text for snippet in commands() if snippet.text.endswith("training.learning_rate=3e-5"))
    execute(train)
    run(EVALUATION, execute)
    assert (real_folder / "search.json").is_file()
    assert list((real_folder / "diagnosis").glob("*.png"))


def test_every_page_with_commands_of_ours_is_run_or_asks_for_help_only():
    assert {snippet.program for snippet in commands()} <= {"l2d", "lm_eval", *OTHERS}
    ours = {snippet.page for snippet in commands() if snippet.program not in OTHERS}
    # What the last two say is looked at below, and run by the tests of these commands.
    assert ours <= {*L2D, *TESS, *PLUGINS, *EVALUATION, "docs/install.md", "docs/reference/options.md"}
    lines = [snippet.text for snippet in commands()]
    assert [start for start in SMALLER if not any(line.startswith(start) for line in lines)] == []


def requests() -> list[list[str]]:
    """Arguments of l2d in all commands, also where another program launches it."""
    found = []
    for snippet in commands():
        _, is_launched, arguments = snippet.text.partition("-m l2d_framework.cli ")
        if is_launched:
            found.append(shlex.split(arguments))
        elif snippet.program == "l2d":
            found.append(shlex.split(snippet.text)[1:])
    return found


def test_every_command_has_a_name_and_options_that_there_are(folder):
    for arguments in requests():
        parse(arguments)


def parse(words: list[str]) -> None:
    """What the command line does before a command runs; what is wrong is an exception."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("l2d", list(words), resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        if name == "eval":  # whose options are lm_eval's
            return
        if not hasattr(command, "resolve_command"):
            command.make_context(name, list(words))


def test_every_run_file_passes_its_check_and_knows_what_commands_replace(mine, folder):
    for name in doc_pages.files(doc_pages.PAGES):
        if name.endswith(".yaml"):
            invoke(f"l2d config check {name}")
    for arguments in requests():
        for file in arguments:
            if file.endswith(".yaml") and (folder / file).is_file():
                load_run(file, [word for word in arguments if re.match(r"[\w.]+=", word)])
