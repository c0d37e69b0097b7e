"""What `bench/tess.py` measures: losses, answers, their rewards, and whether guidance broke them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM

from l2d_framework.config import DiffusionRun
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.evaluation.text import diversity
from l2d_framework.generation.prompts import encode_prompts
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.opening import open_model
from l2d_framework.training.data.collate import IGNORED, Collator
from l2d_framework.training.data.masking import Masker
from l2d_framework.training.data.prepare import prepare
from l2d_framework.types import Layout
from l2d_plugins.guidance.reward_network import load_reward_model

BATCH = 40
"""Answers made together."""
ERRORS = 3.0
"""Standard errors by which guided rewards have to exceed unguided ones."""
DEGENERATE = {"distinct_2": 0.8, "tokens": 0.5, "ended": 0.75, "perplexity": 1.5, "loops": 0.1}
"""Guidance has degenerated where, against unguided answers, the mean share of distinct word pairs, the mean length or
the share of answers that reach their end falls below these shares, the perplexity under the base model exceeds this
multiple, the share of answers that end in a loop is this much higher, or the held-out reward is lower."""


@torch.no_grad()
def held_out_loss(lm: DiffusionLM, run: DiffusionRun) -> dict[str, float]:
    """Denoising loss on the held-out data of a run, with self-conditioning and noise that every call repeats.

    Args:
        lm: the model.
        run: the run.

    Returns:
        Mean cross-entropy of `all` targets and of `text`, which is all but padding, in nats per token; their numbers.
    """
    assert run.data is not None and lm.tokenizer is not None
    rows: Any = prepare(run.data, lm.tokenizer, seed=run.seed).eval
    masking = run.data.masking
    masker = None if masking is None else Masker(tuple(masking.objectives), 1, 0)
    collate = Collator(
        lm.tokenizer.pad_token_id,
        run.block_size,
        padding=run.data.padding,
        max_length=run.data.max_length,
        masker=masker,
    )
    losses, is_text = [], []
    for start in range(0, len(rows), 16):
        batch = collate([rows[i] for i in range(start, min(start + 16, len(rows)))])
        layout = Layout(batch["input_ids"], batch["blocks"])
        keys = [("quality", i) for i in batch["index"].tolist()]
        draws = draw(lm, layout, NoiseRule(keys=keys, self_conditioning=1.0, is_first_noisier=False))
        found = denoising_loss(lm, layout, draws, counted=batch["labels"] != IGNORED)
        losses.append(found.tokens)
        is_text.append(found.position < batch["length"][found.row])
    each, text = torch.cat(losses).double(), torch.cat(is_text)
    return {
        "all": each.mean().item(),
        "text": each[text].mean().item(),
        "tokens": len(each),
        "text_tokens": int(text.sum()),
    }


def prompt_ids(lm: DiffusionLM, question: str) -> list[int]:
    """Tokens of a question with what introduces an answer.

    Args:
        lm: for its tokenizer.
        question: the question.

    Returns:
        Ids.
    """
    assert lm.tokenizer is not None
    turn = [{"role": "user", "content": question}]
    return encode_prompts(lm.tokenizer, [turn])[0]


def answers(lm: DiffusionLM, questions: Sequence[str], canvas: int, title: str, **options: Any) -> list[list[int]]:
    """Answers to questions, on a canvas that their batch shares.

    Args:
        lm: the model.
        questions: the questions; batches hold such of similar length.
        canvas: tokens of question and answer.
        title: of the progress bar.
        **options: of `generate`.

    Returns:
        Tokens of each answer, its end token included where there is one.
    """
    lengths = [len(prompt_ids(lm, question)) for question in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    found: list[list[int]] = [[] for _ in questions]
    for start in track(range(0, len(order), BATCH), title, console=Console()):
        part = order[start : start + BATCH]
        prompts = [[{"role": "user", "content": questions[i]}] for i in part]
        room = canvas - max(lengths[i] for i in part)
        made = lm.generate(prompts, max_new_tokens=room, **options)
        for i, ids, length in zip(part, made.answers.tolist(), made.lengths.tolist(), strict=True):
            found[i] = ids[:length]
    return found


@torch.no_grad()
def rewards(folder: Path, lm: DiffusionLM, questions: Sequence[str], texts: Sequence[list[int]], canvas: int) -> Any:
    """Reward of finished answers, read at the end of the padded canvas as in training and guidance.

    Args:
        folder: of the reward model.
        lm: for its tokenizer.
        questions: the questions.
        texts: tokens of the answers.
        canvas: tokens of question, answer and padding.

    Returns:
        One per answer, (N,), float64.
    """
    assert lm.tokenizer is not None
    network = load_reward_model(str(folder), torch.device("cpu"), torch.float32)
    ids = torch.full((len(texts), canvas), int(lm.tokenizer.pad_token_id))
    for row, question, text in zip(ids, questions, texts, strict=True):
        whole = [*prompt_ids(lm, question), *text][:canvas]
        row[: len(whole)] = torch.tensor(whole)
    parts = [network.rewards(network.table[part])[:, -1] for part in ids.split(BATCH)]
    return torch.cat(parts).double().numpy()


def surface_of(lm: DiffusionLM, texts: Sequence[list[int]]) -> dict[str, float]:
    """What words and tokens alone tell about answers.

    Args:
        lm: for its tokenizer.
        texts: tokens of the answers.

    Returns:
        Means over answers.
    """
    assert lm.tokenizer is not None
    eos = lm.tokenizer.eos_token_id
    words = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]
    mean = {f"distinct_{n}": np.nanmean([diversity.distinct_per_ngram(text, n) for text in words]) for n in (1, 2, 3)}
    mean["entropy"] = np.nanmean([diversity.entropy(ids) for ids in texts])
    mean["loops"] = np.mean([diversity.ends_in_loop(ids) for ids in texts])
    mean["tokens"] = np.mean([len(ids) for ids in texts])
    mean["ended"] = np.mean([eos in ids for ids in texts])
    return {name: float(value) for name, value in mean.items()}


@torch.no_grad()
def perplexity(base: Path, lm: DiffusionLM, questions: Sequence[str], texts: Sequence[list[int]]) -> float:
    """Perplexity of answers, given their questions, under the language model that everything started from.

    Args:
        base: its folder.
        lm: for its tokenizer.
        questions: the questions.
        texts: tokens of the answers.

    Returns:
        exp of the mean over all answer tokens.
    """
    plain = open_model(AutoModelForCausalLM, base)[0].eval()
    total, count = 0.0, 0
    for question, text in zip(questions, texts, strict=True):
        before = prompt_ids(lm, question)
        ids = torch.tensor([[*before, *text]])
        scores = plain(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total -= scores.gather(1, ids[0, len(before) :, None]).sum().item()
        count += len(text)
    return math.exp(total / count)


def compare(guided: Any, plain: Any) -> dict[str, float]:
    """Mean reward and, over the same questions, how much it exceeds another.

    Args:
        guided: rewards, (N,).
        plain: rewards to compare with, (N,).

    Returns:
        `mean`, `difference` and the standard error of each.
    """
    n, more = len(guided), guided - plain
    error = more.std(ddof=1) / math.sqrt(n)
    return {
        "mean": float(guided.mean()),
        "standard_error": float(guided.std(ddof=1) / math.sqrt(n)),
        "difference": float(more.mean()),
        "difference_error": float(error),
    }


def is_degenerate(entry: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Signs that guidance broke the answers.

    Args:
        entry: measurements at one strength.
        plain: those without guidance.

    Returns:
        What broke; empty when nothing did.
    """
    text, base = entry["text"], plain["text"]
    signs = {
        "distinct word pairs": text["distinct_2"] < DEGENERATE["distinct_2"] * base["distinct_2"],
        "length": text["tokens"] < DEGENERATE["tokens"] * base["tokens"],
        "end": text["ended"] < DEGENERATE["ended"] * base["ended"],
        "perplexity": text["perplexity"] > DEGENERATE["perplexity"] * base["perplexity"],
        "loops": text["loops"] > base["loops"] + DEGENERATE["loops"],
        "held-out reward": entry["held_out"]["difference"] < 0,
    }
    return [name for name, broke in signs.items() if broke]


def judge(
    lm: DiffusionLM,
    asked: Sequence[Mapping[str, str]],
    sampled: Mapping[float, Sequence[list[int]]],
    models: Mapping[str, Path],
    *,
    base: Path,
    canvas: int,
) -> dict[str, Any]:
    """Measure answers sampled at several strengths of guidance, the first of which is none.

    Args:
        lm: the tuned model, for its tokenizer.
        asked: held-out questions with true answers.
        sampled: tokens of the answers by strength, in rising order.
        models: folders of the reward models `guiding` and `held_out`.
        base: folder of the language model.
        canvas: tokens of question, answer and padding.

    Returns:
        Measurements by strength, the chosen strength, the one at which guidance degenerates, examples.
    """
    assert lm.tokenizer is not None
    questions = [row["question"] for row in asked]
    entries: list[dict[str, Any]] = []
    plain: dict[str, Any] = {}
    for strength, made in sampled.items():
        judged = {name: rewards(folder, lm, questions, made, canvas) for name, folder in models.items()}
        plain = plain or judged
        entry: dict[str, Any] = {name: compare(judged[name], plain[name]) for name in models}
        entry |= {"strength": strength, "text": surface_of(lm, made)}
        entry["text"]["perplexity"] = perplexity(base, lm, questions, made)
        entry["degenerate"] = is_degenerate(entry, entries[0]) if entries else []
        entries.append(entry)
    true = [[*lm.tokenizer(row["answer"])["input_ids"], lm.tokenizer.eos_token_id] for row in asked]
    true_text = surface_of(lm, true) | {"perplexity": perplexity(base, lm, questions, true)}
    gold = {name: float(rewards(folder, lm, questions, true, canvas).mean()) for name, folder in models.items()}
    broken = [entry for entry in entries[1:] if entry["degenerate"]]
    sound = [entry for entry in entries[1:] if not entry["degenerate"]]
    best = max(sound, key=lambda entry: float(entry["guiding"]["mean"]), default=None)
    shown = dict.fromkeys([0.0, *(entry["strength"] for entry in [*([best] if best else []), *broken[:1]])])
    examples = [
        {"question": questions[i], "true": asked[i]["answer"]}
        | {f"{s:g}": str(lm.tokenizer.decode(sampled[s][i], skip_special_tokens=True)) for s in shown}
        for i in (0, len(questions) // 2)
    ]
    return {
        "prompts": len(asked),
        "canvas": canvas,
        "strengths": entries,
        "true_answers": gold | {"text": true_text},
        "chosen": best,
        "degenerates_at": broken[0]["strength"] if broken else None,
        "examples": examples,
    }


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """What makes the run count as working.

    Args:
        result: what `main` writes.

    Returns:
        Whether each holds, by sentence.
    """
    best, found = result["chosen"], {}
    for stage, entry in result["losses"].items():
        before, after = entry["before"], entry["after"]
        found[f"{stage}: the held-out loss falls"] = after["all"] < before["all"]
        if after["text_tokens"] < after["tokens"]:
            found[f"{stage}: so does that without padding"] = after["text"] < before["text"]
    for name in ("guiding", "held_out"):
        said = f"guided rewards exceed unguided ones by {ERRORS:g} standard errors under the {name} model"
        found[said.replace("_", "-")] = best is not None and (
            best[name]["difference"] >= ERRORS * best[name]["difference_error"] > 0
        )
    found["there is a strength at which guidance degenerates"] = result["degenerates_at"] is not None
    return found
