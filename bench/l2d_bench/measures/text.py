"""How texts go on, judged as TESS 2's adaptation metrics do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject, Value
from l2d_framework.config.sections import UserPath


class TextMeasure(Measure):
    """Perplexity under a judge, distinct n-grams, entropy and MAUVE of continuations.

    `perplexity`, `distinct_1` to `distinct_4`, `entropy` and `mauve` are defined as the authors of TESS 2 do;
    `NAME,corrected` stands for what `l2d eval-text` recommends.

    Source: Tae et al. 2025, arXiv:2502.13917, Table 1.
    """

    kind: Literal["text"] = "text"
    data: UserPath
    """JSON lines with `text`; texts too short are passed over."""
    judge: UserPath
    """Causal language model that finds texts likely or not; folder or hub id."""
    features: UserPath | None = None
    """Model whose states MAUVE compares; the judge when None."""
    samples: int = Field(default=512, ge=2)
    prefix: int = Field(default=256, ge=1)
    """Tokens given."""
    length: int = Field(default=256, ge=1)
    """Tokens to go on with."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def check(self) -> str | None:
        """Look for mauve-text.

        Returns:
            None.

        Raises:
            ConfigError: if it is missing.
        """
        from l2d_framework.evaluation.text.mauve_score import check_installed

        check_installed()
        return None

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The names.
        """
        names = ["perplexity", *(f"distinct_{n}" for n in range(1, 5)), "entropy", "mauve"]
        return [*names, *(f"{name},corrected" for name in names), "zipf", "repetition", "repetition,corrected"]

    def run(self, subject: Subject) -> Outcome:
        """Let the model go on, and judge.

        Args:
            subject: the model.

        Returns:
            The metrics, and the first texts.

        Raises:
            DataError: if fewer texts than wanted are long enough.
        """
        from l2d_bench.measures.prompts import Answerer
        from l2d_framework.evaluation.text.judge import Judge, pretrained
        from l2d_framework.evaluation.text.mauve_score import Features
        from l2d_framework.evaluation.text.measure import evaluate_texts
        from l2d_framework.evaluation.text.samples import Sample
        from l2d_framework.generation.prompts import opening

        answerer = Answerer(subject, self.options)
        ids, golds = self._beginnings(answerer.tokenizer)
        front = opening(answerer.tokenizer)
        texts = answerer.go_on([[*front, *prefix] for prefix in ids], self.length)
        prefixes = answerer.tokenizer.batch_decode(ids)
        samples = [Sample(*parts) for parts in zip(prefixes, texts, golds, strict=True)]
        where = {"device": subject.device, "dtype": "float32"}
        found = evaluate_texts(
            samples,
            tokenizer=answerer.tokenizer,
            judge=Judge(pretrained(self.judge, causal=True, **where)),
            features=Features(pretrained(self.features or self.judge, causal=False, **where)),
        )
        return Outcome(
            values=_values(found["metrics"]),
            texts=[{"prompt": one.prefix, "text": one.text} for one in samples[:5]],
            details={"settings": found["settings"], "empty_texts": found["empty_texts"]},
        )

    def _beginnings(self, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
        # Tokens of the prefixes, all of one length, and the text behind them.
        from l2d_bench.data.rows import read_rows
        from l2d_framework.errors import DataError

        whole = self.prefix + self.length
        prefixes: list[list[int]] = []
        golds: list[str] = []
        for row in read_rows(self.data, ("text",), None):
            ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            if len(ids) >= whole and len(prefixes) < self.samples:
                prefixes.append(ids[: self.prefix])
                golds.append(str(tokenizer.decode(ids[self.prefix : whole])))
        if len(prefixes) < self.samples:
            raise DataError(
                f"{self.data!r} has {len(prefixes)} texts of {whole} tokens or more, fewer than the {self.samples} "
                "wanted. Lower samples, prefix or length."
            )
        return prefixes, golds


def _values(metrics: dict[str, dict[str, Any]]) -> dict[str, Value]:
    found = {}
    for name, variants in metrics.items():
        for variant, numbers in variants.items():
            if numbers["value"] is not None:
                key = name if variant == "authors" else f"{name},{variant}"
                found[key] = Value(value=numbers["value"], error=numbers["standard_error"], items=numbers["samples"])
    return found
