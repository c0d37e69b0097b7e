"""The kinds of measure and of made data by name."""

from __future__ import annotations

from l2d_bench.data.hops import HopQuestions
from l2d_bench.data.l2d_data import L2DQuestions
from l2d_bench.data.makers import DemoQuestions, Maker
from l2d_bench.data.masked_model import MaskedModel
from l2d_bench.data.pairs import AnswerPairs
from l2d_bench.data.puzzles import Carries, Sudoku
from l2d_bench.data.row_files import DataSetRows, GivenRows
from l2d_bench.data.templated import TemplatedRows
from l2d_bench.data.tess_data import TessTexts
from l2d_bench.measures.agreement import AgreementMeasure
from l2d_bench.measures.base import Measure
from l2d_bench.measures.cost import CostMeasure
from l2d_bench.measures.diagnosis import DiagnosisMeasure
from l2d_bench.measures.held_out import HeldOutMeasure
from l2d_bench.measures.loss import LossMeasure
from l2d_bench.measures.parameters import ParametersMeasure
from l2d_bench.measures.questions import QuestionsMeasure
from l2d_bench.measures.rewards import GuidedMeasure, RewardMeasure
from l2d_bench.measures.samples import SamplesMeasure
from l2d_bench.measures.steps import StepsMeasure
from l2d_bench.measures.tasks import TaskMeasure
from l2d_bench.measures.text import TextMeasure
from l2d_bench.measures.trace import TraceMeasure

KINDS: dict[str, type[Measure]] = {
    "task": TaskMeasure,
    "parameters": ParametersMeasure,
    "cost": CostMeasure,
    "questions": QuestionsMeasure,
    "text": TextMeasure,
    "reward": RewardMeasure,
    "guided": GuidedMeasure,
    "loss": LossMeasure,
    "held_out": HeldOutMeasure,
    "steps": StepsMeasure,
    "diagnosis": DiagnosisMeasure,
    "trace": TraceMeasure,
    "samples": SamplesMeasure,
    "agreement": AgreementMeasure,
}
"""Kinds of measure; a new one is a class in a module of its own and a line here."""

MAKERS: dict[str, type[Maker]] = {
    "demo": DemoQuestions,
    "templated": TemplatedRows,
    "given_rows": GivenRows,
    "data_set_rows": DataSetRows,
    "hops": HopQuestions,
    "carries": Carries,
    "sudoku": Sudoku,
    "l2d_questions": L2DQuestions,
    "tess_texts": TessTexts,
    "masked_model": MaskedModel,
    "answer_pairs": AnswerPairs,
}
"""Kinds of made data; likewise."""
