"""Jobs of a profile: run files filled in, references followed, everything named by its contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2d_bench.entries import Entries
from l2d_bench.jobs import DataJob, Job, MeasureJob, ModelJob, digest, make_maker, make_measure
from l2d_bench.options import resolved_options
from l2d_bench.references import Reference, references, replaced
from l2d_bench.schema import Model, ProfileFile, Row
from l2d_framework.errors import ConfigError, suggest


class Resolver:
    """Makes the jobs of a profile, each once.

    Args:
        profile: the profile.
        out: folder for everything the benchmark writes.

    Attributes:
        jobs: all made so far, by key.

    Raises:
        ConfigError: if a measure or data section of the profile is wrong.
    """

    def __init__(self, profile: ProfileFile, out: Path) -> None:
        self._profile, self._out = profile, out.absolute()
        self.jobs: dict[str, Job] = {}
        self._models: dict[tuple[str, int], str] = {}
        self._entries = Entries(profile)
        self._open: list[str] = []
        self._checked: dict[str, str | None] = {}
        self._missing: dict[str, str | None] = {}

    def collect(self, key: str, into: dict[str, Job]) -> None:
        """A job after everything it needs.

        Args:
            key: of the job.
            into: where to put them.
        """
        if key not in into:
            for need in self.jobs[key].needs:
                self.collect(need, into)
            into[key] = self.jobs[key]

    def missing(self, row: Row, column: str) -> str | None:
        """Why a row has no number in a column.

        Args:
            row: the row.
            column: name of the column; it has a measure.

        Returns:
            What is missing; None if nothing is.
        """
        key, name = _model_key(row, column), str(self._profile.columns[column].measure)
        where = f"row {row.label!r}, column {column!r}"
        section = self._entries.measure(name)
        # Looked at whatever else is missing, since it may be wrong.
        if name not in self._checked:
            self._checked[name] = make_measure(section).check()
        model = self._entries.model(key, where)
        below = [section, row.options, row.column_options.get(column, {}), model.options]
        return self.missing_model(key, where) or self._missing_below(below, where) or self._checked[name]

    def missing_model(self, key: str, where: str) -> str | None:
        """Why there is no such model: it, its data or what it starts from is missing.

        Args:
            key: of the model.
            where: what names it, for messages.

        Returns:
            What is missing; None if nothing is.
        """
        model = self._entries.model(key, where)
        if key not in self._missing:
            self._missing[key] = None  # for one that starts from itself, which `model_job` refuses
            self._missing[key] = self._missing_for(key, model)
        return self._missing[key]

    def _missing_for(self, key: str, model: Model) -> str | None:
        from l2d_framework.evaluation.hub import is_reachable

        if model.no_data is not None:
            return model.no_data
        if model.pretrained is not None:
            return None if is_reachable(model.pretrained, "model") else f"model {model.pretrained} cannot be reached"
        raw = self._entries.run(key)
        if (reason := self._missing_below(raw, f"models.{key}")) is not None:
            return reason
        base = (raw.get("model") or {}).get("base")
        if base is not None and not list(references(base)) and not is_reachable(base, "model"):
            return f"model {base} cannot be reached"
        data = raw.get("data") or {}
        for source in (*(data.get("train") or ()), *(data.get("eval") or ())):
            path = str(source.get("path"))
            if not list(references(path)) and not any(c in path for c in "*?[") and not is_reachable(path, "dataset"):
                return f"training data {path} cannot be reached"
        return None

    def _missing_below(self, value: Any, where: str) -> str | None:
        """Why something that a value refers to is missing."""
        for found in references(value):
            if found.kind == "model":
                reason = self.missing_model(found.key, where)
            else:
                section = self._entries.data(found.key, where)
                reason = self._missing_below(section, where) or make_maker(section).missing()
            if reason is not None:
                return reason
        return None

    def model_job(self, key: str, seed: int) -> str:
        """Key of the job that trains a model.

        Args:
            key: of the model, one with a run file.
            seed: of the profile.

        Returns:
            The key; its job is among `jobs`.

        Raises:
            ConfigError: if its run file is wrong or it starts from itself.
        """
        from l2d_framework.config.parsing import parse_run

        model = self._profile.models[key]
        seed = seed if model.seed is None else model.seed
        if (key, seed) in self._models:
            return self._models[key, seed]
        if key in self._open:
            raise ConfigError(f"models.{key} starts from itself, through {' -> '.join([*self._open, key])}. Mend it.")
        self._open.append(key)
        raw = self._entries.run(key) | {"seed": seed}
        raw.pop("output_dir", None)
        needs = self._needs(raw, seed, f"models.{key}")
        try:
            named = parse_run(replaced(raw, lambda found: self._name(found, seed)))
        except ConfigError as error:
            raise ConfigError(f"models.{key}, from {model.run}, cannot be used:\n{error}") from error
        job_key = f"model-{key}-s{seed}-{digest(named.model_dump(mode='json'))}"
        output = self._out / "models" / job_key.removeprefix("model-")
        filled = replaced(raw, lambda found: self._place(found, seed)) | {"output_dir": str(output)}
        self.jobs[job_key] = ModelJob(job_key, f"train {key}, seed {seed}", output, needs, filled)
        self._models[key, seed] = job_key
        self._open.pop()
        return job_key

    def measure_job(self, row: Row, name: str, seed: int) -> str:
        """Key of the job that measures a row in a column.

        Args:
            row: the row; it has a model.
            name: of the column; it has a measure.
            seed: of the profile.

        Returns:
            The key; its job is among `jobs`.

        Raises:
            ConfigError: if an option is unknown or does not fit the model.
        """
        column, key = self._profile.columns[name], _model_key(row, name)
        model = self._entries.model(key, f"row {row.label!r}")
        own_needs = self._own_needs(key, model, seed)
        options = self._options(row, name, model)
        resolved = resolved_options(options, self._entries.run(key), f"row {row.label!r}, column {name!r}")
        section = self._entries.measure(str(column.measure))
        names = make_measure(section).metrics()
        if names is not None and (column.metric or names[0]) not in names:
            hint = suggest(str(column.metric), names) or f", there are {', '.join(names)}."
            raise ConfigError(f"Column {name!r} names the metric {column.metric!r}, which its measure lacks{hint}")
        needs = (*self._needs([section, options], seed, f"row {row.label!r}"), *own_needs)
        batch_size = section.get("batch_size") or self._profile.batch_size
        identity = {
            "model": self._name(Reference("model", key), seed),
            "options": replaced(resolved, lambda found: self._name(found, seed)),
            "measure": make_measure(replaced(section, lambda found: self._name(found, seed))).identity(),
            "seed": seed,
            "dtype": self._profile.dtype,
            "device": self.device,
            # In float32 it changes no answer.
            **({} if self._profile.dtype == "float32" else {"batch_size": batch_size}),
        }
        job_key = f"{column.measure}-{key}-s{seed}-{digest(identity)}"
        if job_key not in self.jobs:
            subject = {
                "path": self._place(Reference("model", key), seed),
                "options": replaced(options, lambda found: self._place(found, seed)),
                "seed": seed,
                "device": self.device,
                "dtype": self._profile.dtype,
                "batch_size": self._profile.batch_size,
            }
            measured = replaced(section, lambda found: self._place(found, seed))
            own = row.options | row.column_options.get(name, {})
            words = "".join(f", {option} {value}" for option, value in own.items())
            title, output = f"{column.measure} of {key}{words}, seed {seed}", self._out / "results" / f"{job_key}.json"
            self.jobs[job_key] = MeasureJob(
                job_key, title, output, tuple(dict.fromkeys(needs)), measured, subject, identity
            )
        return job_key

    @property
    def device(self) -> str:
        """Where to compute, "cpu" or "cuda"."""
        import torch

        wanted = self._profile.device
        return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def _options(self, row: Row, column: str, model: Model) -> dict[str, Any]:
        key = _model_key(row, column)
        plain = {"num_inference_steps": 0} if self._entries.run(key).get("kind") == "language_model" else {}
        pinned = {} if model.revision is None else {"revision": model.revision}
        own = row.options | row.column_options.get(column, {})
        return self._profile.options | plain | pinned | model.options | own

    def _own_needs(self, key: str, model: Model, seed: int) -> tuple[str, ...]:
        return () if model.run is None else (self.model_job(key, seed),)

    def _needs(self, value: Any, seed: int, where: str) -> tuple[str, ...]:
        needs = []
        for found in references(value):
            if found.kind == "data":
                needs.append(self._data_job(found.key, seed, where))
            else:
                needs += self._own_needs(found.key, self._entries.model(found.key, where), seed)
        return tuple(dict.fromkeys(needs))

    def _data_job(self, key: str, seed: int, where: str) -> str:
        section = self._entries.data(key, where)
        needs = self._needs(section, seed, f"data.{key}")
        named = replaced(section, lambda found: self._name(found, seed))
        filled = replaced(section, lambda found: self._place(found, seed))
        job_key = f"data-{key}-{digest([named, make_maker(section).code()])}"
        self.jobs[job_key] = DataJob(
            job_key, f"make {key}", self._out / "data" / job_key.removeprefix("data-"), needs, filled
        )
        return job_key

    def _name(self, found: Reference, seed: int) -> str:
        """What names an entry wherever it lies."""
        if found.kind == "data":
            return self._data_job(found.key, seed, "a reference")
        model = self._entries.model(found.key, "a reference")
        return f"{model.pretrained}@{model.revision}" if model.run is None else self.model_job(found.key, seed)

    def _place(self, found: Reference, seed: int) -> str:
        if found.kind == "model" and self._profile.models[found.key].run is None:
            return str(self._profile.models[found.key].pretrained)
        return str(self.jobs[self._name(found, seed)].output)


def _model_key(row: Row, column: str) -> str:
    return row.column_models.get(column, str(row.model))
