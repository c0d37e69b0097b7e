"""A diffusion model as one of transformers' own: `generate` with beam search, `pipeline`, any tool of that world."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from l2d_framework.blame import naming_plugins
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.rng import request_keys as names_of
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.diffusion.sampling import Sampling, check_sampling
from l2d_framework.errors import ConfigError
from l2d_framework.types import Layout

_CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
"""What transformers calls the cache: `past_key_values` before 5.24."""


@dataclass
class FaceCache:
    """What the backbone remembers of the tokens so far, in the place of transformers' cache.

    Attributes:
        context: the backbone's memory.
        layout: tokens and where real ones stand, (B, S).
        names: request and sample of each row, which name its noise.
    """

    context: Any
    layout: Layout
    names: list[tuple[str, int]]

    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens remembered, padding included."""
        return self.layout.tokens.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on from other rows, (B,); a hypothesis keeps the noise of the row it came from."""
        rows = beam_idx.to(self.layout.tokens.device, torch.int64)
        self.context = self.context.select(rows)
        self.layout = Layout(self.layout.tokens[rows], self.layout.blocks[rows])
        self.names = [self.names[row] for row in rows.tolist()]


class DiffusionForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of one token per block under fixed sampling settings, with the interface of a causal language model.

    The logits about a token are those of the last evaluation after its solve: the distribution that `generate` of the
    diffusion model picks from. Noise is named by the seed, the request, the number of real tokens before, and the
    sample, as there. A request is the text that `forward` sees first, without a cache; equal rows of it are samples 0,
    1, 2, ... of one request, as `num_return_sequences` makes them. Beams all descend from row 0, so the hypotheses of
    one search meet the same noise at the same position and differ in their text alone. Without a cache
    (`use_cache=False`) each step is a request of its own, since where the prompt ended cannot be known: other draws,
    of the same distribution.

    The weights are the diffusion model's own, not copies. There is no loss: a diffusion model learns from
    `l2d_framework.diffusion.loss`, so nothing here has gradients.

    Args:
        diffusion: the model.
        sampling: how to diffuse.
        class_id: class of every text, or None.

    Attributes:
        on_step: called with the evaluations of each solve, (B, n), int64, or None.
    """

    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, diffusion: Diffusion, sampling: Sampling, class_id: int | None = None) -> None:
        if diffusion.block_size != 1 or not diffusion.backbone.independent_positions:
            size = diffusion.block_size
            raise ConfigError(
                "Only a model of one token per block, each asked about by itself, is a causal language model to "
                f"transformers; {type(diffusion.backbone).__name__} denoises "
                f"{'whole answers' if size is None else 'tokens' if size == 1 else f'{size} tokens'} together. "
                "Use generate() of the diffusion model itself."
            )
        if sampling.block_size not in (None, 1):
            raise ConfigError(f"block_size={sampling.block_size} gives no next-token logits. Leave it out.")
        check_sampling(sampling, num_classes=diffusion.backbone.config.num_classes, has_condition=class_id is not None)
        lm: Any = diffusion.backbone.lm
        super().__init__(copy.deepcopy(lm.config))
        self.diffusion = diffusion
        self.sampling = sampling
        self.class_id = class_id
        self.generation_config = copy.deepcopy(lm.generation_config)
        self.on_step: Callable[[Tensor], None] | None = None
        self.training = diffusion.training

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.diffusion.backbone.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.diffusion.backbone.lm.dtype

    @override
    def get_input_embeddings(self) -> nn.Module:
        return self.diffusion.backbone.lm.get_input_embeddings()

    @override
    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self.diffusion.backbone.lm.get_output_embeddings()
        return head

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]  # only refuses
        """Refuse: what transformers would write could not be read again."""
        raise ConfigError(
            f"Nothing was written to {save_directory!s}. Save the diffusion model with l2d_framework.save."
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `forward` makes the cache itself.
        return False

    @naming_plugins()
    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: FaceCache | None = None,
        past_key_values: FaceCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        request_keys: Sequence[str] | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits about the token after each of the last inputs.

        Every position is a solve of its own that reads the true tokens up to it, so logits at all positions (the
        default, as in transformers) cost S times those at the last one (`logits_to_keep=1`, which `generate` asks for).

        Args:
            input_ids: tokens not in the cache yet, (B, N), int64.
            attention_mask: 1 where a real token stands, those in the cache included, (B, S); all when None. Padding
                stands on the left where a cache is used.
            cache: what an earlier call returned; changed by this one.
            past_key_values: its name in transformers before 5.24; either is taken.
            use_cache: return a cache; not when False.
            logits_to_keep: positions from the end to make logits for; all when 0.
            request_keys: name of each prompt for its noise, for rows in as many equal groups, the samples of each;
                made from the tokens when None. Read without a cache only.
            return_dict: not used; the output is always an object.

        Returns:
            Logits, (B, n, V), float32, and the cache.

        Raises:
            ConfigError: if the padding or the number of request keys does not fit.
        """
        count = input_ids.shape[1]
        cache = past_key_values if cache is None else cache
        if cache is None:
            cache = self._begin(input_ids, attention_mask, request_keys)
        else:
            if attention_mask is not None and not bool(attention_mask[:, -count:].all()):
                raise ConfigError("There is padding after tokens in the cache. Pad prompts on the left.")
            known = cache.layout.blocks
            grown = torch.cat([cache.layout.tokens, input_ids], 1)
            cache.context = self.diffusion.backbone.extend(cache.context, input_ids)
            cache.layout = Layout(grown, torch.cat([known, known.new_zeros(len(known), count)], 1))
        kept = min(count, logits_to_keep or count)
        memory: Any = {_CACHE: None if use_cache is False else cache}
        return CausalLMOutputWithPast(logits=self._solve(cache, kept), **memory)

    def _begin(self, ids: Tensor, mask: Tensor | None, names: Sequence[str] | None) -> FaceCache:
        present = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        prompts = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), present.cpu(), strict=True)]
        if names is None:
            found = [name.rpartition(".")[0] for name in names_of(prompts)]
            seen: Counter[str] = Counter()
            rows = []
            for name in found:
                rows.append((f"{name}.0", seen[name]))
                seen[name] += 1
        else:
            if not names or len(ids) % len(names):
                raise ConfigError(
                    f"request_keys must name each prompt once: got {len(names)} for {len(ids)} rows, which is no "
                    "multiple."
                )
            each = len(ids) // len(names)
            rows = [(names[row // each], row % each) for row in range(len(ids))]
        layout = Layout(ids, present - 1)
        return FaceCache(self.diffusion.backbone.read(layout), layout, rows)

    def _solve(self, cache: FaceCache, kept: int) -> Tensor:
        # Logits about the slots after the last `kept` ones, (B, kept, V).
        ids, present = cache.layout.tokens, cache.layout.present
        length = ids.shape[1]
        if not bool(present[:, -1].all()) and kept == 1:
            raise ConfigError("A prompt ends with padding, so no token follows it. Pad prompts on the left.")
        slots = torch.arange(length - kept + 1, length + 1, device=ids.device)
        before = present.long().cumsum(1)[:, -kept:].tolist()
        seed = self.sampling.seed
        keys = [
            [(seed, name, real, sample) for real in row]
            for (name, sample), row in zip(cache.names, before, strict=True)
        ]
        positions = slots.expand(len(ids), -1)
        condition = None if self.class_id is None else torch.full_like(positions, self.class_id)
        solve = Sampler.of(self.diffusion, self.sampling)
        found = solve(Block(positions, cache.layout, cache.context, keys, condition))
        if self.on_step is not None:
            self.on_step(found.evaluations)
        return torch.cat([part for _, part in found.logits.parts()], 1)


def as_transformers(diffusion: Diffusion, sampling: Sampling, class_id: int | None = None) -> DiffusionForCausalLM:
    """A diffusion model as a causal language model of transformers; the class bears the name that pipelines know."""
    kind: Any = type(
        type(diffusion.backbone.lm).__name__, (DiffusionForCausalLM,), {"__doc__": DiffusionForCausalLM.__doc__}
    )
    return kind(diffusion, sampling, class_id)  # type: ignore[no-any-return]
