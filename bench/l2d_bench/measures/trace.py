"""How sure a model is of every token at every evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from l2d_bench.measures.base import Measure, Outcome, Subject
from l2d_framework.config.sections import UserPath


class TraceMeasure(Measure):
    """Heat map of one answer, and when tokens stop to change, over several answers.

    `settled` is the share of the evaluations after which the likeliest token of a position stays what it is, mean over
    the positions of an answer, then over answers.

    Source: Tae et al. 2025, arXiv:2502.13917, Figure 4.
    """

    kind: Literal["trace"] = "trace"
    data: UserPath
    """JSON lines with `prompt`; the first is drawn."""
    new_tokens: int = Field(ge=1)
    """Tokens of the canvas behind the prompt."""
    limit: int = Field(default=20, gt=0)
    """Answers that `settled` is measured on."""
    chat: bool = False
    """Ask in the model's chat template instead of as plain text."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The one.
        """
        return ["settled"]

    def run(self, subject: Subject) -> Outcome:
        """Watch answers take shape.

        Args:
            subject: a diffusion model.

        Returns:
            The share, with the score of each answer; of the first, the probability of the likeliest token, evaluations
            times positions, the tokens of the positions and the text.
        """
        from l2d_bench.data.rows import prompts_of, read_rows
        from l2d_bench.measures.prompts import Answerer, share
        from l2d_framework.tracing import Recorder, maps

        rows = read_rows(self.data, ("prompt",), self.limit)
        answerer = Answerer(subject, self.options)
        scores, matrix, tokens, text = [], list[list[float]](), list[str](), ""
        for number, prompt in enumerate(prompts_of(rows, chat=self.chat)):
            recorder = Recorder(top=2)
            made = answerer.lm.generate(
                [prompt], max_new_tokens=self.new_tokens, do_sample=False, observer=recorder, **answerer.options
            )
            trace = recorder.finish(made.sequences[0, : made.prompt_length + int(made.lengths[0])].tolist())
            scores.append(_settled(trace))
            if number == 0:
                shown = trace.is_predicted
                matrix = maps(trace).confidence[:, shown].tolist()
                ids = [token for token, is_shown in zip(trace.tokens, shown, strict=True) if is_shown]
                tokens = [str(answerer.tokenizer.decode([token])) for token in ids]
                text = str(answerer.tokenizer.decode(ids, skip_special_tokens=True))
        return Outcome(
            values={"settled": share(scores)},
            matrix=matrix,
            texts=[{"prompt": rows[0]["prompt"], "text": text}],
            details={"tokens": tokens},
        )


def _settled(trace: Any) -> float:
    """Mean over positions of the share of evaluations until the likeliest token is the last evaluation's for good."""
    import numpy as np

    shares = []
    for position in np.unique(trace.position):
        likeliest = trace.ids[trace.position == position, 0]
        changed = np.nonzero(likeliest != likeliest[-1])[0]
        shares.append(0.0 if not len(changed) else (int(changed[-1]) + 1) / len(likeliest))
    return float(np.mean(shares))
