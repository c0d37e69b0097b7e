"""Variety, entropy, Zipf's law and repetition of words and tokens; means and their standard errors."""

import json
import math

import numpy as np
import pytest

from l2d_framework.evaluation.statistics import Estimate, exp_of_ratio, mean
from l2d_framework.evaluation.text.diversity import (
    distinct_per_ngram,
    distinct_per_word,
    ends_in_likeliest_loop,
    ends_in_loop,
    entropy,
    zipf,
)
from l2d_framework.evaluation.text.measure import AUTHORS, CORRECTED, DEFINITIONS, evaluate_texts
from l2d_framework.evaluation.text.samples import Sample


def test_distinct_n_of_the_authors_is_reproduced(golden_file):
    golden = json.loads(golden_file("tess/text_formats.json").read_text())
    found = evaluate_texts([Sample("", text) for text in golden["distinct_texts"]])["metrics"]
    assert golden["distinct"] == {f"dist-{n}": found[f"distinct_{n}"][AUTHORS]["value"] for n in range(1, 5)}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_different_words_are_all_distinct_once_ngrams_are_counted_by_ngrams(n):
    text = "one two three four five"
    assert distinct_per_ngram(text, n) == 1
    assert distinct_per_word(text, n) == (6 - n) / 5


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_repeated_word_is_one_ngram(n):
    assert distinct_per_ngram("a " * 10, n) == 1 / (11 - n)
    assert distinct_per_word("a " * 10, n) == 1 / 10


@pytest.mark.parametrize("value", [2 / 3, 1e-9, 0.0, -7e8])
def test_samples_that_agree_have_no_error_in_print(value):
    assert str(mean([value] * 30)) == f"{value:.4g} ± 0"


def test_a_text_too_short_for_an_ngram_counts_nothing_for_the_authors_and_is_left_out_when_corrected():
    metrics = evaluate_texts([Sample("", "a b c"), Sample("", "a")])["metrics"]["distinct_2"]
    assert metrics[AUTHORS]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics[CORRECTED] == {"value": 1, "standard_error": None, "samples": 1, "left_out": 1}


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_entropy_lies_between_that_of_one_token_and_of_all_different_ones(size):
    assert entropy([5] * size) == 0
    assert entropy(range(size)) == pytest.approx(math.log2(size))


def test_no_tokens_have_no_entropy():
    assert math.isnan(entropy([]))


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 2.0])
def test_zipfs_exponent_of_a_power_law_is_its_power(exponent):
    counts = [round(10**6 / rank**exponent) for rank in range(1, 6)]
    texts = [[token] * count for token, count in enumerate(counts)]
    assert zipf(texts) == pytest.approx(exponent, abs=1e-5)


def test_only_the_5000_most_frequent_tokens_enter_zipfs_exponent():
    flat = [token for token in range(5000) for _ in range(2)]
    assert zipf([flat, range(5000, 9000)]) == pytest.approx(0, abs=1e-9)


def test_one_word_has_no_zipf_exponent():
    assert evaluate_texts([Sample("", "a a a")])["metrics"]["zipf"][AUTHORS]["value"] is None


@pytest.mark.parametrize(
    ("text", "likeliest", "any_"),
    [
        ("x a b c a b c", True, True),
        ("a b c a b", False, False),
        ("a b a b", False, False),
        ("x a a", False, False),
        ("b c c b c c", False, True),
        ("x " * 51, True, True),
        ("x y " * 51, True, True),
        (" ".join([f"w{i}" for i in range(90)] * 2), True, True),
        (" ".join([f"w{i}" for i in range(91)] * 2), False, False),
        ("", False, False),
    ],
)
def test_a_loop_is_three_tokens_said_twice_or_fewer_said_51_times(text, likeliest, any_):
    assert ends_in_likeliest_loop(text.split()) is likeliest
    assert ends_in_loop(text.split()) is any_


def test_a_mean_leaves_undefined_samples_out_and_counts_them():
    found = mean([1.0, float("nan"), 3.0])
    assert (found.value, found.samples, found.left_out) == (2, 2, 1)
    assert found.standard_error == pytest.approx(1)
    assert mean([float("nan")]).value is None


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12620.4, 449.6, "12,620 ± 450"),
        (0.36311, 0.01123, "0.363 ± 0.011"),
        (1.0, 0.0, "1 ± 0"),
        (0.88811, None, "0.8881"),
        (None, None, "-"),
    ],
)
def test_a_number_is_shown_as_precisely_as_it_is_known(value, error, text):
    assert str(Estimate(value, error, 5)) == text


def test_the_standard_error_of_a_ratio_is_the_spread_of_ratios_over_resampled_corpora():
    draws = np.random.default_rng(0)
    tokens = draws.integers(5, 40, 400).astype(float)
    nll = tokens * draws.normal(2, 0.3, 400)
    found = exp_of_ratio(nll, tokens)
    picks = draws.integers(0, 400, (2000, 400))
    resampled = np.exp(nll[picks].sum(1) / tokens[picks].sum(1))
    assert found.value == pytest.approx(np.exp(nll.sum() / tokens.sum()))
    assert found.standard_error == pytest.approx(resampled.std(), rel=0.1)


def test_special_tokens_enter_the_entropy_of_the_authors_only(tiny_tokenizer):
    metrics = evaluate_texts([Sample("", "abab</s></s>")], tokenizer=tiny_tokenizer())["metrics"]["entropy"]
    assert metrics[AUTHORS]["value"] == pytest.approx(math.log2(3))
    assert metrics[CORRECTED]["value"] == pytest.approx(1)


def test_every_metric_found_is_defined():
    metrics = evaluate_texts([Sample("", "a b c")])["metrics"]
    assert {name: list(variants) for name, variants in metrics.items()} == {
        name: list(DEFINITIONS[name]) for name in metrics
    }
