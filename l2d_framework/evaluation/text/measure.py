"""Metrics of generated text, each as TESS 2's evaluation defines it and, beside it, with what we recommend mended.

Source: Tae et al. 2025, "TESS 2", and its published evaluation code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2d_framework.errors import DataError
from l2d_framework.evaluation.statistics import Estimate, exp_of_ratio, mean
from l2d_framework.evaluation.text import diversity
from l2d_framework.evaluation.text.judge import Judge, Track
from l2d_framework.evaluation.text.mauve_score import Features, check_golds, check_installed, mauve
from l2d_framework.evaluation.text.samples import Sample

AUTHORS, CORRECTED = "authors", "corrected"

DEFINITIONS = {
    "perplexity": {
        AUTHORS: "exp((NLL(prefix + text) - NLL(prefix)) / added tokens) of each sample, then the mean over samples",
        CORRECTED: "over the corpus: exp(sum of NLL / sum of added tokens), which no single sample can dominate",
    },
    **{
        f"distinct_{n}": {
            AUTHORS: f"different {n}-grams of white-space words / number of words, mean over samples, 0 if empty",
            CORRECTED: f"different {n}-grams / number of {n}-grams, mean over samples that have any",
        }
        for n in range(1, 5)
    },
    "entropy": {
        AUTHORS: "bits of each sample's token frequencies, special tokens counted, mean over samples",
        CORRECTED: "the same without special tokens",
    },
    "mauve": {
        AUTHORS: "prefix + text against prefix + gold; a long prefix that both share hides how the texts differ",
        CORRECTED: "text against gold, without the prefix",
    },
    "zipf": {AUTHORS: "minus the slope of log frequency against log rank, 5,000 most frequent tokens"},
    "repetition": {
        AUTHORS: "share of samples whose end repeats its n-gram of most repeats (n <= 90; from 3 tokens, or 51 times)",
        CORRECTED: "the same for any n-gram: a short repeat hides no longer one",
    },
}
"""For each metric, what is measured as the authors do and as we recommend."""


def evaluate_texts(
    samples: Sequence[Sample],
    *,
    tokenizer: Any = None,
    judge: Judge | None = None,
    features: Features | None = None,
    track: Track = lambda batches, title: batches,
) -> dict[str, Any]:
    """Metrics, JSON-ready; the generator's tokenizer serves entropy and, for words, Zipf's law and repetition."""
    if not samples:
        raise DataError("There is no text to measure. Give at least one sample.")
    if features is not None:
        check_installed()
        check_golds(samples, "the samples")
    settings: dict[str, Any] = {
        "tokens": "words" if tokenizer is None else str(tokenizer.name_or_path or type(tokenizer).__name__)
    }
    metrics: dict[str, dict[str, Estimate]] = {}
    if judge is not None:
        settings["perplexity"], metrics["perplexity"] = _perplexity(samples, judge, track)
    texts = [sample.text for sample in samples]
    for n in range(1, 5):
        metrics[f"distinct_{n}"] = {
            AUTHORS: mean([diversity.distinct_per_word(text, n) for text in texts]),
            CORRECTED: mean([diversity.distinct_per_ngram(text, n) for text in texts]),
        }
    metrics |= _of_tokens(texts, tokenizer)
    if features is not None:
        settings["mauve"] = {"features": features.source.name, "max_length": features.max_length}
        metrics["mauve"] = {
            AUTHORS: mauve(samples, features, track, with_prefix=True),
            CORRECTED: mauve(samples, features, track, with_prefix=False),
        }
    return {
        "samples": len(samples),
        "empty_texts": sum(not text.strip() for text in texts),
        "settings": settings,
        "metrics": {
            name: {variant: estimate.to_json() for variant, estimate in metrics[name].items()}
            for name in DEFINITIONS
            if name in metrics
        },
    }


def _perplexity(samples: Sequence[Sample], judge: Judge, track: Track) -> tuple[dict[str, Any], dict[str, Estimate]]:
    judged = judge.judge(samples, track)
    settings = {
        "model": judge.source.name,
        "max_length": judge.max_length,
        "first_token": judge.source.tokenizer.convert_ids_to_tokens(judge.start),
        "prefixes_merged_with_text": judged.merged,
    }
    return settings, {
        AUTHORS: mean(judged.perplexities, truncated=judged.truncated),
        CORRECTED: exp_of_ratio(judged.nll, judged.tokens, truncated=judged.truncated),
    }


def _of_tokens(texts: Sequence[str], tokenizer: Any) -> dict[str, dict[str, Estimate]]:
    if tokenizer is None:
        plain: list[list[Any]] = [text.split() for text in texts]
        entropies = {}
    else:
        special = set(tokenizer.all_special_ids)
        whole = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
        plain = [[token for token in tokens if token not in special] for tokens in whole]
        entropies = {
            "entropy": {
                AUTHORS: mean([diversity.entropy(tokens) for tokens in whole]),
                CORRECTED: mean([diversity.entropy(tokens) for tokens in plain]),
            }
        }
    exponent = diversity.zipf(plain)  # of all texts together
    return entropies | {
        "zipf": {AUTHORS: Estimate(None if exponent != exponent else exponent, None, len(texts))},
        "repetition": {
            AUTHORS: mean([float(diversity.ends_in_likeliest_loop(tokens)) for tokens in plain]),
            CORRECTED: mean([float(diversity.ends_in_loop(tokens)) for tokens in plain]),
        },
    }
