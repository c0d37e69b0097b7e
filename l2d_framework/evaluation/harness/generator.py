"""Answers of the model `l2d` to the requests of generative tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.options import Plan, read_plan, shortest
from l2d_framework.evaluation.harness.requests import content, noise_key, occurrences
from l2d_framework.evaluation.search.search import search
from l2d_framework.generation.prompts import Encoded, add_ends, pad_left
from l2d_framework.generation.requests import OnAnswer
from l2d_framework.models.unloaded import CLASS, SCALE

if TYPE_CHECKING:
    from l2d_framework.evaluation.harness.model import L2DLM

_LOGGER = logging.getLogger(__name__)


class StopStrings(StoppingCriteria):
    """Ends a row once its answer contains a string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int) -> None:
        self._tokenizer, self._strings, self._start = tokenizer, [s for s in strings if s], start
        # A token has at least one byte; one more, because decoders drop a leading space.
        self._window = 1 + max((len(s.encode()) for s in self._strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows are done, (B,), bool."""
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :].tolist()
        texts = [str(self._tokenizer.decode(tail)) for tail in tails]
        done = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class Generator:
    """What a model answers to generative tasks."""

    def __init__(self, lm: L2DLM) -> None:
        self.lm = lm

    def answer_all(self, requests: Sequence[Any], *, quiet: bool) -> list[str]:
        """A text per request."""
        numbers = occurrences(requests)
        kinds = [content(request.args[1]) for request in requests]
        plans = {kind: self.plan(request.args[1]) for kind, request in zip(kinds, requests, strict=True)}
        keys = [(r.args[0], kind, number) for r, kind, number in zip(requests, kinds, numbers, strict=True)]
        asked = {key: request.args for request, key in zip(requests, keys, strict=True)}
        answered: dict[Any, str] = {}
        for key, args in asked.items():
            if (kept := self.lm.answers.find("generate_until", args, key[2])) is not None:
                answered[key] = kept[0]
                self.lm.meters["generation"].add(kept[1])
        done = self.lm.pooled(answered)
        share = self.lm.share(key[0] for key in asked if key not in done)
        waiting: dict[str, dict[Any, Any]] = {kind: {} for kind in plans}
        for key, args in asked.items():
            if key not in done and key[0] in share:
                waiting[key[1]][key] = args
        bar = tqdm(total=sum(map(len, waiting.values())), disable=quiet, desc="Generating")
        for kind, group in waiting.items():

            def tell(key: Any, text: str, evaluations: list[int], group: dict[Any, Any] = group) -> None:
                answered[key] = text
                self.lm.answers.keep("generate_until", group[key], (text, evaluations), key[2])
                bar.update()

            self._generate(plans[kind], list(group), tell)
        bar.close()
        done |= self.lm.pooled(answered)
        return [done[key] for key in keys]

    def plan(self, generation: Mapping[str, Any]) -> Plan:
        """How to answer requests with these generation options."""
        end = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        size = self.lm.source.empty.vocab_size
        plan = read_plan(generation, self.lm.max_gen_toks, end, search=self.lm.searching, vocab_size=size)
        if plan.count >= self.lm.max_length:
            raise ConfigError(
                f"max_gen_toks={plan.count} leaves no room for the prompt: the context is {self.lm.max_length}. "
                "Lower it in --gen_kwargs."
            )
        plan = replace(plan, options=self.lm.source.classed(self.lm.options | plan.options))
        settings = self.lm.source.sampling(plan.options)
        self.lm.check_class(settings, plan.options)
        searched = None if plan.search is None else plan.search.model_dump()
        if searched and self.lm.source.is_block:
            raise ConfigError("Search weighs next tokens, and this model denoises whole answers. Leave search_* out.")
        used = settings.model_dump(mode="json") | {CLASS: plan.options.get(CLASS), "search": searched}
        used["picking"] = plan.decoding
        self.lm.used[content(used)] = used
        return plan

    def _generate(self, plan: Plan, keys: list[Any], tell: Callable[[Any, str, list[int]], None]) -> None:
        """Tell key, text and evaluations of each answer as soon as it has ended."""
        asked: dict[str, list[Any]] = {}
        for key in sorted(keys):
            asked.setdefault(key[0], []).append(key)
        rows = {text: self.lm.tok_encode(text) or [self.lm.prefix_token_id] for text in asked}
        # The longest first, so that memory runs out at once or never.
        order = sorted(asked, key=lambda text: (-len(rows[text]), text))
        limit = self.lm.max_length - plan.count
        if order and len(rows[order[0]]) > limit:
            _LOGGER.warning("The longest prompt has %d tokens; prompts keep their last %d.", len(rows[order[0]]), limit)
        size = self._batch_size(plan, min(limit, len(rows[order[0]]))) if order else 1
        for count in sorted({len(same) for same in asked.values()}, reverse=True):
            texts = [text for text in order if len(asked[text]) == count]
            named = [key for text in texts for key in asked[text]]
            batch = pad_left(
                [rows[text][-limit:] for text in texts],
                [noise_key(rows[key[0]], key[2]) for key in named],
                chats=[self.lm.is_chat] * len(texts),
            )

            def told(
                number: int, tokens: list[int], evaluations: list[int], recorded: object, named: list[Any] = named
            ) -> None:
                self.lm.meters["generation"].add(evaluations)
                tell(named[number], self._text(tokens, plan.stop_strings), evaluations)

            self.answer(plan, batch, size=size, tell=told)

    def answer(
        self, plan: Plan, batch: Encoded, *, size: int, tell: OnAnswer | None = None, is_probe: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens of each answer, one per name of noise, and their evaluations; `size` are written at a time."""
        if plan.search is not None:
            return self._search(plan, batch, tell)
        model, meter = self.lm.diffusion, self.lm.meters["generation"]
        samples = len(batch.keys or batch.input_ids) // len(batch.input_ids)
        options = dict(plan.options)
        label, scale = options.pop(CLASS, None), options.pop(SCALE, None)
        began = time.perf_counter()
        output = model.generate(
            batch,
            classes=None if label is None else [label] * len(batch.input_ids),
            guidance_scale=scale,
            num_return_sequences=samples,
            batch_size=size,
            on_answer=tell,
            **self.lm.running,
            **self._decoding(plan, batch.input_ids.shape[1]),
            **options,
        )
        lengths = output.lengths.tolist()
        seconds = time.perf_counter() - began
        if not is_probe:
            meter.time(sum(lengths), seconds)
            if meter.beside_plain is None and self.lm.process == 0 and output.evaluations.any():
                plain = self._plain_seconds(batch, samples, size, max(lengths[:size]))
                meter.beside_plain = (seconds / sum(lengths), plain)
        rows = zip(output.answers.tolist(), output.evaluations.tolist(), lengths, strict=True)
        return [(tokens[:length], evaluations[:length]) for tokens, evaluations, length in rows]

    def _decoding(self, plan: Plan, start: int) -> dict[str, Any]:
        """Fields of transformers' generation configuration and `stopping_criteria`, for answers from a slot on."""
        return plan.decoding | {
            "stopping_criteria": StoppingCriteriaList([StopStrings(self.lm.tokenizer, plan.stop_strings, start)]),
            "max_new_tokens": plan.count,
            "pad_token_id": self.lm.tokenizer.pad_token_id,
        }

    def _search(self, plan: Plan, batch: Encoded, tell: OnAnswer | None) -> list[tuple[list[int], list[int]]]:
        """Tokens of each answer that search picked and the network's passes made for them."""
        assert plan.search is not None and batch.keys is not None
        options = dict(plan.options)
        label, scale = options.pop(CLASS, None), options.pop(SCALE, None)
        causal_lm = self.lm.diffusion.as_transformers(class_name=label, guidance_scale=scale, **options)
        answers = []
        samples = len(batch.keys) // len(batch.input_ids)
        add_ends(causal_lm.generation_config, self.lm.diffusion.ends(is_chat=self.lm.is_chat))
        for number, key in enumerate(batch.keys):
            row = number // samples
            prompt = batch.input_ids[row][batch.attention_mask[row].bool()]
            began = time.perf_counter()
            answers.append(search(causal_lm, prompt, plan.search, name=key, decoding=self._decoding(plan, len(prompt))))
            self.lm.meters["generation"].time(len(answers[-1][0]), time.perf_counter() - began)
            if tell is not None:
                tell(number, *answers[-1], {})
        return answers

    def _plain_seconds(self, batch: Encoded, samples: int, size: int, count: int) -> float:
        """Seconds per answer token of transformers' own generate on the first prompts."""
        began = time.perf_counter()
        ids, mask = (
            part.repeat_interleave(samples, 0)[:size].to(self.lm.device)
            for part in (batch.input_ids, batch.attention_mask)
        )
        lengths = {"min_new_tokens": count, "max_new_tokens": count, "num_beams": 1}
        self.lm.model.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=self.lm.tokenizer.pad_token_id, **lengths
        ).tolist()  # which waits for the device
        return (time.perf_counter() - began) / (count * len(ids))

    def _text(self, tokens: list[int], stop_strings: list[str]) -> str:
        end = self.lm.think_end_token
        is_token = isinstance(end, int)
        if is_token and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        text = self.lm.tok_decode(tokens)
        text = text.lstrip() if is_token else text
        return str(postprocess_generated_text(text, stop_strings, None if is_token else end))

    def _batch_size(self, plan: Plan, length: int) -> int:
        settings = self.lm.source.sampling(plan.options)
        if settings.solver.batch_coupled or plan.search is not None:  # hypotheses of one search are a batch already
            return 1
        if self.lm.batch_size != "auto":
            return int(self.lm.batch_size)
        # One token after as long a text as there can be, or one whole block.
        whole = length if self.lm.source.is_block else length + plan.count - 1
        count = plan.count if self.lm.source.is_block else 1
        probe = Plan([], count, plan.decoding, plan.options | shortest(settings))
        return self.lm.largest_batch(lambda n: self.answer(probe, pad_left([[1] * whole] * n), size=n, is_probe=True))
