"""Infilling: gaps in a text, denoised together in sight of everything around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.ode import Observer
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.diffusion.sampler import Block, Sampler
from l2d_framework.diffusion.sampling import Sampling, check_sampling
from l2d_framework.errors import ConfigError, DataError
from l2d_framework.generation.chat_template import check_text
from l2d_framework.generation.prompts import context_length, encode_text
from l2d_framework.generation.results import Infilled
from l2d_framework.types import Layout

_GAP = re.compile(r"<mask:(\d+)>")
_UNKNOWN = -1


def read_gaps(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str], lm_config: Any) -> Layout:
    """Tokens of texts in which `<mask:8>` stands for a gap of 8 tokens, as one batch."""
    context = context_length(lm_config)
    if tokenizer is None:
        raise ConfigError("This model has no tokenizer, so it cannot read texts with gaps. Save one in its folder.")
    if not texts:
        raise ConfigError("There is no text. Give at least one, with gaps like <mask:8>, for 8 tokens.")
    rows = []
    for number, text in enumerate(texts):
        try:
            parts = _GAP.split(check_text(text))
        except DataError as error:
            raise ConfigError(f"Text {number}: {error}") from error
        row = encode_text(tokenizer, parts[0])
        gaps = [int(count) for count in parts[1::2]]
        following = [tokenizer(after, add_special_tokens=False)["input_ids"] if after else [] for after in parts[2::2]]
        length = len(row) + sum(gaps) + sum(map(len, following))
        if context is not None and length > context:
            raise ConfigError(
                f"Text {number} has {length} tokens with its gaps, but the model's context is {context}. Shorten it."
            )
        for count, after in zip(gaps, following, strict=True):
            row += [_UNKNOWN] * count + after
        if _UNKNOWN not in row:
            raise ConfigError(f"Text {number} has no gap, got {text!r}. Write gaps like <mask:8>, for 8 tokens.")
        if row[0] == _UNKNOWN:
            raise ConfigError(
                f"Text {number} begins with a gap, got {text!r}, and this tokenizer puts no token in front from which "
                "the first one could be predicted. Begin with a word, or a special token such as <s>."
            )
        rows.append(row)
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    absent = torch.arange(width) < torch.tensor([[width - len(row)] for row in rows])
    return Layout(tokens.clamp_min(0), torch.where(absent, -1, (tokens == _UNKNOWN).long()))


@torch.no_grad()
def infill(diffusion: Diffusion, gapped: Layout, *, sampling: Sampling, observer: Observer | None = None) -> Infilled:
    """Fill the gaps with the most likely tokens of the last evaluation.

    A row's result depends on its own text and the seed, never on its batch mates; a second copy of a text in one call
    gets noise of its own.

    Args:
        diffusion: the model.
        gapped: texts whose gaps are block 1, padded on the left, on the model's device.
        sampling: how to diffuse; all gaps of a row are one block.
        observer: called after every network evaluation.

    Returns:
        The texts.

    Raises:
        ConfigError: if the backbone sees no later tokens, or a text exceeds its context.
    """
    check_infilling(diffusion.backbone)
    check_sampling(sampling, num_classes=diffusion.backbone.config.num_classes, has_condition=False)
    rows = [(row >= 1).nonzero()[:, 0] for row in gapped.blocks]
    width = max(map(len, rows))
    # Shorter rows ask about their last slot again, with the same noise.
    positions = torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows])
    first = (gapped.blocks < 0).sum(1)
    known = torch.where(gapped.blocks >= 1, _UNKNOWN, gapped.tokens)
    names = request_keys([row[start:].tolist() for row, start in zip(known, first.tolist(), strict=True)])
    block = Block(
        positions=positions,
        layout=gapped,
        context=diffusion.backbone.read(gapped),
        keys=[
            [(sampling.seed, name, int(place - start), 0) for place in row]
            for name, row, start in zip(names, positions.cpu(), first.cpu(), strict=True)
        ],
    )
    found = Sampler.of(diffusion, sampling, observer)(block)
    chosen = torch.stack([logits.argmax(-1) for logits in found.logits.columns()], 1)
    filled = gapped.tokens.scatter(1, positions, chosen)
    return Infilled(filled, gapped.blocks, found.evaluations[:, 0], found.metrics)


def check_infilling(backbone: Backbone) -> None:
    """Refuse models whose gaps would be filled without a look at what follows."""
    if not backbone.sees_later:
        name = backbone.config.component_name()
        raise ConfigError(
            f"Infilling needs a backbone that sees the tokens after a gap; this one, {name!r}, sees earlier ones only. "
            "Use a model trained with the backbone 'in_place', with attention: bidirectional and block_size: null."
        )
