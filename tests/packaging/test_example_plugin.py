"""The example distribution works as its README says: pip install, listed, usable in run files, its own tests pass."""

import json

import pytest
import tiny_runs

from l2d_framework.config import load_run, parse_run
from l2d_framework.errors import ConfigError
from l2d_framework.models.checkpoint import build_model, save

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


def test_it_is_listed_known_to_run_files_and_steers_what_the_command_line_generates(
    environment, tiny_tokenizer, tmp_path
):
    base, run_file = tiny_runs.write_base(tmp_path / "base"), tmp_path / "run.yaml"
    run_file.write_text(RUN.format(base=base))
    with pytest.raises(ConfigError, match="Unknown guidance 'keyword'"):
        load_run(run_file)
    fields = tiny_runs.diffusion_run(base, tmp_path / "unused", tmp_path / "unused")
    save(build_model(parse_run({**fields, "data": None})), tmp_path / "model")
    letter = tiny_tokenizer().convert_tokens_to_ids("A")
    guidance = json.dumps([{"name": "keyword", "token_ids": [letter], "scale": 1e4}])
    sampling = ["--set", f"guidance={guidance}", "--num-inference-steps", "3", "--max-new-tokens", "4"]
    table, _, answer = environment.l2d(
        ({}, ["plugins"]),
        ({}, ["config", "check", str(run_file)]),
        ({}, ["generate", str(tmp_path / "model"), "--prompt", "3+4=", *sampling]),
    )
    (line,) = [line for line in table.splitlines() if "keyword" in line]
    assert {"guidance", "keyword", "l2d-guidance-keyword", "ok"} <= set(line.split())
    assert "AAAA" in answer


def test_its_own_tests_pass(environment, example):
    result = environment.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", example / "pyproject.toml", example / "tests"
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
