"""DiffusionLM: the model users hold; a process that generates text and knows what it was made from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from l2d_framework.backbone import Backbone
from l2d_framework.blame import naming_plugins
from l2d_framework.config import SamplingSection
from l2d_framework.config.sampling import component_of
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.ode import Observer
from l2d_framework.diffusion.sampling import reads_no_noise
from l2d_framework.drafter import Drafter
from l2d_framework.errors import ConfigError, shown, suggest
from l2d_framework.generation import arguments
from l2d_framework.generation.causal_lm import DiffusionForCausalLM, as_transformers
from l2d_framework.generation.infill import infill, read_gaps
from l2d_framework.generation.loop import generate
from l2d_framework.generation.prompts import (
    Encoded,
    Prompt,
    add_ends,
    check_length,
    context_length,
    encode_prompts,
    pad_left,
    turn_end,
)
from l2d_framework.generation.requests import Decoding, OnAnswer, Requests
from l2d_framework.generation.results import Generation, Infilled, html_table
from l2d_framework.models.origin import Origin
from l2d_framework.models.placement import check_whole
from l2d_framework.parametrization import Parametrization
from l2d_framework.schedule import NoiseLaw
from l2d_framework.types import Layout

DEFAULT_NEW_TOKENS = 256
"""Answer length where neither the call nor the base model sets one: the L2D paper's for general tasks."""

_BEFORE_THE_END = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
"""Settings that make end tokens likelier or less likely."""

_STOP_STRINGS = Lock()
"""Held while transformers looks stop strings up in a table of the whole process, from which it also removes some."""


class DiffusionLM(Diffusion):
    """A diffusion language model of a law of noise, a state space and a network.

    A block, whose tokens are denoised together, is the whole sequence when `block_size` is None.
    """

    def __init__(
        self, schedule: NoiseLaw, parametrization: Parametrization, backbone: Backbone, block_size: int | None = 1
    ) -> None:
        super().__init__(schedule, parametrization, backbone, block_size)
        self.origin = Origin()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def device(self) -> torch.device:
        """Where the language model's weights are."""
        return self.backbone.lm.device

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        check_whole(self, "Moving or casting a model")
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        return moved

    def _facts(self) -> dict[str, str]:
        """What it is, for readers."""
        model, sampling, own = self.origin.model, self.origin.sampling, [*self.own_parameters().values()]
        parts = (self.schedule.config, self.parametrization.config, self.backbone.config)
        facts = {part.kind: part.component_name() for part in parts}
        facts["base"] = shown(model.base if model else type(self.backbone.lm).__name__)
        facts["block_size"] = "whole" if self.block_size is None else f"{self.block_size:,}"
        if self.origin.classes:
            facts["classes"] = f"{len(self.origin.classes):,}"
        if sampling is not None:
            steps = sampling.num_inference_steps
            facts["sampling"] = f"{sampling.solver.component_name()}, {steps or 'adaptive'} evaluations"
        everything = sum(parameter.numel() for parameter in self.parameters())
        facts["parameters"] = f"{sum(p.numel() for p in own):,} own of {everything:,}"
        facts["dtype"] = str(self.backbone.lm.dtype).removeprefix("torch.")
        return facts | {"device": str(self.device)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        facts = self._facts()
        return html_table(type(self).__name__, {"": [*facts], " ": [*facts.values()]})

    def sampling(self, **options: Any) -> SamplingSection:
        """The checkpoint's sampling settings, validated, with fields replaced; components by name or as a mapping."""
        return self._settings(options)

    def _settings(self, options: dict[str, Any], scale: float | None = None) -> SamplingSection:
        return self.origin.settings(self.parametrization.config, options, scale=scale, tokenizer=self.tokenizer)

    def ends(self, *, is_chat: bool) -> tuple[int, ...]:
        """Ids of tokens that end an answer beside those of the language model's generation configuration.

        Where training has taught how answers end, that holds for any prompt; of others only the chat template says
        it, and for conversations alone.
        """
        if self.origin.ends is not None:
            return self.origin.ends
        end = turn_end(self.tokenizer, self.origin.chat_template) if is_chat else None
        return () if end is None else (end,)

    def class_ids(self, names: Sequence[str | None]) -> Tensor:
        """Ids of class labels, one per prompt, (B,), int64, -1 for None; ConfigError for an unknown name."""
        return torch.tensor([self.origin.class_id(name) for name in names], device=self.device)

    @naming_plugins()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Tensor | Encoded,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        observer: Observer | None = None,
        classes: Sequence[str | None] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_return_sequences: int = 1,
        batch_size: int | None = None,
        on_answer: OnAnswer | None = None,
        merge: Literal["auto", "always", "never"] = "auto",
        speculate: Literal["auto", "off"] | int = "off",
        drafter: Drafter | Mapping[str, Any] | str | None = None,
        graph: bool = True,
        compile: bool = False,
        **options: Any,
    ) -> Generation:
        """Answer prompts.

        Takes the arguments of transformers' `generate` for picking tokens (`max_new_tokens`, `do_sample`,
        `temperature`, `top_p`, `eos_token_id`, `stop_strings`, ...) and the fields of the `sampling` section for
        diffusing (`num_inference_steps`, `solver`, `guidance`, `estimate`, `end_time`, `block_size`, `patience`,
        `seed`, `preset`); `seed` may be a list with one per prompt. Tokens are picked greedily from the last logits
        unless `do_sample` is set here or in the base model's generation config; the L2D paper samples at temperature 1.
        Unless an `eos_token_id` is named, answers also end with the tokens of `ends`.
        An answer depends on its prompt and the seed, not on batch mates; only a second copy of a prompt in one call
        gets other noise than the first, unless the encoded prompts carry `keys`.

        Args:
            prompts: one text or conversation or a list of them, token ids (B, S) without padding, or an encoded batch.
            generation_config: transformers' generation configuration; the base model's when None.
            logits_processor: further processors of the final logits.
            stopping_criteria: further criteria.
            streamer: receives tokens as they are picked; one prompt and one answer only, as in transformers.
            observer: called after every network evaluation.
            classes: class label of each prompt.
            guidance_scale: scale of the guidance, for all prompts or for each.
            num_return_sequences: answers per prompt; the prompt is read once.
            batch_size: most answers that are written at a time; all when None. One that ends makes room for the next,
                where the backbone can join them; criteria then see one row at a time. Elsewhere (several tokens per
                block, processors of the caller, an observer, a solver that couples rows) the next begin when all of
                them have ended.
            on_answer: called with the number, the tokens, the evaluations and what guidance recorded of each answer as
                soon as it has ended.
            merge: fold adapters into matrices beside them: if there is memory for it, in any case, or never.
            speculate: tokens that are guessed ahead, to be denoised at once and kept as far as they are
                those that would have been written one by one; `auto` for as many as pay. Answers stay the same up to
                rounding. Processors are asked about guesses, too, so they must depend on tokens and scores alone.
            drafter: who guesses them, by name, as a section or a component; the language model when None.
            graph: let an NVIDIA GPU replay a token's evaluations from a CUDA graph, where they can be captured.
            compile: run layers as torch.compile makes them, which takes a while at first and where the number of
                prompts changes; pays for long answers. Refused by backbones that have no layers for it.
            **options: as above.

        Returns:
            Sequences and the evaluations spent on each token.

        Raises:
            ConfigError: if an option is unknown or does not fit the model.
        """
        diffusing = {name: options.pop(name) for name in tuple(options) if name in SamplingSection.model_fields}
        request = arguments.request(
            classes=classes,
            guidance_scale=guidance_scale,
            num_return_sequences=num_return_sequences,
            batch_size=batch_size,
            seed=diffusing.pop("seed", None),
            merge=merge,
            speculate=speculate,
            drafter=component_of("drafter", drafter),
            graph=graph,
            compile=compile,
        )
        if request.drafter is not None:
            request.drafter.check(self.tokenizer)
        arguments.check_parts(logits_processor, stopping_criteria, streamer, observer=observer, on_answer=on_answer)
        arguments.check_prompts(prompts, self.backbone.vocab_size)
        seeds, scales = request.seed, request.guidance_scale
        if isinstance(seeds, int):
            diffusing["seed"] = seeds
        sampling = self._settings(diffusing, scales if isinstance(scales, float) else None)
        if isinstance(scales, list):
            self._settings(diffusing, scale=1.0)  # refuses scales where there is nothing to scale
        encoded = self._encoded(prompts)
        config, criteria = self._decoding(generation_config, options, stopping_criteria, encoded.chats or [False])
        check_length(encoded.attention_mask.sum(-1).tolist(), config, self.backbone.lm.config)
        requests = Requests(
            encoded.to(self.device),
            classes=None if request.classes is None else self.class_ids(request.classes),
            guidance_scale=torch.tensor(scales, device=self.device) if isinstance(scales, list) else None,
            samples=request.num_return_sequences,
            batch_size=request.batch_size,
            on_answer=on_answer,
            seeds=seeds if isinstance(seeds, list) else None,
            running=request,
        )
        decoding = Decoding(config, logits_processor or LogitsProcessorList(), criteria, streamer)
        is_greedy = request.num_return_sequences > 1 and not config.do_sample
        if is_greedy and not isinstance(scales, list) and reads_no_noise(self, sampling):
            warnings.warn(
                f"num_return_sequences={request.num_return_sequences} answers to a prompt will be equal: tokens are "
                "picked greedily, and without evaluations beyond t = 0 nothing else is drawn. Set do_sample, or "
                "ask for one.",
                UserWarning,
                stacklevel=3,
            )
        found = generate(self, requests, sampling=sampling, decoding=decoding, observer=observer)
        return replace(found, tokenizer=self.tokenizer)

    @naming_plugins()
    def infill(
        self,
        texts: str | Sequence[str] | Layout,
        *,
        streamer: BaseStreamer | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Infilled:
        """Fill gaps in texts, in sight of what stands before and after them.

        Where a gap is filled with a token of `ends`, that token stands in the rest of the gap, too.

        Args:
            texts: one or several, with `<mask:8>` for a gap of 8 tokens; or a layout whose gaps are block 1.
            streamer: receives what stands before the first gap, as from `generate` a prompt, and then the rest at
                once, since all gaps are denoised together; one text only.
            observer: called after every network evaluation.
            **options: fields of the `sampling` section.

        Returns:
            The filled texts.

        Raises:
            ConfigError: if an option is unknown, a text has no gap or is too long, or the backbone cannot look ahead.
        """
        for name in options:
            if name not in SamplingSection.model_fields:
                hint = suggest(name, SamplingSection.model_fields) or "."
                raise ConfigError(f"Unknown option {name}={options[name]!r}{hint} Remove or correct it.")
        sampling = self._settings(options)
        arguments.check_parts(None, None, streamer, observer=observer)
        if isinstance(texts, Layout):
            arguments.check_gapped(texts, self.backbone.vocab_size, context_length(self.backbone.lm.config))
            gapped = texts
        else:
            arguments.check_texts(texts)
            gapped = read_gaps(self.tokenizer, [texts] if isinstance(texts, str) else texts, self.backbone.lm.config)
        placed = Layout(gapped.tokens.to(self.device), gapped.blocks.to(self.device))
        if streamer is not None and len(placed.tokens) > 1:
            raise ConfigError(f"A streamer takes one text, got {len(placed.tokens)}. Give one, or leave it out.")
        found = infill(self, placed, sampling=sampling, observer=observer).ended(self.ends(is_chat=False))
        if streamer is not None:
            tokens, blocks = (part[placed.present].cpu() for part in (found.sequences, placed.blocks))
            first = int((blocks >= 1).long().argmax())
            streamer.put(tokens[None, :first])
            streamer.put(tokens[first:])
            streamer.end()
        return replace(found, tokenizer=self.tokenizer)

    @naming_plugins()
    def as_transformers(
        self, *, class_name: str | None = None, guidance_scale: float | None = None, **options: Any
    ) -> DiffusionForCausalLM:
        """This model as a causal language model of transformers: for beam search, `pipeline` and other tools.

        Its greedy `generate` picks the same tokens as this model's with the same settings. It shares the weights.

        Args:
            class_name: class label of every text.
            guidance_scale: scale of the guidance.
            **options: fields of the `sampling` section.

        Returns:
            A `PreTrainedModel` with `generate`.

        Raises:
            ConfigError: if an option is unknown, or the model denoises several tokens together.
        """
        sampling = self._settings(options, guidance_scale)
        label = None if class_name is None else self.origin.class_id(class_name)
        lm = as_transformers(self, sampling, label)
        add_ends(lm.generation_config, self.ends(is_chat=False))
        return lm

    def _encoded(self, prompts: Prompt | Sequence[Prompt] | Tensor | Encoded) -> Encoded:
        if isinstance(prompts, Tensor):
            return Encoded(prompts, torch.ones_like(prompts))
        if isinstance(prompts, Encoded):
            return prompts
        is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
        several: Any = [prompts] if is_single else prompts
        chats = [not isinstance(prompt, str) for prompt in several]
        return pad_left(encode_prompts(self.tokenizer, several, self.origin.chat_template), chats=chats)

    def _decoding(
        self,
        config: GenerationConfig | None,
        options: dict[str, Any],
        criteria: StoppingCriteriaList | None,
        chats: Sequence[bool],
    ) -> tuple[GenerationConfig, StoppingCriteriaList]:
        # Configuration with `options` applied, and criteria with stop strings among them.
        defaults, given = self.backbone.lm.generation_config, config
        config = arguments.decoding_config(
            given,
            options,
            defaults=defaults,
            vocab_size=self.backbone.vocab_size,
            known=[*SamplingSection.model_fields, *arguments.Request.model_fields],
        )
        is_end_chosen = "eos_token_id" in options or (
            given is not None and given.eos_token_id is not None and config.eos_token_id != defaults.eos_token_id
        )
        criteria = StoppingCriteriaList(criteria or [])
        if not is_end_chosen:
            add_ends(config, self.ends(is_chat=all(chats)))
            if any(chats) and not all(chats):
                criteria.append(self._turn_ends(config, chats))
        if config.stop_strings is not None:
            if self.tokenizer is None:
                raise ConfigError(f"stop_strings={config.stop_strings!r} needs a tokenizer, which this model lacks.")
            with _STOP_STRINGS:
                criteria.append(StopStringCriteria(self.tokenizer, config.stop_strings))
            config.stop_strings = None
        if config.max_length is None and config.max_new_tokens is None:
            config.max_new_tokens = DEFAULT_NEW_TOKENS
        return config, criteria

    def _turn_ends(self, config: GenerationConfig, chats: Sequence[bool]) -> StoppingCriteria:
        # What transformers makes of its end tokens, beside stopping there, holds for all rows of a batch.
        ends, whole = self.ends(is_chat=True), copy.copy(config)
        add_ends(whole, ends)
        for name in _BEFORE_THE_END if whole.eos_token_id != config.eos_token_id else ():
            if value := getattr(config, name, None):
                raise ConfigError(
                    f"{name}={value} would not hold for the conversations among these prompts, whose answers end with "
                    "their turn. Ask for conversations and texts in a call each."
                )
        return _TurnEnds(ends, chats)


class _TurnEnds(StoppingCriteria):
    """Ends the answers to conversations among other prompts with their turn."""

    def __init__(self, ends: Sequence[int], chats: Sequence[bool]) -> None:
        self._ends, self._chats = torch.tensor(ends, dtype=torch.int64), torch.tensor(chats)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = self._chats.repeat_interleave(len(input_ids) // len(self._chats)).to(input_ids.device)
        return rows & torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
