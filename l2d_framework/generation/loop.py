"""Generation: read the prompt, solve block after block, pick tokens, extend; the same loop for every method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.ode import NotAhead, Observer
from l2d_framework.diffusion.rng import TokenStreams, request_keys
from l2d_framework.diffusion.sampler import Block, Keys, Sampler
from l2d_framework.diffusion.sampling import Sampling, check_block_size, check_sampling
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prefix import Prefix
from l2d_framework.generation.replay import Replayed, Rows
from l2d_framework.generation.replay_evaluations import ReplayedEvaluations
from l2d_framework.generation.requests import Decoding, Prepared, Requests, check_requests
from l2d_framework.generation.results import Generation
from l2d_framework.generation.sequences import Sequences
from l2d_framework.generation.speculation import Guesses, LookAhead, MainPath
from l2d_framework.types import Layout


@torch.no_grad()
def generate(
    diffusion: Diffusion,
    requests: Requests,
    *,
    sampling: Sampling,
    decoding: Decoding,
    observer: Observer | None = None,
) -> Generation:
    """Answer prompts.

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
    check_requests(requests, decoding)
    loop = _Loop(diffusion, requests, sampling, decoding, observer)
    parts = [part.run() for part in loop.parts()]
    end = max(max(texts.ends) for texts, *_ in parts)
    width = requests.prompts.input_ids.shape[1]
    return Generation(
        torch.cat([texts.ids for texts, *_ in parts])[:, :end],
        torch.cat([cost for _, cost, *_ in parts])[:, width:end],
        torch.cat([lengths for _, _, lengths, _ in parts]),
        width,
        _side_by_side([row for *_, metrics in parts for row in metrics]),
        (loop.guesses.made, loop.guesses.right),
    )


def _side_by_side(rows: list[dict[str, list[Tensor]]]) -> dict[str, Tensor]:
    """What guidance recorded about each row, from its first evaluation on, (B, evaluations), by name."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        whole = [torch.cat(row[name]) if name in row else None for row in rows]
        some = next(values for values in whole if values is not None)
        filled = [some[:0] if values is None else values for values in whole]
        found[name] = pad_sequence(filled, batch_first=True, padding_value=torch.nan)
    return found


class _Loop:
    """State of one call of `generate`, or of a part of its rows; the network sees only rows that have not ended.

    `texts` are prompts and answers; `path` is what the backbone remembers of them, for the rows that go on. Where there
    are more rows than are written at a time, `is_queued` says that one that ends is replaced by the next.
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
        self.numbers = [*range(len(ids) * requests.samples)]
        self.first = [number // requests.samples for number in self.numbers]
        if len(names) == len(self.first):
            self.keys = [(name, 0) for name in names]
        else:
            self.keys = [(names[row], number % requests.samples) for number, row in enumerate(self.first)]
        self.real = [len(self.prompts[row]) for row in self.first]
        self.classes = None if requests.classes is None else repeat(requests.classes)
        self.scales = None if requests.guidance_scale is None else repeat(requests.guidance_scale)
        running = requests.running
        self.denoise = Sampler.of(diffusion, sampling, observer, merge=running.merge, compile=running.compile)
        self.guesses = Guesses.of(
            diffusion.backbone,
            running,
            sampling,
            block_size=diffusion.block_size,
            has_observer=observer is not None,
            has_memory=decoding.config.watermarking_config is not None,
        )
        # Whoever asks for a number knows their own processors; they are asked about guesses, too.
        if self.guesses.wanted is None and decoding.processors:
            self.guesses.never()
        self.drafter = running.drafter or MainPath()
        if self.guesses.wanted != 0:
            self.drafter = self.drafter.begin(diffusion.backbone.lm)
            self.guesses.cost = self.drafter.cost
        self.at_a_time = requests.batch_size or len(self.numbers)
        self.is_queued = self.at_a_time < len(self.numbers) and self._may_queue
        self.prefix = Prefix.of(diffusion.backbone, self.prompts)
        # How many tokens of a prompt are left to be read with what comes after it.
        self.left = int(self.is_queued or self.prefix is not None)
        self.known: dict[int, Rows] = {}

    def parts(self) -> Iterator[_Loop]:
        """All rows, or where none can take the place of another, whole batches of them."""
        samples, count = self.requests.samples, len(self.numbers)
        if self.is_queued or self.at_a_time >= count:
            yield self
            return
        step = samples * max(1, self.at_a_time // samples)
        for start in range(0, count, step):
            for first in range(start, start + step, self.at_a_time):
                yield self._part(slice(first, min(first + self.at_a_time, start + step)))

    def _part(self, rows: slice) -> _Loop:
        part = copy.copy(self)
        for name in ("numbers", "first", "keys", "real", "classes", "scales"):
            values = getattr(self, name)
            setattr(part, name, None if values is None else values[rows])
        return part

    def _prepare(self, rows: list[int]) -> Prepared:
        prompts = [self.first[row] for row in rows]
        ids, mask = self.requests.prompts.input_ids[prompts], self.mask[prompts]
        return self.decoding.prepare(self.diffusion.backbone.lm, ids, mask)

    def run(self) -> tuple[Sequences, Tensor, Tensor, list[dict[str, list[Tensor]]]]:
        """Sequences, evaluations spent on each token, (B, limit), lengths, (B,), and what guidance recorded."""
        streamer, rows = self.decoding.streamer, [*range(len(self.numbers))]
        ids, processors, criteria, config = self._prepare(rows)
        own = (lambda row: self._prepare([row]).processors) if self.is_queued else None
        self.texts = texts = Sequences(ids, processors, criteria, config, own=own)
        self.metrics: list[dict[str, list[Tensor]]] = [{} for _ in rows]
        cost, kept = torch.zeros_like(texts.ids), torch.zeros_like(texts.ids)
        size = self.sampling.block_size or self.diffusion.block_size or texts.limit
        is_graphed = self.requests.running.graph and size == 1 and self._is_steady
        rows, waiting = rows[: self.at_a_time], rows[self.at_a_time :]
        # The backbone has read what is before `ends`, less the tokens that are pending.
        self.path = self._read(rows)
        pending = texts.ids[texts.places(rows, -self.left)]
        if streamer is not None:
            streamer.put(ids.cpu())
        while rows:
            room = texts.limit - max(texts.ends[row] for row in rows)
            ahead = self.guesses.count(room - 1, len(rows)) if pending.shape[1] == 1 else 0
            keys = self._keys(rows, ahead + 1 if ahead else min(size, room))
            numbers = _uniform(keys, ids.device) if config.do_sample else None
            guessed = self._draft(pending, rows, ahead, numbers) if ahead else pending[:, :0]
            if guessed.shape[1] < ahead:  # the drafter knows no more
                ahead = guessed.shape[1]
                keys = [row[: ahead + 1] for row in keys]
            length, new = len(keys[0]), torch.cat([pending, guessed], 1)
            try:
                found = self.path.denoise(new, partial(self._block, rows, keys, ahead))
            except NotAhead:
                self.guesses.never()
                self.path.rewind(torch.full((len(rows),), ahead + 1, device=ids.device))
                continue
            self._keep_metrics(found.metrics, rows)
            taken, going = texts.pick(found.logits, rows, numbers, guessed)
            places = texts.places(rows, taken.shape[1])
            cost[places], kept[places] = found.evaluations[:, : taken.shape[1]] * taken, taken.long()
            written = taken.sum(1).tolist() if ahead else [length] * len(rows)
            if streamer is not None:
                streamer.put(texts.ids[0, texts.ends[0] : texts.ends[0] + int(taken[0].sum())].cpu())
            for row, more in zip(rows, written, strict=True):
                texts.ends[row] += more
            still = [number for number, goes in enumerate(going.tolist()) if goes]
            if ahead:
                self.guesses.learn(ahead, [written[number] - 1 for number in still])
            if still and len(still) < len(rows):
                self.path.keep(torch.tensor(still, device=ids.device))
            ended = [row for number, row in enumerate(rows) if number not in still]
            rows = [rows[number] for number in still]
            wrong = [length - written[number] for number in still]
            if any(wrong):
                self.path.rewind(torch.tensor(wrong, device=ids.device))
            self._tell(ended, cost, kept)
            # Rows that are replayed are captured anew once half of them have ended.
            if ended and self.is_queued and (not self.path.is_replayed or 2 * len(rows) <= self.at_a_time):
                free = self.at_a_time - len(rows)
                fresh, waiting = waiting[:free], waiting[free:]
                self._replace(rows, fresh)
                rows += fresh
            if rows:
                pending = texts.ids[texts.places(rows, -1 if ahead else -length)]
            if is_graphed and type(self.path) is Rows and rows:
                more = texts.limit - min(texts.ends[row] for row in rows)
                kind = ReplayedEvaluations if self.sampling.solver.is_adaptive else Replayed
                self.path = kind.of(self.path, self.path.slots + more)
        if streamer is not None:
            streamer.end()
        return texts, cost, kept.sum(1), self.metrics

    def _tell(self, rows: list[int], cost: Tensor, kept: Tensor) -> None:
        """Say that some rows have ended."""
        if self.requests.on_answer is not None:
            for row in rows:
                where = slice(self.texts.width, self.texts.width + int(kept[row].sum()))
                tokens, evaluations = self.texts.ids[row, where].tolist(), cost[row, where].tolist()
                recorded = {name: torch.cat(values).tolist() for name, values in self.metrics[row].items()}
                self.requests.on_answer(self.numbers[row], tokens, evaluations, recorded)

    def _replace(self, rows: list[int], fresh: list[int]) -> None:
        """Go on with the rows that are left and with new ones behind them."""
        paths = [self.path] if rows else []
        if fresh:
            paths.append(self._read(fresh))
        if paths:
            texts = self.texts
            known = (self.real[row] + texts.ends[row] - texts.width - self.left for row in (*rows, *fresh))
            self.path = paths[0].join(paths[1:], max(1, *known))

    @property
    def _may_queue(self) -> bool:
        """Whether one row may take the place of another, and neither answers nor anybody who looks on can tell."""
        backbone, sampling, decoding = self.diffusion.backbone, self.sampling, self.decoding
        return (
            backbone.joins
            and (sampling.block_size or self.diffusion.block_size) == 1
            and not sampling.solver.batch_coupled
            and decoding.config.max_time is None  # the clock of all
            and not (self.denoise.observer or decoding.streamer or decoding.processors)
        )

    @property
    def _is_steady(self) -> bool:
        """Whether every token takes the same steps or those of its solver, at which nobody looks on."""
        sampling = self.sampling
        return not (
            self.denoise.observer
            or self.guesses.wanted != 0
            or sampling.patience is not None
            or sampling.num_inference_steps == 0
        )

    def _read(self, rows: list[int]) -> Rows:
        """The prompts of some rows as the backbone has read them, less what is left for later."""
        prompts = [*dict.fromkeys(self.first[row] for row in rows)]
        # Rows come in the order of their prompts, so that only the first can be known.
        paths = [self.known.pop(prompt) for prompt in prompts if prompt in self.known]
        if unread := prompts[len(paths) :]:
            paths.append(self._read_new(unread))
        path = paths[0].join(paths[1:], max(path.slots for path in paths))
        if (self.numbers[rows[-1]] + 1) % self.requests.samples:
            self.known[prompts[-1]] = path.select(self._indices([len(prompts) - 1]))
        if len(rows) > len(prompts):
            path.keep(self._indices([prompts.index(self.first[row]) for row in rows]))
        return path

    def _read_new(self, prompts: list[int]) -> Rows:
        """Prompts, as wide as the longest of them, less what is left for later."""
        if self.prefix is not None:
            return Rows(self.denoise, *self.prefix.read([self.prompts[prompt] for prompt in prompts]))
        # A prompt of one token that is left for later is nothing but padding.
        first = -max(self.left + 1, *(len(self.prompts[prompt]) for prompt in prompts))
        ids, mask = (
            functional.pad(part[prompts], (1, 0))[:, first:] for part in (self.requests.prompts.input_ids, self.mask)
        )
        width = ids.shape[1] - self.left
        layout = Layout(ids[:, :width], mask[:, :width] - 1)
        return Rows(self.denoise, self.diffusion.backbone.read(layout), width)

    def _indices(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.mask.device)

    def _keys(self, rows: list[int], count: int) -> list[list[tuple[int | str, ...]]]:
        """What names the noise of the next `count` tokens of each row."""
        keys: list[list[tuple[int | str, ...]]] = []
        for row in rows:
            request, sample = self.keys[row]
            seed = self.sampling.seed if self.requests.seeds is None else self.requests.seeds[self.first[row]]
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

    def _keep_metrics(self, metrics: dict[str, Tensor], rows: list[int]) -> None:
        for name, values in metrics.items():
            for number, row in enumerate(rows):
                self.metrics[row].setdefault(name, []).append(values[number])

    def _draft(self, pending: Tensor, rows: list[int], count: int, numbers: Tensor | None) -> Tensor:
        """Guesses of what comes after the tokens that are pending; nothing of it is read or written for good."""
        lengths = [self.real[row] for row in rows]
        ahead = LookAhead(self.path, self.texts, rows, unread=pending, lengths=lengths, numbers=numbers)
        return ahead.draft(self.drafter, count)


def _uniform(keys: Keys, device: torch.device) -> Tensor:
    """A number in [0, 1) by which each token is drawn, (B', L)."""
    return TokenStreams([[(*parts, "token") for parts in row] for row in keys], device).uniform()


def _per_token(values: Tensor | None, rows: list[int], count: int) -> Tensor | None:
    return None if values is None else values[rows][:, None].expand(-1, count)
