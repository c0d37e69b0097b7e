"""What a model was made from, and the settings of a request that follow from it; needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from l2d_framework.config import ModelSection, SamplingSection, default_sampling
from l2d_framework.errors import ConfigError
from l2d_framework.models.labels import check_class
from l2d_framework.parametrization import ParametrizationConfig


@dataclass(frozen=True)
class Origin:
    """What a model was made from, as its checkpoint records it."""

    model: ModelSection | None = None
    fingerprint: str | None = None
    classes: tuple[str, ...] = ()
    sampling: SamplingSection | None = None
    chat_template: str | None = None
    ends: tuple[int, ...] | None = None
    """Tokens with which answers ended in training; None where nothing says so."""

    def settings(
        self,
        parametrization: ParametrizationConfig,
        options: Mapping[str, Any],
        *,
        scale: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> SamplingSection:
        """The checkpoint's sampling settings with some replaced, `scale` that of the only guidance."""
        settings = (self.sampling or default_sampling(parametrization)).resolve(parametrization, options)
        if scale is not None:
            settings = _rescaled(settings, scale)
        for guidance in settings.guidance:
            guidance.check(tokenizer)
        return settings

    def class_id(self, name: str | None) -> int:
        """Id of a class label, -1 for none."""
        if name is None:
            return -1
        check_class(name, self.classes)
        return self.classes.index(name)


def _rescaled(sampling: SamplingSection, scale: float) -> SamplingSection:
    if len(sampling.guidance) != 1:
        raise ConfigError(
            f"guidance_scale needs exactly one guidance; {len(sampling.guidance)} are set. "
            "Set guidance, for example to [{name: classifier_free}]."
        )
    guidance = sampling.guidance[0]
    try:
        changed = type(guidance).model_validate(guidance.to_json() | {"scale": scale})
    except ValidationError as error:
        raise ConfigError(
            f"guidance_scale {scale!r} does not fit guidance {guidance.component_name()!r}: {error.errors()[0]['msg']}."
        ) from error
    return sampling.model_copy(update={"guidance": [changed]})
