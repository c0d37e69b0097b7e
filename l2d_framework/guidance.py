"""Guidance: a wrapper around prediction."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from l2d_framework.component import Component
from l2d_framework.types import Predict, Prediction, Query, Space


class Guidance(Component):
    """Changes what the network predicts; guidances compose like decorators, the first is innermost.

    A concrete guidance declares a field `scale`. Set `neutral_scale` to the scale at which it changes nothing.
    """

    kind: ClassVar[str] = "guidance"
    neutral_scale: ClassVar[float | None] = 0.0
    needs_classes: ClassVar[bool] = False
    """True when it only makes sense for a model trained with class labels."""
    sets_clean: ClassVar[bool] = False
    """True when it returns a `clean` that does not follow from its `logits`; such a guidance must be the outermost."""

    scale: float = 1.0

    @abstractmethod
    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        """Guided prediction.

        Args:
            predict: the prediction to wrap; may be called again with a changed query.
            query: what is asked.
            space: the state space at this evaluation.

        Returns:
            The guided prediction. Its `logits` are what the read-out shows, its `clean` what the solver moves towards.
        """

    def check(self, tokenizer: Any) -> None:
        """Refuse what this guidance cannot do with a model, before any weights are loaded.

        Args:
            tokenizer: of the language model, a transformers tokenizer; None where there is none.

        Raises:
            ConfigError: if it does not fit.
        """

    def scales(self, query: Query) -> Tensor | float:
        """Scale per position when the request gave one, else this guidance's own.

        Args:
            query: what is asked.

        Returns:
            (B, L, 1), float32, or a number.
        """
        return self.scale if query.guidance_scale is None else query.guidance_scale[..., None]
