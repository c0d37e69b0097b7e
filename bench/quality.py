"""Train a small run of bench/runs and measure what came out: `python bench/quality.py gsm8k_small --out FOLDER`.

Run it where the data set is a folder, or with access to the hub. Called again with the same folder, it goes on where it
was interrupted, and only measures once everything is trained. Writes NAME.json, NAME.md and NAME.png: held-out loss of
the base model and of L2D by t on the same answer tokens, the unigram entropy of those tokens, speed, memory, durations
and three sample generations.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import l2d_framework as l2d
from l2d_framework.cli.progress import progress
from l2d_framework.config import DiffusionRun, load_run
from l2d_framework.diffusion.loss import chunked_cross_entropy, denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.metrics import BINS
from l2d_framework.training.run import train_runs
from l2d_framework.types import Layout

HERE = Path(__file__).parent
EVALUATIONS = 15


@torch.no_grad()
def losses_by_time(lm: DiffusionLM, rows: Any) -> dict[str, Any]:
    """Cross-entropy of the base model and of L2D on the same held-out answer tokens.

    Args:
        lm: the trained model.
        rows: encoded held-out examples.

    Returns:
        `base` and its number of `tokens`; per bin of t the `l2d` loss, the paired `difference` to the base and its
        standard error; the `unigram_entropy` of the tokens; all in nats per token.
    """
    collate, counts = Collator(0), Counter[int]()
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(rows), 16):
        batch = collate([rows[i] for i in range(start, min(start + 16, len(rows)))])
        layout = Layout(batch["input_ids"], batch["blocks"])
        draws = draw(lm, layout, NoiseRule(keys=[("quality", i) for i in batch["index"].tolist()]))
        found = denoising_loss(lm, layout, draws)
        plain = lm.backbone.plain(draws.positions, lm.backbone.read(layout))[draws.valid]
        targets = layout.tokens.gather(1, draws.positions)[draws.valid]
        parts.append((found.t, found.tokens, chunked_cross_entropy(lm.backbone.head, plain, targets, chunk=1024)[1]))
        counts.update(targets.tolist())
    t, losses, base = (torch.cat(part).double() for part in zip(*parts, strict=True))
    bins = (t * BINS).long()
    total = counts.total()
    return {
        "tokens": total,
        "unigram_entropy": -sum(n / total * math.log(n / total) for n in counts.values()),
        "base": base.mean().item(),
        "by_time": [
            {
                "t": [i / BINS, (i + 1) / BINS],
                "tokens": int((bins == i).sum()),
                "l2d": losses[bins == i].mean().item(),
                "difference": (losses - base)[bins == i].mean().item(),
                "standard_error": (losses - base)[bins == i].std().item() / math.sqrt(int((bins == i).sum())),
            }
            for i in range(BINS)
        ],
    }


def checks(held_out: Mapping[str, Any]) -> dict[str, bool]:
    """What makes a run count as working.

    Args:
        held_out: what `losses_by_time` returned.

    Returns:
        Whether each holds, by sentence.
    """
    base, bins = held_out["base"], held_out["by_time"]
    near_zero = max(0.01 * base, 2 * bins[0]["standard_error"])
    falls = (b["difference"] < a["difference"] + 2 * b["standard_error"] for a, b in pairwise(bins))
    return {
        "the base model's loss is below 60 % of the unigram entropy": base < 0.6 * held_out["unigram_entropy"],
        "L2D's loss at t below 0.1 is the base model's, within 1 % or two standard errors": (
            abs(bins[0]["difference"]) <= near_zero
        ),
        "L2D's loss, compared with the base model's on the same tokens, rises from no bin of t to the next": all(falls),
        "L2D's loss at t above 0.9 is less than half of that below 0.1": bins[-1]["l2d"] < 0.5 * bins[0]["l2d"],
    }


def samples(lm: DiffusionLM, rows: Any, count: int = 3) -> list[dict[str, str]]:
    """Answers to the first held-out questions.

    Args:
        lm: the trained model.
        rows: encoded held-out examples.
        count: how many.

    Returns:
        Question, reference answer and generated answer of each.
    """
    assert lm.tokenizer is not None  # runs write one
    found = []
    for row in rows.select(range(count)):
        start = row["supervised"].index(True)
        prompt = torch.tensor([row["input_ids"][:start]])
        answer = lm.generate(prompt, max_new_tokens=96, num_inference_steps=EVALUATIONS, seed=0).answers[0]
        texts = {"question": prompt[0], "reference": row["input_ids"][start:], "generated": answer}
        found.append({name: str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for name, ids in texts.items()})
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw loss against t.

    Args:
        result: what `main` writes.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    held_out = result["held_out"]
    bins = held_out["by_time"]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(held_out["unigram_entropy"], color="0.5", linestyle=":", label="unigram entropy")
    axes.axhline(held_out["base"], color="#d55e00", linestyle="--", label="base model")
    axes.plot(
        [sum(entry["t"]) / 2 for entry in bins],
        [entry["l2d"] for entry in bins],
        marker="o",
        color="#0072b2",
        label="L2D, mean of each tenth of t",
    )
    axes.set(xlabel="t (0 = noise, 1 = data)", ylabel="held-out loss, nats per answer token", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['name']}: what the noisy state tells")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def report(result: Mapping[str, Any]) -> str:
    """The result as markdown.

    Args:
        result: what `main` writes.

    Returns:
        Markdown.
    """
    held_out, hardware = result["held_out"], result["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    runs = [
        f"| {run['kind']} | {run['trainable']:,} | {run['steps']:,} | {run['losses']['eval_loss']:.3f} "
        f"| {run['tokens_per_second']:,.0f} | {run['seconds'] / 60:.1f} | {run['peak_memory'] / 2**30:.2f} GiB |"
        for run in result["runs"]
    ]
    bins = [
        f"| {entry['t'][0]:.1f} to {entry['t'][1]:.1f} | {entry['l2d']:.3f} "
        f"| {entry['difference']:+.4f} | {entry['standard_error']:.4f} |"
        for entry in held_out["by_time"]
    ]
    lines = [
        f"# {result['name']}",
        "",
        f"Written by `bench/quality.py` on {machine}.",
        "",
        "| run | trained parameters | updates | held-out loss | tokens/s | minutes | peak memory |",
        "|---|---|---|---|---|---|---|",
        *runs,
        "",
        f"On the {held_out['tokens']:,} held-out answer tokens the base model's loss is {held_out['base']:.3f} nats, "
        f"their unigram entropy {held_out['unigram_entropy']:.3f}.",
        "",
        "| t | L2D's loss | minus the base model's on the same tokens | standard error |",
        "|---|---|---|---|",
        *bins,
        "",
        *(f"- {'yes' if holds else '**no**'}: {sentence}" for sentence, holds in result["checks"].items()),
        "",
        f"![loss against t]({result['name']}.png)",
        "",
        f"## Sample generations, {EVALUATIONS} evaluations per token",
        "",
        *(f"**Question** {s['question']}\n\n**Generated** {s['generated']}\n" for s in result["samples"]),
    ]
    return "\n".join(lines)


def main(
    name: Annotated[str, typer.Argument(help="File of bench/runs that trains a base model and then L2D over it.")],
    out: Annotated[Path, typer.Option(help="Folder for the two models.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `l2d train`.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for the result files.")] = HERE / "results",
) -> None:
    """Train, measure, write."""
    base, diffusion = out / "base", out / "l2d"
    folders = [f"stages.0.output_dir={base}", f"stages.1.output_dir={diffusion}", f"stages.1.model.base={base}"]
    runs = load_run(HERE / "runs" / f"{name}.yaml", [*folders, *(overrides or [])])
    cards = train_runs(runs, callbacks=lambda run: [progress(Console(), run.kind)])
    run = runs[1]
    assert isinstance(run, DiffusionRun)
    assert run.data is not None  # `train_runs` refuses runs without
    lm = l2d.load(diffusion)
    assert lm.tokenizer is not None
    rows = prepare(run.data, lm.tokenizer, seed=run.seed).eval
    held_out = losses_by_time(lm, rows)
    result = {
        "name": name,
        "hardware": cards[1]["hardware"],
        "versions": cards[1]["versions"],
        "commit": cards[1]["commit"],
        "held_out": held_out,
        "checks": checks(held_out),
        "runs": [
            {
                "kind": card["kind"],
                "config_hash": card["config_hash"],
                "trainable": card["parameters"]["trainable"],
                "seconds": card["seconds"],
                "data": card["data"]["splits"],
                **card["result"],
            }
            for card in cards
        ],
        "samples": samples(lm, rows),
    }
    results.mkdir(parents=True, exist_ok=True)
    for suffix, text in {"json": json.dumps(result, indent=1) + "\n", "md": report(result)}.items():
        target = results / f"{name}.{suffix}"
        temporary = target.with_suffix(".writing")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    plot(result, results / f"{name}.png")
    Console().print(f"Written to {results / name}.json, .md and .png", highlight=False)


if __name__ == "__main__":
    typer.run(main)
