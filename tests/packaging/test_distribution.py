"""What is in the wheel, and that the wheel is what the suite runs against."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import l2d_framework
import l2d_plugins

MOVED = {"l2d_framework/evaluation/harness/start_up/_l2d_lm_eval_hook.py"}
"""To the top of the wheel."""


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=repository,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.skipif(
    os.environ.get("L2D_EXPECT_INSTALLED") != "1", reason="set by `make test`, which installs the wheel"
)
@pytest.mark.parametrize("package", [l2d_framework, l2d_plugins])
def test_the_suite_imports_the_installed_wheel(package):
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(package.__file__).resolve().is_relative_to(site_packages)


def test_every_module_of_both_packages_is_in_the_wheel(wheel, repository):
    names = set(wheel.namelist())
    for parent, package in ((repository, "l2d_framework"), (repository / "plugins", "l2d_plugins")):
        modules = {path.relative_to(parent).as_posix() for path in (parent / package).rglob("*.py")}
        assert modules - MOVED <= names
        assert f"{package}/py.typed" in names


def test_run_files_and_tasks_are_in_the_wheel(wheel, repository):
    names = set(wheel.namelist())
    for folder in ("runs", "tasks"):
        files = [path for path in (repository / "bench" / folder).rglob("*") if path.is_file()]
        assert files
        inside = {f"l2d_framework/_bench/{path.relative_to(repository / 'bench').as_posix()}" for path in files}
        assert inside <= names


def test_nothing_else_is_in_the_wheel(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "l2d_framework",
        "l2d_plugins",
        "l2d_framework-0.1.0.dist-info",
        "_l2d_lm_eval_hook.py",
        "l2d_lm_eval.pth",
        "l2d_lm_eval.start",
    }


def test_licence_is_in_the_wheel(wheel):
    text = wheel.read("l2d_framework-0.1.0.dist-info/licenses/LICENSE").decode()
    assert "Apache License" in text
    assert "License-Expression: Apache-2.0" in wheel.read("l2d_framework-0.1.0.dist-info/METADATA").decode()


def test_every_dependency_has_a_lower_bound(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(item for name in extras if name != "all" for item in extras[name])]:
        assert ">=" in requirement


def test_every_dependency_has_a_tested_version(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(item for name in extras if name != "all" for item in extras[name])]
    tested = {line.split("==")[0] for line in (repository / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.split(r"[\[>]", requirement)[0] for requirement in required} <= tested


def test_extra_all_is_every_extra_but_the_one_under_the_gpl_and_the_one_that_slows_every_start(repository):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = ",".join(name for name in extras if name not in ("all", "text-metrics", "torchao"))
    assert extras["all"] == [f"l2d-framework[{everything}]"]


def test_every_entry_point_of_the_project_loads():
    entry_points = [
        entry for entry in metadata.distribution("l2d-framework").entry_points if entry.group == "l2d_framework"
    ]
    assert {entry.name for entry in entry_points} >= {"schedules", "parametrizations", "backbones", "solvers"}
    for entry in entry_points:
        entry.load()
