"""Golden cases of the authors' L2D code, loaded through the public converter."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from float64 import Float64
from golden_device import DEVICE, read
from torch import Tensor

from l2d_framework.diffusion.ode import Streams, TokenODE
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.guidance import Guidance
from l2d_framework.models.checkpoint import load
from l2d_framework.models.convert import convert
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.registry import registry
from l2d_framework.solver import Solver
from l2d_framework.types import Layout, Query


@dataclass(eq=False)
class Case:
    """One golden case.

    Attributes:
        facts: the JSON file.
        io: inputs and outputs of the authors' code.
        folder: of the converted model.
        lm: the converted model.
    """

    facts: dict[str, Any]
    io: dict[str, Tensor]
    folder: Path
    lm: DiffusionLM

    @cached_property
    def _exact(self) -> "Case":
        io = {name: value.double() if value.is_floating_point() else value for name, value in self.io.items()}
        return Case(self.facts, io, self.folder, copy.deepcopy(self.lm).double())

    @cached_property
    def half(self) -> "Case":
        """As users load it in bfloat16: the language model in it, what was trained in float32."""
        return Case(self.facts, self.io, self.folder, load(self.folder, dtype="bfloat16").to(DEVICE))

    def exactly(self, compute: "Callable[[Case], Any]") -> Any:
        """What `compute` gives in float64."""
        with Float64():
            return compute(self._exact)

    @property
    def classes(self) -> Tensor | None:
        """Class of each row, (B,), or None."""
        return self.io.get("class_labels")

    def context(self, rows: slice = slice(None)) -> Any:
        """The main path over the input tokens."""
        tokens = self.io["input_ids"][rows]
        return self.lm.backbone.read(Layout(tokens, torch.zeros_like(tokens)))

    def query(self, x: Tensor, t: Tensor, positions: Tensor, context: Any, *, classes: bool = True) -> Query:
        """A query about input positions; the golden files count inputs, we count what is predicted."""
        condition = self.classes[: len(x), None].expand(t.shape) if classes and self.classes is not None else None
        return Query(x, t, positions + 1, context, condition=condition)

    def problem(
        self,
        positions: Tensor,
        context: Any,
        estimate: dict[str, Any],
        guidance: list[Guidance],
        *,
        classes: bool = True,
    ) -> TokenODE:
        """The differential equation at input positions, with the given estimate."""
        space = self.lm.parametrization.with_estimate(estimate)
        dummy = torch.zeros(*positions.shape, space.state_size)
        keys = [[(row, column) for column in range(positions.shape[1])] for row in range(len(positions))]
        streams = Streams(*(TokenStreams(keys, DEVICE) for _ in range(2)))
        return TokenODE(
            self.lm,
            self.query(dummy, dummy[..., 0], positions, context, classes=classes),
            guidance=guidance,
            parametrization=space,
            codebook=space.codebook(self.lm.backbone.table()),
            streams=streams,
        )


def load_case(folder: Path, name: str, scratch: Path) -> Case:
    """Lay a case out as the authors' checkpoint, convert it, and load what was written.

    Args:
        folder: of the golden files.
        name: of the case.
        scratch: an empty folder.

    Returns:
        The case.
    """
    facts = json.loads((folder / f"{name}.json").read_text())
    source = scratch / "reference"
    source.mkdir()
    torch.save(read(folder / f"{name}.weights.safetensors"), source / "pytorch_model.bin")
    config = {**facts["base_config"], "model_type": facts["family"], "flow_config": facts["flow_config"]}
    (source / "config.json").write_text(json.dumps(config))
    lm = convert(str(source), scratch / "converted", reader="l2d-reference").to(DEVICE)
    return Case(facts, read(folder / f"{name}.io.safetensors"), scratch / "converted", lm)


def solver(name: str, **fields: Any) -> Solver:
    """A solver by name."""
    found = registry().create("solver", {"name": name, **fields})
    assert isinstance(found, Solver)
    return found


def steps(problem: TokenODE, how: Solver, states: Tensor, grid: list[float]) -> Tensor:
    """Where one step leads from each recorded state (n, B, L, D) but the last.

    Each starts anew, so that rounding is not carried on: late dynamics multiply it by up to a thousand.
    """
    moves = zip(states.double(), pairwise(grid), strict=False)
    return torch.stack([problem.solve(how, state, list(times)) for state, times in moves])
