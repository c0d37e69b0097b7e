"""Train TESS 2 on a small scale and measure what guidance does: `python bench/tess.py tess_small --out FOLDER`.

Run it where the data set is a folder, or with access to the hub. NAME.yaml of bench/runs trains a language model,
adapts it and tunes it to answer; NAME_reward.yaml and NAME_reward_held_out.yaml train two reward models, the first of
which guides. Called again with the same folder, it goes on where it was interrupted. Writes NAME.json, NAME.md and
NAME.png.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tess_measure import answers, checks, held_out_loss, judge
from tess_report import plot, report

import l2d_framework as l2d
from l2d_framework.cli.progress import progress
from l2d_framework.config import DiffusionRun, LanguageModelRun, RewardRun, load_run
from l2d_framework.models.checkpoint import build_model
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.data.sources import load_rows
from l2d_framework.training.reward.run import train_reward
from l2d_framework.training.run import train_runs

HERE = Path(__file__).parent
CHARACTERS = 360
"""Longest question and answer together that is taken to fit the canvas."""
PROMPTS = 200
"""Held-out questions to answer."""
PAIR_STEPS = 8
"""Evaluations for the sampled answers that reward models learn to reject."""
STRENGTHS = (0.0, 3.0, 10.0, 30.0, 300.0, 10000.0)
Row = dict[str, str]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: where to.
        text: what.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds, made first if there is none, with the seconds that took.

    Args:
        path: the file.
        make: returns what it is to hold under `found`.

    Returns:
        The contents of `found`, and seconds.
    """
    if not path.exists():
        start = time.perf_counter()
        found = make()
        write(path, json.dumps({"found": found, "seconds": time.perf_counter() - start}, indent=1) + "\n")
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["found"], data["seconds"]


def short_rows(run: LanguageModelRun, folder: Path) -> dict[str, list[Row]]:
    """Questions that fit the canvas together with their answers, written to `folder` as JSON lines.

    Args:
        run: the run whose first sources of training and evaluation data hold them.
        folder: where to.

    Returns:
        Rows of `train` and `test`.
    """
    assert run.data is not None  # `train_runs` refuses runs without
    found = {}
    for which, source in (("train", run.data.train[0]), ("test", run.data.eval[0])):
        rows = [{name: str(row[name]) for name in ("question", "answer")} for row in load_rows(source)[0]]
        found[which] = [row for row in rows if len(row["question"]) + len(row["answer"]) <= CHARACTERS]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found[which])
        path = folder / f"{which}.jsonl"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write(path, text)
    return found


def pairs(lm: DiffusionLM, rows: Sequence[Row], canvas: int, *, seed: int, corrupt: str) -> list[Row]:
    """Preference pairs: true answers against sampled ones in one half, against corrupted ones in the other.

    Args:
        lm: the tuned model, which samples with few evaluations.
        rows: questions and true answers.
        canvas: tokens of question and answer.
        seed: of everything random.
        corrupt: `replace` puts words of other answers in the place of some; `shuffle` changes the order of words.

    Returns:
        Pairs with `prompt`, `chosen` and `rejected`.
    """
    assert lm.tokenizer is not None
    chance, half = random.Random(seed), len(rows) // 2
    words = [word for row in rows for word in row["answer"].split(" ")]
    asked = [row["question"] for row in rows[:half]]
    made = answers(lm, asked, canvas, f"pairs {seed}", num_inference_steps=PAIR_STEPS, seed=seed, guidance=[])
    rejected = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]
    for row in rows[half:]:
        own = row["answer"].split(" ")
        if corrupt == "shuffle":
            chance.shuffle(own)
        else:
            own = [chance.choice(words) if chance.random() < 0.3 else word for word in own]
        rejected.append(" ".join(own))
    return [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": bad}
        for row, bad in zip(rows, rejected, strict=True)
    ]


def curve(folder: Path) -> list[dict[str, float]]:
    """Logged losses of a finished run.

    Args:
        folder: its output folder.

    Returns:
        Entries with `step` and losses.
    """
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = ("loss", "loss_without_pads", "eval_loss", "eval_loss_without_pads")
    return [{"step": e["step"]} | {n: e[n] for n in names if n in e} for e in log if set(names) & set(e)]


def reward_models(
    name: str, out: Path, lm: DiffusionLM, rows: Sequence[Row], console: Console
) -> tuple[list[dict[str, Any]], float]:
    """Make pairs and train both reward models, each on its half of the questions.

    Args:
        name: of the pipeline.
        out: folder of everything.
        lm: the tuned model, which makes wrong answers.
        rows: questions and true answers.
        console: for progress.

    Returns:
        The cards of the runs, and the seconds that making pairs took.
    """
    half, cards, spent = len(rows) // 2, [], 0.0
    parts = {"reward": (1, "replace", rows[:half]), "reward_held_out": (2, "shuffle", rows[half:])}
    for stem, (seed, corrupt, part) in parts.items():
        path = out / "data" / f"{stem}.jsonl"
        changes = [f"output_dir={out / stem}", f"model.base={out / 'base'}", f"data.train.0.path={path}"]
        (run,) = load_run(HERE / "runs" / f"{name}_{stem}.yaml", changes)
        assert isinstance(run, RewardRun)
        make = partial(pairs, lm, part, run.data.max_length, seed=seed, corrupt=corrupt)
        found, seconds = once(path.with_suffix(".json"), make)
        spent += seconds
        if not path.exists():
            write(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found))
        cards.append(train_reward(run, callbacks=[progress(console, stem)]))
    return cards, spent


def sample(lm: DiffusionLM, asked: Sequence[Row], out: Path, canvas: int) -> tuple[dict[float, Any], float]:
    """Answer questions at every strength of guidance; what a file holds already is not sampled again.

    Args:
        lm: the tuned model, with its number of evaluations.
        asked: the questions.
        out: folder with the reward model; the answers are kept there.
        canvas: tokens of question and answer.

    Returns:
        Tokens of the answers by strength, and seconds.
    """
    questions, found, spent = [row["question"] for row in asked], {}, 0.0
    for strength in STRENGTHS:
        reward = {"name": "reward_gradient", "model": str(out / "reward"), "scale": strength}
        make = partial(
            answers, lm, questions, canvas, f"strength {strength:g}", guidance=[reward] if strength else [], seed=0
        )
        found[strength], seconds = once(out / "samples" / f"{strength:g}.json", make)
        spent += seconds
    return found, spent


def summary(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the result says of a finished run.

    Args:
        card: its `run.json`.

    Returns:
        Name, size, data, duration and result.
    """
    return {
        "name": Path(card["config"]["output_dir"]).name,
        "config_hash": card["config_hash"],
        "trainable": card["parameters"]["trainable"],
        "seconds": card["seconds"],
        "data": card["data"]["splits"],
        **card["result"],
    }


def main(
    name: Annotated[str, typer.Argument(help="File of bench/runs with three stages, beside two of reward models.")],
    out: Annotated[Path, typer.Option(help="Folder for data, models and samples.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `l2d train`.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for the result files.")] = HERE / "results",
) -> None:
    """Train, guide, measure, write."""
    console = Console()
    data = out / "data"
    folders = [f"stages.{i}.output_dir={out / stage}" for i, stage in enumerate(("base", "adapted", "tuned"))]
    folders += [f"stages.1.model.base={out / 'base'}", f"stages.2.model.base={out / 'adapted'}"]
    folders += [
        f"stages.2.data.train.0.path={data / 'train.jsonl'}",
        f"stages.2.data.eval.0.path={data / 'test.jsonl'}",
    ]
    runs = load_run(HERE / "runs" / f"{name}.yaml", [*folders, *(overrides or [])])
    base, adapt, tune = runs
    assert isinstance(base, LanguageModelRun) and isinstance(adapt, DiffusionRun) and isinstance(tune, DiffusionRun)
    assert tune.data is not None
    rows = short_rows(base, data)
    cards = train_runs(runs, callbacks=lambda run: [progress(console, Path(str(run.output_dir)).name)])
    lm, canvas = l2d.load(out / "tuned"), tune.data.max_length
    more, pairing = reward_models(name, out, lm, rows["train"], console)
    cards += more
    losses = {
        stage: {"before": held_out_loss(before, run), "after": held_out_loss(after, run)}
        for stage, run, before, after in (
            ("adaptation", adapt, build_model(adapt).eval(), l2d.load(out / "adapted")),
            ("tuning", tune, l2d.load(out / "adapted"), lm),
        )
    }
    asked = rows["test"][:PROMPTS]
    sampled, sampling = sample(lm, asked, out, canvas)
    models = {"guiding": out / "reward", "held_out": out / "reward_held_out"}
    result: dict[str, Any] = {
        "name": name,
        "hardware": cards[0]["hardware"],
        "versions": cards[0]["versions"],
        "commit": cards[0]["commit"],
        "losses": losses,
        "evaluations": tune.sampling.num_inference_steps,
        **judge(lm, asked, sampled, models, base=out / "base", canvas=canvas),
        "minutes": (sum(card["seconds"] for card in cards) + pairing + sampling) / 60,
        "minutes_of_pairs": pairing / 60,
        "minutes_of_samples": sampling / 60,
        "runs": [summary(card) for card in cards],
        "curves": {stage: curve(out / folder) for stage, folder in (("adaptation", "adapted"), ("tuning", "tuned"))},
    }
    result["checks"] = checks(result)
    write(results / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write(results / f"{name}.md", report(result))
    plot(result, results / f"{name}.png")
    console.print(f"Written to {results / name}.json, .md and .png", highlight=False)


if __name__ == "__main__":
    typer.run(main)
