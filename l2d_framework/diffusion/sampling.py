"""How to sample: the settings, what is refused of them, and the plan that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from l2d_framework.backbone import BackboneConfig
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.errors import ConfigError
from l2d_framework.guidance import Guidance
from l2d_framework.solver import Solver


class Sampling(Protocol):
    """How to sample; the `sampling` section of a run file is one.

    Attributes:
        num_inference_steps: network evaluations per token, the read-out included; 0 for the plain language model, None
            for the solver's own choice.
        solver: how to move.
        end_time: time of the read-out; None for 1, or 1 - 1 / prior_scale when the solver evaluates the end.
        guidance: wrappers around prediction, the first is innermost.
        estimate: changes to the parametrization's `estimate` section.
        seed: of every random stream.
        block_size: tokens denoised together; None for the model's own number.
        patience: stop once no token has changed in this many evaluations; None for never.
    """

    @property
    def num_inference_steps(self) -> int | None: ...  # noqa: D102
    @property
    def solver(self) -> Solver: ...  # noqa: D102
    @property
    def end_time(self) -> float | None: ...  # noqa: D102
    @property
    def guidance(self) -> Sequence[Guidance]: ...  # noqa: D102
    @property
    def estimate(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def block_size(self) -> int | None: ...  # noqa: D102
    @property
    def patience(self) -> int | None: ...  # noqa: D102


def check_sampling(sampling: Sampling, *, num_classes: int, has_condition: bool, is_scaled: bool = False) -> None:
    """Refuse settings a model cannot be sampled with; needs no weights."""
    steps, solver = sampling.num_inference_steps, sampling.solver
    if steps is None and not solver.is_adaptive:
        raise ConfigError(
            f"Solver {solver.component_name()!r} needs num_inference_steps, got None. Set it, such as to 15."
        )
    if steps:
        solver.grid_size(steps)
    if sampling.patience is not None and solver.is_adaptive:
        raise ConfigError(
            f"patience={sampling.patience} counts evaluations on a fixed grid; solver {solver.component_name()!r} "
            "chooses its own steps. Leave patience out."
        )
    if solver.evaluates_end and sampling.end_time == 1.0:
        raise ConfigError(
            f"Solver {solver.component_name()!r} needs the velocity at the end time, which is singular at 1. "
            "Leave end_time out, or set it to 1 - 1 / prior_scale."
        )
    for number, guidance in enumerate(sampling.guidance):
        name = guidance.component_name()
        if guidance.sets_clean and number < len(sampling.guidance) - 1:
            raise ConfigError(
                f"Guidance {name!r} decides what the solver moves towards, so a guidance around it would undo it. "
                "Put it last in the list."
            )
        neutral = guidance.scale == guidance.neutral_scale and not is_scaled
        if guidance.needs_classes and not neutral and not num_classes:
            raise ConfigError(
                f"Guidance {name!r} with scale {guidance.scale:g} needs a model trained with class labels; this one "
                "has none. Remove it or train with `classes`."
            )
        if guidance.needs_classes and not neutral and not has_condition:
            raise ConfigError(
                f"Guidance {name!r} with scale {guidance.scale:g} guides towards a class, and the requests name none. "
                "Give the class of each prompt, or leave the guidance out."
            )


def check_block_size(backbone: BackboneConfig, lm_config: Any, *, trained: int | None, wanted: int | None) -> None:
    """Refuse blocks that a model has not learnt to denoise; needs no weights. None wanted is the model's own size."""
    if trained is None or wanted is None:
        return
    backbone.check(lm_config, wanted)
    if wanted > trained:
        raise ConfigError(
            f"This model has learnt to denoise {trained} tokens together; sampling got block_size={wanted}. Set it to "
            f"{trained} or less, or leave it out."
        )


def plan(diffusion: Diffusion, sampling: Sampling) -> tuple[Solver, list[float]]:
    """Solver with its budget, and the increasing times it visits; the last is the read-out's."""
    solver, steps = sampling.solver, sampling.num_inference_steps
    end = sampling.end_time
    if end is None:
        end = 1 - min(1 / diffusion.parametrization.prior_scale, 0.5) if solver.evaluates_end else 1.0
    if steps is None:
        return solver, diffusion.schedule.grid(2, end)
    return solver.with_budget(steps), diffusion.schedule.grid(solver.grid_size(steps), end)


def reads_no_noise(diffusion: Diffusion, sampling: Sampling) -> bool:
    """Whether logits follow from the known tokens alone, whatever is drawn; only where that is certain."""
    if sampling.num_inference_steps == 0:
        return True
    guides = any(guidance.scale != guidance.neutral_scale for guidance in sampling.guidance)
    if sampling.num_inference_steps != 1 or guides or diffusion.refines:
        return False
    # The single evaluation is the read-out, and at t = 0 the state is not looked at.
    return diffusion.backbone.identity_at_zero and plan(diffusion, sampling)[1][-1] == 0.0
