"""Generation: read the prompt, solve block after block, pick tokens, extend; the same loop for every method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.logits import Logits
from l2d_framework.diffusion.ode import Observer
from l2d_framework.diffusion.rng import TokenStreams, categorical, request_keys
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.diffusion.sampling import Sampling, check_block_size, check_sampling
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import Encoded
from l2d_framework.types import Context, Layout


@dataclass(frozen=True)
class Requests:
    """A batch of prompts and what belongs to each.

    Attributes:
        prompts: token ids, on the model's device.
        classes: class of each prompt, (B,), int64, -1 for none; None for none at all.
        guidance_scale: scale of each prompt, (B,), float32, or None for the guidance's own.
        samples: answers per prompt; the prompt is read once.
        seeds: seed of each prompt, or None for the one of the sampling settings.
    """

    prompts: Encoded
    classes: Tensor | None = None
    guidance_scale: Tensor | None = None
    samples: int = 1
    seeds: Sequence[int] | None = None


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        sequences: prompts and answers, (B * samples, S + N), int64, padded on the right after the end of an answer.
        evaluations: evaluations spent on each answer token (a guidance may call the network more than once
            in each), (B * samples, N), int64; 0 on padding.
        lengths: tokens of each answer, its end token included, (B * samples,), int64.
        prompt_length: S.
        metrics: what guidance recorded at each evaluation, by name, (B * samples, evaluations), float32, NaN where a
            row took no part; such as the reward of each step.
    """

    sequences: Tensor
    evaluations: Tensor
    lengths: Tensor
    prompt_length: int
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def answers(self) -> Tensor:
        """Answer tokens alone, (B * samples, N), int64."""
        return self.sequences[:, self.prompt_length :]


@dataclass(frozen=True)
class Decoding:
    """transformers' own machinery for turning logits into tokens.

    Attributes:
        config: generation configuration; `num_return_sequences` belongs into `Requests.samples`.
        processors: further logits processors.
        criteria: further stopping criteria.
        streamer: receives the tokens of each step; only without padding and for one answer, as in transformers.
    """

    config: GenerationConfig
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: BaseStreamer | None = None


@torch.no_grad()
def generate(
    diffusion: Diffusion,
    requests: Requests,
    *,
    sampling: Sampling,
    picking: Decoding,
    observer: Observer | None = None,
) -> Generation:
    """Answer a batch of prompts.

    A row's answer depends on its own prompt, class, scale, key and the seed, never on its batch mates or padding. Of
    equal prompts without keys, the second in a call is another request than the first, with noise of its own.

    Args:
        diffusion: the model.
        requests: the prompts.
        sampling: how to diffuse.
        picking: how to pick tokens and when to stop.
        observer: called after every network evaluation.

    Returns:
        The answers.

    Raises:
        ConfigError: if the settings do not fit the model, or the prompt and answer exceed its context.
    """
    if sampling.num_inference_steps == 0 and not diffusion.backbone.identity_at_zero:
        raise ConfigError(
            f"num_inference_steps=0 means the plain language model, which {type(diffusion.backbone).__name__} does not "
            "contain. Use at least 1."
        )
    backbone = diffusion.backbone
    check_block_size(backbone.config, backbone.lm.config, trained=diffusion.block_size, wanted=sampling.block_size)
    check_sampling(
        sampling,
        num_classes=diffusion.backbone.config.num_classes,
        has_condition=requests.classes is not None,
        is_scaled=requests.guidance_scale is not None,
    )
    _check_requests(requests, picking)
    loop = _Loop(diffusion, requests, sampling, picking, observer)
    prepared: list[Any] = []

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor:
        prepared.extend((input_ids, logits_processor, stopping_criteria, generation_config))
        return input_ids

    # transformers would fill what is None from the model's configuration, also where None was asked for.
    lm: Any = copy.copy(diffusion.backbone.lm)
    lm.generation_config = picking.config
    try:
        lm.generate(
            requests.prompts.input_ids[loop.first],
            attention_mask=loop.mask[loop.first],
            generation_config=picking.config,
            logits_processor=picking.processors,
            stopping_criteria=picking.criteria,
            custom_generate=decode,
        )
    # Nothing of this package runs in there, and only settings could be wrong.
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise ConfigError(f"transformers refuses these generation settings: {error}") from error
    return loop.run(*prepared)


def _check_requests(requests: Requests, picking: Decoding) -> None:
    count, keys = len(requests.prompts.input_ids), requests.prompts.keys
    if keys is not None and len(keys) == count * requests.samples:
        keys = None
    per_prompt = {"keys": keys} | {name: getattr(requests, name) for name in ("classes", "guidance_scale", "seeds")}
    for name, values in per_prompt.items():
        if values is not None and len(values) != count:
            raise ConfigError(f"{name} must name one value per prompt: got {len(values)} for {count} prompts.")
    config = picking.config
    if picking.streamer is not None and count * requests.samples > 1:
        raise ConfigError(f"A streamer takes one answer, got {count} prompts and {requests.samples} answers of each.")
    if config.max_new_tokens is None and not bool(requests.prompts.attention_mask.all()):
        raise ConfigError(
            f"max_length={config.max_length} counts padding, so answers would depend on their batch mates. "
            "Set max_new_tokens instead."
        )


class _Loop:
    """State of one call of `generate`; the network sees only rows that have not ended."""

    def __init__(
        self,
        diffusion: Diffusion,
        requests: Requests,
        sampling: Sampling,
        picking: Decoding,
        observer: Observer | None,
    ) -> None:
        self.diffusion, self.requests, self.sampling, self.picking = diffusion, requests, sampling, picking
        ids, self.mask = requests.prompts.input_ids, requests.prompts.attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), self.mask.cpu(), strict=True)]
        names = requests.prompts.keys or request_keys(prompts)
        repeat = partial(torch.repeat_interleave, repeats=requests.samples, dim=0)
        self.first = repeat(torch.arange(len(ids), device=ids.device))
        if len(names) == len(self.first):
            self.keys = [(name, 0) for name in names]
        else:
            self.keys = [(names[int(row)], sample % requests.samples) for sample, row in enumerate(self.first)]
        self.real = [len(prompts[int(row)]) for row in self.first]
        self.classes = None if requests.classes is None else repeat(requests.classes)
        self.scales = None if requests.guidance_scale is None else repeat(requests.guidance_scale)
        self.denoise = Sampler.of(diffusion, sampling, observer)
        self.metrics: list[dict[str, Tensor]] = []

    def run(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> Generation:
        backbone, streamer = self.diffusion.backbone, self.picking.streamer
        prompts = self.requests.prompts
        context = prompts.context
        if context is None:
            context = backbone.read(Layout(prompts.input_ids, torch.where(self.mask.bool(), 0, -1)))
        if prompts.context is not None or len(self.first) > len(prompts.input_ids):
            context = context.select(self.first)
        length, limit = ids.shape[1], config.max_length
        cost, kept = ids.new_zeros(len(ids), 0), ids.new_zeros(len(ids), 0)
        rows = list(range(len(ids)))
        if streamer is not None:
            streamer.put(ids.cpu())
        size = self.sampling.block_size or self.diffusion.block_size or limit
        while rows:
            start, end = ids.shape[1], min(ids.shape[1] + size, limit)
            block_keys = self._keys(rows, start - length, end - start)
            found = self.denoise(self._block(context, rows, ids, block_keys))
            self._keep_metrics(found.metrics, rows, len(ids))
            ids, before_end, going = self._pick(found.logits, rows, ids, (processors, criteria, config))
            block = ids.new_zeros(2, len(ids), end - start)
            block[:, rows] = torch.stack([found.evaluations * before_end, before_end.long()])
            cost, kept = torch.cat([cost, block[0]], 1), torch.cat([kept, block[1]], 1)
            if streamer is not None:
                streamer.put(ids[:, start:].flatten().cpu())
            still = [number for number, goes in enumerate(going.tolist()) if goes]
            if still and len(still) < len(rows):
                context = context.select(torch.tensor(still, device=ids.device))
            rows = [rows[number] for number in still]
            if rows:
                context = backbone.extend(context, ids[rows, start:])
        if streamer is not None:
            streamer.end()
        metrics = {name: torch.cat([part[name] for part in self.metrics], 1) for name in next(iter(self.metrics), {})}
        return Generation(ids, cost, kept.sum(1), length, metrics)

    def _keys(self, rows: list[int], offset: int, count: int) -> list[list[tuple[int | str, ...]]]:
        """What names the noise of `count` tokens of each row, starting `offset` tokens after its prompt."""
        keys: list[list[tuple[int | str, ...]]] = []
        for row in rows:
            request, sample = self.keys[row]
            seed = self.sampling.seed if self.requests.seeds is None else self.requests.seeds[int(self.first[row])]
            first = self.real[row] + offset
            keys.append([(seed, request, first + i, sample) for i in range(count)])
        return keys

    def _block(self, context: Context, rows: list[int], ids: Tensor, keys: Any) -> Block:
        start, count = ids.shape[1], len(keys[0])
        present = functional.pad(self.mask[self.first[rows]], (0, start - self.mask.shape[1]), value=1)
        return Block(
            positions=torch.arange(start, start + count, device=ids.device).expand(len(rows), -1),
            layout=Layout(ids[rows], present.long() - 1),
            context=context,
            keys=keys,
            condition=_per_token(self.classes, rows, count),
            guidance_scale=_per_token(self.scales, rows, count),
        )

    def _keep_metrics(self, metrics: dict[str, Tensor], rows: list[int], count: int) -> None:
        whole = {name: values.new_full((count, values.shape[1]), torch.nan) for name, values in metrics.items()}
        for name, values in metrics.items():
            whole[name][rows] = values
        self.metrics.append(whole)

    def _pick(
        self,
        answer: Logits,
        rows: list[int],
        ids: Tensor,
        how: tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All sequences with the block's tokens; per row still going, which come before its end, and if it goes on.

        Processors and criteria always see the whole batch, since transformers makes some of them for its rows.
        """
        processors: Any
        criteria: Any
        processors, criteria, config = how
        offset, pad, count = ids.shape[1] - self.mask.shape[1], _pad_token(config), answer.values.shape[1]
        numbers = None
        if config.do_sample:
            keys = [[(*parts, "token") for parts in row] for row in self._keys(rows, offset, count)]
            numbers = TokenStreams(keys, ids.device).uniform()
        ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        kept = []
        for i, logits in enumerate(answer.columns()):
            whole = logits.new_zeros(len(ids), logits.shape[-1])
            whole[rows] = logits
            whole = processors(ids, whole)
            scores = whole[rows]
            token = scores.argmax(-1) if numbers is None else categorical(scores.softmax(-1), numbers[:, i])
            column = ids.new_full((len(ids), 1), pad)
            column[rows, 0] = torch.where(ended, pad, token)
            ids = torch.cat([ids, column], 1)
            kept.append(~ended)
            ended = ended | criteria(ids, whole)[rows]
        return ids, torch.stack(kept, 1), ~ended


def _per_token(values: Tensor | None, rows: list[int], count: int) -> Tensor | None:
    return None if values is None else values[rows][:, None].expand(-1, count)


def _pad_token(config: GenerationConfig) -> int:
    """The pad token, or the end token where a model has none, as transformers does."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0] if isinstance(ends, list) else ends or 0)
