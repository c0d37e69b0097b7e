"""Questions of several small steps: right answers, as many steps as they say, and none twice."""

import json
import random
from itertools import permutations, product

import pytest

from l2d_bench.data.puzzles import Carries, Sudoku, rounds

SMALL = {"base_rows": 60, "new_questions": 60, "answers": 20}


def questions(folder, name):
    """Prompts without " =", answers."""
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, sign, answer = (row.get("text") or row["prompt"] + row["completion"]).partition(" =")
        assert sign
        yield prompt, int(answer)


@pytest.mark.parametrize("kind", [Carries, Sudoku])
def test_files_hold_questions_of_their_steps_and_none_twice(tmp_path, kind):
    (maker := kind(**SMALL)).make(tmp_path)
    number = {"carries": columns, "sudoku": needed}[maker.kind]
    steps = range(1, maker.most + 1)
    assert {number(prompt) for prompt, _ in questions(tmp_path, "base")} == {1}
    assert {number(prompt) for prompt, _ in questions(tmp_path, "new")} == set(steps)
    for n in steps:
        assert {number(prompt) for prompt, _ in questions(tmp_path, f"held_out_{n}")} == {n}
    asked = [prompt for file in tmp_path.iterdir() for prompt, _ in questions(tmp_path, file.stem)]
    assert len(set(asked)) == len(asked) == 60 + 60 + 20 * maker.most


def columns(prompt):
    sums = [int(a) + int(b) for a, b in (column.split() for column in prompt.split(","))]
    return next(place for place, total in enumerate(sums[1:], 1) if total != 9)


def test_an_answer_is_the_first_digit_of_the_sum():
    source = random.Random(0)
    carried = 0
    for n in range(400):
        prompt, answer = Carries().question(source, 1 + n % 4)
        upper, lower = ("".join(digits) for digits in zip(*(c.split() for c in prompt.split(",")), strict=True))
        assert answer == (int(upper) + int(lower)) // 10**4
        carried += answer > int(upper[0]) + int(lower[0])
    assert 150 < carried < 250


def needed(prompt):
    cells = prompt.replace("/", "").split()
    return rounds({n: int(sign) for n, sign in enumerate(cells) if sign.isdigit()})[cells.index("?")]


def test_an_answer_is_the_digit_of_the_only_grid_there_is():
    rows = list(permutations((1, 2, 3, 4)))
    houses = [[4 * r + c for r in range(4)] for c in range(4)]
    houses += [[r + c for r in (top, top + 4) for c in (left, left + 1)] for top in (0, 8) for left in (0, 2)]
    grids = [sum(four, ()) for four in product(rows, repeat=4)]
    grids = [grid for grid in grids if all(len({grid[cell] for cell in house}) == 4 for house in houses)]
    assert len(grids) == 288
    source = random.Random(0)
    for n in range(60):
        prompt, answer = Sudoku().question(source, 1 + n % 3)
        cells = prompt.replace("/", "").split()
        left = [g for g in grids if all(not s.isdigit() or int(s) == d for s, d in zip(cells, g, strict=True))]
        assert {grid[cells.index("?")] for grid in left} == {answer}


def test_a_cell_of_a_later_round_has_several_digits_in_the_first():
    given = {0: 1, 1: 2, 2: 3}
    assert rounds(given) == {3: 1}  # its row leaves 4
    assert rounds(given | {7: 1}) == {3: 1, 6: 2}  # whose square has 3, 4 and 1 after that
