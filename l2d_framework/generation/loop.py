"""Generation: read the prompt, solve block after block, pick tokens, extend; the same loop for every method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.ode import NotAhead, Observer
from l2d_framework.diffusion.rng import TokenStreams, request_keys
from l2d_framework.diffusion.sampler import Block, Keys, Sampler
from l2d_framework.diffusion.sampling import Sampling, check_block_size, check_sampling
from l2d_framework.errors import ConfigError
from l2d_framework.generation.arguments import Running
from l2d_framework.generation.prompts import Encoded
from l2d_framework.generation.replay import Replayed, Rows
from l2d_framework.generation.sequences import Sequences
from l2d_framework.generation.speculation import Guesses
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
        running: how to run them.
    """

    prompts: Encoded
    classes: Tensor | None = None
    guidance_scale: Tensor | None = None
    samples: int = 1
    seeds: Sequence[int] | None = None
    running: Running = field(default_factory=Running)


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
        guesses: tokens guessed ahead whose rightness was found out, and how many were right.
    """

    sequences: Tensor
    evaluations: Tensor
    lengths: Tensor
    prompt_length: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    guesses: tuple[int, int] = (0, 0)

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
    decoding: Decoding,
    observer: Observer | None = None,
) -> Generation:
    """Answer a batch of prompts.

    A row's answer depends on its own prompt, class, scale, key and the seed, never on its batch mates or padding. Of
    equal prompts without keys, the second in a call is another request than the first, with noise of its own.

    Args:
        diffusion: the model.
        requests: the prompts.
        sampling: how to diffuse.
        decoding: how to pick tokens and when to stop.
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
    _check_requests(requests, decoding)
    loop = _Loop(diffusion, requests, sampling, decoding, observer)
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
    lm.generation_config = decoding.config
    try:
        lm.generate(
            requests.prompts.input_ids[loop.first],
            attention_mask=loop.mask[loop.first],
            generation_config=decoding.config,
            logits_processor=decoding.processors,
            stopping_criteria=decoding.criteria,
            custom_generate=decode,
        )
    # Nothing of this package runs in there, and only settings could be wrong.
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise ConfigError(f"transformers refuses these generation settings: {error}") from error
    return loop.run(*prepared)


def _check_requests(requests: Requests, decoding: Decoding) -> None:
    count, keys = len(requests.prompts.input_ids), requests.prompts.keys
    if keys is not None and len(keys) == count * requests.samples:
        keys = None
    per_prompt = {"keys": keys} | {name: getattr(requests, name) for name in ("classes", "guidance_scale", "seeds")}
    for name, values in per_prompt.items():
        if values is not None and len(values) != count:
            raise ConfigError(f"{name} must name one value per prompt: got {len(values)} for {count} prompts.")
    config = decoding.config
    if decoding.streamer is not None and count * requests.samples > 1:
        raise ConfigError(f"A streamer takes one answer, got {count} prompts and {requests.samples} answers of each.")
    if config.max_new_tokens is None and not bool(requests.prompts.attention_mask.all()):
        raise ConfigError(
            f"max_length={config.max_length} counts padding, so answers would depend on their batch mates. "
            "Set max_new_tokens instead."
        )


_SHARED = 32
"""Fewest tokens that are worth being read apart, where all prompts begin with them."""


class _Loop:
    """State of one call of `generate`; the network sees only rows that have not ended.

    `texts` are prompts and answers; `path` is what the backbone remembers of them, for the rows that go on.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        requests: Requests,
        sampling: Sampling,
        decoding: Decoding,
        observer: Observer | None,
    ) -> None:
        self.diffusion, self.requests, self.sampling, self.decoding = diffusion, requests, sampling, decoding
        ids, self.mask = requests.prompts.input_ids, requests.prompts.attention_mask
        self.prompts = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), self.mask.cpu(), strict=True)]
        names = requests.prompts.keys or request_keys(self.prompts)
        repeat = partial(torch.repeat_interleave, repeats=requests.samples, dim=0)
        self.first = repeat(torch.arange(len(ids), device=ids.device))
        if len(names) == len(self.first):
            self.keys = [(name, 0) for name in names]
        else:
            self.keys = [(names[int(row)], sample % requests.samples) for sample, row in enumerate(self.first)]
        self.real = [len(self.prompts[int(row)]) for row in self.first]
        self.classes = None if requests.classes is None else repeat(requests.classes)
        self.scales = None if requests.guidance_scale is None else repeat(requests.guidance_scale)
        self.denoise = Sampler.of(diffusion, sampling, observer, merge=requests.running.merge)
        self.guesses = Guesses.of(
            diffusion.backbone,
            requests.running.guesses,
            sampling,
            block_size=diffusion.block_size,
            has_observer=observer is not None,
            has_memory=decoding.config.watermarking_config is not None,
        )
        # Whoever asks for a number knows their own processors; they are asked about guesses, too.
        if self.guesses.wanted is None and decoding.processors:
            self.guesses.never()
        self.metrics: list[dict[str, Tensor]] = []

    def run(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> Generation:
        streamer, count, width = self.decoding.streamer, *ids.shape
        self.texts = texts = Sequences(ids, processors, criteria, config)
        cost, kept = torch.zeros_like(texts.ids), torch.zeros_like(texts.ids)
        size = self.sampling.block_size or self.diffusion.block_size or texts.limit
        is_graphed = self.requests.running.graph and size == 1 and self._is_steady
        # The backbone has read what is before `ends`, less the tokens that are pending.
        rows, reached = list(range(count)), width
        self.path, pending = self._read(ids)
        if streamer is not None:
            streamer.put(ids.cpu())
        while rows:
            room = texts.limit - max(texts.ends[row] for row in rows)
            ahead = self.guesses.count(room - 1) if pending.shape[1] == 1 else 0
            length = ahead + 1 if ahead else min(size, room)
            keys = self._keys(rows, length)
            numbers = _uniform(keys, ids.device) if config.do_sample else None
            new = self._look_ahead(pending, rows, ahead, numbers) if ahead else pending
            try:
                found = self.path.denoise(new, partial(self._block, rows, keys, ahead))
            except NotAhead:
                self.guesses.never()
                self.path.rewind(torch.full((len(rows),), ahead + 1, device=ids.device))
                continue
            self._keep_metrics(found.metrics, rows, count)
            taken, going = texts.pick(found.logits, rows, numbers, new[:, pending.shape[1] :])
            places = texts.places(rows, taken.shape[1])
            cost[places], kept[places] = found.evaluations[:, : taken.shape[1]] * taken, taken.long()
            written = taken.sum(1).tolist() if ahead else [length] * len(rows)
            if streamer is not None:
                streamer.put(texts.ids[0, texts.ends[0] : texts.ends[0] + written[0]].cpu())
            for row, more in zip(rows, written, strict=True):
                texts.ends[row] += more
            reached = max(reached, *(texts.ends[row] for row in rows))
            still = [number for number, goes in enumerate(going.tolist()) if goes]
            if ahead:
                self.guesses.learn(ahead, [written[number] - 1 for number in still])
            if still and len(still) < len(rows):
                self.path.keep(torch.tensor(still, device=ids.device))
            rows = [rows[number] for number in still]
            wrong = [length - written[number] for number in still]
            if any(wrong):
                self.path.rewind(torch.tensor(wrong, device=ids.device))
            if rows:
                pending = texts.ids[texts.places(rows, -1 if ahead else -length)]
            if is_graphed and type(self.path) is Rows and rows:
                self.path = Replayed.of(self.path, texts.limit)
        if streamer is not None:
            streamer.end()
        metrics = {name: torch.cat([part[name] for part in self.metrics], 1) for name in next(iter(self.metrics), {})}
        guesses = self.guesses.made, self.guesses.right
        return Generation(texts.ids[:, :reached], cost[:, width:reached], kept.sum(1), width, metrics, guesses)

    @property
    def _is_steady(self) -> bool:
        """Whether every token takes the same steps, at which nobody looks on."""
        sampling = self.sampling
        return not (
            self.denoise.observer
            or self.guesses.wanted != 0
            or sampling.patience is not None
            or sampling.solver.is_adaptive
            or sampling.num_inference_steps == 0
        )

    def _read(self, ids: Tensor) -> tuple[Rows, Tensor]:
        """The prompts as the backbone has read them, and their last tokens that it has not, (B, n)."""
        prompts, backbone = self.requests.prompts, self.diffusion.backbone
        context: Context = prompts.context
        if context is None and (shared := self._shared()):
            return self._read_apart(shared), ids[:, -1:]
        if context is None:
            context = backbone.read(Layout(prompts.input_ids, torch.where(self.mask.bool(), 0, -1)))
        if prompts.context is not None or len(self.first) > len(prompts.input_ids):
            context = context.select(self.first)
        return Rows(self.denoise, context, ids.shape[1]), ids[:, :0]

    def _shared(self) -> list[int]:
        """Tokens with which all prompts begin, without their last; none where reading them once saves little."""
        if not self.diffusion.backbone.rewinds or len(self.prompts) == 1:
            return []
        low, high = min(self.prompts), max(self.prompts)
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low[:-1], high[:-1], strict=False))]
        rest = sum(map(len, self.prompts)) - len(shared) * len(self.prompts)
        return shared if len(shared) >= _SHARED and len(shared) > rest / len(self.prompts) / 4 else []

    def _read_apart(self, shared: list[int]) -> Rows:
        """All but the last tokens of prompts whose first ones are read once for all of them."""
        device = self.mask.device
        rests = [torch.tensor(prompt[len(shared) : -1], dtype=torch.int64) for prompt in self.prompts]
        rest = pad_sequence(rests, batch_first=True).to(device)
        everyone = torch.zeros(len(rests), dtype=torch.int64, device=device)
        known = torch.tensor([shared], device=device)
        path = Rows(self.denoise, self.diffusion.backbone.read(Layout(known, torch.zeros_like(known))), len(shared))
        path.keep(everyone)
        path.extend(rest)
        missing = torch.tensor([rest.shape[1] - len(tokens) for tokens in rests], device=device)
        if bool(missing.any()):
            path.rewind(missing)
        if len(self.first) > len(rests):
            path.keep(self.first)
        return path

    def _keys(self, rows: list[int], count: int) -> list[list[tuple[int | str, ...]]]:
        """What names the noise of the next `count` tokens of each row."""
        keys: list[list[tuple[int | str, ...]]] = []
        for row in rows:
            request, sample = self.keys[row]
            seed = self.sampling.seed if self.requests.seeds is None else self.requests.seeds[int(self.first[row])]
            first = self.real[row] + self.texts.ends[row] - self.texts.width
            keys.append([(seed, request, first + i, sample) for i in range(count)])
        return keys

    def _block(self, rows: list[int], keys: Keys, ahead: int, with_layout: bool) -> Block:
        count = len(keys[0])
        first = self.path.slots - ahead
        return Block(
            positions=torch.arange(first, first + count, device=self.mask.device).expand(len(rows), -1),
            layout=self._layout(rows) if with_layout and not ahead and self.sampling.guidance else None,
            context=self.path.context,
            keys=keys,
            condition=_per_token(self.classes, rows, count),
            guidance_scale=_per_token(self.scales, rows, count),
        )

    def _layout(self, rows: list[int]) -> Layout:
        """The tokens in the backbone's slots."""
        numbers, columns = self.texts.places(rows, -self.path.slots)
        places = numbers, columns.clamp_min(0)
        present = functional.pad(self.mask[self.first], (0, self.texts.limit - self.texts.width), value=1)
        return Layout(self.texts.ids[places], torch.where(columns < 0, -1, present[places].long() - 1))

    def _keep_metrics(self, metrics: dict[str, Tensor], rows: list[int], count: int) -> None:
        whole = {name: values.new_full((count, values.shape[1]), torch.nan) for name, values in metrics.items()}
        for name, values in metrics.items():
            whole[name][rows] = values
        self.metrics.append(whole)

    def _look_ahead(self, pending: Tensor, rows: list[int], count: int, numbers: Tensor | None) -> Tensor:
        """What is pending, and what the language model alone writes behind it; nothing of it is read for good."""
        backbone, known = self.diffusion.backbone, pending
        for i in range(count):
            self.path.extend(known[:, -1:])
            slot = torch.full_like(pending, self.path.slots)
            logits = backbone.head(backbone.plain(slot, self.path.context)).float()[:, 0]
            tokens, _ = self.texts.write(logits, rows, i, None if numbers is None else numbers[:, i])
            known = torch.cat([known, tokens[:, None]], 1)
        self.texts.forget(rows, count)
        self.path.rewind(torch.full((len(rows),), count, device=pending.device))
        return known


def _uniform(keys: Keys, device: torch.device) -> Tensor:
    """A number in [0, 1) by which each token is drawn, (B', L)."""
    return TokenStreams([[(*parts, "token") for parts in row] for row in keys], device).uniform()


def _per_token(values: Tensor | None, rows: list[int], count: int) -> Tensor | None:
    return None if values is None else values[rows][:, None].expand(-1, count)
