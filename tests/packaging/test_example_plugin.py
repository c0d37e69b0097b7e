"""The example distribution works as its README says: pip install, listed, usable in run files, its own tests pass."""

from pathlib import Path

import pytest

RUN = """
model: {{base: {base}}}
schedule: {{name: linear}}
parametrization: {{name: embedding}}
backbone: {{name: two_stream}}
sampling:
  guidance:
    - {{name: keyword, token_ids: [65], scale: 4.0}}
"""


@pytest.fixture(scope="module")
def example(repository):
    return repository / "plugins" / "examples" / "l2d-guidance-keyword"


@pytest.fixture(scope="module")
def environment(new_environment, example):
    """Environment with the example installed."""
    environment = new_environment()
    environment.install(example)
    return environment


@pytest.fixture
def run_file(saved_tiny_lm, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(base=saved_tiny_lm()))
    return path


def test_it_is_listed(environment):
    (line,) = [line for line in environment.l2d("plugins").stdout.splitlines() if "keyword" in line]
    assert {"guidance", "keyword", "l2d-guidance-keyword", "ok"} <= set(line.split())


def test_run_files_know_it_once_installed(environment, new_environment, run_file):
    accepted = environment.l2d("config", "check", run_file)
    assert accepted.returncode == 0, accepted.stderr
    refused = new_environment().l2d("config", "check", run_file)
    assert refused.returncode == 2
    assert "keyword" in refused.stderr


def test_its_own_tests_pass(environment, example):
    result = environment.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", example / "pyproject.toml", example / "tests"
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
