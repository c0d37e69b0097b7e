"""The kinds of measure and of made data by name."""

from __future__ import annotations

from l2d_framework.benchmark.measure import Measure
from l2d_framework.benchmark.parameters import ParametersMeasure
from l2d_framework.benchmark.tasks import TaskMeasure

KINDS: dict[str, type[Measure]] = {"task": TaskMeasure, "parameters": ParametersMeasure}
"""Kinds of measure; a new one is a class in a module of its own and a line here."""
