"""Tables and files that hold them."""

import io
import os

import pytest
from rich.console import Console

from l2d_framework.evaluation.tables import markdown, terminal
from l2d_framework.writing import write_whole

ROWS = [("name", "[b]value[/]"), ("a|b", "1"), ("[red]", "2")]


def test_a_table_holds_the_same_cells_in_markdown_and_on_a_terminal():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(ROWS)]
    assert lines == [["name", "[b]value[/]"], ["---", "---"], ["a/b", "1"], ["[red]", "2"]]
    shown = io.StringIO()
    Console(file=shown, width=80).print(terminal(ROWS, "[b]title[/]"))
    assert all(text in shown.getvalue() for text in ("[b]title[/]", "[b]value[/]", "a|b", "[red]"))


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_whole(path, "before ±\n")

    def fail(*names: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_whole(path, b"after")
    assert path.read_bytes() == "before ±\n".encode()
