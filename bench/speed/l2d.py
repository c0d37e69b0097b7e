"""Speed and memory of L2D beside the language model it is built on: `python bench/speed/l2d.py [--device cuda]`.

One run, one machine, the same random weights. Every round measures every case once, so that a busy machine slows all of
them alike, and ratios are medians over rounds. On a CPU, seconds are those of the process, not of the clock.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import known_device, result_file, write_card
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from l2d_framework.cli import run_script
from l2d_framework.config import DiffusionRun, parse_run
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.metrics import peak_memory
from l2d_framework.training.run_record import environment
from l2d_framework.types import Layout

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
PROMPT, NEW_TOKENS, EVALUATIONS = 128, 9, 15
SEQUENCE, RANK = 256, 32

PLAIN, LORA = "transformers' generate", "LoRA"
TARGETS = (
    *(
        (f"decode, batch {batch}", f"{name}, {mode}", "cost", 17.0)
        for batch in (1, 8)
        for name in ("L2D", "L2D merged")
        for mode in ("argmax", "sample")
    ),
    ("train, 100 % supervised", "L2D", "speed", 0.75),
    ("train, 25 % supervised", "L2D", "speed", 1.5),
)
"""Group, case, whether `cost` or `speed` in multiples of the group's first case, and how much is wanted."""

RUN = {
    "model": {"base": "random"},
    "schedule": {"name": "linear"},
    "parametrization": {"name": "embedding"},
    "backbone": {"name": "two_stream", "rank": RANK},
    "sampling": {"preset": "l2d-paper", "num_inference_steps": EVALUATIONS},
}


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        cpu: seconds of the process per unit of work.
        wall: seconds of the clock per unit of work.
        first: seconds until the first unit, such as the prompt's; 0 where there is none.
    """

    cpu: float
    wall: float
    first: float = 0.0


def seconds() -> tuple[float, float]:
    """Seconds of the process and of the clock."""
    return time.process_time(), time.perf_counter()


def l2d_over(lm: Any, dtype: torch.dtype) -> DiffusionLM:
    """L2D over a language model, nothing of which is zero, lest somebody profits from it.

    Args:
        lm: the language model.
        dtype: of L2D's own weights.

    Returns:
        The model, where the language model is.
    """
    torch.manual_seed(1)
    run = parse_run(RUN)
    assert isinstance(run, DiffusionRun)
    backbone = run.backbone.build(lm)
    state_space = run.parametrization.build(backbone.vocab_size, backbone.hidden_size)
    model = DiffusionLM(run.schedule.build(), state_space, backbone, run.block_size).to(lm.device)
    for parameter in model.own_parameters().values():
        parameter.data = parameter.data.to(dtype)
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


class Bench:
    """Models of one set of random weights, made when a case first needs them.

    Args:
        device: where to run; in bfloat16 on a GPU.

    Attributes:
        rows: sequences of an update.
        sequence: tokens of each.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rows, self.sequence = 1, SEQUENCE

    def seconds(self) -> tuple[float, float]:
        """CPU and wall seconds, once the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return seconds()

    @cached_property
    def lm(self) -> Any:
        """The language model."""
        torch.manual_seed(0)
        lm: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
        return lm.to(self.device, self.dtype).eval()

    @cached_property
    def diffusion(self) -> DiffusionLM:
        """The diffusion model, to generate with."""
        return l2d_over(self.lm, self.dtype).eval()

    @cached_property
    def trained(self) -> tuple[DiffusionLM, torch.optim.Optimizer]:
        """A diffusion model with float32 weights of its own, and its optimizer."""
        model = l2d_over(self.lm, torch.float32).train()
        return model, torch.optim.AdamW(model.own_parameters().values(), lr=1e-5, fused=True)

    @cached_property
    def lora(self) -> tuple[Any, torch.optim.Optimizer]:
        """peft's plain LoRA on all linear modules, and its optimizer."""
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(self.lm).train(), config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def tokens(self, rows: int, columns: int) -> Tensor:
        """Random token ids, (rows, columns)."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(0, self.lm.config.vocab_size, (rows, columns), generator=generator).to(self.device)


class _Clock(StoppingCriteria):
    """Notes the time of every token."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.times = bench, [bench.seconds()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(self.bench.seconds())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _decode(bench: Bench, model: str, batch: int, **options: Any) -> Sample:
    """Seconds per further token of `generate`, whose stopping criteria look at the clock."""
    clock = _Clock(bench)
    getattr(bench, model).generate(
        bench.tokens(batch, PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    (start, _), first, last = clock.times[0], clock.times[1], clock.times[-1]
    cpu, wall = ((b - a) / (NEW_TOKENS - 1) for a, b in zip(first, last, strict=True))
    return Sample(cpu, wall, first[0] - start)


def train(bench: Bench, trained: str, loss: Callable[[Bench, Any, int], Tensor], supervised: int) -> Sample:
    """An update, whose last `supervised` tokens of every sequence count.

    Args:
        bench: the models.
        trained: attribute of the bench with model and optimizer.
        loss: of bench, model and `supervised`.
        supervised: tokens.

    Returns:
        Seconds per token of the sequences, optimizer included.
    """
    model, optimizer = getattr(bench, trained)
    start = bench.seconds()
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype is torch.bfloat16):
        total = loss(bench, model, supervised)
    total.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    cpu, wall = ((b - a) / (bench.rows * bench.sequence) for a, b in zip(start, bench.seconds(), strict=True))
    return Sample(cpu, wall)


def diffusion_loss(bench: Bench, model: DiffusionLM, supervised: int) -> Tensor:
    """L2D's loss of sequences whose last `supervised` tokens count."""
    tokens, last = bench.tokens(bench.rows, bench.sequence), bench.sequence - 1
    blocks = torch.arange(bench.sequence, device=bench.device) - (last - min(supervised, last))
    layout = Layout(tokens, blocks.clamp_min(0).expand_as(tokens))
    losses = denoising_loss(model, layout, draw(model, layout, NoiseRule(keys=[(row,) for row in range(bench.rows)])))
    return losses.total / losses.count


def frugal_diffusion_loss(bench: Bench, model: DiffusionLM, supervised: int) -> Tensor:
    """The same with layers computed again in the backward pass instead of remembered."""
    backbone: Any = model.backbone
    backbone.gradient_checkpointing = True
    loss = diffusion_loss(bench, model, supervised)
    backbone.gradient_checkpointing = False
    return loss


def language_model_loss(bench: Bench, model: Any, supervised: int) -> Tensor:
    """The plain loss as transformers computes it: logits everywhere, labels of -100 where nothing counts."""
    tokens = bench.tokens(bench.rows, bench.sequence)
    labels = tokens.clone()
    labels[:, : bench.sequence - supervised] = -100
    return model(input_ids=tokens, labels=labels).loss  # type: ignore[no-any-return]


def sparse_language_model_loss(bench: Bench, model: Any, supervised: int) -> Tensor:
    """The plain loss with the vocabulary head at supervised positions only, which transformers leaves to its users."""
    tokens, last = bench.tokens(bench.rows, bench.sequence), bench.sequence - 1
    keep = torch.arange(last - supervised, last, device=bench.device)
    logits = model(input_ids=tokens, logits_to_keep=keep).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, keep + 1].flatten())


Cases = dict[str, dict[str, Callable[[], Sample]]]
"""What to measure by group and name; the first of a group is what the others are compared with."""


def cases(bench: Bench) -> Cases:
    """Everything that is measured.

    Args:
        bench: the models.

    Returns:
        Functions that measure once.
    """
    found: Cases = {}
    for batch in (1, 8):
        group = found[f"decode, batch {batch}"] = {PLAIN: partial(_decode, bench, "lm", batch)}
        for name, merge in (("L2D", "never"), ("L2D merged", "always")):
            for mode in ("argmax", "sample"):
                options = {"estimate": {"mode": mode}, "merge": merge}
                group[f"{name}, {mode}"] = partial(_decode, bench, "diffusion", batch, **options)
    for share, supervised in ((100, SEQUENCE), (25, SEQUENCE // 4)):
        group = found[f"train, {share} % supervised"] = {}
        group[LORA] = partial(train, bench, "lora", language_model_loss, supervised)
        group["LoRA, head there only"] = partial(train, bench, "lora", sparse_language_model_loss, supervised)
        group["L2D"] = partial(train, bench, "trained", diffusion_loss, supervised)
        group["L2D, gradient checkpointing"] = partial(train, bench, "trained", frugal_diffusion_loss, supervised)
    return found


def measure(cases: Cases, rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """Samples of every case, taken in turns after one round that does not count.

    Args:
        cases: what to measure.
        rounds: samples of each.

    Returns:
        `rounds` samples by group and name.
    """
    samples: dict[str, dict[str, list[Sample]]] = {group: {name: [] for name in row} for group, row in cases.items()}
    for number in track(range(rounds + 1), "rounds", transient=True):
        for group, row in cases.items():
            for name, run in row.items():
                sample = run()
                if number:
                    samples[group][name].append(sample)
    return samples


def memory_alone(device: str, cases: Cases) -> dict[str, dict[str, int]]:
    """Peak memory of every case in a process of its own, bytes."""
    command = [sys.executable, __file__, "--device", device, "--threads", str(torch.get_num_threads()), "--alone"]

    def peak(case: str) -> int:
        return int(subprocess.run([*command, case], check=True, capture_output=True, text=True).stdout)

    return {group: {name: peak(f"{group}/{name}") for name in row} for group, row in cases.items()}


def summarize(
    samples: Mapping[str, Mapping[str, Sequence[Sample]]],
    *,
    unit: str,
    memory: Mapping[str, Mapping[str, int]],
    targets: Sequence[tuple[str, str, str, float]] = TARGETS,
) -> dict[str, Any]:
    """Medians and ratios.

    Args:
        samples: by group and name, the reference first.
        unit: which seconds count, `cpu` or `wall`.
        memory: peak bytes by group and name; may be empty.
        targets: as `TARGETS`.

    Returns:
        `groups`, with `cost` in multiples of the reference's seconds (median over rounds) and `speed`, its inverse; and
        `targets` with what was wanted and found.
    """
    groups: dict[str, dict[str, Any]] = {}
    for group, row in samples.items():
        reference = [getattr(sample, unit) for sample in next(iter(row.values()))]
        groups[group] = {}
        for name, found in row.items():
            seconds = [getattr(sample, unit) for sample in found]
            cost = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
            groups[group][name] = {
                "seconds": statistics.median(seconds),
                "cost": cost,
                "speed": 1 / cost,
                "first": statistics.median(sample.first for sample in found),
                "peak_memory": memory.get(group, {}).get(name),
                "samples": [asdict(sample) for sample in found],
            }
    compared: list[dict[str, Any]] = [
        {"group": g, "case": n, "what": what, "limit": limit, "found": groups[g][n][what]}
        for g, n, what, limit in targets
        if n in groups.get(g, {})
    ]
    for target in compared:
        found, limit = target["found"], target["limit"]
        target["met"] = found <= limit if target["what"] == "cost" else found >= limit
    return {"groups": groups, "targets": compared}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for every group and one of the targets.

    Args:
        result: what `summarize` returned.

    Returns:
        Tables to print.
    """
    found = []
    for group, row in result["groups"].items():
        is_training = group.startswith("train")
        speed = "tokens/s" if is_training else "ms per token"
        ratio = "x LoRA's speed" if is_training else "x plain's time"
        table = Table("", speed, ratio, "first token, ms", "peak memory, MiB", box=box.SIMPLE_HEAD, title=group)
        for name, case in row.items():
            shown = 1 / case["seconds"] if is_training else 1e3 * case["seconds"]
            memory = "" if case["peak_memory"] is None else f"{case['peak_memory'] / 2**20:,.0f}"
            first = f"{1e3 * case['first']:,.0f}" if case["first"] else ""
            table.add_row(name, f"{shown:,.1f}", f"{case['speed' if is_training else 'cost']:.2f}", first, memory)
        found.append(table)
    table = Table("", "wanted", "found", "", box=box.SIMPLE_HEAD, title="targets")
    for target in result["targets"]:
        sign = "at most" if target["what"] == "cost" else "at least"
        verdict = "met" if target["met"] else "missed"
        name = f"{target['group']}: {target['case']}"
        table.add_row(name, f"{sign} {target['limit']:g} x", f"{target['found']:.2f} x", verdict)
    return [*found, table]


def write(out: Path, card: Mapping[str, Any]) -> None:
    """Write a result file and say where it is.

    Args:
        out: the file.
        card: what to write.
    """
    write_card(out, card)
    Console().print(f"Written to {out}", highlight=False)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/speed_DEVICE.json when absent.")] = None,
    memory: Annotated[bool, typer.Option(help="Also run every case in a process of its own for its peak.")] = True,
    alone: Annotated[str | None, typer.Option(hidden=True, help="Run GROUP/NAME once and print its peak.")] = None,
) -> None:
    """Measure, print tables, and write the result file."""
    where = known_device(device)
    torch.set_num_threads(threads)
    bench = Bench(device)
    chosen = cases(bench)
    if alone is not None:
        group, _, name = alone.partition("/")
        chosen[group][name]()
        sys.stdout.write(f"{peak_memory(bench.device)}\n")
        return
    out = result_file(out, f"speed_{where.type}.json")
    unit = "cpu" if bench.device.type == "cpu" else "wall"
    # First, because a process starts with the peak of the one that started it, which is still without models.
    peaks = memory_alone(device, chosen) if memory else {}
    result = summarize(measure(chosen, rounds), unit=unit, memory=peaks)
    settings = {"model": SHAPE, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "evaluations": EVALUATIONS}
    settings |= {"sequence": SEQUENCE, "rank": RANK, "rounds": rounds, "dtype": str(bench.dtype), "run": RUN}
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1), **result}
    console = Console()
    for table in tables(card):
        console.print(table)
    write(out, card)


if __name__ == "__main__":
    run_script(main)
