"""The authors' TESS 2 tensors as models, queries and reverse processes of this package."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from golden_device import DEVICE, read
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from l2d_framework.diffusion.ode import Evaluation, Streams, TokenODE
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.guidance import Guidance
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.solver import Solver
from l2d_framework.types import Layout, Query
from l2d_plugins.backbones.in_place import InPlaceConfig
from l2d_plugins.parametrizations.simplex import SimplexConfig
from l2d_plugins.schedules.cosine import Cosine

TIMES = 5000
"""T of the authors' training; tensors count times as indices of T."""


@dataclass(frozen=True)
class Case:
    """One network of the authors with everything they recorded."""

    folder: Path
    meta: dict[str, Any]
    io: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        """The case in a folder."""
        meta = json.loads((folder / f"{folder.name}_meta.json").read_text())
        return cls(folder, meta, read(folder / f"{folder.name}_tensors.safetensors"))

    @property
    def k(self) -> float:
        """Simplex value."""
        return float(self.meta["simplex_value"])

    @property
    def steps(self) -> int:
        """N of the recorded reverse processes."""
        return int(self.meta["inference_steps"])

    def model(self, mix: Any = "mean") -> DiffusionLM:
        """The network with the authors' weights."""
        fields = {k: v for k, v in self.meta["config"].items() if not k.startswith("self_") and k != "is_causal"}
        lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[self.meta["arch"]](**fields), dtype=torch.float32)
        state = read(self.folder / f"{self.folder.name}_state.safetensors")
        time = state.pop("timestep_embed.weight")
        lm.load_state_dict(state)
        backbone = InPlaceConfig().build(lm)
        with torch.no_grad():
            backbone.time.weight.copy_(time)
        space = SimplexConfig(k=self.k, self_conditioning=mix).build(backbone.vocab_size, backbone.hidden_size)
        return DiffusionLM(Cosine(steps=TIMES), space, backbone, None).eval().to(DEVICE)

    def layout(self, tokens: str = "input_ids", mask: str = "span_mask") -> Layout:
        """Rows in which the span mask says what is denoised."""
        return Layout(self.io[tokens], self.io[mask].long())

    def at(self, layout: Layout, values: Tensor) -> Tensor:
        """Values at the denoised slots of all rows, (N, ...)."""
        return values[layout.blocks >= 1]


def slots(layout: Layout) -> tuple[Tensor, Tensor]:
    """Denoised slots of each row, its last one repeated to fill up, (B, L), and which are no repetition."""
    rows = [row.nonzero()[:, 0] for row in layout.blocks >= 1]
    width = max(map(len, rows))
    positions = torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows])
    return positions, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Values (B, S, ...) at slots (B, L)."""
    return values[torch.arange(len(values))[:, None], positions]


def query(model: DiffusionLM, layout: Layout, x: Tensor, t: Tensor, previous: Tensor | None = None) -> Query:
    """Question about the denoised slots; states, times and predictions are given for all of them."""
    positions, _ = slots(layout)
    return Query(
        x=take(x, positions),
        t=take(t, positions),
        positions=positions,
        context=model.backbone.read(layout),
        previous=None if previous is None else take(previous, positions),
    )


class Replay(TokenODE):
    """A reverse process whose noise was recorded."""

    noises: Iterable[Tensor]

    def fresh_noise(self, x: Tensor) -> Tensor:
        """The next recorded noise."""
        return self._parametrization.prior_scale * next(iter(self.noises))


def replay(
    model: DiffusionLM,
    layout: Layout,
    *,
    noises: Sequence[Tensor],
    steps: int,
    solver: Solver,
    guidance: Sequence[Guidance] = (),
    estimate: dict[str, Any] | None = None,
) -> tuple[list[Evaluation], TokenODE]:
    """Evaluations of a reverse process from the first of the noises, (B, S, V) each."""
    positions, _ = slots(layout)
    seen: list[Evaluation] = []
    streams = [TokenStreams([[(p,)] * positions.shape[1] for p in range(len(positions))], positions.device)] * 2
    start, *later = (take(noise, positions) for noise in noises)
    problem = Replay(
        model,
        query(model, layout, torch.zeros(*layout.tokens.shape, 1), torch.zeros(layout.tokens.shape)),
        guidance=guidance,
        parametrization=model.parametrization.with_estimate(estimate or {}),
        codebook=model.codebook(),
        streams=Streams(*streams),
        layout=layout,
        observer=seen.append,
    )
    problem.noises = iter(later)
    times = model.schedule.grid(steps, 1.0)
    x = problem.solve(solver, model.parametrization.prior_scale * start, times)
    problem.read_out(x, times[-1])
    return seen, problem
