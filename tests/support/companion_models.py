"""Folders of models that stand beside the diffusion model, spoilt, and proof that their weights were not loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedModel


class Weights(BaseException):
    """Weights were about to be loaded."""


def refuse_weights(monkeypatch: pytest.MonkeyPatch, auto: Any) -> None:
    """Raise `Weights` wherever transformers would load any, by themselves or through one of its auto classes."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Weights

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(auto, "from_pretrained", refuse)


def swapped(folder: Path) -> None:
    """Let two tokens of the tokenizer change places."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def longer(folder: Path) -> None:
    """Give the tokenizer a further token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    """Take the tokenizer away."""
    for file in folder.glob("token*"):
        file.unlink()
