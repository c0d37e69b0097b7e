"""What the kernel adds to an evaluation of the network: `python bench/speed/overhead.py [--device cuda]`.

The same call of a solver is measured with the model and with stand-ins that answer at once what the model answered, so
that the dispatch to plugins, the query and the bookkeeping are left. Every round measures every case once, and shares
are medians over rounds. On a CPU, seconds are those of the process, not of the clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from blocks import measure
from common import known_device, result_file, write_card
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from l2d_framework.blame import naming_plugins
from l2d_framework.cli import run_script
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.diffusion.ode import Streams, TokenODE
from l2d_framework.diffusion.sampler import Block
from l2d_framework.guidance import Guidance
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run_record import environment
from l2d_framework.types import Layout, Predict, Prediction, Query, Space

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "SmolLM2-135M's shape": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
RUN: dict[str, Any] = {
    "model": {"base": "random"},
    "schedule": {"name": "linear"},
    "parametrization": {"name": "embedding"},
    "backbone": {"name": "two_stream"},
}
PROMPT, EVALUATION, LIMIT = 128, "evaluation", 0.01
"""Tokens of the prompt, the case that all others are a share of, and the largest share for models worth using."""


class PassThrough(Guidance):
    """A guidance that changes nothing."""

    name: Literal["pass_through"] = "pass_through"

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        """What it wraps, called as it was.

        Args:
            predict: what it wraps.
            query: what is asked.
            space: unused.

        Returns:
            The answer.
        """
        return predict(query)


class Instant:
    """Answers at once, and is otherwise like the part of a model in whose place it stands.

    Args:
        part: the part.
        **answers: what some of its methods return, by name; of a call under `__call__`.
    """

    def __init__(self, part: Any, **answers: Any) -> None:
        self._part, self._called = part, answers.pop("__call__", None)
        for name, answer in answers.items():
            setattr(self, name, lambda *_, answer=answer: answer)

    def __call__(self, query: Query) -> Any:
        """The stored answer.

        Args:
            query: unused.

        Returns:
            It.
        """
        return self._called

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class Cases:
    """One model and what is measured of it, each as a function without arguments.

    Args:
        shape: of the language model.
        device: where to run; in bfloat16 on a GPU.
    """

    def __init__(self, shape: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(0)
        lm = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        lm = lm.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)  # type: ignore[arg-type]
        run = parse_run(RUN)
        assert isinstance(run, DiffusionRun)
        backbone = run.backbone.build(lm)
        space = run.parametrization.build(backbone.vocab_size, backbone.hidden_size)
        self.lm = DiffusionLM(run.schedule.build(), space, backbone, run.block_size).to(device).eval()

    def problem(self, rows: int, *, instant: bool = False, guidance: Guidance | None = None) -> tuple[TokenODE, Tensor]:
        """The next token of some prompts, as a solver sees it.

        Args:
            rows: number of prompts.
            instant: let stand-ins answer.
            guidance: around the prediction, or None.

        Returns:
            The problem, and a state to begin with.
        """
        lm: Any = self.lm
        device = lm.backbone.lm.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, lm.backbone.vocab_size, (rows, PROMPT), generator=generator).to(device)
        layout = Layout(tokens, torch.zeros_like(tokens))
        block = Block(
            positions=torch.full((rows, 1), PROMPT, device=device),
            layout=layout,
            context=lm.backbone.read(layout),
            keys=[[(0, str(row), PROMPT)] for row in range(rows)],
        )
        space = lm.parametrization
        x = space.prior(block.streams("prior")).float()
        query = Query(x=x, t=torch.full_like(x[..., 0], 0.5), positions=block.positions, context=block.context)
        codebook = lm.codebook()
        if instant:
            answer = lm(query)
            space = Instant(space, estimate=torch.zeros_like(x), lookahead=query.t)
            lm = Instant(lm, __call__=answer)
        problem = TokenODE(
            lm,
            query,
            guidance=[] if guidance is None else [guidance],
            parametrization=space,
            codebook=codebook,
            streams=Streams(block.streams("estimate"), block.streams("fresh")),
            layout=layout,
        )
        return problem, x

    @torch.no_grad()
    def all(self) -> dict[str, Callable[[], object]]:
        """What is measured, `EVALUATION` first; where some tokens are active, that is one of two."""
        real, x = self.problem(1)
        bare, _ = self.problem(1, instant=True)
        guided, _ = self.problem(1, instant=True, guidance=PassThrough())
        # The network is asked about the one row that is active.
        some, two = self.problem(2)
        some._diffusion, some._parametrization = bare._diffusion, bare._parametrization
        active = torch.tensor([[True], [False]], device=x.device)
        query = real._at(x, 0.5)
        return {
            EVALUATION: lambda: real.clean(x, 0.5),
            "kernel": lambda: bare.clean(x, 0.5),
            "kernel with a guidance": lambda: guided.clean(x, 0.5),
            "kernel with some tokens active": lambda: some.clean(two, 0.5, active=active),
            "Query.replace": lambda: query.replace(x=x),
            "naming_plugins, once per request": naming_plugins()(lambda: None),
        }


def repeated(case: Callable[[], object], times: int) -> Callable[[], None]:
    """A case several times over.

    Args:
        case: what to do.
        times: how often.

    Returns:
        A function that does it.
    """

    @torch.no_grad()
    def run() -> None:
        for _ in range(times):
            case()

    return run


def compare(shape: dict[str, Any], device: torch.device, rounds: int, evaluations: int) -> dict[str, dict[str, Any]]:
    """Seconds of every case and its share of an evaluation.

    Args:
        shape: of the language model.
        device: where to run.
        rounds: samples of each case.
        evaluations: of the network, per sample; the other cases, which are short, are repeated fifty times as often.

    Returns:
        By case its median seconds, its median share, and the seconds of all rounds.
    """
    cases = Cases(shape, device).all()
    times = {name: evaluations * (1 if name == EVALUATION else 50) for name in cases}
    samples = measure({name: repeated(case, times[name]) for name, case in cases.items()}, rounds, device)
    each = {name: [second / times[name] for second in seconds] for name, seconds in samples.items()}
    return {
        name: {
            "seconds": statistics.median(found),
            "share": statistics.median(part / whole for part, whole in zip(found, each[EVALUATION], strict=True)),
            "samples": found,
        }
        for name, found in each.items()
    }


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=5, help="Samples of every case.")] = 5,
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations of the network per sample.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/overhead_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print a table, and write the result file."""
    where = known_device(device)
    out = result_file(out, f"overhead_{where.type}.json")
    torch.set_num_threads(1)
    models = {name: compare(shape, where, rounds, evaluations) for name, shape in SHAPES.items()}
    for model, rows in models.items():
        for name, row in rows.items():
            print(f"{model:22} {name:34} {1e6 * row['seconds']:12,.1f} us {100 * row['share']:8.3f} %")
    settings = {"shapes": SHAPES, "run": RUN, "prompt": PROMPT, "rounds": rounds, "evaluations": evaluations}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "limit": LIMIT, "settings": settings, **environment(1)}
    write_card(out, card | {"models": models})


if __name__ == "__main__":
    run_script(main)
