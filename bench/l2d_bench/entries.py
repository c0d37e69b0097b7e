"""Entries of a profile by name, with what is wrong about them said at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from l2d_bench import folder as bench_folder
from l2d_bench.kinds import KINDS, MAKERS
from l2d_bench.schema import Model, ProfileFile
from l2d_framework.config.files import override, read_file
from l2d_framework.config.validation import validated
from l2d_framework.errors import ConfigError, suggest


class Entries:
    """The entries of a profile.

    Args:
        profile: the profile.

    Raises:
        ConfigError: if a measure or data section is wrong.
    """

    def __init__(self, profile: ProfileFile) -> None:
        self._profile = profile
        self._runs: dict[str, dict[str, Any]] = {}
        for name, section in profile.measures.items():
            _known_kind("measures", name, section, KINDS)
            validated(KINDS[section["kind"]], section, f"measures.{name}")
        for name, section in profile.data.items():
            _known_kind("data", name, section, MAKERS)
            validated(MAKERS[section["kind"]], section, f"data.{name}")

    def model(self, key: str, where: str) -> Model:
        """A model of the profile.

        Args:
            key: of the model.
            where: what names it, for messages.

        Returns:
            What the profile says of it.

        Raises:
            ConfigError: if there is none.
        """
        if key not in self._profile.models:
            hint = suggest(key, self._profile.models) or "."
            raise ConfigError(
                f"{where}: the profile has no model {key!r}{hint} Add it there, as `no_data: why` where there is none."
            )
        return self._profile.models[key]

    def measure(self, name: str) -> dict[str, Any]:
        """A measure.

        Args:
            name: of the measure.

        Returns:
            Its section.

        Raises:
            ConfigError: if there is none.
        """
        if name not in self._profile.measures:
            hint = suggest(name, self._profile.measures) or "."
            raise ConfigError(f"A column names the measure {name!r}, which the profile lacks{hint} Add or correct it.")
        return self._profile.measures[name]

    def data(self, key: str, where: str) -> dict[str, Any]:
        """Data to be made.

        Args:
            key: of the data.
            where: what names it, for messages.

        Returns:
            Their section.

        Raises:
            ConfigError: if there is none.
        """
        if key not in self._profile.data:
            raise ConfigError(f"{where}: the profile makes no data {key!r}{suggest(key, self._profile.data) or '.'}")
        return self._profile.data[key]

    def run(self, key: str) -> dict[str, Any]:
        """Fields of the run that makes a model, with the profile's values in place.

        Args:
            key: of the model.

        Returns:
            Fields, references among them; none of a model without a run file.

        Raises:
            ConfigError: if the file cannot be read or its stage is not there.
        """
        model = self._profile.models[key]
        if key not in self._runs:
            self._runs[key] = {} if model.run is None else self._read(key, model)
        return dict(self._runs[key])

    def _read(self, key: str, model: Model) -> dict[str, Any]:
        data = read_file(bench_folder() / str(model.run))
        stages = data.get("stages")
        count = 0 if stages is None else len(stages)
        if (model.stage is None) != (stages is None) or not 0 <= (model.stage or 0) < max(1, count):
            has = "one run, so leave stage out" if stages is None else f"{count} stages; name one, from 0"
            raise ConfigError(f"models.{key}: {model.run} holds {has}.")
        run: Mapping[str, Any] = data if stages is None else stages[int(model.stage or 0)]
        return override(dict(run), [f"{name}={json.dumps(value)}" for name, value in model.set.items()])


def _known_kind(where: str, name: str, section: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    kind = section.get("kind")
    if kind not in known:
        hint = suggest(str(kind), known) or f", known are {', '.join(known)}."
        raise ConfigError(f"{where}.{name}.kind: unknown, got {kind!r}{hint}")
