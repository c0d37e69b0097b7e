"""What words and tokens alone tell about a text: variety, entropy, Zipf's law, repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def unique_ngrams(words: Sequence[Hashable], n: int) -> tuple[int, int]:
    """How many different n-grams there are, and how many in all."""
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(grams)), len(grams)


def distinct_per_word(text: str, n: int) -> float:
    """Different n-grams over the number of words, as TESS 2's evaluation counts: below 1 for n > 1; 0 without words."""
    words = text.split()
    return unique_ngrams(words, n)[0] / len(words) if words else 0.0


def distinct_per_ngram(text: str, n: int) -> float:
    """Different n-grams over the number of n-grams; NaN for a text of fewer than n words."""
    different, count = unique_ngrams(text.split(), n)
    return different / count if count else float("nan")


def entropy(tokens: Sequence[Hashable]) -> float:
    """Entropy of the tokens' frequencies, -sum p log2 p."""
    if not tokens:
        return float("nan")
    shares = np.array(list(Counter(tokens).values())) / len(tokens)
    # Adding zero turns the -0.0 of a single token into 0.0.
    return float(-(shares * np.log2(shares)).sum() + 0.0)


def zipf(texts: Iterable[Sequence[Hashable]]) -> float:
    """Zipf's exponent: minus the slope of log frequency against log rank, over the 5,000 most frequent tokens.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 5.2.
    """
    counts = Counter(token for tokens in texts for token in tokens)
    frequencies = sorted(counts.values(), reverse=True)[:5000]
    if len(frequencies) < 2:
        return float("nan")
    ranks = np.arange(1, len(frequencies) + 1)
    # Adding zero turns the -0.0 of a flat line into 0.0.
    return float(-np.polyfit(np.log(ranks), np.log(frequencies), 1)[0] + 0.0)


def ends_in_likeliest_loop(tokens: Sequence[Hashable]) -> bool:
    """Whether a text ends in a loop, judged by the n-gram (n <= 90) with the most repeats, the shortest one on a tie.

    A loop is three or more tokens said twice, or fewer said more than 50 times. A short repeat that ties hides a longer
    one: "b c c b c c" ends in no loop.

    Source: Holtzman et al. 2020, section 5.3, as their published evaluation counts.
    """
    repeats = _repeats(tokens)
    n = max(repeats, key=lambda n: repeats[n], default=0)
    return _is_loop(n, repeats.get(n, 0))


def ends_in_loop(tokens: Sequence[Hashable]) -> bool:
    """Whether a text ends in a loop of any length n <= 90."""
    return any(_is_loop(n, times) for n, times in _repeats(tokens).items())


def _repeats(tokens: Sequence[Hashable]) -> dict[int, int]:
    """How many times in a row the last n tokens stand at the end, by n."""
    repeats = {}
    for n in range(1, min(90, len(tokens)) + 1):
        last, times = tokens[len(tokens) - n :], 1
        while tokens[max(len(tokens) - n * (times + 1), 0) : len(tokens) - n * times] == last:
            times += 1
        repeats[n] = times
    return repeats


def _is_loop(n: int, times: int) -> bool:
    return times > 1 and (n >= 3 or times > 50)
