"""Cost of a reverse step of TESS 2 beside its unavoidable parts, and its peak memory: `python bench/speed/tess.py`.

Every round measures every case once, so that a busy machine slows all of them alike; the floor of a round is the sum of
its parts in that round, and ratios are medians over rounds. On a CPU, seconds are those of the process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import result_file
from l2d import Sample, measure, seconds, summarize, write
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    StoppingCriteria,
    StoppingCriteriaList,
)

from l2d_framework.cli import run_script
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.diffusion.logits import top_token
from l2d_framework.diffusion.ode import Streams, TokenODE
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.selection import Selection
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.metrics import peak_memory
from l2d_framework.training.run_record import environment
from l2d_framework.types import Layout, Query

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
WIDER = {**SHAPE, "hidden_size": 1024, "intermediate_size": 4096}
WIDE = {**SHAPE, "vocab_size": 128_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LENGTH, NOISED, CALLS = 128, (128, 96), 3
LIMITS = {"argmax": 1.3, "nucleus 0.99": 1.15, "nucleus 0.99, confident": 1.15}
"""Wanted of a step in multiples of the floor, and of the other estimates in multiples of argmax."""
PROMPT, ANSWERS, ANSWER, PATIENCE = 1024, 8, 16, 1
CANVASES, STEPS = (256, 1024, 2048), 3
ESTIMATES: dict[str, dict[str, Any]] = {
    "argmax": {"mode": "argmax"},
    "nucleus 0.99": {"mode": "nucleus", "top_p": 0.99},
    "nucleus 0.99, confident": {"mode": "nucleus", "top_p": 0.99, "temperature": 0.03},
}
"""A random model's nucleus has most of the vocabulary; at a low temperature it has a few tokens, as late steps do."""
PARTS = ("backbone", "lm_head", "vocabulary x embedding")
OTHERS = ("noise of the state", "noise and softmax of the state", "softmax of the prediction", "likeliest tokens")
"""What a step does besides, of which the floor has nothing."""
FLOOR = "floor: their sum"

RUN: dict[str, Any] = {
    "model": {"base": "random"},
    "schedule": {"name": "cosine"},
    "parametrization": {"name": "simplex"},
    "backbone": {"name": "in_place"},
    "block_size": None,
    "sampling": {"preset": "tess2"},
}


def model(shape: dict[str, Any], attention: str = "bidirectional") -> DiffusionLM:
    """A model with random weights.

    Args:
        shape: of its Llama.
        attention: of its backbone.

    Returns:
        The model, to generate with.
    """
    torch.manual_seed(0)
    run = parse_run({**RUN, "backbone": {**RUN["backbone"], "attention": attention}})
    assert isinstance(run, DiffusionRun)
    backbone = run.backbone.build(LlamaForCausalLM(LlamaConfig(**shape)).eval())
    space = run.parametrization.build(backbone.vocab_size, backbone.hidden_size)
    return DiffusionLM(run.schedule.build(), space, backbone, run.block_size).eval()


def timed(run: Callable[[], Any]) -> Sample:
    """Seconds that one call takes.

    Args:
        run: what to measure; called several times, since the first gets its memory from the system page by page.

    Returns:
        The mean of the calls.
    """
    start = seconds()
    for _ in range(CALLS):
        run()
    cpu, wall = ((b - a) / CALLS for a, b in zip(start, seconds(), strict=True))
    return Sample(cpu, wall)


class Steps:
    """A canvas in the middle of its reverse process.

    Args:
        lm: the model.
        length: tokens of the canvas.
        noised: how many of them are noised, from the end.
        padding: how many are padding, from the start.
    """

    @torch.no_grad()
    def __init__(self, lm: DiffusionLM, length: int, noised: int, padding: int = 0) -> None:
        self.lm, self.noised = lm, noised
        tokens = torch.randint(0, lm.backbone.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
        places = torch.arange(length)[None]
        self.layout = Layout(tokens, (places >= length - noised).long() - (places < padding).long())
        self.positions = torch.arange(length - noised, length)[None]
        known = max(length - noised, 1)
        self.context = lm.backbone.read(Layout(tokens[:, :known], self.layout.blocks[:, :known]))
        self.hidden = torch.randn(1, noised, lm.backbone.hidden_size)
        self.mixed = torch.rand(noised, lm.backbone.vocab_size)
        self.noise = lm.parametrization.noise(Selection(self._streams("prior")))

    def _streams(self, purpose: str) -> TokenStreams:
        return TokenStreams([[(0, position, purpose) for position in range(self.noised)]], self.positions.device)

    @torch.no_grad()
    def part(self, name: str) -> Sample:
        """Seconds of one of `PARTS` or `OTHERS`."""
        backbone, t = self.lm.backbone, torch.full((1, self.noised), 0.5)
        table = backbone.table()
        work = {
            PARTS[0]: lambda: backbone.features(self.hidden, t, self.positions, self.context, None),
            PARTS[1]: lambda: backbone.head(self.hidden),
            PARTS[2]: lambda: self.mixed @ table,
            OTHERS[0]: self.noise.dense,
            OTHERS[1]: lambda: self.noise.softmax(-1),
            OTHERS[2]: lambda: self.mixed.softmax(-1),
            OTHERS[3]: lambda: top_token(self.mixed),
        }
        return timed(work[name])

    @torch.no_grad()
    def step(self, estimate: dict[str, Any], guidance: Any = None) -> Sample:
        """Seconds of a step that has a previous prediction."""
        options: dict[str, Any] = {} if guidance is None else {"guidance": [guidance]}
        sampling = self.lm.sampling(estimate=estimate, **options)
        space = self.lm.parametrization.with_estimate(sampling.estimate)
        start = Selection(self._streams("prior"))
        problem = TokenODE(
            self.lm,
            Query(
                x=space.prior_scale * space.noise(start),
                t=torch.zeros(self.positions.shape),
                positions=self.positions,
                context=self.context,
            ),
            guidance=sampling.guidance,
            parametrization=space,
            codebook=self.lm.codebook(),
            streams=Streams(self._streams("estimate"), self._streams("fresh")),
            layout=self.layout,
        )
        x = sampling.solver.step(problem, space.prior_scale * space.noise(start), 0.49, 0.5)
        return timed(lambda: sampling.solver.step(problem, x, 0.5, 0.51))


def step_cases(reward: str | None) -> dict[str, dict[str, Callable[[], Sample]]]:
    """What is measured of a reverse step.

    Args:
        reward: folder of a reward model, or None for no guidance.

    Returns:
        Functions that measure once, by how many tokens are noised and by name.
    """
    lm, found = model(SHAPE), {}
    for noised in NOISED:
        steps = Steps(lm, LENGTH, noised)
        group = found[f"{noised} of {LENGTH} noised"] = {name: partial(steps.part, name) for name in (*PARTS, *OTHERS)}
        group |= {name: partial(steps.step, estimate) for name, estimate in ESTIMATES.items()}
        if reward is not None:
            guidance = {"name": "reward_gradient", "model": reward}
            group["argmax, reward guidance"] = partial(steps.step, ESTIMATES["argmax"], guidance)
    return found


def wider_cases() -> dict[str, Callable[[], Sample]]:
    """A step of a wider model, of which what a step does besides its floor is a smaller share.

    Returns:
        Functions that measure once, by name.
    """
    steps = Steps(model(WIDER), LENGTH, LENGTH)
    return {**{name: partial(steps.part, name) for name in PARTS}, "argmax": partial(steps.step, ESTIMATES["argmax"])}


def prompt_cases() -> dict[str, Callable[[], Sample]]:
    """An evaluation of the backbone behind a long prompt.

    Returns:
        Functions that measure once, by name.
    """
    length, name = PROMPT + LENGTH, PARTS[0]
    both, causal = model(SHAPE), model(SHAPE, "causal")
    return {
        "every position seen by all": partial(Steps(both, length, LENGTH).part, name),
        "the same behind a pad": partial(Steps(both, length, LENGTH, padding=1).part, name),
        "causal, the prompt read once": partial(Steps(causal, length, LENGTH).part, name),
    }


def answer_cases(lm: DiffusionLM) -> dict[str, Callable[[], Sample]]:
    """Answers to a batch, whose rows may settle.

    Args:
        lm: the model.

    Returns:
        Functions that measure once, by name.
    """
    prompts = torch.randint(0, lm.backbone.vocab_size, (ANSWERS, 4), generator=torch.Generator().manual_seed(1))

    def answer(patience: int | None) -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": ANSWER, "num_inference_steps": 16, "patience": patience}
        found = lm.generate(prompts, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
        return found.evaluations.float().mean()

    share = float(answer(PATIENCE) / answer(None))
    return {
        "all evaluations": partial(timed, partial(answer, None)),
        f"settled rows left out, {share:.0%} of the evaluations": partial(timed, partial(answer, PATIENCE)),
    }


def with_floor(row: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Samples of a group after those of its floor.

    Args:
        row: samples by name; those of `PARTS` are summed round by round.

    Returns:
        The same, the floor first.
    """
    rounds = zip(*(row[name] for name in PARTS), strict=True)
    return {FLOOR: [Sample(sum(s.cpu for s in parts), sum(s.wall for s in parts)) for parts in rounds], **row}


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


class _Clock(StoppingCriteria):
    """Notes the time at every picked token."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(seconds())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(lm: DiffusionLM, length: int, estimate: str, steps: int = STEPS) -> list[tuple[float, float]]:
    """An answer through the public interface.

    Args:
        lm: the model.
        length: tokens of the answer.
        estimate: one of `ESTIMATES`.
        steps: network evaluations.

    Returns:
        CPU and wall seconds when each token was picked.
    """
    clock = _Clock()
    lm.generate(
        torch.tensor([[1, 2]]),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        num_inference_steps=steps,
        estimate=ESTIMATES[estimate],
    )
    return clock.times


def held_alone(case: str) -> str:
    """Memory that one generation took; for a process of its own.

    Args:
        case: length and estimate, joined by a slash.

    Returns:
        JSON with the bytes before it and the peak.
    """
    length, _, estimate = case.partition("/")
    lm = model(WIDE)
    before = _resident()
    generate(lm, int(length), estimate)
    return json.dumps({"before": before, "peak": peak_memory(torch.device("cpu"))})


def memory() -> list[dict[str, Any]]:
    """Memory of generations, each in a process of its own.

    Returns:
        Per case: what a generation added to libraries and weights, and what one tensor (L, V) would be, in bytes.
    """
    found = []
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--alone"]
    cases = [(estimate, length) for estimate in ("argmax", "nucleus 0.99") for length in CANVASES]
    for estimate, length in track(cases, "memory", transient=True):
        made = subprocess.run([*command, f"{length}/{estimate}"], check=True, capture_output=True, text=True)
        held = json.loads(made.stdout)
        canvas = 4 * length * WIDE["vocab_size"]
        added = held["peak"] - held["before"]
        found.append({"case": estimate, "length": length, **held, "added": added, "canvas": canvas})
    return found


def picking(rounds: int) -> dict[str, float]:
    """Seconds of picking the tokens of the longest canvas, and of one reverse step there.

    Args:
        rounds: samples of each.

    Returns:
        CPU seconds, medians.
    """
    lm, length = model(SHAPE), CANVASES[-1]
    steps, picked, stepped = Steps(lm, length, length), [], []
    for number in track(range(rounds + 1), "picking", transient=True):
        times = generate(lm, length, "argmax", steps=1)
        sample = steps.step(ESTIMATES["argmax"])
        if number:
            picked.append(times[-1][0] - times[0][0])
            stepped.append(sample.cpu)
    return {"length": length, "picking": statistics.median(picked), "step": statistics.median(stepped)}


def tables(card: dict[str, Any]) -> list[Table]:
    """Tables of a result.

    Args:
        card: what is written to the result file.

    Returns:
        Tables to print.
    """
    found = []
    for group, row in card["groups"].items():
        table = Table("", "ms", "x first", box=box.SIMPLE_HEAD, title=group)
        for name, case in row.items():
            table.add_row(name, f"{1e3 * case['seconds']:,.1f}", f"{case['cost']:.2f}")
        found.append(table)
    table = Table("", "length", "added, MiB", "one (L, V), MiB", box=box.SIMPLE_HEAD, title="peak memory")
    for row in card["memory"]:
        mebi = (f"{row[name] / 2**20:,.0f}" for name in ("added", "canvas"))
        table.add_row(row["case"], f"{row['length']:,}", *mebi)
    found.append(table)
    table = Table("", "s", box=box.SIMPLE_HEAD, title=f"length {card['picking']['length']:,}")
    table.add_row("picking all tokens", f"{card['picking']['picking']:.2f}")
    table.add_row("one reverse step", f"{card['picking']['step']:.2f}")
    return [*found, table]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Result file; bench/results/speed_tess_cpu.json when absent.")
    ] = None,
    reward: Annotated[Path | None, typer.Option(help="Where to put a reward model, to measure guidance, too.")] = None,
    alone: Annotated[
        str | None, typer.Option(hidden=True, help="Generate LENGTH/ESTIMATE and print its memory.")
    ] = None,
) -> None:
    """Measure, print tables, and write the result file."""
    torch.set_num_threads(threads)
    if alone is not None:
        sys.stdout.write(held_alone(alone))
        return
    out = result_file(out, "speed_tess_cpu.json")
    # First, because a process starts with the peak of the one that started it, which is still without models.
    held = memory()
    if reward is not None:
        config = LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0)
        LlamaForSequenceClassification(config).save_pretrained(reward)
    samples = measure(step_cases(None if reward is None else str(reward)), rounds)
    wider = measure({f"{LENGTH} of {LENGTH} noised, width {WIDER['hidden_size']:,}": wider_cases()}, rounds)
    rows = {group: with_floor(row) for group, row in (samples | wider).items()}
    targets = [(group, "argmax", "cost", LIMITS["argmax"]) for group in rows]
    for group, row in samples.items():
        beside = f"{group}, beside argmax"
        rows[beside] = {name: row[name] for name in ESTIMATES}
        targets += [(beside, name, "cost", limit) for name, limit in LIMITS.items() if name != "argmax"]
    behind = {f"backbone, {LENGTH} noised behind {PROMPT:,}": prompt_cases()}
    rows |= measure({**behind, f"{ANSWERS} answers of {ANSWER} tokens": answer_cases(model(SHAPE))}, rounds)
    result = summarize(rows, unit="cpu", memory={}, targets=targets)
    settings = {
        "model": SHAPE,
        "wider_model": WIDER,
        "model_for_memory": WIDE,
        "steps_for_memory": STEPS,
        "rounds": rounds,
        "run": RUN,
    }
    card = {"device": "cpu", "seconds_are": "cpu", "settings": settings, **environment(1), **result}
    card |= {"memory": held, "picking": picking(min(rounds, 5))}
    console = Console()
    for table in tables(card):
        console.print(table)
    write(out, card)


if __name__ == "__main__":
    run_script(main)
