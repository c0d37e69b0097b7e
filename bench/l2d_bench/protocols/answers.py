"""Answers found in texts, by the rules of the papers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from lm_eval.tasks.hendrycks_math.utils import strip_string

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_UNSIGNED = re.compile(r"\d+(?:\.\d+)?|\.\d+")
# In "10-5" and "(3)-5" the sign is an operation.
_SIGNED = re.compile(r"(?:(?<![\d)])[-+])?(?:\d+(?:\.\d+)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"(-?)(?:\\frac\{(-?\d+)\}\{(-?\d+)\}|(\d+)/(\d+))")
_BOXED = re.compile(r"\\boxed\s*")


def marked_number(text: str) -> str | None:
    """The first number after four hash signs and a space, without commas.

    Args:
        text: an answer in the style of GSM8K.

    Returns:
        The number as written, or None without a marked number.

    Source: Cetin et al. 2025, arXiv:2501.15781, evaluation on GSM8K; its text prints three signs, the data have four.
    """
    found = _MARKED.search(text)
    number = "" if found is None else found[1].replace(",", "")
    return number if any(letter.isdigit() for letter in number) else None


def boxed(text: str) -> str | None:
    r"""What the last complete `\boxed` holds.

    Args:
        text: with LaTeX in it.

    Returns:
        The text between its braces, braces within included, or its single token; None if there is none.
    """
    for found in reversed(list(_BOXED.finditer(text))):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            token = re.match(r"[^\s$.,]+", rest)
            if token is not None:
                return token[0]
            continue
        depth = 0
        for place, letter in enumerate(rest):
            escaped = place > 0 and rest[place - 1] == "\\"
            depth += 0 if escaped else (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[1:place]
    return None


def math_answer(text: str) -> str | None:
    r"""The answer to a problem of MATH: what the last `\boxed` holds, else the last number without its sign.

    Args:
        text: of the solution.

    Returns:
        The answer as written, or None.

    Source: Cetin et al. 2025, arXiv:2501.15781, evaluation on MATH.
    """
    found = boxed(text)
    if found is not None:
        return found
    numbers = _UNSIGNED.findall(_THOUSANDS.sub("", text))
    return numbers[-1] if numbers else None


def same_math(answer: str, reference: str) -> bool:
    r"""Whether two answers agree after the clean-up of LaTeX of Hendrycks et al.

    Args:
        answer: found.
        reference: wanted.

    Returns:
        True if they are equal as text, as numbers, or as fractions of integers.

    Source: Hendrycks et al. 2021, arXiv:2103.03874; Cetin et al. 2025, arXiv:2501.15781.
    """
    mine, wanted = _cleaned(answer), _cleaned(reference)
    if mine == wanted:
        return True
    values = _number(mine), _number(wanted)
    if None not in values:
        return values[0] == values[1]
    fractions = _fraction(mine), _fraction(wanted)
    return None not in fractions and fractions[0] == fractions[1]


def _cleaned(text: str) -> str:
    try:
        return str(strip_string(text))
    except (AssertionError, IndexError, ValueError):  # what it raises at LaTeX that is cut off
        return text.strip()


def _number(text: str) -> float | None:
    try:
        return float(_THOUSANDS.sub("", text))
    except ValueError:
        return None


def _fraction(text: str) -> Fraction | None:
    found = _FRACTION.fullmatch(text)
    if found is not None:
        above, below = int(found[2] or found[4]), int(found[3] or found[5])
        return None if below == 0 else Fraction(-above if found[1] else above, below)
    plain = re.fullmatch(r"-?\d+(?:\.\d+)?", _THOUSANDS.sub("", text))
    return None if plain is None else Fraction(plain[0])


def option(text: str, labels: Sequence[str]) -> str | None:
    """The first label that ends, or that something other than a letter or digit follows.

    Args:
        text: an answer.
        labels: of the options that the question has.

    Returns:
        A label, or None.

    Source: Cetin et al. 2025, arXiv:2501.15781, evaluation on questions with options.
    """
    found = re.search(rf"({'|'.join(map(re.escape, labels))})(?![^\W_])", text)
    return None if found is None else found[1]


def last_number(text: str) -> str | None:
    """The last number with its sign, without thousands commas.

    Args:
        text: an answer.

    Returns:
        The number as written, or None.
    """
    numbers = _SIGNED.findall(_THOUSANDS.sub("", text))
    return numbers[-1] if numbers else None


def stated(text: str) -> str:
    """What stands between "the answer is" and the next full stop.

    Args:
        text: a chain of thought.

    Returns:
        The answer; the whole text where it states none.

    Source: Tae et al. 2025, arXiv:2502.13917, evaluation on BIG-Bench Hard.
    """
    found = re.search(r"[tT]he answer is (.*?)\.", text)
    return text.strip() if found is None else found[1]
