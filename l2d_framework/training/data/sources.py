"""Opening data sources: Hub ids, folders laid out like the Hub, files and globs."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
from huggingface_hub import constants as hub

from l2d_framework.config import DataSection, DataSource, RowSource
from l2d_framework.errors import DataError, suggest
from l2d_framework.lines import COMPRESSIONS, Span, read_lines, read_objects, spans
from l2d_framework.training.data.encode import FIELDS, Columns, Format

_LOADERS = dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
_LOADERS |= {".parquet": "parquet", ".txt": "text", ".csv": "csv", ".arrow": "arrow"}
_HASHED_ROWS = 1000
_STRETCH = 2**26  # bytes
_END = 2**16
_OTHER_SPLIT = re.compile(r"(?<![a-z])(test|testing|dev|val|valid|validation|eval|evaluation)(?![a-z])")


@dataclass(frozen=True)
class Opened:
    """A data source whose rows, a `Dataset` or when streaming an `IterableDataset`, can be read."""

    source: DataSource
    data: Any
    columns: Columns
    card: dict[str, Any]
    """Facts about it that JSON can hold."""


def load_sources(section: DataSection, which: Literal["train", "eval"]) -> list[Opened]:
    """Open the training or the evaluation sources of a run file; a folder here comes before a Hub id of its name."""
    sources = section.train if which == "train" else section.eval
    return [_open(source, streaming=section.streaming) for source in sources]


def describe(source: RowSource) -> str:
    """Short name of a source for messages."""
    return f"{source.path!r} ({f'name {source.name!r}, ' if source.name else ''}split {source.split!r})"


def _open(source: DataSource, *, streaming: bool) -> Opened:
    data, present, files = load_rows(source, streaming=streaming)
    columns = _columns(source, present, data.features)
    used = [*columns.names.values(), *([columns.class_column] if columns.class_column else [])]
    data, card = select_rows(source, data, files, used=used)
    card |= {"weight": source.weight, "class_name": source.class_name}
    return Opened(source, data, columns, card | {"format": columns.format, "columns": columns.names})


def open_first(source: DataSource) -> Opened | None:
    """Open a source to look at its first rows; None if it lies on the Hub and cannot be reached now."""
    path = Path(source.path)
    is_here = path.expanduser().exists() or glob.has_magic(source.path) or path.suffix in _LOADERS
    if not is_here and (hub.HF_HUB_OFFLINE or "[" in source.split):
        return None
    try:
        return _open(source, streaming="[" not in source.split)
    except DataError as error:
        if isinstance(error.__cause__, ConnectionError):
            return None
        raise


def load_rows(source: RowSource, *, streaming: bool = False) -> tuple[Any, list[str], list[str]]:
    """A `Dataset` or, streaming, an `IterableDataset`; its columns; the local files that the path names."""
    loader, data_files, files = _locate(source)
    with _blaming(source, streaming=streaming):
        is_whole = source.split == "train" and loader == "json" and files
        if streaming and is_whole and (columns := first_columns(files[0])):
            # In shards, so that `datasets` goes on in the middle of a large file, and divides it.
            stretches = [(file, span) for file in files for span in spans(file, _STRETCH)]
            options = {"stretches": stretches, "columns": columns}
            return datasets.IterableDataset.from_generator(json_lines, gen_kwargs=options), list(columns), files
        data = datasets.load_dataset(
            loader,
            source.name,
            split=source.split,
            data_files=data_files,
            revision=source.revision,
            streaming=streaming,
        )
        present = list(next(iter(data)))
        if streaming and (files or Path(source.path).expanduser().is_dir()):
            # Parquet by row group, for the same reasons. Each file is asked for its own, so not where that is far away.
            data = data.reshard()
        return data, present, files


def first_columns(file: str) -> tuple[str, ...]:
    """Columns of a file's first row; none if it holds one JSON value over several lines, or a list."""
    _, line = next(read_lines(file))
    try:
        first = json.loads(line)
    except ValueError:
        return ()
    return tuple(first) if isinstance(first, dict) else ()


def json_lines(stretches: list[tuple[str, Span | None]], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of some files or stretches of them, one after the other, as values by column; None where a row lacks it."""
    # `datasets` gives all files the types that it finds in the first rows, which the metadata of corpora contradict.
    for file, span in stretches:
        for _, row in read_objects(file, span):
            yield {name: row.get(name) for name in columns}


def select_rows(source: RowSource, data: Any, files: Sequence[str], *, used: list[str]) -> tuple[Any, dict[str, Any]]:
    """Rows that the source asks for, and facts about them."""
    streaming = isinstance(data, datasets.IterableDataset)
    with _blaming(source, streaming=streaming):
        if source.exclude:
            data = data.filter(partial(_wanted, exclude=source.exclude))
        if source.limit is not None:
            data = data.take(source.limit) if streaming else data.select(range(min(source.limit, len(data))))
        next(iter(data))
        # A corpus that is streamed may be too large to read for its digest.
        whole = bool(files) and not streaming
        digest = {"sha256": _hash_files(files)} if whole else {"sha256_of_first_rows": _hash_rows(data, used)}
        if not whole and (here := files or _data_files(Path(source.path).expanduser())):
            digest["sha256_of_ends"] = _hash_ends(here)
    card = {
        **{key: getattr(source, key) for key in ("path", "name", "split", "revision", "limit", "exclude")},
        "local": bool(files) or Path(source.path).expanduser().is_dir(),
        "fingerprint": None if streaming else data._fingerprint,
        **digest,
        "rows": None if streaming else len(data),
    }
    return data, card


def _wanted(row: dict[str, Any], exclude: dict[str, list[str]]) -> bool:
    return not any(str(row[column]) in values for column, values in exclude.items())


def _locate(source: RowSource) -> tuple[str, Any, list[str]]:
    # Loader or path for `load_dataset`, its data files, and the local files where the path names files.
    path = Path(source.path).expanduser()
    if path.is_dir():
        shards = _shards(path) if source.data_files is None else []
        return ("json", {"train": shards}, shards) if shards else (str(path), source.data_files, [])
    files = [str(path)] if path.is_file() else []
    if not files and glob.has_magic(source.path):
        files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"No file matches the pattern {source.path!r} (looked in {Path.cwd()}).")
    if files:
        if source.data_files is not None:
            raise DataError(f"{source.path!r} is a file already; data_files is for folders and Hub ids. Remove it.")
        return _loader_of(files), {"train": files}, files
    named_as_file = source.path.startswith((".", "/", "~")) or source.path.count("/") > 1
    if named_as_file or Path(source.path).suffix in _LOADERS:
        raise DataError(f"There is no file or folder {source.path!r} (looked in {Path.cwd()}). Check the path.")
    return source.path, source.data_files, []


def _shards(folder: Path) -> list[str]:
    # All of a folder that holds nothing but packed JSON, like Dolma's. `datasets` would read only those files that have
    # "train" in their names where any has, and some of Dolma's have.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    is_corpus = all(
        _LOADERS.get(Path(path.stem).suffix) == "json"
        and path.suffix in COMPRESSIONS
        and not _OTHER_SPLIT.search(path.name)
        for path in files
    )
    return [str(path) for path in files] if is_corpus else []


def _loader_of(files: Sequence[str]) -> str:
    endings = {next((s for s in reversed(Path(name).suffixes) if s not in COMPRESSIONS), "") for name in files}
    loaders = {_LOADERS.get(ending) for ending in endings}
    loader = loaders.pop()
    if loader is None or loaders:
        raise DataError(
            f"Cannot read files ending in {sorted(endings)} as one source, such as {files[0]!r}. "
            f"Known endings: {', '.join(_LOADERS)}; list other files as sources of their own."
        )
    return loader


@contextmanager
def _blaming(source: RowSource, *, streaming: bool) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        offline = " HF_HUB_OFFLINE is set: unset it to download." if hub.HF_HUB_OFFLINE else ""
        raise DataError(
            f"There is no data set {source.path!r}: no folder {str(Path.cwd() / source.path)!r}, and the Hub does not "
            f"serve it ({error}). Check the spelling, log in if it is private, or put a copy into that folder.{offline}"
        ) from error
    except StopIteration as error:
        raise DataError(f"{describe(source)} is empty: it holds no rows.") from error
    except DataError:
        raise
    # The libraries below raise whatever a broken file makes them raise; all of it is the data's fault.
    except Exception as error:
        whole = " Streaming reads whole splits: use `limit` instead of a slice." if streaming else ""
        cause = error.__cause__ or error
        raise DataError(
            f"{describe(source)} cannot be loaded: {type(cause).__name__}: {cause} "
            f"Check `path`, `name`, `split`, `revision` and `data_files`.{whole}"
        ) from error


def require_columns(source: RowSource, present: list[str], wanted: Iterable[tuple[str, str]]) -> None:
    """Refuse a source that lacks a column."""
    for field, column in wanted:
        if column not in present:
            raise DataError(
                f"{describe(source)} has no column {column!r} for {field!r}; its columns are {present}"
                f"{suggest(column, present)}. Name the right one, such as columns: {{prompt: question}}."
            )


def _columns(source: DataSource, present: list[str], features: Any) -> Columns:
    layout = _format(source, present)
    fields = FIELDS[layout]
    if layout == "messages" and source.columns.keys() >= set(FIELDS["prompt_completion"]):
        fields = FIELDS["prompt_completion"]
    names = {str(field): source.columns.get(field, field) for field in fields}
    classes = [("class_column", source.class_column)] if source.class_column is not None else []
    require_columns(source, present, [*names.items(), *classes, *(("exclude", name) for name in source.exclude)])
    feature = (features or {}).get(source.class_column)
    class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Columns(layout, names, source.class_column, class_names, source.class_name)


def _format(source: DataSource, present: list[str]) -> Format:
    if source.format != "auto":
        return source.format
    available = {*source.columns, *present}
    # A format that the user maps columns for is meant, even if the rows could be read otherwise, too.
    candidates = [name for name, fields in FIELDS.items() if not source.columns or set(fields) & set(source.columns)]
    for name in candidates:
        if available.issuperset(FIELDS[name]):
            return name
    if source.columns:
        return candidates[0]
    raise DataError(
        f"{describe(source)} has no recognisable format: its columns are {present}. Expected `messages`, `prompt` and "
        "`completion`, or `text`; map other names, such as columns: {prompt: question, completion: answer}."
    )


def _hash_files(files: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in files:
        with open(name, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _data_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if {*path.suffixes} & _LOADERS.keys() and path.is_file())


def _hash_ends(files: Sequence[str]) -> str:
    """Hash of the lengths, beginnings and ends of files, which may be too large to read."""
    total = hashlib.sha256()
    for name in files:
        with open(name, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            total.update(size.to_bytes(8, "little"))
            for place in (0, max(size - _END, 0)):
                stream.seek(place)
                total.update(stream.read(_END))
    return total.hexdigest()


def _hash_rows(data: Any, used: list[str]) -> str:
    total = hashlib.sha256()
    for row in islice(data, _HASHED_ROWS):
        total.update(json.dumps([row[column] for column in used], default=str).encode())
    return total.hexdigest()
