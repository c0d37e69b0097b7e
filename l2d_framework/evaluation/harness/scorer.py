"""Scores of given answers: the likelihood of a mixture over noise, or a named stand-in where there is no likelihood."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]

from l2d_framework.blame import naming_plugins
from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.sampler import Block, Sampler, get_ready
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.options import shortest
from l2d_framework.evaluation.harness.requests import PIECE, noise_key
from l2d_framework.generation.prefix import SHARED, Prefix
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import CLASS
from l2d_framework.training.data.collate import number_blocks
from l2d_framework.types import Context, Layout, Query

if TYPE_CHECKING:
    from l2d_framework.evaluation.harness.model import L2DLM

MAIN, MIXTURE, PSEUDO = "main", "mixture", "pseudo"
METHODS = {
    MAIN: "log-likelihood of the frozen language model",
    MIXTURE: "log of the probability averaged over noise_samples fixed noises, token by token, the true tokens before "
    "each given; its logarithm is biased low for few samples",
    PSEUDO: "no likelihood: log-probability the network gives the answer's tokens when all of them are noised "
    "together, summed over tokens, averaged over pseudo_times times and noise_samples noises",
}
"""What each score is."""

_LOGITS = 2**25
"""Most logits held at once."""


@dataclass(frozen=True)
class ScoredQuestion:
    """What comes before, and answers to it that differ in nothing but their last token."""

    context: tuple[int, ...]
    answers: list[tuple[int, ...]]

    def text(self, limit: int) -> list[int]:
        """All tokens known when the last of an answer is asked for, cut on the left."""
        return [*self.context, *self.answers[0][:-1]][-limit:]


_Entry = tuple[ScoredQuestion, list[int]]
"""A question and the numbers of the requests that ask it."""


@dataclass(frozen=True)
class Scorer:
    """A model with the settings of scoring."""

    model: DiffusionLM
    sampling: SamplingSection
    samples: int  # fixed noises K
    times: int  # of the pseudo-likelihood
    limit: int  # most tokens a text may have
    label: int | None = None  # id of the class of all texts
    merge: Literal["auto", "always", "never"] = "auto"  # as in `generate`
    compile: bool = False  # as in `generate`
    evaluations: list[int] = field(default_factory=list)  # filled: spent on each scored token, over all noises
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)  # of questions, by their first tokens

    @torch.no_grad()
    def mixture(self, questions: Sequence[ScoredQuestion]) -> list[list[tuple[float, bool]]]:
        """log p(answer | question) with p(token | text before) = mean over noises of softmax(logits).

        Every position is a block of its own that reads the true tokens before it, so all are solved together. Noise
        depends on the question, the position and the sample: answers to one question meet the same noise. With each
        logarithm goes whether every token is the averaged distribution's most likely one.
        """
        device = self.model.device
        layout, context, starts = self._read(questions)
        lengths = [len(question.answers[0]) for question in questions]
        # A batch-coupled solver sees one token and one noise at a time.
        coupled = self.sampling.solver.batch_coupled
        groups = [[k] for k in range(self.samples)] if coupled else [list(range(self.samples))]
        step = 1 if coupled else max(1, _LOGITS // (len(questions) * self.samples * self.model.backbone.vocab_size))
        likely: list[Tensor] = []
        given: list[Tensor] = []
        last: dict[int, Tensor] = {}
        for first in range(0, max(lengths), step):
            # Shorter answers ask about their last token again.
            offsets = [[min(j, n - 1) for j in range(first, min(first + step, max(lengths)))] for n in lengths]
            asked = [[start + j for j in row] for start, row in zip(starts, offsets, strict=True)]
            parts = [self._logarithms(questions, offsets, asked, layout, context, group) for group in groups]
            average = torch.cat(parts, 2).logsumexp(2) - math.log(self.samples)
            rows = zip(questions, offsets, strict=True)
            targets = torch.tensor([[question.answers[0][j] for j in row] for question, row in rows])
            given.append(average.gather(2, targets.to(device)[..., None])[..., 0])
            likely.append(average.argmax(-1))
            last |= {i: average[i, n - 1 - first] for i, n in enumerate(lengths) if first < n <= first + step}
        before = torch.cat(given, 1).tolist(), torch.cat(likely, 1).tolist()
        return [
            [
                (sum(chosen[: n - 1]) + float(last[i][a[-1]]), (*best[: n - 1], int(last[i].argmax())) == a)
                for a in question.answers
            ]
            for i, (question, n, chosen, best) in enumerate(zip(questions, lengths, *before, strict=True))
        ]

    def _read(self, questions: Sequence[ScoredQuestion]) -> tuple[Layout, Context, list[int]]:
        """All texts, what the backbone has read of them, and the slots where their answers start.

        Questions with several answers are read once, and so is what all questions begin with, where that is possible.
        """
        backbone, device = self.model.backbone, self.model.device
        texts, rests = [one.text(self.limit) for one in questions], [list(one.answers[0][:-1]) for one in questions]
        prompts = [tuple(text[: len(text) - len(rest)]) for text, rest in zip(texts, rests, strict=True)]
        each = list(dict.fromkeys(prompts))
        prefix = self._prefix(each)
        if prefix is None and (len(each) == len(questions) or not backbone.rewinds or min(map(len, each)) == 1):
            encoded = pad_left(texts)
            layout = Layout(encoded.input_ids.to(device), encoded.attention_mask.to(device) - 1)
            return layout, backbone.read(layout), [layout.tokens.shape[1] - len(rest) for rest in rests]
        if prefix is None:
            encoded = pad_left([prompt[:-1] for prompt in each])
            layout = Layout(encoded.input_ids.to(device), encoded.attention_mask.to(device) - 1)
            context, slots = backbone.read(layout), layout.tokens.shape[1]
        else:
            context, slots = prefix.read(each)
        if len(each) < len(questions):
            context = context.select(torch.tensor([each.index(prompt) for prompt in prompts], device=device))
        ends = [torch.tensor([prompt[-1], *rest]) for prompt, rest in zip(prompts, rests, strict=True)]
        end = pad_sequence(ends, batch_first=True).to(device)
        encoded = pad_left(prompts)
        own = pad_sequence(
            [torch.zeros(len(rest) + 1, dtype=torch.int64) for rest in rests], batch_first=True, padding_value=-1
        )
        layout = Layout(
            torch.cat([encoded.input_ids[:, :-1].to(device), end], 1),
            torch.cat([encoded.attention_mask[:, :-1] - 1, own], 1).to(device),
        )
        return layout, backbone.extend(context, end), [slots + 1] * len(questions)

    def _prefix(self, prompts: Sequence[tuple[int, ...]]) -> Prefix | None:
        """What all questions begin with."""
        known = self.prefixes.get(prompts[0][:SHARED])
        if known is None or not all(map(known.begins, prompts)):
            return Prefix.of(self.model.backbone, prompts)
        for prefix in self.prefixes.values():
            if prefix is not known:
                prefix.forget()
        return known

    def _logarithms(
        self,
        questions: Sequence[ScoredQuestion],
        offsets: list[list[int]],
        slots: list[list[int]],
        layout: Layout,
        context: Context,
        samples: list[int],
    ) -> Tensor:
        """Log-probabilities of the tokens `offsets` into each answer, in some slots, (B, L, K, V)."""
        positions, keys = [], []
        for question, row, where in zip(questions, offsets, slots, strict=True):
            name, start = noise_key(question.context, 0), len(question.context)
            positions.append([slot for slot in where for _ in samples])
            keys.append([(self.sampling.seed, name, start + j, k) for j in row for k in samples])
        places = torch.tensor(positions, device=layout.tokens.device)
        label = None if self.label is None else torch.full_like(places, self.label)
        block = Block(positions=places, layout=layout, context=context, keys=keys, condition=label)
        sampling = self.sampling.model_copy(update={"patience": None})
        output = Sampler.of(self.model, sampling, merge=self.merge, compile=self.compile)(block)
        shape = (len(questions), len(offsets[0]), len(samples))
        spent = output.evaluations.view(shape).sum(-1).tolist()
        for row, counts in zip(offsets, spent, strict=True):
            self.evaluations.extend(n for j, n in enumerate(counts) if j == 0 or row[j] != row[j - 1])
        logits = torch.cat([part for _, part in output.logits.parts()], 1)
        return logits.view(*shape, -1).log_softmax(-1)

    @torch.no_grad()
    def pseudo(self, questions: Sequence[ScoredQuestion]) -> list[list[tuple[float, bool]]]:
        """Minus the denoising loss of each answer, as training measures it, at fixed times and noises.

        score = mean over t in {1/2T, 3/2T, ...} and over noises of sum_i log p(y_i | x_t, t, question), where x_t is
        the answer under noise, block by block. Noise depends on the question, the position and the sample alone. A
        backbone that carries hidden states goes on from those at the time before. With each score goes whether every
        token is the most likely one at every time.
        """
        model, device = self.model, self.model.device
        get_ready(model, merge=self.merge, compile=self.compile)
        answers = [question.answers[0] for question in questions]
        longest = max(map(len, answers))
        cut = [question.context[-(self.limit - len(a)) :] for question, a in zip(questions, answers, strict=True)]
        encoded = pad_left(cut)
        # Shorter answers repeat their last token, state and all, which is one slot for the network.
        places, last = torch.arange(longest), torch.tensor([[len(a) - 1] for a in answers])
        own, offsets = (places <= last).to(device), places.minimum(last).to(device)
        padded = torch.tensor([[*a, *a[-1:] * (longest - len(a))] for a in answers], device=device)
        # A block is denoised after the true tokens before it, as in training.
        ids, mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
        blocks = torch.where(own, number_blocks(own, model.block_size), -1)
        context = model.backbone.read(Layout(torch.cat([ids, padded], 1), torch.cat([mask - 1, blocks], 1)))
        label = None if self.label is None else torch.full_like(padded, self.label)
        scores = torch.zeros(len(questions), device=device)
        greedy = torch.ones(len(questions), dtype=torch.bool, device=device)
        names = [(noise_key(question.context, 0), len(question.context)) for question in questions]
        for sample in range(self.samples):
            keys = [
                [(self.sampling.seed, name, start + j, sample, "pseudo") for j in row]
                for (name, start), row in zip(names, offsets.tolist(), strict=True)
            ]
            carried: Tensor | None = None
            for number in range(self.times):
                noise = model.parametrization.noise(TokenStreams(keys, device))
                time = (number + 0.5) / self.times
                t = torch.full(padded.shape, time, device=device)
                query = Query(
                    x=model.diffuse(padded, t, noise),
                    t=t,
                    positions=encoded.input_ids.shape[1] + offsets,
                    context=context,
                    condition=label,
                    carried=carried,
                    shared_time=time,
                    compiled=self.compile,
                )
                found = model(query)
                logits, carried = found.logits.log_softmax(-1), found.hidden
                chosen = logits.gather(2, padded[..., None])[..., 0]
                scores += chosen.masked_fill(~own, 0).sum(1)
                greedy &= ((logits.argmax(-1) == padded) | ~own).all(1)
        count = self.samples * self.times
        self.evaluations.extend(count for a in answers for _ in a)
        return [[(float(score) / count, bool(hit))] for score, hit in zip(scores, greedy, strict=True)]


def score(
    lm: L2DLM, requests: Sequence[Any], *, quiet: bool, batch_size: int | None = None
) -> list[tuple[float, bool]]:
    """Score of each triple of texts, tokens of the question and tokens of the answer."""
    questions: dict[Any, _Entry] = {}
    # The mixture reads all but the last token, which is how pieces of a long text fill the context.
    most = lm.max_length if lm.scoring == MIXTURE else lm.max_length - 1
    for number, (_, context, answer) in enumerate(requests):
        if len(answer) > most:
            raise ConfigError(f"An answer of {len(answer)} tokens exceeds the model's context, {lm.max_length}.")
        # What comes before the last token is the same text, so one evaluation serves several last tokens.
        shared = tuple(answer[:-1]) if lm.scoring == MIXTURE else tuple(answer)
        question, numbers = questions.setdefault((tuple(context), shared), (ScoredQuestion(tuple(context), []), []))
        if lm.scoring == MIXTURE or not question.answers:
            question.answers.append(tuple(answer))
        numbers.append(number)
    # Questions that begin alike stand side by side, and all in the order of the longest text.
    groups: dict[Any, list[_Entry]] = {}
    for entry in sorted(questions.values(), key=lambda entry: (-len(entry[0].text(lm.max_length)), entry[0].context)):
        groups.setdefault(entry[0].context[:SHARED], []).append(entry)
    order = [entry for group in groups.values() for entry in sorted(group, key=_place)]
    scorer = _scorer(lm)
    for start, group in groups.items():
        prefix = Prefix.of(lm.diffusion.backbone, list(dict.fromkeys(question.context for question, _ in group)))
        if prefix is not None:
            scorer.prefixes[start] = prefix
    longest = max((question for question, _ in order), key=lambda one: len(one.text(lm.max_length)), default=None)
    size = 1 if longest is None else _batch_size(lm, scorer, longest, batch_size)
    # Pieces of a text beyond those whose logits are held at once wait for one another, and would be lost together.
    is_rolling = lm.scoring == MIXTURE and any(text is None for text, *_ in requests)
    room = _LOGITS // (lm.samples * lm.diffusion.backbone.vocab_size) if is_rolling else None
    results: dict[int, tuple[float, bool]] = {}
    bar = tqdm(total=len(requests), disable=quiet, desc="Scoring")
    began = time.perf_counter()
    together = [list(run) for _, run in groupby(order, lambda entry: scorer.prefixes.get(entry[0].context[:SHARED]))]
    for chunk in (chunk for run in together for chunk in _chunks(run, size, room)):
        found = _scores_of(lm, scorer, [question for question, _ in chunk])
        for (_, numbers), scores in zip(chunk, found, strict=True):
            for number, value in zip(numbers, scores * (len(numbers) // len(scores)), strict=True):
                results[number] = value
                text, *piece = requests[number]
                lm.answers.keep(*(("loglikelihood", text) if text is not None else (PIECE, piece)), value)
            bar.update(len(numbers))
    bar.close()
    lm.meters["scoring"].add(scorer.evaluations)
    lm.meters["scoring"].time(len(scorer.evaluations), time.perf_counter() - began)
    return [results[number] for number in range(len(requests))]


def _chunks(run: list[_Entry], size: int, most: int | None) -> Iterator[list[_Entry]]:
    """So many questions at a time, or fewer whose answers, each as long as the longest, have so many tokens at most."""
    while run:
        longest = max(len(question.answers[0]) for question, _ in run[:size])
        count = size if most is None else min(size, max(1, most // longest))
        yield run[:count]
        run = run[count:]


def _place(entry: _Entry) -> tuple[int, tuple[int, ...]]:
    return -len(entry[0].context), entry[0].context


def _scorer(lm: L2DLM, **changes: Any) -> Scorer:
    label = lm.options.get(CLASS)
    return Scorer(
        lm.diffusion,
        lm.settings.model_copy(update=changes),
        samples=lm.samples,
        times=lm.times,
        limit=lm.max_length,
        label=None if label is None else lm.source.classes.index(label),
        merge=lm.running.get("merge", "auto"),
        compile=lm.running.get("compile", False),
    )


@naming_plugins()
def _scores_of(lm: L2DLM, scorer: Scorer, questions: list[ScoredQuestion]) -> list[list[tuple[float, bool]]]:
    return scorer.mixture(questions) if lm.scoring == MIXTURE else scorer.pseudo(questions)


def _batch_size(lm: L2DLM, scorer: Scorer, longest: ScoredQuestion, wanted: int | None) -> int:
    if scorer.sampling.solver.batch_coupled:
        return 1
    if wanted or lm.batch_size != "auto":
        return int(wanted or lm.batch_size)
    probe = _scorer(lm, **shortest(scorer.sampling))
    return lm.largest_batch(lambda n: _scores_of(lm, probe, [longest] * n))


def largest_batch(lm: L2DLM) -> int:
    """Largest batch of the longest texts for which memory is enough."""
    question = ScoredQuestion((1,), [(1,) * (lm.max_length - 1)])
    return lm.largest_batch(lambda n: _scores_of(lm, _scorer(lm, **shortest(lm.settings)), [question] * n))
