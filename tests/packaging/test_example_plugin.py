"""The example distributions work as their READMEs say: installed, listed, used in run files, their own tests pass."""

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
  solver: {{name: dpmpp_2m}}
  num_inference_steps: 4
  guidance:
    - {{name: keyword, token_ids: [65], scale: 4.0}}
"""


@pytest.fixture(scope="module")
def examples(repository):
    return sorted((repository / "plugins" / "examples").glob("l2d-*"))


@pytest.fixture(scope="module")
def environment(new_environment, examples):
    """Environment with the examples installed."""
    environment = new_environment()
    environment.install(*examples)
    return environment


def test_they_are_listed_known_to_run_files_and_decide_what_the_command_line_generates(
    environment, tiny_tokenizer, tmp_path
):
    base, run_file = tiny_runs.write_base(tmp_path / "base"), tmp_path / "run.yaml"
    run_file.write_text(RUN.format(base=base))
    with pytest.raises(ConfigError, match="Unknown solver 'dpmpp_2m'"):
        load_run(run_file)
    fields = tiny_runs.diffusion_run(base, tmp_path / "unused", tmp_path / "unused")
    save(build_model(parse_run({**fields, "data": None})), tmp_path / "model")
    letter = tiny_tokenizer().convert_tokens_to_ids("A")
    guidance = json.dumps([{"name": "keyword", "token_ids": [letter], "scale": 1e4}])
    sampling = ["--set", f"guidance={guidance}", "--num-inference-steps", "4", "--max-new-tokens", "4"]
    table, _, answer = environment.l2d(
        ({}, ["plugins"]),
        ({}, ["config", "check", str(run_file)]),
        ({}, ["generate", str(tmp_path / "model"), "--prompt", "3+4=", "--solver", "dpmpp_2m", *sampling]),
    )
    lines = [set(line.split()) for line in table.splitlines()]
    assert any({"guidance", "keyword", "l2d-guidance-keyword", "ok"} <= line for line in lines)
    for name in ("dpmpp_2m", "ab2"):
        assert any({"solver", name, "l2d-solver-multistep", "ok"} <= line for line in lines)
    assert "AAAA" in answer


def test_their_own_tests_pass(environment, examples):
    folders = [example / "tests" for example in examples]
    assert len(folders) == 2
    result = environment.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", examples[0] / "pyproject.toml", *folders
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
