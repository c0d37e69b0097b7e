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

import l2d_bench
import l2d_framework
import l2d_plugins
from l2d_framework.registry import extensions

MOVED = {"l2d_framework/evaluation/harness/start_up/_l2d_lm_eval_hook.py"}
"""To the top of the wheel."""


def built(project: Path, folder: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from this tree."""
    return built(repository, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def bench_wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the benchmarks."""
    return built(repository / "bench", tmp_path_factory.mktemp("bench"))


@pytest.mark.skipif(
    os.environ.get("L2D_EXPECT_INSTALLED") != "1", reason="set by `make test`, which installs the wheel"
)
@pytest.mark.parametrize("package", [l2d_framework, l2d_plugins, l2d_bench])
def test_the_suite_imports_the_installed_wheel(package):
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(package.__file__).resolve().is_relative_to(site_packages)


def test_every_module_of_both_packages_is_in_the_wheel(wheel, repository):
    names = set(wheel.namelist())
    for parent, package in ((repository, "l2d_framework"), (repository / "plugins", "l2d_plugins")):
        modules = {path.relative_to(parent).as_posix() for path in (parent / package).rglob("*.py")}
        assert modules - MOVED <= names
        assert f"{package}/py.typed" in names


def test_the_wheel_of_the_benchmarks_holds_its_modules_and_its_files_alone(bench_wheel, repository):
    names = {name for name in bench_wheel.namelist() if not name.startswith("l2d_bench-0.1.0.dist-info/")}
    place = repository / "bench"
    modules = {path.relative_to(place).as_posix() for path in (place / "l2d_bench").rglob("*.py")}
    files = {
        f"l2d_bench/_files/{path.relative_to(place).as_posix()}"
        for folder in ("runs", "tasks", "tables", "profiles")
        for path in (place / folder).rglob("*")
        if path.is_file()
    }
    assert len(files) > 100
    assert names == modules | files | {"l2d_bench/py.typed"}


def test_both_distributions_have_one_version_and_one_licence(repository):
    both = [tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (repository, repository / "bench")]
    assert both[0]["project"]["version"] == both[1]["project"]["version"]
    assert (repository / "LICENSE").read_text() == (repository / "bench" / "LICENSE").read_text()


def test_the_command_and_the_tasks_of_the_benchmarks_are_found():
    assert "bench" in extensions().commands()
    assert l2d_bench.folder() / "tasks" in extensions().task_folders()


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


def required(repository: Path) -> list[str]:
    """Dependencies of the project and of its extras."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(item for name in extras if name != "all" for item in extras[name])]


def test_every_dependency_has_a_lower_bound_that_is_in_the_oldest_set(repository):
    bounds = [re.match(r"([\w-]+).*?>=([\w.]+)", requirement).groups() for requirement in required(repository)]
    floors = subprocess.check_output([sys.executable, repository / ".ci" / "floors.py"], text=True).split()
    assert sorted(floors) == sorted(f"{name}=={bound}" for name, bound in bounds)


def test_every_dependency_has_a_tested_version(repository):
    tested = {line.split("==")[0] for line in (repository / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.split(r"[\[>]", requirement)[0] for requirement in required(repository)}
    assert names - {"l2d-bench"} <= tested


def test_extra_all_is_every_extra_but_four(repository):
    # MAUVE is under the GPL, torchao slows every start of transformers, the benchmarks are not for everybody, and the
    # kernels are for machines with a GPU.
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = ",".join(name for name in extras if name not in ("all", "text-metrics", "torchao", "kernels", "bench"))
    assert extras["all"] == [f"l2d-framework[{everything}]"]


def test_every_entry_point_of_the_project_loads():
    entry_points = [
        entry for entry in metadata.distribution("l2d-framework").entry_points if entry.group == "l2d_framework"
    ]
    assert {entry.name for entry in entry_points} >= {"schedules", "parametrizations", "backbones", "solvers"}
    for entry in entry_points:
        entry.load()


def test_the_tests_that_run_under_other_kernels_are_there(repository):
    (line,) = re.findall(
        r"^kernel-tests = \$\(addprefix \$\(CURDIR\)/tests/,(.*)\)$", (repository / "Makefile").read_text(), re.M
    )
    assert [name for name in line.split() if not (repository / "tests" / name).exists()] == []


def test_all_that_names_a_version_names_the_same(repository):
    projects = [repository / "pyproject.toml", repository / "bench" / "pyproject.toml"]
    versions = {tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"] for path in projects}
    versions |= set(re.findall(r"^version: (.+)$", (repository / "CITATION.cff").read_text("utf-8"), re.MULTILINE))
    assert len(versions) == 1
