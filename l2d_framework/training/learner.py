"""What the trainer trains: a module that turns a batch into a summed loss, and knows how it is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from l2d_framework.backbone import Backbone, stacked
from l2d_framework.config import DiffusionRun, TrainingSection
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw, draw_solves
from l2d_framework.diffusion.trajectory import trajectory_loss
from l2d_framework.errors import ConfigError
from l2d_framework.models import checkpoint
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.placement import check_whole
from l2d_framework.training import sharding
from l2d_framework.training.data.collate import IGNORED
from l2d_framework.types import Layout


class Learner(nn.Module, ABC):
    """A model together with its loss, in one `forward` so that distributed wrappers see the whole computation."""

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss of a batch that a `Collator` made.

        `loss` is the sum over supervised tokens in nats, (), differentiable; `losses` are those of every draw and `row`
        says to which row each belongs, (N,); for a diffusion model also its time `t` and whether it `is_pad`, (N,).
        """

    @abstractmethod
    def save(self, folder: Path, notes: str) -> None:
        """Write the model for its users, with markdown for the model card."""

    def checkpoint(self, folder: Path) -> None:
        """Write the model such that `restore` continues exactly."""
        self.save(folder, "")

    def units(self) -> Sequence[Sequence[nn.Module]]:
        """Modules whose weights are gathered together where they are in shares, as in `Backbone`."""
        return stacked(self)

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters with a learning rate of their own, as in `Backbone`; none unless the model names some."""
        return {}

    @property
    def hears_losses(self) -> bool:
        """Whether `observe` wants to be called."""
        return False

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Hear the time of every draw of an update of all processes and its cross-entropy, each (N,), float32."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Read the weights that `checkpoint` wrote."""


class Denoiser(Learner):
    """Learns to denoise supervised tokens; only the diffusion model's own parameters are trained."""

    def __init__(self, model: DiffusionLM, training: TrainingSection, seed: int) -> None:
        super().__init__()
        check_whole(model, "Training")
        self.model = model
        self._training, self._seed = training, seed
        if model.backbone.carries and training.unroll is None:
            raise ConfigError(
                f"Backbone {model.backbone.config.component_name()!r} carries hidden states from one evaluation to the "
                "next, which only training.unroll teaches. Set training.unroll to {}, or let the backbone carry none."
            )
        self._dtype = model.backbone.lm.dtype if model.backbone.trains_lm else None
        own = {id(parameter) for parameter in model.own_parameters().values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
            if parameter.requires_grad:
                # Small updates vanish in half precision, so the master weights have more; autocast computes in less.
                parameter.data = parameter.data.float()
        if training.gradient_checkpointing:
            backbone: Any = model.backbone
            backbone.gradient_checkpointing = True

    @staticmethod
    def check(run: DiffusionRun) -> None:
        """Refuse what the backbone cannot do, before weights are loaded."""
        draws, checkpoints = run.training.draws_per_token, run.training.gradient_checkpointing
        if draws == 1 and not checkpoints and run.training.unroll is None:
            return
        Denoiser.check_backbone(run, checkpoint.build_model(run, meta=True).backbone)

    @staticmethod
    def check_backbone(run: DiffusionRun, backbone: Backbone) -> None:
        """Refuse what a run asks of its backbone, with or without weights, and cannot have."""
        draws, checkpoints = run.training.draws_per_token, run.training.gradient_checkpointing
        name = run.backbone.component_name()
        if draws > 1 and not backbone.independent_positions:
            raise ConfigError(
                f"training.draws_per_token is {draws}, but noisy positions of backbone {name!r} see each other: a "
                "token can be noised only once. Set it to 1."
            )
        if checkpoints and not hasattr(backbone, "gradient_checkpointing"):
            raise ConfigError(
                f"training.gradient_checkpointing is true, but backbone {name!r} offers none. Set it to false."
            )
        if run.training.unroll is not None:
            _check_unroll(run)

    @override
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Denoising loss of a batch, on noised true tokens or along the model's own trajectory.

        Noise is keyed by (seed, epoch, index) in training and by (seed, index) in evaluation, where labels of classes
        are never dropped, so that evaluations can be compared.
        """
        layout = Layout(batch["input_ids"], batch["blocks"])
        settings, seed = self._training, self._seed
        pairs = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        rule = NoiseRule(
            keys=[(seed, e, i) if self.training else ("eval", seed, i) for e, i in pairs],
            draws=settings.draws_per_token,
            class_dropout=settings.class_dropout if self.training else 0.0,
            dropout_per=settings.class_dropout_per,
            self_conditioning=settings.self_conditioning if self.training else float(settings.self_conditioning > 0),
            fixed_times=not self.training,
            is_first_noisier=self.training,
        )
        classes = batch["class_id"] if self.model.backbone.config.num_classes else None
        how: Any = {"classes": classes, "counted": batch["labels"] != IGNORED, "chunk": settings.loss_chunk}
        is_sharded = sharding.is_sharded(self)
        if settings.unroll is None:
            draws = draw(self.model, layout, rule)
            losses = denoising_loss(self.model, layout, draws, in_step=is_sharded, **how)
        else:
            _check_whole(is_sharded)
            solves = draw_solves(layout, rule, fewest=settings.unroll.fewest, most=settings.unroll.most)
            losses = trajectory_loss(self.model, layout, solves, **how)
        return {
            "loss": losses.total,
            "losses": losses.tokens,
            "cross_entropies": losses.cross_entropies,
            "t": losses.t,
            "row": losses.row,
            "is_pad": losses.position >= batch["length"][losses.row],
        }

    @override
    def save(self, folder: Path, notes: str) -> None:
        checkpoint.save(self.model, folder, notes=notes, dtype=self._dtype)

    @override
    def checkpoint(self, folder: Path) -> None:
        checkpoint.save(self.model, folder)

    @override
    def units(self) -> Sequence[Sequence[nn.Module]]:
        return self.model.backbone.units()

    @override
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return self.model.backbone.parameter_groups()

    @property
    @override
    def hears_losses(self) -> bool:
        return isinstance(self.model.schedule, nn.Module)

    @override
    def observe(self, t: Tensor, losses: Tensor) -> None:
        self.model.schedule.observe(t, losses)

    @override
    def restore(self, folder: Path) -> None:
        checkpoint.load_weights(self.model, folder)


def _check_unroll(run: DiffusionRun) -> None:
    if isinstance(run.schedule.build(), nn.Module):
        name = run.schedule.component_name()
        raise ConfigError(
            f"training.unroll shows no true token in a noisy state, from which schedule {name!r} learns its times. "
            "Leave training.unroll out, or take another schedule."
        )
    if not run.parametrization.gaussian_path:
        name = run.parametrization.component_name()
        raise ConfigError(
            f"training.unroll moves along a slope, but parametrization {name!r} corrupts tokens in a way of its own. "
            "Leave training.unroll out."
        )


def _check_whole(is_sharded: bool) -> None:
    if is_sharded:
        raise ConfigError(
            "training.unroll makes as many passes of the network as a process has drawn, but processes with shares "
            "of the weights have to make them together. Launch without FSDP, or leave training.unroll out."
        )
