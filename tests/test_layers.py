"""CONTRIBUTING.md shows the layers that the import contracts enforce."""

import subprocess
import sys


def test_the_picture_of_the_layers_is_that_of_the_contracts(repository):
    command = [sys.executable, repository / ".ci" / "layers.py", "--check"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
