"""`l2d config check` reads the first rows of the data as training will, without weights."""

import json
import re

import pytest
from tiny_models import tiny_lm, tiny_tokenizer
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.errors import DataError

PAIRS = [{"prompt": f"{i} plus {i}?", "completion": str(i + i)} for i in range(300)]
LONG = {"prompt": "a very long question " * 9, "completion": "yes"}
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]} for i in range(9)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_lm().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    return tmp_path


def check(rows, *stages, name="a.jsonl", **data):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    run = {
        "kind": "language_model",
        "model": {"base": "base"},
        "data": {"train": [{"path": name}], "max_length": 40, **data},
        "training": {"max_steps": 1},
        "output_dir": "out",
    }
    runs = {"stages": [run, *({**run, **stage} for stage in stages)]} if stages else run
    with open("run.json", "w", encoding="utf-8") as file:
        json.dump(runs, file)
    found = CliRunner().invoke(app, ["config", "check", "run.json"])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0
    return found


def test_good_rows_pass_in_silence(folder):
    assert check(PAIRS).stderr == ""
    assert check(CHATS, chat_template="tulu").stderr == ""


def test_conversations_without_a_template_are_refused_with_the_shipped_ones_named(folder):
    with pytest.raises(DataError, match=r"no chat template. Set data.chat_template .*\(tess2_reward, tulu\)"):
        check(CHATS)


def test_a_conversation_that_the_template_refuses_is_named_by_row(folder):
    bad = {"messages": [{"role": "user", "content": None}, CHATS[0]["messages"][1]]}
    with pytest.raises(DataError, match=r"Example 9 of 'a.jsonl'.*turn 0 of role 'user' has the content None"):
        check([*CHATS, bad], chat_template="tulu", streaming=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_examples_cut_to_nothing_are_counted_among_the_first_rows_and_refused_above_the_share(folder, streaming):
    rows = [LONG if i % 20 == 7 else row for i, row in enumerate(PAIRS)]
    assert "left out 10 of 200 examples" in check(rows, streaming=streaming).stderr
    rows[0] = LONG
    why = r"Example 0 of 'a.jsonl'.*beyond max_length = 40.*one of 11 in 200"
    if streaming:
        with pytest.raises(DataError, match=why):
            check(rows, streaming=True)
    else:
        said = check(rows).stderr.replace("\n", " ")
        assert re.search(why + ".*Training stops if the rows after the first 200", said)
        with pytest.raises(DataError, match=why):
            check(rows[:200])
    assert "left out 11 of 200" in check(rows, streaming=streaming, drop_unsupervised=0.06).stderr


def test_a_stage_that_goes_on_from_another_is_checked_with_the_first_tokenizer(folder):
    later = {
        "model": {"base": "out"},
        "output_dir": "later",
        "data": {"train": [{"path": "b.jsonl"}], "max_length": 40},
    }
    check(PAIRS, later | {"data": {"train": [{"path": "a.jsonl"}], "max_length": 40}})
    with open("b.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps(LONG) + "\n")
    with pytest.raises(DataError, match=r"Example 0 of 'b.jsonl'.*one of 1 in 1"):
        check(PAIRS, later)


def test_a_source_that_cannot_be_reached_is_said_to_be_unchecked(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "'someone/set' (split 'train') cannot be reached now" in check(PAIRS, train=[{"path": "someone/set"}]).stderr
