"""The model `l2d` of lm_eval: its Hugging Face model with a diffusion model in its place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from l2d_framework.blame import naming_plugins
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.generator import Generating
from l2d_framework.evaluation.harness.opened import shortest
from l2d_framework.evaluation.harness.request_ids import content
from l2d_framework.evaluation.harness.scorer import MAIN, MIXTURE, PSEUDO, Job, Scorer
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import CLASS


class L2DLM(Generating):
    """Diffusion checkpoints, and plain language models with `num_inference_steps=0`; `Opened` says what it takes.

    Noise is named by a request's own words, never by its place in a batch, so neither batch size, order nor the number
    of processes changes an answer.
    """

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores of continuations: log-likelihoods, or what `scoring` names."""
        self._notice(requests)
        self._check_scoring(requests)
        found = self._remembered("loglikelihood", requests, super().loglikelihood, disable_tqdm)
        self._count("scoring")
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts."""
        self._notice(requests)
        self._check_scoring(requests)
        if self.scoring == PSEUDO:
            raise ConfigError("scoring='pseudo' compares answers to a question; whole texts need a likelihood.")
        found = self._remembered("loglikelihood_rolling", requests, super().loglikelihood_rolling, disable_tqdm)
        self._count("scoring")
        return found

    def _check_scoring(self, requests: Sequence[Any]) -> None:
        if self.scoring is None:
            tasks = sorted({str(request.task_name) for request in requests})
            raise ConfigError(
                f"The tasks {tasks} ask for log-likelihoods, which this model has none of: it denoises all tokens of "
                "an answer together. Choose tasks that generate, or add scoring=pseudo to --model_args for a "
                "pseudo-likelihood of multiple-choice answers."
            )
        if self.scoring != MAIN:
            self._check_class(self.settings, self.options)

    def _remembered(self, kind: str, requests: Sequence[Any], compute: Any, quiet: bool) -> list[Any]:
        # Processes wait for each other inside rolling likelihoods, so each must take part.
        together = self.world_size > 1 and kind == "loglikelihood_rolling"
        found = {}
        for request in requests:
            answer = None if together else self.answers.find(kind, request.args)
            if answer is not None:
                found[content(request.args)] = answer
        rest = list({content(r.args): r for r in requests if content(r.args) not in found}.values())
        if together:
            rest = list(requests)
        if rest:
            for request, answer in zip(rest, compute(rest, disable_tqdm=quiet), strict=True):
                found[content(request.args)] = answer
        return [found[content(request.args)] for request in requests]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        model = self.diffusion
        if self.scoring == MAIN:
            plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return plain
        jobs: dict[Any, tuple[Job, list[int]]] = {}
        # The mixture reads all but the last token, which is how pieces of a long text fill the context.
        most = self.max_length if self.scoring == MIXTURE else self.max_length - 1
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > most:
                raise ConfigError(f"An answer of {len(answer)} tokens exceeds the model's context, {self.max_length}.")
            # What comes before the last token is the same text, so one evaluation serves several last tokens.
            shared = tuple(answer[:-1]) if self.scoring == MIXTURE else tuple(answer)
            job, numbers = jobs.setdefault((tuple(context), shared), (Job(tuple(context), []), []))
            if self.scoring == MIXTURE or not job.answers:
                job.answers.append(tuple(answer))
            numbers.append(number)
        order = sorted(jobs.values(), key=lambda entry: (-len(entry[0].text(self.max_length)), entry[0].context))
        scorer = self._scorer(model)
        size = self._scoring_batch(scorer, order[0][0], override_bs) if order else 1
        results: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring")
        began = time.perf_counter()
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for (_, numbers), scores in zip(chunk, self._score(scorer, [job for job, _ in chunk]), strict=True):
                for number, score in zip(numbers, scores * (len(numbers) // len(scores)), strict=True):
                    results[number] = score
                    if requests[number][0] is not None:
                        self.answers.keep("loglikelihood", requests[number][0], score)
                bar.update(len(numbers))
        bar.close()
        self.meters["scoring"].add(scorer.evaluations)
        self.meters["scoring"].time(len(scorer.evaluations), time.perf_counter() - began)
        return [results[number] for number in range(len(requests))]

    def _scorer(self, model: DiffusionLM, **changes: Any) -> Scorer:
        label = self.options.get(CLASS)
        return Scorer(
            model,
            self.settings.model_copy(update=changes),
            samples=self.samples,
            times=self.times,
            limit=self.max_length,
            label=None if label is None else self.source.classes.index(label),
        )

    @naming_plugins()
    def _score(self, scorer: Scorer, jobs: list[Job]) -> list[list[tuple[float, bool]]]:
        return scorer.mixture(jobs) if self.scoring == MIXTURE else scorer.pseudo(jobs)

    def _scoring_batch(self, scorer: Scorer, longest: Job, wanted: int | None) -> int:
        if scorer.sampling.solver.batch_coupled:
            return 1
        if wanted or self.batch_size != "auto":
            return int(wanted or self.batch_size)
        probe = self._scorer(scorer.model, **shortest(scorer.sampling))
        return self._largest(lambda n: self._score(probe, [longest] * n))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # HFLM asks before whole texts and before scoring by the language model alone.
        if self.device.type == "cpu":
            return self._largest(lambda n: None)
        model = self.diffusion
        if self.scoring == MAIN:
            return int(super()._detect_batch_size(requests, pos))
        job = Job((1,), [(1,) * (self.max_length - 1)])
        return self._largest(lambda n: self._score(self._scorer(model, **shortest(self.settings)), [job] * n))
