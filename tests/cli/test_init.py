import io
import json

import pytest
import yaml
from tiny_runs import write_base

from l2d_framework.config import load_run
from l2d_framework.training.arguments import total_steps

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(4) for b in range(3)]
DATA = {
    "prompt_completion": [{"prompt": prompt, "completion": answer} for prompt, answer in SUMS],
    "other_names": [{"Question": prompt, "answer": answer, "id": 1} for prompt, answer in SUMS],
    "conversations": [
        {"conversations": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in SUMS
    ],
    "long_texts": [{"text": "12+3=15 " * 40}] * 3,
    "many": [{"text": "1+2=3"}] * 300,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model without chat template."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def answers(base, tmp_path, monkeypatch):
    """In an empty folder with data, an answer to each question, in their order."""
    monkeypatch.chdir(tmp_path)
    for name, rows in DATA.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "--base": base,
        "--data": "prompt_completion.jsonl",
        "--method": "l2d",
        "--budget": "3 epochs",
        "--output-dir": "null",
    }


def options(answers):
    return [text for pair in answers.items() for text in pair]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("method", ["l2d", "tess"])
def test_the_run_file_passes_the_check_and_every_option_has_its_answer(l2d, answers, tmp_path, data, method):
    code, out, err = l2d("init", "mine.yaml", *options(answers | {"--data": f"{data}.jsonl", "--method": method}))
    assert code == 0, err
    assert "Next: l2d train mine.yaml" in out
    code, _, err = l2d("config", "check", "mine.yaml")
    assert code == 0, err
    (run,) = load_run(tmp_path / "mine.yaml")
    assert (run.model.base, run.output_dir) == (str(answers["--base"]), "null")
    assert run.training.epochs == 3
    assert run.backbone.component_name() == {"l2d": "two_stream", "tess": "in_place"}[method]
    assert run.training.learning_rate == {"l2d": 1e-4, "tess": 1e-5}[method]
    assert "#" in (tmp_path / "mine.yaml").read_text()


def test_columns_by_other_names_and_a_missing_chat_template_are_found_out(l2d, answers, tmp_path):
    found = {}
    for data in ("other_names", "conversations"):
        assert l2d("init", f"{data}.yaml", *options(answers | {"--data": f"{data}.jsonl"}))[0] == 0
        found[data] = yaml.safe_load((tmp_path / f"{data}.yaml").read_text())["data"]
    assert found["other_names"]["train"][0]["columns"] == {"prompt": "Question", "completion": "answer"}
    assert found["conversations"]["train"][0]["columns"] == {"messages": "conversations"}
    assert found["conversations"]["chat_template"] == "tulu"


def test_lengths_decide_what_is_cut_and_joined_and_rows_what_is_held_out(l2d, answers, tmp_path):
    for data in ("long_texts", "many"):
        code, out, _ = l2d("init", f"{data}.yaml", *options(answers | {"--data": f"{data}.jsonl"}))
        assert code == 0
    long, many = (load_run(tmp_path / f"{data}.yaml")[0] for data in ("long_texts", "many"))
    assert long.data.pack and not many.data.pack
    assert many.data.max_length == 64
    assert (long.data.eval_fraction, many.data.eval_fraction) == (0.0, 0.05)
    assert "Of the first 200 plain texts" in out


@pytest.mark.parametrize(
    ("data", "budget", "save", "log", "few"),
    [
        ("prompt_completion", "3 epochs", 1, 1, "makes 5 updates"),  # 12 rows, 8 at a time
        ("prompt_completion", "40 epochs", 6, 3, None),
        ("prompt_completion", "5 updates", 1, 1, None),
        ("prompt_completion", "100000 updates", 100, 10, None),
        ("many", "1 epoch", 100, 10, None),  # of which only the first rows are looked at
    ],
)
def test_a_run_saves_in_every_tenth_of_it_logs_twenty_times_and_is_not_too_short_unsaid(
    l2d, answers, tmp_path, data, budget, save, log, few
):
    code, _, err = l2d("init", "mine.yaml", *options(answers | {"--data": f"{data}.jsonl", "--budget": budget}))
    assert code == 0, err
    (run,) = load_run(tmp_path / "mine.yaml")
    assert (run.training.save_steps, run.training.logging_steps) == (save, log)
    assert ("updates" in err) == (few is not None)
    if few:
        assert few in err
        assert few == f"makes {total_steps(run.training, DATA[data])} updates"


def test_what_is_not_given_is_asked(l2d, answers, tmp_path, monkeypatch):
    # The folder for the model is named after the base, however that is written.
    (answers["--base"] / "inner").mkdir()
    typed = [f"{answers['--base']}/inner/..", "many.jsonl", "tess", "7 updates", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    code, _, err = l2d("init")
    assert code == 0, err
    assert err.count(":") == 5
    (run,) = load_run(tmp_path / "run.yaml")
    assert run.training.max_steps == 7
    assert run.output_dir == "base-tess"
    assert run.model.base == str(answers["--base"].resolve()), "dots are another folder elsewhere"


def test_an_answer_is_checked_when_it_is_given_and_asked_for_again(l2d, answers, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    wrong_and_right = {
        "--base": ["./nowhere", str(answers["--base"])],
        "--data": ["nowhere.jsonl", "many.jsonl"],
        "--method": ["l2dd", "l2d"],
        "--budget": ["a lot", "3 epochs"],
        "--output-dir": ["taken", "mine"],
    }
    typed = [line for pair in wrong_and_right.values() for line in pair]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    code, _, err = l2d("init")
    assert code == 0, err
    (run,) = load_run(tmp_path / "run.yaml")
    assert (run.training.epochs, run.output_dir) == (3, "mine")
    reasons = ["./nowhere", "nowhere.jsonl", "did you mean 'l2d'", "got 'a lot'", "'taken' exists and is not empty"]
    places = [err.index(reason) for reason in reasons]
    assert places == sorted(places)
    assert "--" not in err, "nobody typed an option"
    assert err.count("Method (") == err.count("Budget (") == err.count("New folder for the model") == 2


def test_an_option_that_is_wrong_is_refused_before_anything_is_asked(l2d, answers, monkeypatch):
    monkeypatch.setattr("typer.prompt", lambda *_, **__: pytest.fail("asked"))
    for option, value in (("--method", "l2dd"), ("--budget", "a lot"), ("--output-dir", ".")):
        code, _, err = l2d("init", option, value)
        assert code == 2
        assert f"{option}: " in err


def test_without_an_answer_the_option_is_named(l2d, answers, tmp_path, monkeypatch):
    del answers["--budget"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = l2d("init", *options(answers))
    assert code == 2
    assert "--budget is missing" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--budget": "a lot"}, "'3 epochs' or '1000 updates', got 'a lot'"),
        ({"--budget": "0 epochs"}, "got '0 epochs'"),
        ({"--budget": "1.5 updates"}, "Updates are whole, got '1.5 updates'"),
        ({"--method": "l2dd"}, "did you mean 'l2d'"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--base": "./nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_answer_is_named_and_nothing_written(l2d, answers, tmp_path, wrong, message):
    code, _, err = l2d("init", *options(answers | wrong))
    assert code == 2
    assert message in err
    assert not (tmp_path / "run.yaml").exists()


def test_a_run_file_is_never_overwritten(l2d, answers, tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    code, _, err = l2d("init", *options(answers))
    assert code == 2
    assert "exists" in err
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_data_without_known_columns_say_what_they_have(l2d, answers, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"left": "a", "right": "b"}\n')
    code, _, err = l2d("init", *options(answers | {"--data": "odd.jsonl"}))
    assert code == 2
    assert "['left', 'right']" in err
