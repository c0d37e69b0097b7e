"""Environments made by tests: they see the running environment's packages, so that torch is never installed twice."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


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

    def l2d(self, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the command line of the project, on a wide terminal."""
        program = "import sys; from l2d_framework.cli import main; sys.argv[0] = 'l2d'; main()"
        return self.run("-c", program, *arguments, COLUMNS="300", **environ)


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
