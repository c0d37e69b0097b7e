"""Classifier-free guidance."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from l2d_framework.guidance import Guidance
from l2d_framework.types import Predict, Prediction, Query, Space


class ClassifierFree(Guidance):
    """Moves towards w * clean(class) + (1 - w) * clean(no class), w being the scale.

    The paper's Eq. 7 prints a minus sign before the second term; with it the weights would not sum to one, so this
    follows the released code. Each branch draws its own estimate. The logits stay those of the class, unguided, as in
    that code, and positions without a class are not guided.

    Source: Cetin et al. 2025, arXiv:2501.15781, Eq. 7; Ho and Salimans 2022, arXiv:2207.12598.
    """

    neutral_scale: ClassVar[float | None] = 1.0
    needs_classes: ClassVar[bool] = True
    sets_clean: ClassVar[bool] = True

    name: Literal["classifier_free"] = "classifier_free"
    scale: float = Field(1.0, allow_inf_nan=False)
    """w: 1 is the model as it was trained, above 1 follows the class more, 0 ignores it; the first thing to try where
    answers look like another class's."""

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        """The class's logits and the mixed clean state, from one pass of the network over both branches."""
        if query.condition is None or (query.guidance_scale is None and self.scale == self.neutral_scale):
            return predict(query)
        with_class, without = predict.together([query, query.replace(condition=None)])
        # The class draws first, from the random numbers that it would draw without guidance.
        clean, null = _clean(with_class, space), _clean(without, space)
        scale = self.scales(query)
        guided = scale * clean + (1 - scale) * null
        neutral = (query.condition < 0)[..., None]
        if isinstance(scale, Tensor):
            neutral = neutral | (scale == self.neutral_scale)
        return Prediction(with_class.logits, torch.where(neutral, clean, guided))


def _clean(prediction: Prediction, space: Space) -> Tensor:
    return space.estimate(prediction.logits) if prediction.clean is None else prediction.clean
