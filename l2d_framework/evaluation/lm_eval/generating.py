"""Answers of the model `l2d` to the requests of generative tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import StoppingCriteriaList

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.lm_eval.numbering import content, noise_key, occurrences
from l2d_framework.evaluation.lm_eval.opened import Opened, shortest
from l2d_framework.evaluation.lm_eval.options import Plan, read_plan
from l2d_framework.evaluation.lm_eval.source import CLASS, SCALE
from l2d_framework.evaluation.lm_eval.until import Until
from l2d_framework.prompts import Encoded, pad_left

_LOGGER = logging.getLogger(__name__)


class Generating(Opened):
    """A model that answers requests."""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests.

        Args:
            requests: lm_eval's instances.
            disable_tqdm: show no progress.

        Returns:
            A text per request.
        """
        self._notice(requests)
        numbers = occurrences(requests, self._gather)
        kinds = [content(request.args[1]) for request in requests]
        plans = {kind: self._plan(request.args[1]) for kind, request in zip(kinds, requests, strict=True)}
        keys = [(r.args[0], kind, number) for r, kind, number in zip(requests, kinds, numbers, strict=True)]
        done: dict[Any, str] = {}
        waiting: dict[str, dict[Any, Any]] = {kind: {} for kind in plans}
        for request, key in zip(requests, keys, strict=True):
            found = self.answers.find("generate_until", request.args, key[2])
            if found is None:
                waiting[key[1]][key] = request.args
            elif key not in done:
                done[key] = found[0]
                self.meters["generation"].add(found[1])
        bar = tqdm(total=sum(map(len, waiting.values())), disable=disable_tqdm or self.rank != 0, desc="Generating")
        for kind, group in waiting.items():
            for key, text, evaluations in self._generate(plans[kind], list(group), bar):
                done[key] = text
                self.answers.keep("generate_until", group[key], (text, evaluations), key[2])
        bar.close()
        self._count("generation")
        return [done[key] for key in keys]

    def _plan(self, generation: Mapping[str, Any]) -> Plan:
        plan = read_plan(generation, self.max_gen_toks, self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        if plan.count >= self.max_length:
            raise ConfigError(
                f"max_gen_toks={plan.count} leaves no room for the prompt: the model's context is {self.max_length}. "
                "Lower it in --gen_kwargs."
            )
        plan = replace(plan, options=self.source.classed(self.options | plan.options))
        settings = self.source.sampling(plan.options)
        self._used[content(plan.options)] = settings.model_dump(mode="json") | {CLASS: plan.options.get(CLASS)}
        return plan

    def _generate(self, plan: Plan, keys: list[Any], bar: Any) -> Iterator[tuple[Any, str, list[int]]]:
        """Yields key, text and evaluations of each answer."""
        rows = {key: self.tok_encode(key[0]) or [self.prefix_token_id] for key in keys}
        # The longest first, so that memory runs out at once or never.
        keys.sort(key=lambda key: (-len(rows[key]), key))
        limit = self.max_length - plan.count
        if keys and len(rows[keys[0]]) > limit:
            _LOGGER.warning("The longest prompt has %d tokens; prompts keep their last %d.", len(rows[keys[0]]), limit)
        size = self._generation_batch(plan, min(limit, len(rows[keys[0]]))) if keys else 1
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            batch = pad_left([rows[key][-limit:] for key in chunk], [noise_key(rows[key], key[2]) for key in chunk])
            answers = self._answer(plan, batch)
            for key, (tokens, evaluations) in zip(chunk, answers, strict=True):
                self.meters["generation"].add(evaluations)
                yield key, self._text(tokens, plan.until), evaluations
            bar.update(len(chunk))

    def _answer(
        self, plan: Plan, batch: Encoded, *, is_probe: bool = False, **changes: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens of each answer and the evaluations spent on them."""
        model, meter = self.diffusion, self.meters["generation"]
        options = plan.options | changes
        label, scale = options.pop(CLASS, None), options.pop(SCALE, None)
        began = time.perf_counter()
        found = model.generate(
            batch,
            stopping_criteria=StoppingCriteriaList([Until(self.tokenizer, plan.until, batch.input_ids.shape[1])]),
            classes=None if label is None else [label] * len(batch.input_ids),
            guidance_scale=scale,
            max_new_tokens=plan.count,
            pad_token_id=self.tokenizer.pad_token_id,
            **plan.picking,
            **options,
        )
        lengths = found.lengths.tolist()
        seconds = time.perf_counter() - began
        if not is_probe:
            meter.time(sum(lengths), seconds)
            if not meter.is_compared and self.rank == 0 and found.evaluations.any():
                meter.compare(seconds / sum(lengths), self._plain_seconds(batch, max(lengths)))
        rows = zip(found.answers.tolist(), found.evaluations.tolist(), lengths, strict=True)
        return [(tokens[:length], evaluations[:length]) for tokens, evaluations, length in rows]

    def _plain_seconds(self, batch: Encoded, count: int) -> float:
        """Seconds per answer token of transformers' own generate on the same prompts."""
        began = time.perf_counter()
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        lengths = {"min_new_tokens": count, "max_new_tokens": count}
        found = self._model.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=self.tokenizer.pad_token_id, **lengths
        )
        found.tolist()
        return (time.perf_counter() - began) / (count * len(ids))

    def _text(self, tokens: list[int], until: list[str]) -> str:
        end = self.think_end_token
        is_token = isinstance(end, int)
        if is_token and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        text = self.tok_decode(tokens)
        return str(postprocess_generated_text(text.lstrip() if is_token else text, until, None if is_token else end))

    def _generation_batch(self, plan: Plan, length: int) -> int:
        settings = self.source.sampling(plan.options)
        if settings.solver.batch_coupled:
            return 1
        if self.batch_size != "auto":
            return int(self.batch_size)
        # One token after as long a text as there can be, or one whole block.
        whole = length if self.source.is_block else length + plan.count - 1
        probe = Plan([], plan.count if self.source.is_block else 1, plan.picking, plan.options)
        return self._largest(
            lambda n: self._answer(probe, pad_left([[1] * whole] * n), is_probe=True, **shortest(settings))
        )
