"""The loss along a model's own trajectory: solved from noise as in sampling, and learnt from at every evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from l2d_framework.blame import naming_plugins
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.loss import Losses, chunked_cross_entropy, refining
from l2d_framework.diffusion.selection import Sliced
from l2d_framework.diffusion.training_noise import Solves
from l2d_framework.types import Layout, Query, Stride


@naming_plugins()
def trajectory_loss(
    diffusion: Diffusion,
    layout: Layout,
    solves: Solves,
    *,
    classes: Tensor | None = None,
    counted: Tensor | None = None,
    chunk: int = 1024,
) -> Losses:
    """Cross-entropy of the clean tokens at each evaluation of a solve by Euler's method, without guidance.

    Estimates are drawn as in sampling. No gradient passes through states, estimates or a remembered prediction, only
    through the hidden states that a backbone carries from one evaluation to the next.

    Args:
        diffusion: the model.
        layout: tokens and blocks, (B, S).
        solves: what is solved in how many evaluations.
        classes: class of each row, (B,), int64, -1 for none; None for none at all.
        counted: denoised slots whose loss counts, (B, S), bool; all when None.
        chunk: positions per pass of the vocabulary head, which bounds memory to chunk x V.

    Returns:
        The losses of all evaluations; `total` has the mean over those of a solve.
    """
    order, counts = solves.rows, torch.tensor(solves.counts, device=layout.tokens.device)
    layout = Layout(layout.tokens[order], layout.blocks[order])
    chosen = solves.valid
    if counted is not None:
        chosen = chosen & counted[order].gather(1, solves.positions)
    condition = None if classes is None else torch.where(solves.kept, classes[order, None], -1)
    targets = layout.tokens.gather(1, solves.positions)
    path = _Path(diffusion, layout, solves, condition)
    totals, found = [], []
    for number in range(solves.counts[0]):
        query, features = path.evaluate(number)
        here = chosen[: len(features)]
        row, _ = here.nonzero(as_tuple=True)
        t = query.t[here]
        weight = diffusion.schedule.weight(t)
        share = 1 / counts[row] if weight is None else weight / counts[row]
        # Where the language model answers alone there is nothing to learn.
        with torch.set_grad_enabled(features.requires_grad):
            total, entropies = chunked_cross_entropy(
                diffusion.backbone.head,
                features[here],
                targets[: len(features)][here],
                chunk=chunk,
                weights=share,
                refine=refining(diffusion, query.x[here], t) if diffusion.refines else None,
            )
        totals.append(total)
        tokens = entropies if weight is None else weight * entropies
        found.append((tokens, entropies, t, order[row], solves.positions[: len(features)][here]))
        path.move(number, query, features.detach())
    tokens, entropies, t, row, position = (torch.cat(parts) for parts in zip(*found, strict=True))
    learnt = layout.blocks >= 1 if counted is None else counted[order] & (layout.blocks >= 1)
    count = int(learnt.sum())
    copies = int(chosen.sum()) // max(count, 1)
    return Losses(torch.stack(totals).sum() / max(copies, 1), tokens, entropies, t, count, row, position)


class _Path:
    """Solves on their way, those of most evaluations first; the others leave as they end."""

    def __init__(self, diffusion: Diffusion, layout: Layout, solves: Solves, condition: Tensor | None) -> None:
        self._diffusion, self._solves, self._condition = diffusion, solves, condition
        self._context = diffusion.backbone.read(layout)
        self._grids = [diffusion.schedule.grid(count, 1.0) for count in solves.counts]
        space = diffusion.parametrization
        with torch.no_grad():
            x = space.prior(solves.random)
            self._x = x.to(torch.float32 if x.device.type == "mps" else space.state_dtype)
            diffusion.forget_codebook()  # as in `denoising_loss`
            self._codebook = diffusion.codebook()
        self._previous: Tensor | None = None
        self._carried: Tensor | None = None

    def _times(self, number: int, rows: int) -> Tensor:
        """Times of an evaluation of the first solves, (rows, L), as precise as the states."""
        times = torch.tensor([[grid[number]] for grid in self._grids[:rows]], dtype=self._x.dtype)
        return times.to(self._x.device).repeat(1, self._solves.positions.shape[1])

    def evaluate(self, number: int) -> tuple[Query, Tensor]:
        """The question of an evaluation, and the hidden states that answer it."""
        rows, positions = len(self._x), self._solves.positions
        times = {grid[number] for grid in self._grids[:rows]}
        query = Query(
            x=self._x.float(),
            t=self._times(number, rows).float(),
            positions=positions[:rows],
            context=self._context,
            condition=None if self._condition is None else self._condition[:rows],
            previous=self._previous,
            carried=self._carried,
            shared_time=times.pop() if len(times) == 1 else None,
        )
        features = self._diffusion.features(query)
        self._carried = features if self._diffusion.backbone.carries else None
        return query, features

    @torch.no_grad()
    def move(self, number: int, query: Query, features: Tensor) -> None:
        """Let the solves that go on make a step of Euler's method."""
        rows = sum(count > number + 1 for count in self._solves.counts)
        if not rows:
            return
        if rows < len(features):
            self._context = self._context.select(torch.arange(rows, device=features.device))
            self._carried = None if self._carried is None else self._carried[:rows]
            self._x, features = self._x[:rows], features[:rows]
            query = query.replace(x=query.x[:rows], t=query.t[:rows])
        space, table = self._diffusion.parametrization, self._diffusion.backbone.table()
        t, s = (self._times(at, rows) for at in (number, number + 1))
        ahead = self._ahead(number, t)
        draws, estimates, memory = Sliced(self._solves.random.first(rows)), [], []
        for part, logits in self._diffusion.answer_from(features, query).parts():
            estimates.append(space.estimate(logits, ahead[:, part], self._codebook, draws.of(part)))
            if space.uses_previous:
                memory.append(space.remember(logits, table))
        self._previous = torch.cat(memory, 1) if memory else None
        clean = estimates[0] if len(estimates) == 1 else torch.cat(estimates, 1)
        slope = self._diffusion.schedule.velocity(self._x, clean, t)
        self._x = self._x + (s - t)[..., None] * slope

    def _ahead(self, number: int, t: Tensor) -> Tensor:
        """Times whose temperature the estimates have, (B, L), float32; solves of one length look ahead together."""
        counts, parts = self._solves.counts[: len(t)], []
        for count in sorted(set(counts), reverse=True):
            first = counts.index(count)
            grid, here = self._grids[first], t[first : first + counts.count(count)]
            stride = Stride(grid[number + 1] - grid[number])
            parts.append(self._diffusion.parametrization.lookahead(here, stride))
        return torch.cat(parts).float()
