"""What is asked of a model: prompts and what belongs to each, and transformers' machinery for picking tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from l2d_framework.errors import ConfigError
from l2d_framework.generation.arguments import Running
from l2d_framework.generation.prompts import Encoded

if TYPE_CHECKING:  # models take seconds to import
    from transformers import PreTrainedModel

OnAnswer = Callable[[int, list[int], list[int], dict[str, list[float]]], None]
"""Called with the number of an answer, its tokens, the evaluations spent on each, and what guidance recorded."""


@dataclass(frozen=True)
class Requests:
    """Prompts and what belongs to each.

    Attributes:
        prompts: token ids, on the model's device.
        classes: class of each prompt, (B,), int64, -1 for none; None for none at all.
        guidance_scale: scale of each prompt, (B,), float32, or None for the guidance's own.
        samples: answers per prompt; the prompt is read once.
        seeds: seed of each prompt, or None for the one of the sampling settings.
        batch_size: most answers that are written at a time, or None for all.
        on_answer: called as soon as an answer has ended.
        running: how to run them.
    """

    prompts: Encoded
    classes: Tensor | None = None
    guidance_scale: Tensor | None = None
    samples: int = 1
    seeds: Sequence[int] | None = None
    batch_size: int | None = None
    on_answer: OnAnswer | None = None
    running: Running = field(default_factory=Running)


class Prepared(NamedTuple):
    """Prompts, processors, criteria and configuration, as transformers makes them."""

    ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


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

    def prepare(self, lm: PreTrainedModel, ids: Tensor, mask: Tensor) -> Prepared:
        """What transformers makes of these settings for some prompts.

        Args:
            lm: the language model; nothing of it is run.
            ids: padded prompts, (B, S), int64.
            mask: their attention mask, (B, S).

        Returns:
            Everything that its own loop would be given.

        Raises:
            ConfigError: if transformers refuses the settings.
        """
        prepared: list[Prepared] = []

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **kwargs: Any,
        ) -> Tensor:
            prepared.append(Prepared(input_ids, logits_processor, stopping_criteria, generation_config))
            return input_ids

        # transformers would fill what is None from the model's configuration, also where None was asked for.
        other: Any = copy.copy(lm)
        other.generation_config = self.config
        try:
            other.generate(
                ids,
                attention_mask=mask,
                generation_config=self.config,
                logits_processor=self.processors,
                stopping_criteria=self.criteria,
                custom_generate=decode,
            )
        # Nothing of this package runs in there, and only settings could be wrong.
        except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
            raise ConfigError(f"transformers refuses these generation settings: {error}") from error
        return prepared[0]


def check_requests(requests: Requests, decoding: Decoding) -> None:
    """Refuse values that are not one per prompt, and a streamer or a length that several answers cannot share."""
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
