"""Keyword guidance: pull every answer towards a set of tokens."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from l2d_framework import Guidance, Prediction, hookimpl
from l2d_framework.types import Predict, Query, Space


class Keyword(Guidance):
    """Moves the logits of each position along the gradient of log p(any of `token_ids`).

    `scale` is the length of the step; at 0 nothing changes. Put it before guidance that sets the clean state itself.
    """

    name: Literal["keyword"] = "keyword"
    token_ids: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Ids of the tokens to make likelier."""
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Length of the step, in logits; raise it for more of these tokens."""

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        """Predict once, then add scale * (p(token | it is a keyword) - p(token)) to the logits."""
        plain = predict(query)
        logits = plain.logits
        # Indexed on the CPU, where an id beyond the vocabulary is an error that says so.
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[self.token_ids] = False
        among_keywords = logits.masked_fill(others.to(logits.device), -torch.inf).softmax(-1)
        return replace(plain, logits=logits + self.scales(query) * (among_keywords - logits.softmax(-1)))


@hookimpl
def l2d_components() -> list[type[Guidance]]:
    """Offer the one component of this package."""
    return [Keyword]
