"""What can be measured of a model: the interface of every kind of measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from l2d_framework.config.sections import Section


class Value(Section):
    """A number with its uncertainty."""

    value: float
    error: float | None = None
    """Standard error over items; None where one number is all there is."""
    items: int = Field(ge=0)
    scores: list[float] | None = None
    """Score of each item, in the order of the data."""


class Outcome(Section):
    """Everything one measure found about one model; stored as JSON and read by all columns that show a part of it."""

    values: dict[str, Value] = Field(default_factory=dict)
    curves: dict[str, list[list[float]]] = Field(default_factory=dict)
    """Named lists of `[x, y]`, such as a loss along the updates."""
    matrix: list[list[float]] | None = None
    """Of a heat map, row by row from the top: rows times columns."""
    texts: list[dict[str, str]] = Field(default_factory=list)
    """Generations: `prompt` and `text` of each."""
    details: dict[str, Any] = Field(default_factory=dict)
    """JSON-ready facts, such as `evaluations_per_token`."""
    absent: list[str] = Field(default_factory=list)
    """Values that there cannot be here, such as memory of a GPU on a CPU; that is no failure."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        path: folder of a trained model, or a hub id.
        options: arguments of the adapter as in `lm_eval --model l2d --model_args`, the seed of the noise and
            `pretrained` not among them.
        seed: of noise and of everything drawn.
        device: where to compute, "cpu" or "cuda".
        dtype: of the weights, or "auto".
        batch_size: rows computed together, or "auto".
        card: contents of the `run.json` of a model that was trained here, its folder's `trainer_state.json` beside it.
    """

    path: str
    options: dict[str, Any]
    seed: int
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int | str = 16
    card: dict[str, Any] | None = None


class Measure(Section, ABC):
    """One kind of measurement and its settings; a subclass declares `kind: Literal["..."] = "..."` and its fields.

    Subclasses import torch, lm_eval and the like inside `run`, since profiles are checked without them. Everything a
    result depends on is a field or in the subject: the JSON of both names the stored result.
    """

    kind: str

    def check(self) -> str | None:
        """Look for what is needed before anything is trained: tasks, data, extras.

        Returns:
            Why there is no data, for the cell; None if everything is there.

        Raises:
            ConfigError: if a setting is wrong or an extra is missing.
        """
        return None

    def metrics(self) -> list[str] | None:
        """Names of the values that `run` will return.

        Returns:
            The names; None if they are known only afterwards.
        """
        return None

    def identity(self) -> dict[str, Any]:
        """What tells this measure from others, part of the name of its results.

        Returns:
            JSON-ready: its fields, and whatever else a result depends on.
        """
        return self.model_dump(mode="json")

    @abstractmethod
    def run(self, subject: Subject) -> Outcome:
        """Measure.

        Args:
            subject: the model.

        Returns:
            What was found.

        Raises:
            L2DError: if it cannot be measured; the message stands in the cell.
        """
