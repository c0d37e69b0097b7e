"""`l2d eval-text`: files in, table, numbers, report and picture out; mistakes before weights."""

import json
import re
import sys

import pytest
import transformers
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.errors import ConfigError, DataError, install
from l2d_framework.evaluation.statistics import Estimate
from l2d_framework.evaluation.text import mauve_score
from l2d_framework.evaluation.text.samples import Columns, Sample, read_samples


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def answers(tmp_path):
    rows = [
        {"prompt": "The sky", "answers": [{"text": " is blue", "tokens": 8}, {"text": " is red\u2028or grey"}]},
        {"prompt": [{"role": "user", "content": "Hello"}], "answers": [{"text": "Good day"}]},
    ]
    return write(tmp_path / "answers.jsonl", rows)


@pytest.fixture
def columns(tmp_path):
    return write(
        tmp_path / "columns.jsonl", [{"prefix": "p", "text": f"text {i}", "gold": f"word {i}"} for i in range(12)]
    )


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval-text", *map(str, arguments)], catch_exceptions=False)


def test_answers_of_generate_are_one_sample_each(answers):
    assert read_samples(answers, Columns(), golds=["g", "h"]) == [
        Sample("The sky", " is blue", "g"),
        Sample("The sky", " is red\u2028or grey", "g"),
        Sample("Hello\n", "Good day", "h"),
    ]


def test_columns_may_have_other_names(tmp_path):
    file = write(tmp_path / "other.jsonl", [{"question": "q", "output": "o", "human": "h"}])
    assert read_samples(file, Columns("question", "output", "human")) == [Sample("q", "o", "h")]


def test_files_are_compared_in_table_numbers_report_and_picture(answers, columns, saved_tiny_lm, tmp_path):
    pytest.importorskip("mauve", reason="the extra text-metrics is not installed")
    model, output = saved_tiny_lm("gpt2"), tmp_path / "deep" / "out"
    golds = write(tmp_path / "golds.jsonl", [{"gold": "one"}, {"gold": "two"}])
    common = ("--perplexity-model", model, "--tokenizer", model, "--max-length", 9)
    result = run(columns, *common, "--mauve-model", model, "--out", output)
    assert result.exit_code == 0, result.output
    written = json.loads((output / "eval_text.json").read_text())
    metrics = written["results"]["columns"]["metrics"]
    assert list(metrics) == list(written["definitions"])
    assert written["results"]["columns"]["settings"]["mauve"]["features"] == str(model)
    assert not (output / "eval_text.png").exists()
    for variant in metrics["perplexity"].values():
        assert str(Estimate(**variant)) in result.stdout

    pytest.importorskip("matplotlib")
    both = tmp_path / "both"
    result = run(answers, columns, *common, "--out", both)
    assert result.exit_code == 0, result.output
    report = (both / "eval_text.md").read_text()
    assert "| metric | definition | answers | columns |" in report
    assert "answers, perplexity (authors): 3 texts were cut to 9 tokens." in report
    assert "![metrics of the files](eval_text.png)" in report
    assert (both / "eval_text.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((both / "eval_text.json").read_text())["results"]["columns"]["metrics"]["perplexity"]
        == (metrics["perplexity"])
    )

    result = run(answers, "--mauve-model", model, "--gold", golds)
    assert "mauve" in result.stdout


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"prefix": "p", "txt": "t"}], "did you mean 'txt'"),
        ([{"text": "t"}], "no column 'prefix'"),
        ([{"prefix": "p", "text": 3}], "of type int"),
        ([{"prefix": "p", "text": " "}], "all 1 are empty"),
        (["row"], "not a JSON object"),
        ([{"prompt": "p", "answers": [{"tokens": 3}]}], "without `text`"),
        ([{"prompt": "p", "answers": []}], "no text"),
        ([{"prompt": [3], "answers": [{"text": "t"}]}], "neither text nor messages"),
    ],
)
def test_unusable_rows_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        run(write(tmp_path / "rows.jsonl", rows))


def test_mistakes_are_found_before_weights_are_loaded(columns, saved_tiny_lm, tmp_path, monkeypatch):
    pytest.importorskip("mauve", reason="the extra text-metrics is not installed")

    def fail(*args, **options):
        pytest.fail("weights were loaded")

    model = saved_tiny_lm()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    no_gold = write(tmp_path / "no_gold.jsonl", [{"prefix": "p", "text": "t"}] * 3)
    one_gold = write(tmp_path / "one_gold.jsonl", [{"gold": "g"}])
    judged = ("--perplexity-model", model)
    for error, message, arguments in [
        (DataError, "There is no file", (tmp_path / "missing.jsonl", *judged)),
        (DataError, "3 of the 3 samples of 'no_gold'", (no_gold, "--mauve-model", model, *judged)),
        (DataError, "12 rows and the file of golds 1", (columns, "--gold", one_gold, *judged)),
        (ConfigError, "named twice", (columns, columns, *judged)),
        (ConfigError, "no folder", (columns, "--perplexity-model", tmp_path / "missing")),
        (ConfigError, "No tokenizer", (columns, "--tokenizer", tmp_path, *judged)),
        (ConfigError, "--dtype must be", (columns, "--dtype", "int8", *judged)),
        (ConfigError, "cannot be used here", (columns, "--device", "nowhere", *judged)),
        (ConfigError, "is not empty", (columns, "--out", tmp_path, *judged)),
    ]:
        with pytest.raises(error, match=message):
            run(*arguments)


def test_a_missing_library_is_named_with_its_extra(columns, monkeypatch):
    monkeypatch.setattr(mauve_score.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(install("l2d-framework[text-metrics]"))):
        run(columns, "--mauve")


def test_without_models_mauve_is_not_imported(columns, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert run(columns).exit_code == 0
