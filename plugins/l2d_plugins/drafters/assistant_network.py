"""The language model of `assistant`: refused before its weights are loaded, loaded once; what it has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from l2d_framework.errors import ConfigError, UnsupportedModelError
from l2d_plugins.companions import OPENING, Companion, stamps
from l2d_plugins.twins import Head, cache_name, private

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASSISTANT = Companion(
    "Assistant",
    "causal language model",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    ("llama", "mistral", "qwen2"),
    "Give the folder of a small language model, or a hub id, such as org/name, as `model` of the drafter 'assistant'.",
    "Name a language model.",
)
_FAILURES = (RuntimeError, TypeError, AttributeError, LookupError, ValueError)
"""How code fails that is not built as expected."""


def check_assistant(name: str, tokenizer: Any) -> None:
    """Refuse a model that cannot guess, without loading its weights; `tokenizer` may be None."""
    size = None if tokenizer is None else len(tokenizer)
    with OPENING:
        _check(name, tokenizer, size, stamps(name))


def assistant_bytes(name: str, dtype: torch.dtype) -> int:
    """Size of its weights."""
    return _ASSISTANT.bytes(name, dtype)


def load_assistant(name: str, device: torch.device, dtype: torch.dtype) -> Network:
    """The frozen assistant, loaded once and kept for the next request; a folder written again is loaded again."""
    with OPENING:
        return _load(name, device, dtype, stamps(name))


@lru_cache(maxsize=4)
def _check(name: str, tokenizer: Any, size: int | None, stamps: tuple[int, ...]) -> None:
    """Every request asks, and comparing large vocabularies takes a while."""
    config = _ASSISTANT.config(name)
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(kind, "_is_stateful", False):
        raise UnsupportedModelError(
            f"Assistant {name!r} is a {kind.__name__}, which cannot take tokens back that were guessed wrong. Choose "
            "one with attention alone, such as LlamaForCausalLM."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"Assistant {name!r} is quantized. Name the model before quantization.")
    if tokenizer is not None:
        ours, theirs = _ASSISTANT.vocabularies(name, tokenizer)
        why = "Its guesses would be other words. Choose a model with the same tokenizer."
        # Tokens that only one of them has were added to it, such as one for padding.
        _ASSISTANT.refuse_vocabulary(name, ours, theirs, why, may_add=True)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _load(name: str, device: torch.device, dtype: torch.dtype, stamps: tuple[int, ...]) -> Network:
    model = _ASSISTANT.load(transformers.AutoModelForCausalLM, name, device, dtype)
    network = Network(name, model)
    network.prove()
    return network


@dataclass(frozen=True)
class Memory:
    """What was read of some rows.

    Attributes:
        layers: keys and values of each layer, (B, h, T, d); the last token of each row stands in the last slot.
        lengths: tokens of each row, the longest T.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    lengths: list[int]

    def taken(self, rows: Sequence[int], lengths: Sequence[int]) -> Memory:
        """Some rows in this order, and so many of the first tokens of each, at least one of which has any."""
        old, width = max(self.lengths), max(lengths)
        ends = [self.lengths[row] - length for row, length in zip(rows, lengths, strict=True)]
        if list(rows) == [*range(len(self.lengths))] and len({*ends}) == 1:
            return self._changed(lambda part: part[:, :, : old - ends[0]], lengths)
        device = self.layers[0][0].device
        source = old - width - torch.tensor(ends, device=device)[:, None] + torch.arange(width, device=device)
        places = torch.tensor(rows, device=device)[:, None], source.clamp_min(0)
        return self._changed(lambda part: part.transpose(1, 2)[places].transpose(1, 2), lengths)

    def beside(self, other: Memory) -> Memory:
        """These rows, and others behind them."""
        width = max(*self.lengths, *other.lengths)

        def joined(*parts: Tensor) -> Tensor:
            return torch.cat([functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

        pairs = zip(self.layers, other.layers, strict=True)
        layers = [(joined(keys, more), joined(values, others)) for (keys, values), (more, others) in pairs]
        return Memory(layers, [*self.lengths, *other.lengths])

    def _changed(self, change: Callable[[Tensor], Tensor], lengths: Sequence[int]) -> Memory:
        return Memory([(change(keys), change(values)) for keys, values in self.layers], list(lengths))


class Network:
    """A frozen causal language model whose body and head are run apart, by twins of their own for each call."""

    def __init__(self, name: str, lm: PreTrainedModel) -> None:
        self.name, self.lm = name, lm
        self.body: Any = lm.base_model
        part = next((part for part, child in lm.named_children() if child is self.body), None)
        if part is None:
            raise self._refusal("it has no body below its head")
        self.head = Head(lm, part)
        embedding: Any = lm.get_input_embeddings()
        self.size = len(embedding.weight)
        config: Any = lm.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self._cache_name = cache_name(self.body)

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Assistant {self.name!r} is a {type(self.lm).__name__}, which cannot be read piece by piece: {why}. "
            "Choose another, such as a LlamaForCausalLM."
        )

    def read(self, memory: Memory | None, tokens: Tensor) -> tuple[Memory, Tensor]:
        """Read further tokens of every row, (B, n), and what is known then; hidden states (B, n, H)."""
        (rows, count), device = tokens.shape, tokens.device
        before = [0] * rows if memory is None else memory.lengths
        cache = DynamicCache()
        for keys, values in () if memory is None else memory.layers:
            layer: Any = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        lengths, width = torch.tensor(before, device=device)[:, None], max(before) + count
        present = torch.arange(width, device=device) >= width - count - lengths
        given: dict[str, Any] = {self._cache_name: cache}
        # A config may ask for more outputs, which transformers would collect by hooks on modules that all twins share.
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.lm.config, name, False):
                given[name] = False
        out = private(self.body)(
            # Of a vocabulary that is padded further than this one.
            input_ids=tokens.clamp_max(self.size - 1),
            attention_mask=None if len({*before}) == 1 else present.long(),
            # Of tokens that fill up a row there may be more than it can read.
            position_ids=(lengths + torch.arange(count, device=device)).clamp_max(self.context - 1),
            use_cache=True,
            **given,
        )
        layers: list[Any] = cache.layers
        after = Memory([(layer.keys, layer.values) for layer in layers], [length + count for length in before])
        return after, out.last_hidden_state

    def prove(self) -> None:
        """See on an example that what is read in pieces, beside other rows and after tokens taken back, is the same."""
        tokens = torch.arange(12, device=self.lm.device).reshape(2, 6) % self.size
        try:
            with torch.no_grad():
                whole = self.lm(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, -1].float()
                memory, _ = self.read(None, tokens)
                memory, _ = self.read(memory.taken([1, 0], [4, 2]), tokens[[1, 0], [4, 2]][:, None])
                memory, _ = self.read(memory.taken([1], [3]), tokens[:1, 3:5])
                other, _ = self.read(None, tokens[1:, :5])
                memory, hidden = self.read(memory.beside(other), tokens[:, 5:])
                pieces = self.head(hidden)[:, -1].float()
        except _FAILURES as error:
            raise self._refusal(f"{type(error).__name__}: {error}") from error
        tolerance = 1e-3 if self.lm.dtype == torch.float32 else 5e-2
        off = float((pieces - whole).abs().max() / whole.abs().max().clamp_min(1e-12))
        if not off <= tolerance:
            raise self._refusal(f"what it says is then off by {off:.1e}")


class Reading:
    """What an assistant has read of the rows of one request.

    Args:
        network: the assistant.
        lm: the language model that it guesses for.

    Attributes:
        cost: of a pass, in passes of that model, by their weights.
        room: most tokens that it can read.
    """

    def __init__(self, network: Network, lm: PreTrainedModel) -> None:
        self._network = network
        config: Any = lm.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self.cost = network.lm.num_parameters() / lm.num_parameters()
        self.room = network.context
        self._memory: Memory | None = None
        self._rows: list[int] = []
        self._tokens = torch.zeros(0, 0, dtype=torch.int64, device=lm.device)

    def follow(self, texts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Read what is new of some texts, those of rows that are known perhaps; logits (B, V) of what comes next."""
        ends, tokens = [len(text) for text in texts], pad_sequence(list(texts), batch_first=True)
        kept = self._kept(tokens, ends, rows)
        groups = [[n for n, count in enumerate(kept) if bool(count) == is_known] for is_known in (True, False)]
        parts = [self._read(group, kept, tokens, ends, rows) for group in groups if group]
        memory, hidden = parts[0]
        for further, more in parts[1:]:
            memory, hidden = memory.beside(further), torch.cat([hidden, more])
        order = [number for group in groups for number in group]
        places = [order.index(number) for number in range(len(order))]
        self._memory, self._rows, self._tokens = memory.taken(places, ends), list(rows), tokens
        return self._logits(hidden[places])

    def extend(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, (B,); logits (B, V) of what comes next."""
        assert self._memory is not None
        ends = torch.tensor(self._memory.lengths, device=tokens.device)[:, None]
        self._tokens = functional.pad(self._tokens, (0, 1)).scatter(1, ends, tokens[:, None])
        self._memory, hidden = self._network.read(self._memory, tokens[:, None])
        return self._logits(hidden)

    def _kept(self, tokens: Tensor, ends: Sequence[int], rows: Sequence[int]) -> list[int]:
        """How many of the first tokens of each row were read as they stand, less than all of them."""
        known = [self._rows.index(row) if row in self._rows else -1 for row in rows]
        if self._memory is None:
            return [0] * len(rows)
        width = min(tokens.shape[1], self._tokens.shape[1])
        old = self._tokens[[max(number, 0) for number in known], :width]
        same: list[int] = (old == tokens[:, :width]).long().cumprod(1).sum(1).tolist()
        most = [0 if number < 0 else self._memory.lengths[number] for number in known]
        return [min(*limits) for limits in zip(same, most, (end - 1 for end in ends), strict=True)]

    def _read(
        self, group: Sequence[int], kept: Sequence[int], tokens: Tensor, ends: Sequence[int], numbers: Sequence[int]
    ) -> tuple[Memory, Tensor]:
        """Read on in some rows; hidden states at their ends, (B', 1, H)."""
        begins, stops = [kept[number] for number in group], [ends[number] for number in group]
        memory = None
        if begins[0]:
            assert self._memory is not None
            memory = self._memory.taken([self._rows.index(numbers[number]) for number in group], begins)
        more = [stop - begin for begin, stop in zip(begins, stops, strict=True)]
        new = pad_sequence([tokens[n, b:e] for n, b, e in zip(group, begins, stops, strict=True)], batch_first=True)
        rows = [*range(len(group))]
        if memory is None:  # several answers to a prompt
            new, found = new.unique(dim=0, return_inverse=True)
            rows = found.tolist()
        memory, hidden = self._network.read(memory, new)
        return memory.taken(rows, stops), hidden[rows, [count - 1 for count in more]][:, None]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Over the vocabulary of the other model, in which tokens may be padded to another number."""
        logits: Tensor = self._network.head(hidden)[:, -1].float()
        return functional.pad(logits, (0, self._vocab_size - logits.shape[-1]), value=-torch.inf)
