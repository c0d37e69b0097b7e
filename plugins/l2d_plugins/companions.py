"""Models that stand beside the diffusion model: refused before their weights are loaded, loaded once, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
import transformers
from pydantic import AfterValidator, Field

from l2d_framework.errors import CheckpointError, ConfigError, UnsupportedModelError
from l2d_framework.opening import new_model, open_config, open_model, open_tokenizer
from l2d_plugins.families import advice

ModelPath = Annotated[
    str, Field(min_length=1), AfterValidator(lambda name: str(Path(name).expanduser()) if name[0] == "~" else name)
]
"""A folder, in which `~` stands for the home folder, or a hub id."""

OPENING = Lock()
"""Held while a companion is looked for among those that are open, so that two threads do not open it twice."""


def stamps(name: str) -> tuple[int, ...]:
    """What changes when a folder is written again."""
    return tuple(sorted(file.stat().st_mtime_ns for file in Path(name).iterdir())) if Path(name).is_dir() else ()


@dataclass(frozen=True)
class Companion:
    """A kind of model that may stand beside the diffusion model, and what to say of one that cannot.

    Attributes:
        called: what it is, in front of its name.
        kind: what transformers has to know of its type.
        kinds: transformers' name of its classes of that kind, by type of configuration.
        proven: families to advise.
        give: what to give where nothing is found.
        instead: what to do where another kind of model was saved.
    """

    called: str
    kind: str
    kinds: str
    proven: Sequence[str]
    give: str
    instead: str

    def config(self, name: str) -> Any:
        """Configuration of one, refused unless a model of this kind was saved with it."""
        called = f"{self.called} {name!r}"
        is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if is_path and not Path(name).exists():
            raise ConfigError(f"There is no folder {name!r}. {self.give}")
        if Path(name).is_file():
            raise ConfigError(f"{name!r} is a file. {self.give}")
        try:
            config: Any = open_config(name)
        except CheckpointError as error:
            raise ConfigError(
                f"{called} is neither a model folder here nor a hub repository that can be reached: {error}"
            ) from error
        kinds = getattr(transformers, self.kinds)  # takes seconds to import, and listing plugins needs none
        if type(config) not in kinds:
            raise UnsupportedModelError(
                f"{called} is of type {config.model_type!r}, for which there is no {self.kind}. "
                f"{advice(config.model_type, self.proven)}"
            )
        wanted, saved = kinds[type(config)].__name__, config.architectures or []
        if wanted not in saved:
            raise UnsupportedModelError(
                f"{called} was saved as {' or '.join(saved) or 'no architecture'}, not as {wanted}. {self.instead}"
            )
        return config

    def vocabularies(self, name: str, tokenizer: Any) -> tuple[dict[int, str], dict[int, str]]:
        """Tokens by number, of the diffusion model and of one of these; refused without a tokenizer."""
        try:
            theirs = _by_id(open_tokenizer(name))
        except CheckpointError as error:
            raise ConfigError(
                f"{self.called} {name!r} has no tokenizer that could be compared with the model's ({error}). Put the "
                "tokenizer it was trained with into its folder."
            ) from error
        return _by_id(tokenizer), theirs

    def refuse_vocabulary(
        self, name: str, ours: dict[int, str], theirs: dict[int, str], why: str, *, may_add: bool = False
    ) -> None:
        """Refuse another vocabulary, naming the first token that differs; with `may_add` of those that both have."""
        numbers = ours.keys() & theirs.keys() if may_add else ours.keys() | theirs.keys()
        first = min((i for i in numbers if ours.get(i) != theirs.get(i)), default=None)
        if first is not None:
            raise ConfigError(
                f"{self.called} {name!r} has another vocabulary: token {first} is {theirs.get(first)!r} there and "
                f"{ours.get(first)!r} here ({len(theirs)} and {len(ours)} tokens). {why}"
            )

    def bytes(self, name: str, dtype: torch.dtype) -> int:
        """Size of one's weights, from its configuration alone."""
        with torch.device("meta"):
            config = self.config(name)
            model = new_model(getattr(transformers, self.kinds)[type(config)], config, dtype=dtype)
        return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))

    def load(self, auto: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
        """One with its weights, frozen."""
        model: Any
        model, report = open_model(auto, name, dtype=dtype)
        if report["missing_keys"]:
            raise CheckpointError(
                f"{self.called} {name!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which would be "
                "random. Download or train it again."
            )
        return model.to(device).eval().requires_grad_(False)


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}
