"""A trace as one web page that needs nothing but itself."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from l2d_framework.evaluation.tables import write_whole
from l2d_framework.tracing.record import Trace
from l2d_framework.tracing.texts import token_texts

_MARK = "@@DATA@@"


def write_page(trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, *, title: str = "") -> None:
    """Write a page that plays the trace back: the draft at every evaluation, coloured by confidence.

    The page holds the whole trace as JSON, in the element `data` under the key `trace`.

    Args:
        trace: what happened.
        tokenizer: the model's.
        path: an HTML file.
        title: heading.
    """
    used = {*trace.tokens, *trace.ids.flatten().tolist()}
    texts = token_texts(tokenizer, used)
    data = {"title": title, "texts": {str(token): text for token, text in texts.items()}, "trace": trace.to_json()}
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    write_whole(path, template.replace(_MARK, _embedded(data)))


def _embedded(data: Any) -> str:
    """JSON in ASCII without any character that means something to an HTML parser."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
