"""Questions of several look-ups: right answers, and no map that is asked about was trained on."""

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


def the_map(text):
    return {int(a): int(b) for a, b in re.findall(r", (\d) (\d)", text)}


@pytest.mark.parametrize("name", ["new", *(f"held_out_{number}" for number in range(1, 5))])
def test_an_answer_is_where_so_many_hops_lead(folder, name):
    asked = set()
    for row in rows(folder, name):
        to = the_map(row["prompt"])
        hops, start = map(int, re.search(r"; (\d) from (\d) =$", row["prompt"]).groups())
        asked.add(hops)
        here = start
        for _ in range(hops):
            here = to[here]
        assert row["completion"] == f" {here}"
        assert here != start
    assert asked == ({1, 2, 3, 4} if name == "new" else {int(name[-1])})


def test_the_base_sees_single_hops_only_and_no_map_comes_twice(folder):
    maps = []
    for row in rows(folder, "base"):
        to = the_map(row["text"])
        hops = re.findall(r"(\d) from (\d) = (\d) ;", row["text"])
        assert len(hops) == 8
        assert all(count == "1" and to[int(start)] == int(end) for count, start, end in hops)
        maps.append(row["text"].partition(";")[0])
    for name in ("new", *(f"held_out_{number}" for number in range(1, 5))):
        maps += [row["prompt"].partition(";")[0] for row in rows(folder, name)]
    assert len(set(maps)) == len(maps)


def test_every_run_of_the_profile_is_one(tmp_path):
    assert len(Bench(["own/steps"], "steps", tmp_path).jobs) > 20
