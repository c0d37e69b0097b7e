"""Which rows of a data set are asked and which serve as examples."""

from __future__ import annotations

from typing import Any

from l2d_bench.protocols.answers import marked_number, math_answer

_SHOTS = 5
_SEED = 42


def _spread(rows: Any) -> list[int]:
    return [shot * (len(rows) // _SHOTS) for shot in range(_SHOTS)]


def first_rows(rows: Any) -> Any:
    """The examples of data sets that have no other split.

    Args:
        rows: of the split.

    Returns:
        The first five.
    """
    return rows.select(range(_SHOTS))


def later_rows(rows: Any) -> Any:
    """The items where the first five are examples.

    Args:
        rows: of the split.

    Returns:
        All others.
    """
    return rows.select(range(_SHOTS, len(rows)))


def spread_rows(rows: Any) -> Any:
    """The examples of MATH.

    Args:
        rows: of the split, N.

    Returns:
        Five: numbers 0, N // 5, 2 (N // 5) and so on.

    Source: Cetin et al. 2025, arXiv:2501.15781, evaluation on MATH.
    """
    return rows.select(_spread(rows))


def rows_between(rows: Any) -> Any:
    """The items of MATH-500, which has no training split for examples.

    Args:
        rows: of the split.

    Returns:
        All but the examples whose answer can be read.
    """
    shots = set(_spread(rows))
    return with_math_answer(rows.select([number for number in range(len(rows)) if number not in shots]))


def with_math_answer(rows: Any) -> Any:
    """Leave out items without a readable reference.

    Args:
        rows: with a column "solution".

    Returns:
        The others.
    """
    return rows.select([number for number, text in enumerate(rows["solution"]) if math_answer(text) is not None])


def with_marked_answer(rows: Any) -> Any:
    """Leave out items without a readable reference.

    Args:
        rows: with a column "answer" in the style of GSM8K.

    Returns:
        The others.
    """
    return rows.select([number for number, text in enumerate(rows["answer"]) if marked_number(text) is not None])


def shuffled(rows: Any) -> Any:
    """All rows in the order in which TESS 2 takes items.

    Args:
        rows: of the split.

    Returns:
        The same rows.

    Source: Tae et al. 2025, arXiv:2502.13917, whose scripts shuffle with seed 42.
    """
    return rows.shuffle(seed=_SEED)


def shuffled_512(rows: Any) -> Any:
    """The items of SQuAD.

    Args:
        rows: of the split.

    Returns:
        512 of them.

    Source: as of `shuffled`.
    """
    return shuffled(rows).select(range(min(512, len(rows))))


def shuffled_2000(rows: Any) -> Any:
    """The items of TriviaQA.

    Args:
        rows: of the split.

    Returns:
        2000 of them.

    Source: as of `shuffled`.
    """
    return shuffled(rows).select(range(min(2000, len(rows))))


def three_titles(rows: Any) -> Any:
    """The examples of SQuAD: the first question about each of the first three articles.

    Args:
        rows: of the training split.

    Returns:
        Three rows, or fewer where there are fewer articles.
    """
    firsts: dict[str, int] = {}
    for number, title in enumerate(rows["title"]):
        firsts.setdefault(title, number)
        if len(firsts) == 3:
            break
    return rows.select(list(firsts.values()))


def first_two(rows: Any) -> Any:
    """The examples of TriviaQA.

    Args:
        rows: of the training split.

    Returns:
        The first two.
    """
    return rows.select(range(2))
