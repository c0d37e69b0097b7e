import sys

import pytest

from l2d_framework.cli import main


@pytest.fixture
def l2d(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, standard output and standard error."""
    # Help texts are wrapped at the width of the terminal.
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capsys.readouterr()  # what the preparations wrote
        monkeypatch.setattr(sys, "argv", ["l2d", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run
