"""The commands of README.md, as they are written there, in an empty folder; further options only cut their size.

Their models are the real one's first layers: `test_pretrained.py` asks the whole one.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from l2d_framework.cli import app

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # as for whoever types the commands
]

STANDS_FOR = ("Qwen/Qwen2.5-1.5B-Instruct", "mistralai/Mistral-7B-v0.1", "gpt2")
"""Hub ids of README's run files; here folders with the first layers of the real model."""

SMALLER = {
    "l2d train my_run.yaml": "training.batch_size=4 training.max_steps=2",
    "l2d train tess.yaml": "stages.0.training.max_steps=1 stages.0.training.batch_size=2"
    " stages.0.training.warmup_steps=0 stages.0.data.max_length=64"
    " stages.1.training.epochs=1 stages.1.training.batch_size=2 stages.1.data.max_length=64",
    "l2d train-reward": "training.max_steps=1 training.batch_size=2 training.micro_batch_size=2",
    "l2d generate my_model": "--max-new-tokens 8",
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


def sections() -> dict[str, str]:
    """Text of README by heading."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^##+ (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(section: str) -> list[str]:
    """Indented lines that call this package, without their comments."""
    found = re.findall(r"^    ((?:l2d|lm_eval|L2D_\w+=).*)$", section, flags=re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in found]


def blocks(section: str, language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(shallow_model: Path, datasets_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what README's examples take for granted: models, data, run files."""
    for name in STANDS_FOR:
        (tmp_path / name).mkdir(parents=True)
        for file in shallow_model.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        short = tmp_path / name / "generation_config.json"
        settings = json.loads(short.read_text(encoding="utf-8")) | {"max_new_tokens": 3}
        short.unlink()
        short.write_text(json.dumps(settings), encoding="utf-8")
    for data in datasets_dir.glob("*/*/"):
        link = tmp_path / data.relative_to(datasets_dir)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(data)
    write_lines(tmp_path / "my_chats.jsonl", ROWS)
    write_lines(tmp_path / "held_out.jsonl", ROWS[:2])
    write_lines(tmp_path / "allenai/tulu-v2-sft-mixture/train.jsonl", ROWS[:2])
    write_lines(tmp_path / "my_corpus/part.jsonl", [{"text": TEXT}] * 3)
    pairs = [{"chosen": f"The answer is {i}.", "rejected": f"No idea about {i}."} for i in range(200)]
    write_lines(tmp_path / "my_pairs.jsonl", pairs)
    for section in sections().values():
        for text in blocks(section, "yaml"):
            (tmp_path / re.match(r"# (\S+\.yaml)\n", text)[1]).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def smaller(line: str) -> str:
    """The command with its options of `SMALLER`."""
    return f"{line} {next((more for start, more in SMALLER.items() if line.startswith(start)), '')}"


def invoke(line: str) -> None:
    """Runs a command of README that is ours in this process, which has paid for the imports."""
    program, *arguments = shlex.split(smaller(line))
    assert program == "l2d"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def execute(line: str) -> None:
    """Runs a command of README in a shell."""
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


def test_what_readme_says_of_l2d(folder):
    text = sections()
    first, *others = commands(text["Finetune your own model"])
    execute(first)
    for line in others:
        invoke(line)
    invoke(
        "l2d train my_run.yaml training.batch_size=4 training.max_steps=1 output_dir=my_guided_model "
        "'classes=[math, coding]' backbone.num_classes=2 data.train.0.class_column=topic "
        "'sampling.guidance=[{name: classifier_free}]'"
    )
    (code,) = (code for code in blocks(text["Generate"], "python"))
    known: dict[str, Any] = {}
    for part in code.split("\n\n"):
        if "tess" not in part:
            exec(part, known)
    assert len(known["out"].sequences) == len(known["prompts"])
    assert (folder / "folder" / "l2d.json").is_file()


@pytest.mark.timeout(1800)  # eleven commands, about a minute each
@pytest.mark.slow  # each of its commands opens data sets; the others' tests run them on tiny models
def test_what_readme_says_of_evaluation(folder):
    text = sections()
    execute(commands(text["Finetune your own model"])[0])
    for line in [*commands(text["Evaluate"]), *commands(text["The papers' tables"])]:
        execute(line)
    assert (folder / "search.json").is_file()
    assert list((folder / "diagnosis").glob("*.png"))


def test_what_readme_says_of_tess(folder):
    text = sections()
    for line in commands(text["The other method: TESS 2"]):
        invoke(line)
    assert (folder / "brick.html").stat().st_size > 1000
    import l2d_framework

    known: dict[str, Any] = {"l2d": l2d_framework, "prompts": ["The capital of France is"]}
    (code,) = blocks(text["Generate"], "python")
    for part in code.split("\n\n"):
        if "tess" in part:
            exec(part, known)


def test_every_command_of_readme_is_run():
    text = sections()
    run = ("Finetune your own model", "The other method: TESS 2", "Evaluate", "The papers' tables")
    assert {name for name, section in text.items() if commands(section)} == set(run)
    assert all(any(line.startswith(start) for name in run for line in commands(text[name])) for start in SMALLER)
