"""Several processes that answer one file: whatever becomes of them, it is what one would have written."""

import itertools
import random

import pytest
from accelerate import PartialState

from l2d_framework.cli import answer_file
from l2d_framework.cli.answer_file import AnswerFile, part_of
from l2d_framework.errors import ConfigError, L2DError, OutputError

MEET = answer_file._meet
ASKED = [{"prompt": text} for text in ("a", "ü", "a", "b\n", "c")]


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """Processes are objects of this one, all entered before any of them writes."""
    monkeypatch.setattr(answer_file, "_meet", lambda *_: None)


def answer(file, most=None):
    for number in file.missing[:most]:
        file.write(number, [{"text": f"answer {number}", "evaluations_per_token": 7.33}])


def entered(output, processes):
    return [AnswerFile(output, ASKED, place=(n, processes)).__enter__() for n in range(processes)]


def end(file, error=None):
    file.__exit__(error, None, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "a.jsonl"
    with AnswerFile(output, ASKED) as file:
        answer(file)
    return output.read_bytes()


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_last_of_any_number_of_processes_writes_the_file_of_one(tmp_path, capsys, whole, processes):
    for seed in range(4):
        output = tmp_path / f"{seed}.jsonl"
        files = entered(output, processes)
        shares = [file.missing for file in files]
        assert sorted(itertools.chain(*shares)) == list(range(len(ASKED)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        random.Random(seed).shuffle(files)
        for file in files:
            assert not file.missing or not output.exists()
            answer(file)
            end(file)
        assert output.read_bytes() == whole
        assert sum(file.has_all for file in files) == 1
        assert "if one of them fails, the same command goes on" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2)])
def test_any_number_of_processes_goes_on_from_any_other(tmp_path, capsys, whole, before, after):
    output, known = tmp_path / "a[1].jsonl", 0
    for processes in (before, after):
        for file in entered(output, processes):
            known += bool(file.missing)
            answer(file, 1)
            end(file, KeyboardInterrupt)
    capsys.readouterr()
    with AnswerFile(output, ASKED) as file:
        assert len(file.missing) == len(ASKED) - known
        answer(file)
    assert f"{known} of 5 are answered" in capsys.readouterr().err
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_one_process_that_fails_leaves_what_the_others_have_written(tmp_path, capsys, whole):
    output = tmp_path / "a.jsonl"
    first, second = entered(output, 2)
    answer(second, 1)
    end(first, KeyboardInterrupt)  # which has none, and says where those of the other are
    assert f"The answers so far are in {output}.part1. The same command" in capsys.readouterr().err
    end(second, KeyboardInterrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.part1"]
    first, second = entered(output, 2)
    assert [file.missing for file in (first, second)] == [[0, 3], [2, 4]]
    end(second, KeyboardInterrupt)
    answer(first)
    end(first)
    assert not output.exists() and not first.has_all
    files = entered(output, 2)
    assert [file.missing for file in files] == [[2], [4]]
    for file in files:
        answer(file)
        end(file)
    assert output.read_bytes() == whole


def test_two_that_end_at_once_write_one_file_and_another_file_there_is_left_alone(tmp_path, monkeypatch, whole):
    for content in (whole, b"mine"):
        output = tmp_path / f"{len(content)}.jsonl"
        first, second = entered(output, 2)
        for file in (first, second):
            answer(file)
        rename = answer_file._rename

        def late(file, new, content=content, rename=rename):
            new.write_bytes(content)
            rename(file, new)

        with monkeypatch.context() as patched:
            patched.setattr(answer_file, "_rename", late)
            if content == whole:
                end(first)
                assert not first.has_all
            else:
                with pytest.raises(OutputError, match=r"made by somebody else.*in .*\.part', .*\.part1'"):
                    end(first)
        end(second, None if content == whole else KeyboardInterrupt)
        assert output.read_bytes() == content
        assert (tmp_path / f"{output.name}.part").exists() == (content != whole)


def test_machines_that_do_not_see_each_other_s_files_are_told_before_anything_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(PartialState, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda _: None)
    part_of(tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=r"a\.jsonl\.part1' is not seen here. Name an --out that lies where all"):
        MEET(tmp_path / "a.jsonl", 2)
    part_of(tmp_path / "a.jsonl", 1).touch()
    MEET(tmp_path / "a.jsonl", 2)

    def closed(_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(PartialState, "wait_for_everyone", closed)
    with pytest.raises(L2DError, match=r"2 processes did not meet, or one has ended.*closed by peer"):
        MEET(tmp_path / "a.jsonl", 2)


def test_a_part_of_something_else_is_refused_and_kept_whoever_finds_it(tmp_path):
    other = tmp_path / "a.jsonl.part7"
    other.write_text("a download, say")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.part7' holds answers of another generation"):
        AnswerFile(tmp_path / "a.jsonl", ASKED, place=(1, 2)).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    other.rename(tmp_path / "a.jsonl.party")
    with AnswerFile(tmp_path / "a.jsonl", []):
        pass
