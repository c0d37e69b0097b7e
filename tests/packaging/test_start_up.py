"""What commands import: asking for help costs no torch and no plugin, others only what they need."""

import json
import resource
import statistics
import subprocess
import sys
from ast import literal_eval

import pytest
from diffusion_models import SPACE
from tiny_models import tiny_lm, tiny_tokenizer

from l2d_framework.config import parse_run
from l2d_framework.models.checkpoint import build_model, save


def command(*arguments: object) -> str:
    """A program that does what `l2d` does."""
    return f"import sys; sys.argv = {['l2d', *map(str, arguments)]}; from l2d_framework.cli import main; main()"


COMMANDS = {"import": "import l2d_framework", "help": command("--help"), "version": command("--version")}

HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "huggingface_hub", "l2d_plugins"}
TRAINING = {
    "datasets",
    "pandas",
    "sklearn",
    "tensorboard",
    "trl",
    "matplotlib",
    "lm_eval",
    "l2d_framework.training",
    "transformers.trainer",
    "transformers.trainer_utils",
    "transformers.integrations.integration_utils",
}
"""What training, evaluation and pictures need."""
MODELS = {"transformers.modeling_utils", "transformers.quantizers", "scipy", "torchao", "torch._inductor"}
"""What comes with the first model of transformers."""

REPORT = f"""
import atexit, sys
def report():
    print("HEAVY", sorted({HEAVY | TRAINING | MODELS} & sys.modules.keys()), file=sys.stderr)
atexit.register(report)
"""


def run(program: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Result of a program and the processor seconds it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", COMMANDS)
def test_no_torch_and_no_plugin_is_imported(name):
    result, _ = run(REPORT + COMMANDS[name])
    assert result.returncode == 0, result.stderr
    assert "HEAVY []" in result.stderr


def test_the_report_sees_torch():
    result, _ = run(REPORT + "import torch")
    assert "torch" in heavy(result)


def heavy(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Heavy modules that a program with `REPORT` imported."""
    assert result.returncode == 0, result.stderr
    return set(literal_eval(result.stderr.partition("HEAVY ")[2].splitlines()[0]))


def test_listing_plugins_imports_no_model_of_transformers(monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")
    result, _ = run(REPORT + command("plugins"))
    assert heavy(result) == {"torch", "transformers", "numpy", "huggingface_hub", "l2d_plugins"}


@pytest.fixture(scope="module")
def fully_trained(tmp_path_factory):
    """A checkpoint without an adapter, and a run file for one, which needs no more to be checked."""
    folder = tmp_path_factory.mktemp("start_up")
    tiny_lm().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    sections = {
        "model": {"base": str(folder / "base")},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "in_place"},
        "block_size": None,
    }
    save(build_model(parse_run(sections)), folder / "model")
    (folder / "run.json").write_text(json.dumps(sections))
    return folder


def test_without_adapter_training_or_data_nothing_is_imported_for_them(fully_trained, monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")
    monkeypatch.chdir(fully_trained)
    check = command("config", "check", "run.json")
    generate = command("generate", "model", "--prompt", "Hello", "--max-new-tokens", "2", "--num-inference-steps", "3")
    result, _ = run(f"{REPORT}\ntry:\n    {check}\nexcept SystemExit as end:\n    assert not end.code\n{generate}")
    found = heavy(result)
    assert "transformers.modeling_utils" in found
    theirs = heavy(run(REPORT + "import transformers.generation.utils")[0])  # old releases need scikit-learn there
    assert not (found - theirs) & {"peft", *TRAINING}


@pytest.mark.parametrize("name", COMMANDS)
def test_half_a_second_is_enough(name):
    bare, cost = (statistics.median(run(program)[1] for _ in range(3)) for program in ("pass", COMMANDS[name]))
    assert cost - bare < 0.5


def test_help_names_the_commands_and_version_the_version():
    result, _ = run(COMMANDS["help"])
    for command in ("train", "generate", "convert", "config", "plugins", "params", "demo"):
        assert command in result.stdout
    result, _ = run(COMMANDS["version"])
    assert "0.1.0" in result.stdout
