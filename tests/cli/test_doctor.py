import json
import time
import tomllib
from importlib import metadata

import huggingface_hub
import pytest
import torch
from fake_plugins import TOYS, broken, installed
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from l2d_framework.cli import doctor
from l2d_framework.errors import install
from l2d_framework.evaluation.code import sandbox


@pytest.fixture
def examine(l2d):
    """Runs the command; returns its exit code and what it found, by area and name."""

    def run():
        code, out, _ = l2d("doctor", "--json")
        told = json.loads(out)
        assert told["ok"] == (code == 0)
        return code, {(one["area"], one["name"]): one for one in told["findings"]}

    return run


@pytest.fixture
def requirements(monkeypatch):
    """Replaces what the distribution says that it needs."""
    return lambda *texts: monkeypatch.setattr(metadata, "requires", lambda name: list(texts))


def test_every_extra_of_the_distribution_is_explained(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"all"}


def test_a_sound_installation_has_no_problem_and_shows_its_versions(l2d, requirements):
    requirements("pydantic>=2", "matplotlib>=3; extra == 'plots'")
    with installed(TOYS):
        code, out, _ = l2d("doctor")
    assert code == 0
    assert out.strip().endswith("No problems.")
    assert f"{metadata.version('pydantic')} (>=2)" in out


def test_versions_out_of_range_and_missing_ones_are_problems(examine, requirements):
    requirements("pydantic>=99", "nothing-of-that-name>=1", "rich>=1; python_version < '3'", "pluggy>=1")
    with installed(TOYS):
        code, found = examine()
    assert code == 1
    old = found["versions", "pydantic"]
    assert old["status"] == "problem"
    assert ">=99" in old["value"] and "pip install 'pydantic>=99'" in old["advice"]
    assert found["versions", "nothing-of-that-name"]["status"] == "problem"
    assert found["versions", "pluggy"]["status"] == "ok"
    assert ("versions", "rich") not in found


def test_a_missing_extra_is_a_note_that_says_what_it_would_add(examine, requirements):
    requirements("nothing-of-that-name>=1; extra == 'plots'", "trl>=99; extra == 'reward'")
    with installed(TOYS):
        code, found = examine()
    plots = found["extras", "plots"]
    assert plots["status"] == "note"
    assert "l2d plot" in plots["value"] and install("l2d-framework[plots]") in plots["advice"]
    assert code == 1  # for the extra that is installed, but too old
    assert found["extras", "reward"]["status"] == "problem"


def test_broken_plugins_are_named_with_their_reason(examine):
    with installed(TOYS, broken("hasty", ImportError("no luck today"))):
        code, found = examine()
    assert code == 1
    (one,) = (one for (area, name), one in found.items() if "hasty" in name)
    assert one["area"] == "plugins" and one["status"] == "problem" and "no luck today" in one["value"]


def test_what_cannot_be_examined_is_a_problem_and_hides_nothing_else(examine, monkeypatch):
    def fail(self):
        raise OSError("no such thing")

    monkeypatch.setattr(sandbox.Sandbox, "obstacle", fail)
    with installed(TOYS):
        code, found = examine()
    assert code == 1
    assert "no such thing" in found["sandbox", "sandbox"]["value"]
    assert ("extras", "plots") in found


@pytest.mark.parametrize(("answer", "status"), [(None, "ok"), ("refused: no namespaces", "note")])
def test_a_system_without_isolation_is_told_what_it_lacks(examine, monkeypatch, answer, status):
    monkeypatch.setattr(sandbox.Sandbox, "obstacle", lambda self: answer)
    with installed(TOYS):
        _, found = examine()
    one = found["sandbox", "isolation"]
    assert one["status"] == status
    assert (answer or "") in one["value"]


@pytest.mark.parametrize(
    ("has_gpu", "variable", "lacking"),
    [
        (False, "CXX", "no C++ compiler (g++)"),
        (False, "CXX", "no header files of Python"),
        (True, "CC", "no Triton, no C compiler (gcc or clang)"),
    ],
)
def test_whether_layers_can_be_compiled_is_told_by_what_that_needs(
    examine, monkeypatch, tmp_path, has_gpu, variable, lacking
):
    (tmp_path / "Python.h").touch()
    (tmp_path / "mine").touch(mode=0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    if "header" in lacking:
        (tmp_path / "Python.h").unlink()
        monkeypatch.setenv(variable, "mine")
    with installed(TOYS):
        one = examine()[1]["compilers", "compile"]
        assert (one["status"], one["value"]) == ("note", f"cannot be used: {lacking}")
        assert "leave `compile` out" in one["advice"]
        (tmp_path / "Python.h").touch()
        monkeypatch.setenv(variable, "mine")
        monkeypatch.setattr(doctor, "find_spec", lambda name: name)
        one = examine()[1]["compilers", "compile"]
    assert (one["status"], one["value"]) == ("ok", f"can be used, with {'Triton and ' if has_gpu else ''}mine")


def asked(self, name, *, timeout):
    raise AssertionError("the hub was asked")


def test_offline_the_hub_is_not_asked(examine, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    with installed(TOYS):
        _, found = examine()
    assert found["hub", "access"]["status"] == "ok"
    assert "HF_HUB_OFFLINE" in found["hub", "access"]["value"]


def silent(self, name, *, timeout):
    time.sleep(60)


def away(self, name, *, timeout):
    raise ConnectionError("no route")


@pytest.mark.parametrize(("answer", "told"), [(silent, "no answer in 0.1 s"), (away, "ConnectionError: no route")])
def test_a_hub_that_does_not_answer_is_not_waited_for(examine, monkeypatch, answer, told):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "PATIENCE", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    start = time.perf_counter()
    with installed(TOYS):
        _, found = examine()
    assert time.perf_counter() - start < 50
    one = found["hub", "access"]
    assert one["status"] == "note"
    assert told in one["value"] and "HF_HUB_OFFLINE=1" in one["advice"]


class Response:
    """A mirror's answer that it has no such model."""

    status_code = 404
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def test_a_mirror_without_the_model_has_answered(examine, monkeypatch):
    def lacks(self, name, *, timeout):
        raise RepositoryNotFoundError("404", response=Response())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lacks)
    with installed(TOYS):
        _, found = examine()
    assert found["hub", "access"]["status"] == "ok"
