"""Table and picture of what `bench/tess.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MODELS = {"guiding": ("the guiding model", "#0072b2"), "held_out": ("the held-out model", "#d55e00")}
_TEXT = {
    "distinct_2": "distinct word pairs",
    "entropy": "entropy, bits per token",
    "perplexity": "perplexity under the base model",
    "loops": "end in a loop",
    "tokens": "tokens",
    "ended": "reach their end",
}
_CURVES = {
    "perplexity": "#cc79a7",
    "ended": "#e69f00",
    "distinct_2": "#0072b2",
    "entropy": "#009e73",
    "tokens": "#d55e00",
}


def report(result: Mapping[str, Any]) -> str:
    """The result as markdown.

    Args:
        result: what `tess.py` writes.

    Returns:
        Markdown.
    """
    hardware = result["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, threads used: {hardware['threads']}"
    entries, true = result["strengths"], result["true_answers"]
    lines = [
        f"# {result['name']}",
        "",
        f"Written by `bench/tess.py` on {machine}, in {result['minutes']:.1f} minutes of training and sampling.",
        "",
        *(f"- {'yes' if holds else '**no**'}: {sentence}" for sentence, holds in result["checks"].items()),
        "",
        "## Training",
        "",
        "| run | trained parameters | updates | minutes | held out |",
        "|---|---|---|---|---|",
        *(_run(run) for run in result["runs"]),
        "",
        "Denoising loss on held-out text, in nats per token, with the same noise before and after:",
        "",
        "| | before | after | before, without padding | after, without padding |",
        "|---|---|---|---|---|",
        *(
            f"| {stage} | {e['before']['all']:.3f} | {e['after']['all']:.3f} "
            f"| {e['before']['text']:.3f} | {e['after']['text']:.3f} |"
            for stage, e in result["losses"].items()
        ),
        "",
        "## Guidance",
        "",
        f"{result['prompts']} held-out questions, {result['evaluations']} evaluations, a canvas of {result['canvas']} "
        "tokens. Rewards are those of finished answers, with the standard error over questions; differences are to the "
        "unguided answers to the same questions from the same noise.",
        "",
        "| strength | reward, guiding model | difference | reward, held-out model | difference | "
        + " | ".join(_TEXT.values())
        + " | degenerate |",
        "|" + "---|" * (6 + len(_TEXT)),
        *(_strength(entry) for entry in entries),
        f"| true answers | {true['guiding']:.2f} | | {true['held_out']:.2f} | | "
        + " | ".join(_surface(true["text"]))
        + " | |",
        "",
        _sentence(result),
        "",
        f"![rewards, text and losses]({result['name']}.png)",
        "",
        "## Samples",
        "",
        *(_example(example) for example in result["examples"]),
    ]
    return "\n".join(lines)


def _run(run: Mapping[str, Any]) -> str:
    if "losses" in run:
        held_out = f"loss {run['losses']['eval_loss']:.3f}"
    else:
        held_out = f"{run['held_out']['accuracy']:.1%} of pairs ranked right"
    return f"| {run['name']} | {run['trainable']:,} | {run['steps']:,} | {run['seconds'] / 60:.1f} | {held_out} |"


def _surface(text: Mapping[str, float]) -> list[str]:
    shares = ("loops", "ended")
    return [f"{text[name]:.0%}" if name in shares else f"{text[name]:.2f}" for name in _TEXT]


def _strength(entry: Mapping[str, Any]) -> str:
    cells = [f"{entry['strength']:g}"]
    for name in _MODELS:
        found = entry[name]
        cells.append(f"{found['mean']:.2f} ± {found['standard_error']:.2f}")
        is_plain = entry["strength"] == 0
        cells.append("" if is_plain else f"{found['difference']:+.2f} ± {found['difference_error']:.2f}")
    return "| " + " | ".join([*cells, *_surface(entry["text"]), ", ".join(entry["degenerate"])]) + " |"


def _sentence(result: Mapping[str, Any]) -> str:
    best, broken = result["chosen"], result["degenerates_at"]
    first = "No strength kept the answers sound."
    if best is not None:
        errors = [f"{best[n]['difference'] / best[n]['difference_error']:.1f}" for n in _MODELS]
        first = (
            f"Of the strengths that keep answers sound, {best['strength']:g} has the highest reward under the guiding "
            f"model: {errors[0]} standard errors above no guidance, and {errors[1]} under the held-out model."
        )
    second = f"Guidance degenerates from {broken:g} on." if broken is not None else "No strength tried degenerates."
    true = result["true_answers"]
    beyond = [entry["strength"] for entry in result["strengths"] if entry["guiding"]["mean"] > true["guiding"]]
    third = f" From {beyond[0]:g} on, the guiding model prefers guided answers to true ones." if beyond else ""
    return f"{first}{third} {second}"


def _example(example: Mapping[str, str]) -> str:
    named = {"question": "Question", "true": "True answer", "0": "Unguided"}
    # Answers hold "####", which is a heading elsewhere.
    texts = (f"{named.get(name, f'Strength {name}')}:\n\n```text\n{text}\n```\n" for name, text in example.items())
    return "\n".join(texts)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw rewards and text against strength, and losses against updates.

    Args:
        result: what `tess.py` writes.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    rewards, text, losses = figure.subplots(1, 3)
    _rewards(rewards, result)
    _text(text, result)
    _losses(losses, result)
    for axes in (rewards, text, losses):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _strength_axis(axes: Any, result: Mapping[str, Any]) -> list[float]:
    strengths = [entry["strength"] for entry in result["strengths"]]
    # Not to scale between nothing and the first strength.
    axes.set_xticks(range(len(strengths)), ["none", *(f"{s:g}" for s in strengths[1:])])
    axes.set_xlabel("strength of guidance")
    if result["degenerates_at"] is not None:
        axes.axvspan(strengths.index(result["degenerates_at"]) - 0.5, len(strengths) - 0.5, color="0.92", zorder=0)
    axes.set_xlim(-0.5, len(strengths) - 0.5)
    return list(range(len(strengths)))


def _rewards(axes: Any, result: Mapping[str, Any]) -> None:
    places = _strength_axis(axes, result)
    for name, (label, color) in _MODELS.items():
        found = [entry[name] for entry in result["strengths"]]
        axes.errorbar(
            places,
            [value["mean"] for value in found],
            yerr=[value["standard_error"] for value in found],
            marker="o",
            capsize=4,
            color=color,
            label=label,
        )
        axes.axhline(result["true_answers"][name], color=color, linestyle=":", label=f"true answers, {label}")
    axes.set_ylabel("mean reward ± standard error")
    axes.set_title(f"{result['name']}: rewards (grey: degenerate)")


def _text(axes: Any, result: Mapping[str, Any]) -> None:
    places = _strength_axis(axes, result)
    plain = result["strengths"][0]["text"]
    for name, color in _CURVES.items():
        values = [entry["text"][name] / plain[name] for entry in result["strengths"]]
        axes.plot(places, values, marker="o", color=color, label=f"{_TEXT[name].split(',')[0]}, unguided = 1")
    loops = [entry["text"]["loops"] for entry in result["strengths"]]
    axes.plot(places, loops, marker="s", color="0.4", label="end in a loop, share of answers")
    axes.set_ylim(bottom=0)
    axes.set_title("the text of the answers")


def _losses(axes: Any, result: Mapping[str, Any]) -> None:
    for (stage, log), color in zip(result["curves"].items(), ("#0072b2", "#d55e00"), strict=True):
        for name, style, label in (("loss", "-", ""), ("loss_without_pads", "--", ", without padding")):
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), style, color=color, label=stage + label, linewidth=1)
    axes.set(xlabel="update", ylabel="training loss, nats per token", title="losses")
    axes.set_ylim(bottom=0)
