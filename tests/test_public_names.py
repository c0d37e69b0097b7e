"""What third parties may rely on is what the package names, and it is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import l2d_framework


@pytest.mark.parametrize("name", l2d_framework.__all__)
def test_every_public_name_is_there(name):
    assert getattr(l2d_framework, name) is not None


def test_type_checkers_know_every_public_name():
    source = Path(l2d_framework.__file__).read_text(encoding="utf-8")
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(l2d_framework.__all__) - {"__version__"} <= imported


def test_the_package_imports_without_torch():
    code = "import sys, l2d_framework; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
