"""What counts as a model or data set that can be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from l2d_framework.errors import DataError
from l2d_framework.evaluation import hub


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub._is_on_hub.cache_clear()
    yield
    hub._is_on_hub.cache_clear()


def _hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    asked: list[str] = []

    def check(self: HfApi, name: str, **options: Any) -> None:
        asked.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(HfApi, "auth_check", check)
    return asked


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError])
def test_what_this_user_cannot_have_is_missing(monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
    # Made without its constructor, whose response is of an HTTP library that releases exchange.
    _hub(monkeypatch, kind.__new__(kind))
    assert not hub.is_reachable("someone/model", "model")


def test_a_hub_that_does_not_answer_is_an_error_and_not_a_missing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, TimeoutError("slow"))
    with pytest.raises(DataError, match=r"someone/model.*slow.*HF_HUB_OFFLINE=1"):
        hub.is_reachable("someone/model", "model")


def test_what_the_hub_gives_is_there_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _hub(monkeypatch, None)
    assert hub.is_reachable("someone/model", "model")
    assert hub.is_reachable("someone/model", "model")
    assert asked == ["someone/model"]


def test_the_hub_is_not_asked_for_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = _hub(monkeypatch, TimeoutError("slow"))
    (tmp_path / "datasets--someone--rows").mkdir()
    assert hub.is_reachable("someone/rows", "dataset")
    assert hub.is_reachable(str(tmp_path), "model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_reachable("someone/other", "dataset")
    assert asked == []
