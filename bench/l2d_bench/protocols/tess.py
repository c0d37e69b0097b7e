"""Wording and scores of the TESS 2 paper, as they should be and as its scripts have them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from l2d_bench.protocols.answers import last_number, marked_number, stated

Row = Mapping[str, Any]
_UNSIGNED_INTEGERS = re.compile(r"[-+]?\d*\.\d+|\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gsm8k(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to GSM8K by the value of its last number.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "exact_match".
    """
    found, wanted = last_number(results[0]), marked_number(row["answer"])
    return {"exact_match": float(found is not None and wanted is not None and float(found) == float(wanted))}


def gsm8k_authors(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to GSM8K as the authors' scripts do: integers lose their sign, and decimals their point.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "exact_match".

    Source: the evaluation scripts of Tae et al. 2025, arXiv:2502.13917.
    """
    texts = results[0], row["answer"].rpartition("####")[2].strip()
    mine, wanted = (_bare_number(text) for text in texts)
    return {"exact_match": float(mine == wanted)}


def _bare_number(text: str) -> str:
    plain = _THOUSANDS.sub("", text)
    numbers = _UNSIGNED_INTEGERS.findall(plain)
    return (numbers[-1] if numbers else plain).lower().translate(_NO_PUNCTUATION)


def chain_target(row: Row) -> str:
    """An example's answer in GSM8K.

    Args:
        row: an exemplar of lm_eval.

    Returns:
        Its chain of thought.
    """
    return str(row["target"])


def gsm8k_text(row: Row) -> str:
    """A question of GSM8K.

    Args:
        row: an item.

    Returns:
        Its last lines in the turn of the user.
    """
    return f"Question: {row['question'].strip()}"


def gsm8k_shot(row: Row) -> str:
    """An example's question in GSM8K.

    Args:
        row: an exemplar of lm_eval.

    Returns:
        What stands before its chain of thought.
    """
    return f"{gsm8k_text(row)}\nAnswer: "


def bbh_shot(row: Row) -> str:
    """An example's question in BIG-Bench Hard.

    Args:
        row: an exemplar of lm_eval.

    Returns:
        What stands before its chain of thought.
    """
    return f"{bbh_text(row)}\nA: Let's think step by step.\n"


def bbh_text(row: Row) -> str:
    """A question of BIG-Bench Hard.

    Args:
        row: an item or exemplar.

    Returns:
        Its last lines in the turn of the user.
    """
    return f"Q: {row['input']}"


def bbh_text_authors(row: Row) -> str:
    """A question of BIG-Bench Hard as the authors' scripts end their prompt.

    Args:
        row: an item.

    Returns:
        The question and the beginning of the answer.
    """
    return f"{bbh_text(row)} A:"


def bbh(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to BIG-Bench Hard.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "exact_match".
    """
    return {"exact_match": float(stated(results[0]) == row["target"])}


def squad_text(row: Row) -> str:
    """A question of SQuAD below its context.

    Args:
        row: of the data set.

    Returns:
        Context, empty line, question.
    """
    return f"{row['context']}\n\n{row['question']}"


def squad_target(row: Row) -> str:
    """An example's answer in SQuAD.

    Args:
        row: of the data set.

    Returns:
        The first of its answers.
    """
    return str(row["answers"]["text"][0])


def squad(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to SQuAD against the best of the reference's.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "exact_match" and "f1", the overlap of words.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1.
    """
    pairs = [(normalized(results[0]), normalized(answer)) for answer in row["answers"]["text"]]
    exact = max(float(mine == wanted) for mine, wanted in pairs)
    return {"exact_match": exact, "f1": max(_overlap(mine.split(), wanted.split()) for mine, wanted in pairs)}


def _overlap(mine: list[str], wanted: list[str]) -> float:
    if not mine or not wanted:
        return float(mine == wanted)
    common = (Counter(mine) & Counter(wanted)).total()
    return 2 * common / (len(mine) + len(wanted))


def normalized(text: str) -> str:
    """Text as SQuAD and TriviaQA compare it.

    Args:
        text: an answer.

    Returns:
        It in lower case, without punctuation and articles, with single spaces.
    """
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def trivia_target(row: Row) -> str:
    """An example's answer in TriviaQA.

    Args:
        row: of the data set.

    Returns:
        The answer's main name.
    """
    return str(row["answer"]["value"])


def trivia(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Score an answer to TriviaQA.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "acc", whether it contains a name of the right answer.
    """
    found = normalized(results[0])
    names = [normalized(name) for name in (*row["answer"]["aliases"], row["answer"]["value"])]
    return {"acc": float(any(name and name in found for name in names))}


def length(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Length of an answer that only a judge can score.

    Args:
        row: the item.
        results: its answer.

    Returns:
        "characters".
    """
    return {"characters": float(len(results[0]))}
