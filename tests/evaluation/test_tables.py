"""Tables and files that hold them."""

import io
import os

import pytest
from rich.console import Console

from l2d_framework.evaluation.tables import markdown, terminal
from l2d_framework.writing import write_whole

ROWS = [("name", "[b]value[/]"), ("a|b", "1"), ("[red]", "2")]
SHORT = [*ROWS, ("only a name",)]


def test_a_table_holds_the_same_cells_in_markdown_and_on_a_terminal():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(ROWS)]
    assert lines == [["name", "[b]value[/]"], ["---", "---"], ["a/b", "1"], ["[red]", "2"]]
    shown = io.StringIO()
    Console(file=shown, width=80).print(terminal(SHORT, "[b]title[/]"))
    assert all(text in shown.getvalue() for text in ("[b]title[/]", "[b]value[/]", "a|b", "[red]", "only a name"))


@pytest.mark.parametrize("width", [24, 40, 80, 160])
def test_no_word_is_cut_however_narrow_a_terminal_is(width):
    rows = [("row", *(f"heading of column {i}" for i in range(7)))]
    rows += [(f"label {j}", *(f"{i}.{j}4567 ± 0.1" for i in range(7))) for j in range(3)]
    shown = io.StringIO()
    Console(file=shown, width=width).print(terminal(rows, "a title"))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert all(words.count(word) == 1 for row in rows[1:] for cell in row[1:] for word in cell.split()[:1])
    assert len([line for line in lines if line.strip() == "a title"]) == 1
    tables = sum("─" in line for line in lines)
    assert (tables == 1) == (width == 160) and words.count("label") == 3 * tables


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_whole(path, "before ±\n")

    def fail(*names: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_whole(path, b"after")
    assert path.read_bytes() == "before ±\n".encode()
