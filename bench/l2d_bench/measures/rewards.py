"""Rewards of answers under a model that judges and never guides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from typing_extensions import override

from l2d_bench.measures.base import Measure, Outcome, Subject
from l2d_framework.config.sections import UserPath

if TYPE_CHECKING:
    from l2d_bench.measures.prompts import Answer, Answerer


class RewardMeasure(Measure):
    """Mean reward of answers, and signs that guidance broke them.

    `reward` stands in for a judge such as AlpacaEval's; `distinct_2`, `loops`, `ended` and `tokens` show when answers
    degenerate. The reward is read at the end of a padded canvas, as guidance reads it, so the reward model has to be
    trained with `data.pad_to`.
    """

    kind: Literal["reward"] = "reward"
    data: UserPath
    """JSON lines with `prompt`."""
    model: UserPath
    """Folder of the reward model; one that no row is guided by."""
    canvas: int = Field(ge=2)
    """Tokens of question, answer and padding."""
    limit: int | None = Field(default=None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the adapter below those of models and rows."""

    def metrics(self) -> list[str]:
        """Names of the values.

        Returns:
            The names.
        """
        return ["reward", "distinct_2", "loops", "ended", "tokens"]

    def run(self, subject: Subject) -> Outcome:
        """Answer in the model's chat template, and judge.

        Args:
            subject: the model.

        Returns:
            Means over answers, and the first answers.
        """
        from l2d_bench.data.rows import prompts_of, read_rows
        from l2d_bench.measures.prompts import Answerer, share

        rows = read_rows(self.data, ("prompt",), self.limit)
        answerer, prompts = Answerer(subject, self.options), prompts_of(rows, chat=True)
        found = answerer.ask(prompts, self.canvas)
        scores = self._scores(answerer, prompts, found)
        return Outcome(
            # Answers of less than two words have no pair of words.
            values={name: share(values) for name, values in scores.items() if not all(v != v for v in values)},
            texts=[{"prompt": row["prompt"], "text": one.text} for row, one in zip(rows[:8], found[:8], strict=True)],
            details={"evaluations_per_token": sum(answer.evaluations for answer in found) / len(found)},
        )

    def _scores(self, answerer: Answerer, prompts: Sequence[Any], found: Sequence[Answer]) -> dict[str, list[float]]:
        from l2d_framework.evaluation.text import diversity

        ends = _ends(answerer)
        return {
            "reward": self._rewards(self.model, answerer, prompts, found),
            "distinct_2": [diversity.distinct_per_ngram(answer.text, 2) for answer in found],
            "loops": [float(diversity.ends_in_loop(answer.ids)) for answer in found],
            "ended": [float(not ends.isdisjoint(answer.ids)) for answer in found],
            "tokens": [float(len(answer.ids)) for answer in found],
        }

    def _rewards(
        self, model: str, answerer: Answerer, prompts: Sequence[Any], answers: Sequence[Answer]
    ) -> list[float]:
        import torch
        from transformers import AutoModelForSequenceClassification

        from l2d_framework.generation.prompts import encode_prompts, turn_end
        from l2d_framework.opening import open_model, open_tokenizer

        judge: Any = open_model(AutoModelForSequenceClassification, model)[0]
        judge = judge.to(answerer.lm.device).eval()
        tokenizer: Any = open_tokenizer(model)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        end, ends = turn_end(tokenizer), _ends(answerer)
        ids = torch.full((len(answers), self.canvas), int(pad), device=answerer.lm.device)
        # Answers are read as text, since a judge need not have the tokens of every model that it judges.
        for row, prompt, answer in zip(ids, encode_prompts(tokenizer, list(prompts)), answers, strict=True):
            ended = [end] * (not ends.isdisjoint(answer.ids))
            whole = [*prompt, *tokenizer(answer.text, add_special_tokens=False)["input_ids"], *ended][: self.canvas]
            row[: len(whole)] = torch.tensor(whole)
        embed, rewards = judge.get_input_embeddings(), list[float]()
        with torch.inference_mode():
            for part in ids.split(answerer.batch_size):
                # Given embeddings instead of tokens, transformers reads the last position, padding or not.
                rewards += judge(inputs_embeds=embed(part)).logits[:, 0].float().tolist()
        return rewards


def _ends(answerer: Answerer) -> set[int]:
    return {answerer.tokenizer.eos_token_id, *answerer.lm.ends(is_chat=True)}


class GuidedMeasure(RewardMeasure):
    """The same, with the reward of the model that guides, and what a language model and the tokens alone say.

    `entropy` is that of an answer's tokens, in bits; `loss` their cross-entropy under `language_model`, given the
    question, in nats per token, whose exponential is a perplexity.
    """

    kind: Literal["guided"] = "guided"  # type: ignore[assignment]
    guide: UserPath
    """Folder of the reward model that guides."""
    language_model: UserPath
    """Folder of a causal language model with the measured model's tokenizer."""

    @override
    def metrics(self) -> list[str]:
        return [*super().metrics(), "guiding_reward", "entropy", "loss"]

    @override
    def _scores(self, answerer: Answerer, prompts: Sequence[Any], found: Sequence[Answer]) -> dict[str, list[float]]:
        import torch
        from transformers import AutoModelForCausalLM

        from l2d_framework.evaluation.text import diversity
        from l2d_framework.generation.prompts import encode_prompts
        from l2d_framework.opening import open_model

        judge: Any = open_model(AutoModelForCausalLM, self.language_model)[0]
        judge = judge.to(answerer.lm.device).eval()
        losses = []
        for before, answer in zip(encode_prompts(answerer.tokenizer, list(prompts)), found, strict=True):
            ids = torch.tensor([[*before, *answer.ids]], device=answerer.lm.device)
            with torch.inference_mode():
                scores = judge(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
            losses.append(-scores.gather(1, ids[0, len(before) :, None]).mean().item())
        return super()._scores(answerer, prompts, found) | {
            "guiding_reward": self._rewards(self.guide, answerer, prompts, found),
            "entropy": [diversity.entropy(answer.ids) for answer in found],
            "loss": losses,
        }
