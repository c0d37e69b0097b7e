"""Checkpoints and rows that commands are tried on."""

import dataclasses
import json

import pytest
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer
from tiny_runs import write_sums

from l2d_framework.config import ModelSection
from l2d_framework.models.checkpoint import save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, an L2D and a TESS checkpoint over it, one whose tokenizer is lost, and rows."""
    root = tmp_path_factory.mktemp("diagnose")
    lm, tokenizer = tiny_lm(), tiny_tokenizer(chat=True)
    for name in ("base", "mute"):
        lm.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "base")
    for name, base, model in (
        ("l2d", "base", diffusion_lm(lm, classes=("odd", "even"))),
        ("tess", "base", tess_lm(tiny_lm())),
        ("silent", "mute", diffusion_lm(lm)),
    ):
        section = ModelSection(base=str(root / base), dtype="float32")
        model.origin = dataclasses.replace(model.origin, model=section)
        model.tokenizer = None if base == "mute" else tokenizer
        save(model, root / name)
    write_sums(root / "sums.jsonl")
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(3)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (root / "texts.jsonl").write_text(
        "".join(json.dumps({"story": text}) + "\n" for text in ("once", "upon a", "time"))
    )
    (root / "empty.jsonl").write_text(json.dumps({"prompt": "2+2=", "completion": " "}) + "\n")
    return root
