"""One block of tokens from noise to logits; the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from l2d_framework.backbone import Backbone
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.early_stop import Settled
from l2d_framework.diffusion.logits import Logits
from l2d_framework.diffusion.ode import Observer, Streams, TokenODE
from l2d_framework.diffusion.rng import TokenStreams
from l2d_framework.diffusion.sampling import Sampling, plan
from l2d_framework.errors import ConfigError
from l2d_framework.parametrization import Parametrization
from l2d_framework.solver import Solver
from l2d_framework.types import Context, Layout, Query

Keys = Sequence[Sequence[tuple[int | str, ...]]]
"""For each row, one tuple of key parts per token, which name its random numbers."""


@dataclass(frozen=True)
class Block:
    """Tokens to denoise together."""

    positions: Tensor  # their slots, (B, L), int64
    layout: Layout | None  # the sequence so far, (B, S); None where it is not known ahead
    context: Context  # what the backbone remembers of it
    keys: Keys
    condition: Tensor | None = None  # class of each token, (B, L), int64
    guidance_scale: Tensor | None = None  # (B, L), float32

    def streams(self, purpose: str) -> TokenStreams:
        """Random streams of the block's tokens for one purpose."""
        return TokenStreams([[(*parts, purpose) for parts in row] for row in self.keys], self.positions.device)


@dataclass(frozen=True)
class Denoised:
    """What became of a block."""

    logits: Logits  # those that yield the tokens
    evaluations: Tensor  # of the network, spent on each token, (B, L), int64
    metrics: dict[str, Tensor]  # what guidance recorded, by name, (B, evaluations), float32
    check: Callable[..., None] = lambda rows=None: None  # PluginError if guided logits of some rows, or any, were NaN

    def select(self, rows: Tensor) -> Denoised:
        """What became of some rows, (B',)."""
        return Denoised(
            replace(self.logits, values=self.logits.values[rows]),
            self.evaluations[rows],
            {name: values[rows] for name, values in self.metrics.items()},
            partial(self.check, rows),
        )


def check_running(backbone: Backbone, *, merge: str, compile: bool) -> None:
    """Refuse to merge or compile what cannot be; needs no weights."""
    if backbone.is_offloaded and merge == "always":
        raise ConfigError("merge='always' needs all weights at once, but some lie elsewhere. Leave it out.")
    if compile and not backbone.compiles:
        name = backbone.config.component_name()
        raise ConfigError(f"compile=True compiles layers, and backbone {name!r} has none for it. Leave it out.")
    if compile and backbone.is_offloaded:
        raise ConfigError("compile=True needs all layers in one place, but some lie elsewhere. Leave it out.")


def get_ready(diffusion: Diffusion, *, merge: Literal["auto", "always", "never"], compile: bool) -> None:
    """Make what saves time when a model is run so, unless that cannot be."""
    backbone = diffusion.backbone
    check_running(backbone, merge=merge, compile=compile)
    backbone.merge("never" if backbone.is_offloaded else merge)
    diffusion.check_codebook()


@dataclass(frozen=True)
class Sampler:
    """A model with the settings of a request; the parametrization has the request's estimate options."""

    diffusion: Diffusion
    sampling: Sampling
    parametrization: Parametrization
    observer: Observer | None = None
    compile: bool = False

    @classmethod
    def of(
        cls,
        diffusion: Diffusion,
        sampling: Sampling,
        observer: Observer | None = None,
        *,
        merge: Literal["auto", "always", "never"] = "auto",
        compile: bool = False,
    ) -> Sampler:
        """A sampler with the sampling's estimate options.

        Args:
            diffusion: the model.
            sampling: the settings.
            observer: called after every evaluation.
            merge: fold adapters if there is memory, in any case, or not at all.
            compile: run layers as torch.compile makes them.

        Returns:
            The sampler.

        Raises:
            ConfigError: if the model cannot be run so.
        """
        if sampling.num_inference_steps != 0:
            get_ready(diffusion, merge=merge, compile=compile)
        return cls(diffusion, sampling, diffusion.parametrization.with_estimate(sampling.estimate), observer, compile)

    @cached_property
    def _plan(self) -> tuple[Solver, list[float]]:
        return plan(self.diffusion, self.sampling)

    def __call__(self, block: Block) -> Denoised:
        """Solve the block, read it out, and check what guidance did."""
        found = self.solve(block)
        found.check()
        return found

    def solve(self, block: Block, ode: Callable[..., TokenODE] = TokenODE) -> Denoised:
        """Solve the block and read it out; with a solver of a fixed grid, the host waits for nothing.

        Args:
            block: tokens to denoise.
            ode: makes the equation of them.

        Returns:
            What became of the block.
        """
        diffusion, sampling, positions = self.diffusion, self.sampling, block.positions
        backbone, space = diffusion.backbone, self.parametrization
        if sampling.num_inference_steps == 0:
            plain = backbone.plain(positions, block.context)
            logits = Logits(plain, backbone.vocab_size, backbone.head)
            return Denoised(logits, torch.zeros_like(positions), {})
        solver, times = self._plan
        x = space.prior(block.streams("prior"))
        x = x.to(torch.float32 if x.device.type == "mps" else space.state_dtype)
        problem = ode(
            diffusion,
            Query(
                x=x,
                t=torch.zeros(positions.shape, device=x.device),
                positions=positions,
                context=block.context,
                condition=block.condition,
                guidance_scale=block.guidance_scale,
                compiled=self.compile,
            ),
            guidance=sampling.guidance,
            parametrization=space,
            codebook=diffusion.codebook(),
            streams=Streams(block.streams("estimate"), block.streams("fresh"), repeat=solver.is_adaptive),
            layout=block.layout,
            patience=sampling.patience,
            observer=self.observer,
        )
        try:
            logits = problem.read_out(problem.solve(solver, x, times), times[-1])
        except Settled as end:
            logits = end.logits
        metrics = {name: torch.stack(values, 1) for name, values in problem.metrics.items()}
        return Denoised(logits, problem.evaluations, metrics, problem.check_sound)
