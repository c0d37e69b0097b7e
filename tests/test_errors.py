"""What messages advise."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from l2d_framework.errors import install


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that the distribution `toy-clone` was installed from, with a second distribution `extras` in it."""
    folder = tmp_path / "my clone"
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "pyproject.toml").touch()
    (tmp_path / "toy_clone-1.dist-info").mkdir()
    (tmp_path / "toy_clone-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-clone\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    came_from(folder, {"dir_info": {}})
    return folder


def came_from(folder: Path, how: dict[str, Any]) -> None:
    origin = folder.parent / "toy_clone-1.dist-info" / "direct_url.json"
    origin.write_text(json.dumps({"url": folder.as_uri(), **how}))
    importlib.invalidate_caches()


def test_who_installed_from_a_clone_is_told_to_install_an_extra_from_there(clone: Path) -> None:
    assert shlex.split(install("toy-clone[fast]")) == ["pip", "install", f"{clone}[fast]"]
    assert shlex.split(install("toy-clone")) == ["pip", "install", str(clone)]
    assert shlex.split(install("toy-clone[bench]")) == ["pip", "install", str(clone / "bench")]
    came_from(clone, {"dir_info": {"editable": True}})
    assert shlex.split(install("toy-clone[fast]")) == ["pip", "install", "--editable", f"{clone}[fast]"]


def test_who_has_no_clone_any_more_or_never_had_one_is_sent_to_the_index(clone: Path) -> None:
    index = ["pip", "install", "toy-clone[fast]"]
    came_from(clone, {"archive_info": {}})
    assert shlex.split(install("toy-clone[fast]")) == index
    came_from(clone, {"dir_info": {}})
    clone.rename(clone.with_name("elsewhere"))
    assert shlex.split(install("toy-clone[fast]")) == index
    assert install("no-such-distribution[fast]") == "pip install 'no-such-distribution[fast]'"
