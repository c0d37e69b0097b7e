"""Runs that train a reward model for guidance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializeAsAny, model_validator

from l2d_framework.component import Component, merged
from l2d_framework.config.sampling import component_type
from l2d_framework.config.sections import ModelSection, OutputFolder, RowSource, Section, Updates, optional, specialised
from l2d_framework.registry import Registry

if TYPE_CHECKING:
    from l2d_framework.schedule import ScheduleConfig
else:
    # The interface imports torch; `reward_type` puts the installed components here.
    ScheduleConfig = Component

_TRAINING = {"epochs": 1.0, "micro_batch_size": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "tess2-paper": {
        "data": {"train": [{"path": "weqweasdas/preference_dataset_mixture2_and_safe_pku"}], "max_length": 2048},
        "training": {**_TRAINING, "batch_size": 512, "warmup_ratio": 0.03, "final_fraction": 0.0},
    },
    "tess2-script": {
        "data": {"train": [{"path": "argilla/ultrafeedback-binarized-preferences-cleaned"}], "max_length": 512},
        "training": {**_TRAINING, "batch_size": 128, "learning_rate": 2e-5, "warmup_ratio": 0.0, "final_fraction": 0.1},
    },
}
"""Settings of TESS 2's reward model, as the paper describes them and as the authors' script has them.

The paper starts from Mistral 7B v0.1 tuned on Tulu 2. Its learning rate is not known to us, so that of the script, the
default of `RewardTraining`, stands in. The script asks for warm-up, too, but reads another setting and makes none.

Source: TESS 2, arXiv:2502.13917, appendix on reward modelling; the authors' script for training it.
"""


class PairSource(RowSource):
    """Preference pairs: columns `chosen` and `rejected`, and perhaps `prompt`, with texts or lists of messages."""

    columns: dict[Literal["prompt", "chosen", "rejected", "margin"], str] = Field(default_factory=dict)
    """The source's column for each of our names that it spells differently; `margin` only if it is given here."""


class PairData(Section):
    """What to compare."""

    model_config = ConfigDict(json_schema_extra=optional("train"))

    train: list[PairSource] = Field(min_length=1)
    """Sources of pairs to learn from."""
    eval: list[PairSource] = Field(default_factory=list)
    """Sources of held-out pairs, measured every `training.eval_steps` updates; or use `eval_fraction`."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts whose pairs are held out when `eval` is empty."""
    max_length: int = Field(default=2048, ge=2)
    """Pairs of which either side has more tokens are left out."""
    format: Literal["authors", "generation", "tokenizer"] = "authors"
    """How a conversation is written.

    `authors` is that of TESS 2's reward model: user and assistant tags, the end-of-text token and a line break behind
    the answer, nothing in front. `generation` is what guidance will show it: the beginning-of-text token in front and
    no line break behind. `tokenizer` is the tokenizer's own chat template.
    """
    chat_template: str | None = None
    """Jinja template, a file with one or the name of one; replaces `format`."""
    pad_to: int | None = Field(default=None, ge=2)
    """Pad every side to this many tokens, let the model see the padding and read the reward at the very end of it, as
    guidance does at the end of its canvas; otherwise padding is hidden and the reward read at the last token."""
    add_pad_token: bool = False
    """Add `[PAD]` to a vocabulary without padding token. Guidance then needs a diffusion model that has it, too;
    otherwise the end-of-text token pads."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError(f"eval names data and eval_fraction is {self.eval_fraction}; keep one of them")
        if self.pad_to is not None and self.pad_to < self.max_length:
            raise ValueError(f"pad_to {self.pad_to} is less than max_length {self.max_length}; make them equal")
        return self


class RewardTraining(Updates):
    """How to train a reward model: AdamW in float32, linear warm-up, linear decay."""

    micro_batch_size: int | None = Field(default=None, ge=1)
    """Pairs per forward pass of one process; as many as `batch_size` allows when None. Noise depends on them."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Highest rate of AdamW; lower it where the loss jumps."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the updates in which the learning rate rises from zero."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the highest."""
    margin: float = Field(default=0.0, ge=0)
    """Lead that the chosen reward should have where a source names no column for it."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of each matrix that an update takes off, times the rate; raise it where held-out pairs fall behind."""


class SimplexNoise(Section):
    """Noise on the simplex under the training texts, so that the reward model knows the drafts guidance shows it."""

    schedule: SerializeAsAny[ScheduleConfig]
    """How much noise there is at which time; that of the diffusion model to be guided."""
    k: float = Field(default=5.0, gt=0)
    """Half the distance between the true token's coordinate and the others', and the standard deviation of noise."""


class RewardRun(Section):
    """Training a reward model on preference pairs."""

    model_config = ConfigDict(json_schema_extra=optional("data"))

    kind: Literal["reward"]
    preset: Literal["tess2-paper", "tess2-script"] | None = None
    """Settings that hold where the run file says nothing."""
    model: ModelSection
    """The language model that gets a reward head; with the tokenizer of the diffusion model to be guided."""
    data: PairData
    """The pairs to learn from."""
    training: RewardTraining = RewardTraining()
    """How to train."""
    noise: SimplexNoise | None = None
    """Show noisy texts as guidance will; clean ones when None."""
    output_dir: OutputFolder = None
    seed: int = Field(default=0, ge=0)
    """Of the new reward head, the order of the pairs, what is held out, and noise."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.training.eval_steps and not self.data.eval and not self.data.eval_fraction:
            raise ValueError(
                f"training.eval_steps is {self.training.eval_steps} but nothing is held out; set data.eval_fraction"
            )
        if self.noise is not None and self.data.pad_to is None:
            raise ValueError(
                "noise replaces tokens by embeddings, of which transformers reads the last, padding or not; set "
                "data.pad_to"
            )
        return self


@cache
def reward_type(plugins: Registry | None) -> type[RewardRun]:
    """Reward run whose schedule is a union over plugins, or anything while none are loaded."""
    noise: Any = specialised(SimplexNoise, schedule=(component_type(plugins, "schedule"), ...))
    return specialised(RewardRun, noise=(noise | None, None))


def with_reward_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Raw fields of a reward run laid over those of the preset it names."""
    preset = data.get("preset")
    return merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, data)
