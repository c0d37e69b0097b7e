"""Train bench/runs/gsm8k_small.yaml and measure what came out.

    python bench/quality.py --out /tmp/gsm8k-small [--results bench/results]

Run it where `openai/gsm8k` is a folder, or with access to the hub. A second call with the same --out only measures.
Writes gsm8k_small.json, .md and .png: held-out loss of the base and of L2D by t on the same answer tokens, the unigram
entropy of those tokens, speed, memory, and three sample generations.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import l2d_framework as l2d
from l2d_framework.cli.progress import progress
from l2d_framework.config import DiffusionRun, load_run
from l2d_framework.model import DiffusionLM
from l2d_framework.objective import NoiseRule, chunked_cross_entropy, denoising_loss, draw
from l2d_framework.training.collate import Collator
from l2d_framework.training.data import prepare
from l2d_framework.training.run import train_runs
from l2d_framework.types import Layout

BINS = 10
RUN_FILE = Path(__file__).parent / "runs" / "gsm8k_small.yaml"


@torch.no_grad()
def losses_by_time(lm: DiffusionLM, rows: Any) -> dict[str, Any]:
    """Cross-entropy of the base and of L2D on the same held-out answer tokens.

    Args:
        lm: the trained model.
        rows: encoded held-out examples.

    Returns:
        `base` and its number of `tokens`; per bin of t the `l2d` loss, the paired `difference` to the base and its
        standard error; the `unigram_entropy` of the tokens; all in nats per token.
    """
    collate, bins = Collator(0), [[[], []] for _ in range(BINS)]
    base_sum, counts = 0.0, Counter()
    for start in range(0, len(rows), 16):
        tensors = collate([rows[i] for i in range(start, min(start + 16, len(rows)))])
        layout = Layout(tensors["input_ids"], tensors["blocks"])
        draws = draw(lm, layout, NoiseRule(keys=[("quality", int(i)) for i in tensors["index"]]))
        found = denoising_loss(lm, layout, draws)
        plain = lm.backbone.plain(draws.positions, lm.backbone.read(layout))[draws.valid]
        targets = layout.tokens.gather(1, draws.positions)[draws.valid]
        _, base = chunked_cross_entropy(lm.backbone.head, plain, targets, chunk=1024)
        base_sum += float(base.sum())
        counts.update(targets.tolist())
        for t, loss, reference in zip(found.t.tolist(), found.tokens.tolist(), base.tolist(), strict=True):
            bins[min(int(t * BINS), BINS - 1)][0].append(loss)
            bins[min(int(t * BINS), BINS - 1)][1].append(loss - reference)
    total = sum(counts.values())
    return {
        "tokens": total,
        "unigram_entropy": -sum(n / total * math.log(n / total) for n in counts.values()),
        "base": base_sum / total,
        "by_time": [
            {
                "t": [i / BINS, (i + 1) / BINS],
                "tokens": len(losses),
                "l2d": sum(losses) / len(losses),
                "difference": sum(gaps) / len(gaps),
                "standard_error": float(torch.tensor(gaps).std() / math.sqrt(len(gaps))),
            }
            for i, (losses, gaps) in enumerate(bins)
        ],
    }


def samples(lm: DiffusionLM, rows: Any, count: int = 3) -> list[dict[str, str]]:
    """Answers to the first held-out questions.

    Args:
        lm: the trained model.
        rows: encoded held-out examples.
        count: how many.

    Returns:
        Question, gold answer and generated answer of each.
    """
    found = []
    for row in rows.select(range(count)):
        start = row["supervised"].index(True)
        prompt = torch.tensor([row["input_ids"][:start]])
        answer = lm.generate(prompt, max_new_tokens=96, seed=0).answers[0]
        texts = (prompt[0], row["input_ids"][start:], answer)
        names = ("question", "gold", "generated")
        found.append({n: lm.tokenizer.decode(t, skip_special_tokens=True) for n, t in zip(names, texts, strict=True)})
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss against t.

    Args:
        result: what `main` writes.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    losses = result["held_out"]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    middle = [sum(entry["t"]) / 2 for entry in losses["by_time"]]
    axes.errorbar(
        middle,
        [entry["l2d"] for entry in losses["by_time"]],
        yerr=[entry["standard_error"] for entry in losses["by_time"]],
        marker="o",
        capsize=3,
        color="#0072b2",
        label="L2D",
    )
    axes.axhline(losses["base"], color="#d55e00", linestyle="--", label="base model (t = 0)")
    axes.set(xlabel="t (0 = noise, 1 = data)", ylabel="held-out loss, nats per answer token", ylim=(0, None))
    axes.set_title("GSM8K, small Llama trained from scratch")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def table(result: dict[str, Any]) -> str:
    """The result as markdown.

    Args:
        result: what `main` writes.

    Returns:
        Markdown.
    """
    held_out, cards = result["held_out"], result["runs"]
    lines = [
        "# GSM8K from scratch, then L2D",
        "",
        f"Machine: {result['hardware']['cpu']}, {result['hardware']['cores']} cores. Held-out answer tokens: "
        f"{held_out['tokens']:,}; their unigram entropy is {held_out['unigram_entropy']:.3f} nats, the base model's loss "
        f"{held_out['base']:.3f}.",
        "",
        "| run | trained parameters | updates | tokens/s | minutes | peak memory |",
        "|---|---|---|---|---|---|",
        *(
            f"| {card['kind']} | {card['trainable']:,} | {card['steps']} | {card['tokens_per_second']:,.0f} "
            f"| {card['seconds'] / 60:.1f} | {card['peak_memory'] / 2**30:.2f} GiB |"
            for card in cards
        ),
        "",
        "| t | L2D loss | minus base, same tokens | standard error |",
        "|---|---|---|---|",
        *(
            f"| {e['t'][0]:.1f} to {e['t'][1]:.1f} | {e['l2d']:.3f} | {e['difference']:+.3f} | {e['standard_error']:.3f} |"
            for e in held_out["by_time"]
        ),
        "",
        "Sample generations, 15 evaluations a token:",
        "",
        *(f"> **Q** {s['question']}\n>\n> **A** {s['generated']}\n" for s in result["samples"]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as for l2d train")
    arguments = parser.parse_args()
    base, out = arguments.out / "base", arguments.out / "l2d"
    folders = [f"stages.0.output_dir={base}", f"stages.1.output_dir={out}", f"stages.1.model.base={base}"]
    runs = load_run(RUN_FILE, [*folders, *arguments.overrides])
    cards = train_runs(runs, callbacks=lambda run: [progress(Console(), run.kind)])
    lm = l2d.load(out)
    run = runs[1]
    assert isinstance(run, DiffusionRun)
    assert run.data is not None
    rows = prepare(run.data, lm.tokenizer, seed=run.seed).eval
    result = {
        "hardware": cards[1]["hardware"],
        "versions": cards[1]["versions"],
        "config_hashes": [card["config_hash"] for card in cards],
        "runs": [
            {
                "kind": card["kind"],
                "trainable": card["parameters"]["trainable"],
                "seconds": card["seconds"],
                "data": card["data"]["splits"],
                **card["result"],
            }
            for card in cards
        ],
        "held_out": losses_by_time(lm, rows),
        "samples": samples(lm, rows),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name, text in {"json": json.dumps(result, indent=2), "md": table(result)}.items():
        target = arguments.results / f"gsm8k_small.{name}"
        target.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        os.replace(target.with_suffix(".part"), target)
    plot(result, arguments.results / "gsm8k_small.png")


if __name__ == "__main__":
    main()
