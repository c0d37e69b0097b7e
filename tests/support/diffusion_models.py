"""Diffusion language models of a few kilobytes whose diffusion path is felt."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tiny_models import tiny_lm, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.loss import Losses, denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.models.diffusion_lm import DiffusionLM, Origin
from l2d_framework.types import Layout, Query
from l2d_plugins.backbones import in_place, main_path
from l2d_plugins.backbones.in_place import InPlaceConfig
from l2d_plugins.backbones.two_stream import TwoStream, TwoStreamConfig
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.parametrizations.simplex import SimplexConfig
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers.renoise import Renoise

PROVEN = main_path.PROVEN
"""Families that the two-stream backbone promises to serve."""

BIDIRECTIONAL = in_place.PROVEN
"""Families that the in-place backbone serves."""

NETWORK: dict[str, Any] = {"rank": 2, "alpha": 2.0, "time_features": 8, "conditioning_size": 8}
SPACE: dict[str, Any] = {"size": 8, "hidden": 8, "prior_scale": 8.0}


def backbone_config(**fields: Any) -> TwoStreamConfig:
    """Small two-stream configuration with some fields replaced."""
    return TwoStreamConfig(**{**NETWORK, **fields})


def fresh_lm(
    lm: PreTrainedModel | str = "llama",
    *,
    classes: Sequence[str] = (),
    tokenizer: bool = False,
    space: dict[str, Any] | None = None,
    **backbone: Any,
) -> DiffusionLM:
    """L2D as training starts with it, over a language model or a family of `tiny_models`."""
    lm = tiny_lm(lm) if isinstance(lm, str) else lm
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = backbone_config(num_classes=len(classes), **backbone).build(lm)
        states = EmbeddingConfig(**SPACE, **(space or {})).build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), states, network)
    model.origin = Origin(classes=tuple(classes))
    model.tokenizer = tiny_tokenizer(chat=True) if tokenizer else None
    return model.eval()


def diffusion_lm(lm: PreTrainedModel | str = "llama", **options: Any) -> DiffusionLM:
    """L2D as if trained: every own weight is moved, the final one most, so that states and noise change the tokens."""
    return moved(fresh_lm(lm, **options))


def moved(model: DiffusionLM) -> DiffusionLM:
    """The model itself, with the weights of `diffusion_lm`."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.own_parameters().items():
            scale = 4.0 if ".final.2." in name else 0.3
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model


@cache
def shared_lm(family: str = "llama", **options: Any) -> DiffusionLM:
    """The same model at every call of a session; not to be changed."""
    return diffusion_lm(family, **options)


def tess_lm(
    lm: PreTrainedModel | str = "llama",
    *,
    classes: Sequence[str] = (),
    tokenizer: bool = False,
    space: dict[str, Any] | None = None,
    block_size: int | None = None,
    **backbone: Any,
) -> DiffusionLM:
    """TESS 2 over a language model or a family of `tiny_models`, its time and class embeddings moved to matter."""
    lm = tiny_lm(lm) if isinstance(lm, str) else lm
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = InPlaceConfig(num_classes=len(classes), **backbone).build(lm)
    own = [*network.time.parameters(), *(network.classes.parameters() if classes else ())]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in own:
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    model = DiffusionLM(
        Cosine(), SimplexConfig(**(space or {})).build(network.vocab_size, network.hidden_size), network, block_size
    )
    sampling = SamplingSection(solver=Renoise(), num_inference_steps=4, block_size=None)
    model.origin = Origin(classes=tuple(classes), sampling=sampling)
    model.tokenizer = tiny_tokenizer(chat=True) if tokenizer else None
    return model.eval()


@cache
def shared_tess(family: str = "llama", **options: Any) -> DiffusionLM:
    """The same model at every call of a session; not to be changed."""
    return tess_lm(family, **options)


def random_tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids without special ones, (B, S)."""
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def all_known(tokens: Tensor, *, padding: Sequence[int] = ()) -> Layout:
    """Layout of clean tokens, row i of which starts with `padding[i]` slots of padding."""
    blocks = torch.zeros_like(tokens)
    for row, count in enumerate(padding):
        blocks[row, :count] = -1
    return Layout(tokens, blocks)


def ask_everywhere(model: DiffusionLM, layout: Layout, *, t: float | Tensor = 0.5, seed: int = 0) -> Query:
    """Query about every position after the first, at random states."""
    rows, length = layout.tokens.shape
    shape = rows, length, model.parametrization.state_size
    return Query(
        x=model.parametrization.prior_scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
        t=torch.as_tensor(t, dtype=torch.float32).expand(rows, length),
        positions=torch.arange(1, length + 1).expand(rows, -1),
        context=model.backbone.read(layout),
    )


def supervised(tokens: Tensor, *, known: int = 3) -> Layout:
    """Layout whose first tokens are the prompt and whose others are learnt, each a block of its own."""
    blocks = (torch.arange(tokens.shape[1]) - known + 1).clamp_min(0)
    return Layout(tokens, blocks.expand_as(tokens))


def training_loss(model: DiffusionLM, layout: Layout, *, classes: Tensor | None = None, **rule: Any) -> Losses:
    """Denoising loss of a batch, in chunks of a few positions; the examples are numbered."""
    keys = [(0, 0, row) for row in range(len(layout.tokens))]
    draws = draw(model, layout, NoiseRule(**{"keys": keys, **rule}))
    return denoising_loss(model, layout, draws, classes=classes, chunk=5)


def own_gradients(model: DiffusionLM, loss: Tensor) -> dict[str, Tensor | None]:
    """Gradients of a loss by name of own weight; none are left on the model."""
    loss.backward()
    found = {name: weight.grad for name, weight in model.own_parameters().items()}
    model.zero_grad()
    return found


def two_stream(model: DiffusionLM) -> TwoStream:
    """The backbone, known to be two-stream."""
    assert isinstance(model.backbone, TwoStream)
    return model.backbone
