"""Questions of several look-ups: right answers, and no chains that are asked about were trained on."""

import json
import re

import pytest

from l2d_bench.bench import Bench
from l2d_bench.data.hops import HopQuestions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hops")
    HopQuestions(base_rows=50, new_questions=40, answers=10).make(made)
    return made


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def hops_of(text):
    return dict(re.findall(r", ([a-z]) ([a-z])", text))


@pytest.mark.parametrize("name", ["new", *(f"held_out_{number}" for number in range(1, 5))])
def test_an_answer_is_the_end_that_so_many_hops_lead_to(folder, name):
    asked = set()
    for row in rows(folder, name):
        to = hops_of(row["prompt"])
        assert len(to) == 15 and sum(a == b for a, b in to.items()) == 3
        here = re.fullmatch(r".* ; 4 from ([a-z]) =", row["prompt"])[1]
        hops = 0
        while to[here] != here:
            here, hops = to[here], hops + 1
        assert row["completion"] == f" {here}"
        asked.add(hops)
    assert asked == ({1, 2, 3, 4} if name == "new" else {int(name[-1])})


def test_the_base_sees_single_hops_only_and_no_chains_come_twice(folder):
    maps = []
    for row in rows(folder, "base"):
        to = hops_of(row["text"])
        hops = re.findall(r"(\d) from ([a-z]) = ([a-z]) ;", row["text"])
        assert len(hops) == 8
        assert all(count == "1" and to[start] == end for count, start, end in hops)
        maps.append(row["text"].partition(";")[0])
    for name in ("new", *(f"held_out_{number}" for number in range(1, 5))):
        maps += [row["prompt"].partition(";")[0] for row in rows(folder, name)]
    assert len(set(maps)) == len(maps)


@pytest.mark.parametrize(("fields", "message"), [({"chains": 6}, "need 30 of 26"), ({"asked": 16}, "exceeds the 15")])
def test_a_row_needs_enough_letters(fields, message):
    with pytest.raises(ValueError, match=message):
        HopQuestions(**fields)


def test_every_run_of_the_profile_is_one(tmp_path):
    assert len(Bench(["own/steps"], "steps", tmp_path).jobs) > 20
