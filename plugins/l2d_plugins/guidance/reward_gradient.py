"""Reward guidance of TESS 2: ascend the gradient of a reward model on the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from l2d_framework.diffusion.logits import pieces
from l2d_framework.guidance import Guidance
from l2d_framework.types import Layout, Predict, Prediction, Query, Random, Space
from l2d_plugins.companions import ModelPath
from l2d_plugins.guidance.reward_network import RewardNetwork, check_reward_model, load_reward_model, reward_bytes


class RewardGradient(Guidance):
    """Adds `scale` times the gradient of a reward to the logits.

    The reward model reads known tokens as they are and, at the positions asked about, its embeddings averaged with the
    predicted probabilities. Self-conditioning and solver see the guided logits. The reward before the ascent is
    recorded under the name `reward`.

    Each option at its default is what the paper writes. The released code computes in bfloat16 and, with more than one
    inner step, never clears gradients; `precision` and `accumulate_gradients` bring that back.

    Source: arXiv:2502.13917, Eq. 9 to 11.
    """

    name: Literal["reward_gradient"] = "reward_gradient"
    model: ModelPath
    """Folder or hub id of a transformers sequence classifier with one output and the same vocabulary."""
    scale: float = Field(0.25, allow_inf_nan=False)
    """Step along the gradient, in logits per unit of reward; 0 guides nothing. Raise it while rewards rise and answers
    stay readable."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Divides the logits before the softmax."""
    gumbel: Literal["none", "soft", "hard"] = "none"
    """Gumbel-softmax (arXiv:1611.01144); `hard` shows the reward model tokens and passes gradients straight through."""
    inner_steps: int = Field(1, ge=1)
    """Ascents per evaluation of the diffusion network; each costs a pass of the reward model forward and back."""
    accumulate_gradients: bool = False
    """At each inner step, add the gradients of all inner steps so far."""
    position: Literal["canvas_end", "expected_end"] = "canvas_end"
    """Where the reward is read: at the last token, or averaged over where the answer may end."""
    max_gradient_norm: float | None = Field(None, gt=0)
    """Longest gradient of a row; unlimited when None."""
    every: int = Field(1, ge=1)
    """Guide every n-th evaluation, the first one included; above 1 to save passes of the reward model."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the reward model's weights; `bfloat16` halves their memory."""

    def check(self, tokenizer: Any) -> None:
        """Refuse a reward model that cannot guide; without a tokenizer (None) vocabularies are not compared."""
        check_reward_model(self.model, tokenizer, needs_end=self.position == "expected_end")

    @override
    def bytes_beside(self, dtype: torch.dtype) -> int:
        return reward_bytes(self.model, getattr(torch, self.precision))

    def __call__(self, predict: Predict, query: Query, space: Space) -> Prediction:
        """Guided logits, from which the clean state follows."""
        with torch.no_grad():
            prediction = predict(query)
            if (query.guidance_scale is None and self.scale == self.neutral_scale) or space.evaluation % self.every:
                return prediction
            reward = load_reward_model(self.model, prediction.logits.device, getattr(torch, self.precision))
            reward.check_width(prediction.logits.shape[-1])
            logits = self._ascend(prediction.logits, query, reward, space)
            if prediction.clean is None:
                return Prediction(logits)
            guided = torch.as_tensor(self.scales(query), device=logits.device).ne(0)
            return Prediction(logits, torch.where(guided, space.estimate(logits), prediction.clean))

    def _ascend(self, logits: Tensor, query: Query, reward: RewardNetwork, space: Space) -> Tensor:
        canvas, scale = _Canvas.of(query.positions, space.layout), self.scales(query)
        total: Tensor | None = None
        for step in range(self.inner_steps):
            seeds = None if self.gumbel == "none" else _seeds(space.random())
            soft = _SoftTokens(logits, self.temperature, seeds, self.gumbel == "hard", reward)
            rewards, gradient = self._gradient(soft, canvas)
            if step == 0:
                space.record("reward", rewards)
            if self.accumulate_gradients:
                gradient = total = gradient if total is None else total.add_(gradient)
            factor = scale * self._shortening(gradient, canvas)
            logits = torch.addcmul(logits, gradient, factor)
        return logits

    def _gradient(self, soft: _SoftTokens, canvas: _Canvas) -> tuple[Tensor, Tensor]:
        """Rewards (B,), and the gradient of their sum with respect to the logits, (B, L, V).

        Only what is as narrow as the embeddings is on autograd's tape; the step to the vocabulary is taken by hand.
        """
        embedded, ending = soft.read()
        # Whoever generates may have switched autograd off for good; copies made here are on again.
        with torch.inference_mode(False), torch.enable_grad():
            embedded, ending = embedded.clone().requires_grad_(), ending.clone().requires_grad_()
            values = soft.reward.rewards(canvas.inputs(embedded, soft.reward))
            reward = canvas.last(values)
            if self.position == "expected_end":
                reward = canvas.at_end(values, ending, soft.reward)
            slopes = torch.autograd.grad(reward.sum(), (embedded, ending), materialize_grads=True)
        return reward.detach(), canvas.shared(soft.slope(*slopes))

    def _shortening(self, gradient: Tensor, canvas: _Canvas) -> Tensor:
        """What a row's gradient is multiplied with, (B, 1, 1); slots asked about twice count once."""
        if self.max_gradient_norm is None:
            return gradient.new_ones(1, 1, 1)
        lengths = torch.where(canvas.is_kept, torch.linalg.vector_norm(gradient, dim=-1), 0)
        norm: Tensor = torch.linalg.vector_norm(lengths, dim=-1)[:, None, None]
        return (self.max_gradient_norm / norm).clamp(max=1)


@dataclass(frozen=True)
class _SoftTokens:
    """Distributions over tokens, made from logits a few positions at a time, and what a reward model reads of them."""

    logits: Tensor  # (B, L, V), float32
    temperature: float
    seeds: Tensor | None  # of Gumbel noise, (B, L), int64, on the host
    hard: bool  # read the likeliest token; the gradient stays that of the distribution
    reward: RewardNetwork

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Probabilities (B, n, V), float32, of some positions."""
        for part in pieces(*self.logits.shape):
            scores = self.logits[:, part].to(self.reward.table.dtype).float()
            if self.seeds is not None:
                scores = scores + _gumbel(self.seeds[:, part], scores)
            yield part, (scores / self.temperature).softmax(-1)

    def read(self) -> tuple[Tensor, Tensor]:
        """Expected embeddings, (B, L, H), and probabilities of an end token, (B, L), float32."""
        table, ends = self.reward.table, self.reward.ends
        embedded, ending = [], []
        for _, probability in self.parts():
            if self.hard:
                tokens = probability.argmax(-1)
                embedded.append(table[tokens])
                ending.append(_is_any(tokens, ends).float())
            else:
                embedded.append(probability.to(table.dtype) @ table)
                ending.append(probability[..., list(ends)].sum(-1))
        return torch.cat(embedded, 1), torch.cat(ending, 1)

    def slope(self, embedded: Tensor, ending: Tensor) -> Tensor:
        """Gradient with respect to the logits, (B, L, V), from those with respect to what `read` returned."""
        out = torch.empty_like(self.logits)
        for part, probability in self.parts():
            rising = (embedded[:, part] @ self.reward.table.T).float()
            rising[..., list(self.reward.ends)] += ending[:, part, None]
            rising -= (probability * rising).sum(-1, keepdim=True)
            out[:, part] = rising.mul_(probability).div_(self.temperature)
        return out


@dataclass(frozen=True)
class _Canvas:
    """A batch without its padding: every row's tokens from its first slot on, as a model that sees no later ones reads.

    Of positions that are repeated to fill up a row, the last one counts.
    """

    tokens: Tensor  # known tokens, of no meaning elsewhere, (B, T), int64
    column: Tensor  # which of the positions asked about stands here, -1 for known tokens, (B, T), int64
    count: Tensor  # tokens of each row, (B,), int64
    kept: Tensor  # for every position asked about, which of those with its slot counts, (B, L), int64

    @classmethod
    def of(cls, positions: Tensor, layout: Layout) -> _Canvas:
        rows, length = positions.shape
        more = max(0, int(positions.max()) + 1 - layout.tokens.shape[1])
        tokens = functional.pad(layout.tokens, (0, more))
        known = functional.pad(layout.blocks == 0, (0, more))
        order = torch.arange(length, device=positions.device).expand(rows, -1)
        column = torch.full_like(tokens, -1).scatter_reduce(1, positions, order, "amax")
        visible = known | (column >= 0)
        count = visible.sum(1)
        places = (~visible).long().argsort(dim=1, stable=True)[:, : int(count.max())]
        return cls(tokens.gather(1, places), column.gather(1, places), count, column.gather(1, positions))

    @property
    def is_kept(self) -> Tensor:
        """Which of the positions asked about count, (B, L), bool."""
        return self.kept == torch.arange(self.kept.shape[1], device=self.kept.device)

    def inputs(self, embedded: Tensor, reward: RewardNetwork) -> Tensor:
        """What the reward model reads, (B, T, H)."""
        column = self.column.clamp_min(0)[..., None].expand(-1, -1, embedded.shape[-1])
        return torch.where((self.column >= 0)[..., None], embedded.gather(1, column), reward.table[self.tokens])

    def last(self, values: Tensor) -> Tensor:
        """Of values (B, T), those at the last tokens, (B,)."""
        return values.gather(1, self.count[:, None] - 1).squeeze(1)

    def at_end(self, values: Tensor, ending: Tensor, reward: RewardNetwork) -> Tensor:
        """Of values (B, T), the mean over where the first end token may stand, (B,); nowhere means the last token.

        The answer begins at the first position asked about; `ending` (B, L) is the probability of an end token there.
        """
        asked = self.column >= 0
        inside = torch.arange(values.shape[1], device=values.device) < self.count[:, None]
        ended = _is_any(self.tokens, reward.ends) & inside & (asked.cumsum(1) > 0)
        stop = torch.where(asked, ending.gather(1, self.column.clamp_min(0)), ended.float())
        going = functional.pad((1 - stop).cumprod(1), (1, 0), value=1.0)
        return (stop * going[:, :-1] * values).sum(1) + going[:, -1] * self.last(values)

    def shared(self, gradient: Tensor) -> Tensor:
        """The gradient (B, L, V) at slots asked about twice as it is where they count."""
        if bool(self.is_kept.all()):
            return gradient
        return gradient.gather(1, self.kept[..., None].expand_as(gradient))


def _is_any(tokens: Tensor, wanted: tuple[int, ...]) -> Tensor:
    return torch.isin(tokens, torch.tensor(wanted, dtype=tokens.dtype, device=tokens.device))


def _seeds(random: Random) -> Tensor:
    """A seed below 2^48 per token, from two of the numbers that come again where a solver asks for that."""
    high, low = ((random.uniform().cpu() * 2**24).long() for _ in range(2))
    return (high << 24) | low


def _gumbel(seeds: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    generator = torch.Generator(like.device)
    for row, values in zip(out, seeds.tolist(), strict=True):
        for place, seed in zip(row, values, strict=True):
            place.exponential_(generator=generator.manual_seed(seed))
    return out.log_().neg_()
