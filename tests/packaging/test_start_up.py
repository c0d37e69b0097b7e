"""Importing the package and asking the command line for help costs no torch and no plugin."""

import resource
import statistics
import subprocess
import sys

import pytest

COMMANDS = {
    "import": "import l2d_framework",
    "help": "import sys; sys.argv = ['l2d', '--help']; from l2d_framework.cli import main; main()",
    "version": "import sys; sys.argv = ['l2d', '--version']; from l2d_framework.cli import main; main()",
}

REPORT = """
import atexit, sys
def report():
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "l2d_plugins"} & sys.modules.keys()
    print("HEAVY", sorted(heavy), file=sys.stderr)
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
    assert "HEAVY ['torch']" in result.stderr


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
