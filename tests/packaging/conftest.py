"""Environments made by tests: they see the running environment's packages, so that torch is never installed twice."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Every command in a process of its own, forked from one that has paid for the imports.
FORKS = """
import json, os, sys, torch, transformers
from l2d_framework.cli import main

for environ, arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(environ)
        sys.argv = ["l2d", *arguments]
        sys.exit(main())
    if os.wait()[1]:
        sys.exit(f"{arguments} failed")
    print("\f", end="", flush=True)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment on top of the running one."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *sources: Path) -> None:
        """Install local distributions, without dependencies, without the network."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index"]
        result = subprocess.run([*pip, "--no-build-isolation", *sources], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    def run(self, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's python in its own folder, so that nothing is imported from the working tree."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def l2d(self, *commands: tuple[dict[str, str], list[str]]) -> list[str]:
        """What commands of the project print on a wide terminal, each under its variables of the environment."""
        result = self.run("-W", "ignore::DeprecationWarning", "-c", FORKS, json.dumps(commands), COLUMNS="300")
        assert result.returncode == 0, result.stderr
        return result.stdout.split("\f")[: len(commands)]


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Environment]:
    """`new_environment()`: a fresh environment to install plugins into."""

    def create() -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False, symlinks=True)
        inner = sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)})
        outer = sysconfig.get_path("purelib")
        # addsitedir, because an editable install of the project is itself a .pth file in the outer folder.
        Path(inner, "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
        return Environment(folder)

    return create


@pytest.fixture(scope="session")
def make_plugin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`make_plugin(name, source)`: folder of a distribution, version 1.2.3, whose one module is a plugin."""

    def make(name: str, source: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        module = name.replace("-", "_")
        (folder / f"{module}.py").write_text(source)
        (folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "{name}"\nversion = "1.2.3"\n'
            f'[project.entry-points.l2d_framework]\n{module} = "{module}"\n'
            f'[tool.hatch.build.targets.wheel]\nonly-include = ["{module}.py"]\n'
        )
        return folder

    return make
