"""All figures of speed in one unattended run: `python bench/speed/gpu.py [--minutes 8] [--device cuda]`.

Random weights, smallest questions first, the result file written after each, so that a run that is cut short keeps what
it has. Within a question every round measures every case once, so that a busy machine slows all of them alike; ratios
are medians over rounds. On a CPU, seconds are those of the process, not of the clock, and `--size small` is meant.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import check_known, known_device, result_file, write_card
from l2d import EVALUATIONS, LORA, PLAIN, RUN, diffusion_loss, l2d_over, language_model_loss, train
from l2d import Bench as Training
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from l2d_framework.cli import run_script
from l2d_framework.generation.prompts import Encoded
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run_record import environment

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "small": {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    # Llama 3.2 1B
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
}
HEADS = {"tiny": (4, 2), "small": (8, 4), "1b": (32, 8)}
Cases = dict[str, Callable[[], int]]
"""What to measure by name: each returns how many tokens it made. The first is what the others are compared with."""


@dataclass
class Bench:
    """One set of random weights on one device."""

    device: torch.device
    size: str
    prompt: int
    new_tokens: int
    rounds: int
    vocabulary: int | None = None  # instead of the size's own
    questions: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None  # called after each answer

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def lm(self) -> Any:
        """The language model."""
        torch.manual_seed(0)
        heads, groups = HEADS[self.size]
        shape = {**SIZES[self.size], "num_attention_heads": heads, "num_key_value_heads": groups}
        shape["vocab_size"] = self.vocabulary or shape["vocab_size"]
        with self.device:  # where a billion random numbers take no time
            lm: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096))
        return lm.to(self.device, self.dtype).eval()

    @cached_property
    def diffusion(self) -> DiffusionLM:
        """L2D over it, nothing of which is zero, lest somebody profits from it."""
        return l2d_over(self.lm, self.dtype).eval()

    @cached_property
    def training(self) -> Training:
        """LoRA and L2D in training, over copies of the language model's weights."""
        found = Training(str(self.device))
        found.lm = self.lm
        return found

    def floor(self, evaluations: int, rows: int = 1) -> float | None:
        """Milliseconds a token that reading the weights takes at least; None while the bandwidth is unknown."""
        known = self.questions.get("bandwidth")
        return None if known is None else (1 + evaluations) * known["ms_per_pass"] / rows

    def agree(self, scale: float) -> None:
        """Let the diffusion path move the language model's states by so many times of what it would."""
        last: Any = self.diffusion.get_submodule("backbone.conditioning.final.2")
        if not hasattr(self, "_final"):
            self._final = [weight.data.clone() for weight in last.parameters()]
        for weight, data in zip(last.parameters(), self._final, strict=True):
            weight.data.copy_(scale * data)

    def tokens(self, rows: int, length: int | None = None) -> Tensor:
        """Random prompts."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(5, self.lm.config.vocab_size, (rows, length or self.prompt), generator=generator)
        return ids.to(self.device)

    def plain(self, rows: int, length: int | None = None) -> int:
        """transformers' own answer."""
        given = self.tokens(rows, length)
        options = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "pad_token_id": 0}
        self.lm.generate(given, do_sample=False, eos_token_id=None, **options)
        return rows * self.new_tokens

    def answer(self, rows: int, length: int | None = None, **options: Any) -> int:
        """L2D's answer."""
        ids = self.tokens(rows, length)
        # Prompts that begin alike would be read together, which is another question.
        encoded = Encoded(ids, torch.ones_like(ids))
        options = {"max_new_tokens": self.new_tokens, "do_sample": False, "eos_token_id": None, **options}
        self.last = self.diffusion.generate(encoded, pad_token_id=0, **options)
        return rows * int(options.get("num_return_sequences", 1)) * self.new_tokens

    def seconds(self) -> float:
        """Seconds of the process on a CPU, else of the clock once the device has done its work."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def ask(self, name: str, cases: Cases, **facts: Any) -> None:
        """Measure cases in turns, after one round that does not count, and keep the answer.

        Memory is what a case takes beside what lay there before it, since models of other questions lie there, too.
        """
        samples: dict[str, list[float]] = {case: [] for case in cases}
        peaks: dict[str, float] = {}
        for number in range(self.rounds + 1):
            for case, run in cases.items():
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                begun = self.seconds()
                made = run()
                spent = (self.seconds() - begun) / made
                if number:
                    samples[case].append(spent)
                if self.device.type == "cuda":
                    peaks[case] = (torch.cuda.max_memory_allocated() - before) / 2**30
        reference = next(iter(samples.values()))
        rows = {
            case: {
                "ms_per_token": 1e3 * statistics.median(spent),
                "cost": statistics.median(a / b for a, b in zip(spent, reference, strict=True)),
                "peak_gib": peaks.get(case),
                "samples": spent,
            }
            for case, spent in samples.items()
        }
        self.questions[name] = {"cases": rows, **facts}
        print(name)
        for case, row in rows.items():
            print(f"  {case:44} {row['ms_per_token']:10.2f} ms/token {row['cost']:8.2f} x", flush=True)
        self.keep()


def same_tokens(bench: Bench) -> None:
    """Whether every way to run a request writes the same: in this type, by token."""
    ways = {"unmerged": {"merge": "never", "graph": False}, "merged": {"graph": False}, "graph": {}}
    ways |= {"guessed": {"speculate": 4}}
    answers = {}
    for name, options in ways.items():
        bench.answer(4, **options)
        answers[name] = bench.last.answers
    equal = {name: float((answer == answers["merged"]).float().mean()) for name, answer in answers.items()}
    bench.questions["share of equal tokens"] = equal
    print("share of equal tokens", equal)


def bandwidth(bench: Bench) -> None:
    """What a token must take at least: all weights read once by the language model, and once for each evaluation."""
    source = torch.ones(2**28 if bench.device.type == "cuda" else 2**25, device=bench.device)
    target, spent = torch.empty_like(source), []
    for _ in range(bench.rounds + 1):
        begun = bench.seconds()
        target.copy_(source)
        spent.append(bench.seconds() - begun)
    rate = 2 * source.nbytes / statistics.median(spent[1:])  # read and written
    weights = sum(weight.nbytes for weight in bench.lm.parameters())
    floor = 1e3 * weights / rate
    facts = {"bytes_per_second": rate, "bytes_of_weights": weights, "ms_per_pass": floor}
    bench.questions["bandwidth"] = facts
    print(f"bandwidth {rate / 1e9:,.0f} GB/s, a pass over {weights / 1e9:.2f} GB takes at least {floor:.2f} ms")


def ways(bench: Bench, rows: int) -> None:
    """Plain generation, and L2D with one thing after the other."""
    cases: Cases = {
        PLAIN: partial(bench.plain, rows),
        "L2D, argmax, unmerged": partial(bench.answer, rows, estimate={"mode": "argmax"}, merge="never", graph=False),
        "L2D, argmax": partial(bench.answer, rows, estimate={"mode": "argmax"}, graph=False),
        "L2D, sampled": partial(bench.answer, rows, estimate={"mode": "sample"}, graph=False),
    }
    if bench.device.type == "cuda":
        for mode in ("argmax", "sample"):
            cases[f"L2D, {mode}, graph"] = partial(bench.answer, rows, estimate={"mode": mode})
    bench.ask(f"batch, {rows}", cases, batch=rows, floor=bench.floor(EVALUATIONS, rows))


def evaluations(bench: Bench) -> None:
    """Time per token against the number of evaluations."""
    for count in (1, 3, 7, 15, 31):
        cases: Cases = {PLAIN: partial(bench.plain, 1), "L2D": partial(bench.answer, 1, num_inference_steps=count)}
        bench.ask(f"evaluations, {count}", cases, evaluations=count, floor=bench.floor(count))


def adaptive(bench: Bench, rows: int) -> None:
    """Time per token where every row chooses its steps, with as many evaluations as that takes."""
    solve = partial(bench.answer, rows, solver="fehlberg2", num_inference_steps=None)
    cases: Cases = {PLAIN: partial(bench.plain, rows), "L2D": partial(solve, graph=False)}
    if bench.device.type == "cuda":
        cases["L2D, graph"] = solve
    solve(max_new_tokens=2)
    bench.ask(f"adaptive, batch {rows}", cases, evaluations=float(bench.last.evaluations.float().mean()))


def compiled(bench: Bench, rows: int) -> None:
    """Time per token with layers that torch.compile has made, in graphs where the device has them."""
    cases: Cases = {PLAIN: partial(bench.plain, rows), "L2D": partial(bench.answer, rows)}
    cases["L2D, compiled"] = partial(bench.answer, rows, compile=True)
    bench.ask(f"compiled, batch {rows}", cases)


def contexts(bench: Bench) -> None:
    """Time per token against the length of the prompt."""
    for length in (128, 512, 2048):
        cases: Cases = {PLAIN: partial(bench.plain, 1, length), "L2D": partial(bench.answer, 1, length)}
        bench.ask(f"context, {length}", cases, context=length)


def vocabularies(bench: Bench) -> None:
    """Time per token against the size of the vocabulary."""
    own = SIZES[bench.size]["vocab_size"]
    for size in (own // 4, own // 2, own, 2 * own):
        other = replace(bench, vocabulary=size)
        cases: Cases = {PLAIN: partial(other.plain, 1), "L2D": partial(other.answer, 1)}
        other.ask(f"vocabulary, {size}", cases, vocabulary=size)


def updates(bench: Bench, length: int, share: float) -> Cases:
    """Updates of eight sequences each, the last tokens of which are supervised."""
    supervised = max(1, int(share * length))

    def update(trained: str, loss: Callable[[Training, Any, int], Tensor]) -> int:
        own = bench.training
        own.rows, own.sequence = 8, length
        train(own, trained, loss, supervised)
        return own.rows * length

    return {LORA: partial(update, "lora", language_model_loss), "L2D": partial(update, "trained", diffusion_loss)}


def lengths(bench: Bench) -> None:
    """Training with all tokens supervised against the length of sequences."""
    for length in (bench.prompt // 2, bench.prompt, 2 * bench.prompt, 4 * bench.prompt):
        bench.ask(f"length, {length}", updates(bench, length, 1.0), length=length)


def shares(bench: Bench) -> None:
    """Training against the share of supervised tokens."""
    for share in (1.0, 0.5, 0.25, 0.1):
        bench.ask(f"supervised, {share}", updates(bench, 2 * bench.prompt, share), supervised=share)


def speculation(bench: Bench) -> None:
    """Time per token where the language model guesses ahead, against how often it is right."""
    for scale in (0.0, 3.0, 6.0, 8.5, 40.0):
        bench.agree(scale)
        cases: Cases = {"off": partial(bench.answer, 1, do_sample=True, graph=False)}
        for count in (2, 4, 8, "auto"):
            cases[f"{count}"] = partial(bench.answer, 1, do_sample=True, speculate=count)
        name = f"agreement, scale {scale:g}"
        bench.answer(1, do_sample=True, speculate=1, max_new_tokens=8 * bench.new_tokens)
        made, right = bench.last.guesses
        print(f"agreement {right / max(made, 1):.2f}")
        bench.ask(name, cases, agreement=right / max(made, 1))
    bench.agree(1.0)


def samples(bench: Bench) -> None:
    """Ten answers to a prompt, at once and one by one."""
    ten = [partial(bench.answer, 1, seed=number) for number in range(10)]
    cases: Cases = {
        "ten generations": lambda: sum(run() for run in ten),
        "ten samples": partial(bench.answer, 1, num_return_sequences=10),
    }
    bench.ask("ten answers", cases)


def parts(bench: Bench) -> Iterator[Callable[[], None]]:
    """Questions, the most valuable first."""
    yield partial(bandwidth, bench)
    yield partial(same_tokens, bench)
    yield partial(ways, bench, 1)
    yield partial(speculation, bench)
    yield partial(evaluations, bench)
    yield partial(compiled, bench, 1)
    yield partial(adaptive, bench, 1)
    yield partial(adaptive, bench, 8)
    yield partial(ways, bench, 8)
    yield partial(samples, bench)
    yield partial(shares, bench)
    yield partial(contexts, bench)
    yield partial(compiled, bench, 8)
    yield partial(ways, bench, 32)
    yield partial(lengths, bench)
    yield partial(vocabularies, bench)


Number = Callable[[dict[str, Any]], float | None]


def _time(case: dict[str, Any]) -> float:
    return float(case["ms_per_token"])


def _speed(case: dict[str, Any]) -> float:
    return 1e3 / float(case["ms_per_token"])


def _gain(case: dict[str, Any]) -> float:
    return 1 / float(case["cost"])


def _peak(case: dict[str, Any]) -> float | None:
    return None if case["peak_gib"] is None else float(case["peak_gib"])


class Panel(NamedTuple):
    """One picture: a number of some cases against a fact of their questions, whose names begin with that fact."""

    fact: str
    x: str
    y: str
    number: Number
    cases: Sequence[str] = (PLAIN, "L2D")

    def lines(self, questions: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
        """Points of every case that has at least two, and of the floor of time."""
        chosen = [part for name, part in questions.items() if name.startswith(self.fact)]
        found: dict[str, list[tuple[float, float]]] = {"floor": []}
        for part in sorted(chosen, key=lambda part: float(part[self.fact])):
            if self.number is _time and part.get("floor"):
                found["floor"].append((part[self.fact], part["floor"]))
            for case in (case for case in self.cases if case in part["cases"]):
                if (number := self.number(part["cases"][case])) is not None:
                    found.setdefault(case, []).append((part[self.fact], number))
        return {case: points for case, points in found.items() if len(points) > 1}


_TRAINED = (LORA, "L2D")
_ANSWERED = (PLAIN, "L2D, argmax", "L2D, sampled", "L2D, argmax, graph", "L2D, sample, graph")
_MS, _GIB = "ms per token", "memory beside all weights, GiB"
PANELS = (
    Panel("evaluations", "evaluations per token", _MS, _time),
    Panel("agreement", "share of guesses that are right", "times faster", _gain, ("2", "4", "8", "auto")),
    Panel("batch", "answers at once", _MS, _time, _ANSWERED),
    Panel("context", "tokens of the prompt", _MS, _time),
    Panel("vocabulary", "tokens of the vocabulary", _MS, _time),
    Panel("length", "tokens of a sequence", "trained tokens per second", _speed, _TRAINED),
    Panel("supervised", "share of tokens that are supervised", "trained tokens per second", _speed, _TRAINED),
    Panel("batch", "answers at once", _GIB, _peak, _ANSWERED),
    Panel("context", "tokens of the prompt", _GIB, _peak),
    Panel("length", "tokens of a sequence", _GIB, _peak, _TRAINED),
)


def draw(questions: dict[str, Any], out: Path) -> None:
    """What was measured, a panel for each of the questions that were answered."""
    from matplotlib.figure import Figure

    shown = [(panel, lines) for panel in PANELS if (lines := panel.lines(questions))]
    rows = math.ceil(len(shown) / 3)
    if not rows:
        return
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    places = figure.subplots(rows, 3, squeeze=False).flat
    for (panel, lines), axes in zip(shown, places, strict=False):
        for case, points in lines.items():
            style = {"color": "grey", "linestyle": "dashed"} if case == "floor" else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=f"{case} guesses" if case.isdigit() else case, **style)
        axes.set(xlabel=panel.x, ylabel=panel.y, ylim=(0, None))
        axes.legend(fontsize="small")
    for axes in list(places):
        axes.remove()
    figure.savefig(out, dpi=150)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    size: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SIZES)}.")] = "1b",
    minutes: Annotated[float, typer.Option(min=0.1, help="No question is begun after so many.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 5,
    prompt: Annotated[int, typer.Option(min=4, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="Only such questions, by name, such as speculation.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/decode_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print, draw, and write the result file after each question."""
    where = known_device(device)
    check_known("--size", [size], SIZES)
    out = result_file(out, f"decode_{where.type}.json")
    if where.type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(where, size, prompt, new_tokens, rounds)
    questions = [(getattr(part, "func", part).__name__, part) for part in parts(bench)]
    check_known("--only", only or (), dict.fromkeys(name for name, _ in questions))
    settings = {"size": size, "shape": SIZES[size], "run": RUN, "prompt": prompt, "new_tokens": new_tokens}
    unit = "cpu" if bench.device.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings | {"rounds": rounds}, **environment(1)}
    begun = time.monotonic()

    def keep() -> None:
        write_card(out, card | {"seconds": time.monotonic() - begun, "questions": bench.questions})

    bench.keep = keep
    for name, part in questions:
        if only and name not in only:
            continue
        if time.monotonic() - begun > 60 * minutes:
            print("The time is up; what has been measured is kept.")
            break
        try:
            part()
        except torch.OutOfMemoryError as error:
            bench.questions.setdefault("out of memory", []).append(str(error).partition(".")[0])
        keep()
    draw(bench.questions, out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
