"""The file that `l2d generate` writes: in it a row per prompt, beside it what is known before all are answered."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import typer

from l2d_framework.cli.common import check_file
from l2d_framework.config.differences import differences, told
from l2d_framework.config.files import parse_json
from l2d_framework.errors import ConfigError, L2DError, OutputError
from l2d_framework.writing import write_whole

Row = dict[str, Any]
_NUMBER, _REQUEST, _IDENTITY = "number", "request", "identity"
"""Fields that the rows of a part have beside those of the file: which row it is, and a hash of all that was asked. The
first line says that in full."""


class AnswerFile:
    """A JSONL file, if one is named, with a row for each of `asked`, which has the fields of the row but `answers`.

    Until the last row is known, it has the name of a part. A row is in there as soon as it is known, so an interruption
    loses none, and whoever asks the same again, as `identity` says it, goes on from them. Of several processes each has
    a part of its own, and the last one to end makes them one file; `place` says which of how many this one is.
    """

    def __init__(
        self,
        output: Path | None,
        asked: Sequence[Row],
        identity: Mapping[str, Any] | None = None,
        *,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self._output, self._asked = output, asked
        self._process, self._processes = place
        self.has_all = True
        """Whether this process knows every row in the end, and has written the file if there is one."""
        prompts = {"number": len(asked), "sha256": _hash(asked)}
        self._identity: Row = json.loads(json.dumps({**(identity or {}), "prompts": prompts}, default=str))
        self._request = _hash(self._identity)
        # With which every row of the part begins, so that half a row is known as well.
        self._mark = json.dumps({_REQUEST: self._request}).removesuffix("}").encode()
        self._known: dict[int, Row] = {}
        self._share: Sequence[int] = range(len(asked))
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self._output is None:
            return self
        check_file(self._output, "--out")
        from l2d_framework.training.folder_lock import locked_file

        part = part_of(self._output, self._process)
        with self._open:
            self._open.enter_context(locked_file(part if self._process else self._output, "--out"))
            check_file(self._output, "--out")  # another process may have had it until now
            self._read_parts(self._output)
            self._file = self._open.enter_context(part.open("a", encoding="utf-8"))
            if self._processes > 1:
                _meet(self._output, self._processes)
            self._open = self._open.pop_all()
        self._share = self.missing[self._process :: self._processes]
        if self._known and self._process == 0:
            typer.echo(f"Going on from {part}: {len(self._known)} of {len(self._asked)} are answered.", err=True)
        return self

    def _read_parts(self, output: Path) -> None:
        for part in _parts_of(output):
            self._read(part, is_own=part == part_of(output, self._process))

    def _read(self, part: Path, *, is_own: bool) -> None:
        try:
            content = part.read_bytes()
        except FileNotFoundError:  # the process that ended last has just removed it
            return
        whole = content[: content.rfind(b"\n") + 1]
        try:
            rows = [parse_json(line, str(part)) for line in whole.decode("utf-8").split("\n")[:-1]]
            is_ours = all(row.pop(_REQUEST) == self._request for row in rows)
            heads = [row[_IDENTITY] for row in rows if _IDENTITY in row]
            found = differences(heads[0], self._identity) if heads else {}
            known = {row.pop(_NUMBER): row for row in rows if _IDENTITY not in row}
        except (ValueError, AttributeError, LookupError, TypeError):
            is_ours, found = False, {}
        rest = content[len(whole) :]
        if not (is_ours and (rest.startswith(self._mark) or self._mark.startswith(rest))):
            how = told(found) or "other prompts, another model, other options or another version"
            raise ConfigError(
                f"{str(part)!r} holds answers of another generation: {how}. Give the command that began it again to go "
                "on with it, move it elsewhere, or name another --out."
            )
        self._known |= known
        if is_own and whole != content:  # a row that was being written
            write_whole(part, whole)

    @property
    def missing(self) -> list[int]:
        """Numbers of the rows that are not known and that this process is to find."""
        return [number for number in self._share if number not in self._known]

    @property
    def known(self) -> dict[int, Row]:
        """What is known, by its number, in the order of what was asked."""
        return dict(sorted(self._known.items()))

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._output is not None

    def write(self, number: int, answers: Sequence[Row]) -> None:
        """Add a row, or write it anew."""
        row = self._known[number] = {**self._asked[number], "answers": [*answers]}
        if self._output is None:
            return
        try:
            if not self._file.tell():
                self._file.write(json.dumps({_REQUEST: self._request, _IDENTITY: self._identity}) + "\n")
            self._file.write(_line({_REQUEST: self._request, **row, _NUMBER: number}))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{str(self._output)!r} could not be written: {error.strerror}. Earlier answers are in "
                f"{str(part_of(self._output, self._process))!r}; the same command goes on from them."
            ) from error

    def __exit__(self, kind: object, *_: object) -> None:
        if self._output is None:
            return
        part = part_of(self._output, self._process)
        with self._open:
            with suppress(OSError):  # what could not be written before cannot now
                self._file.close()
            if kind is None:
                self._end(self._output)
                return
            with suppress(FileNotFoundError):  # others have written the file meanwhile
                if not part.stat().st_size:
                    part.unlink()
            if parts := ", ".join(map(str, _parts_of(self._output, only_with_rows=True))):
                typer.echo(f"The answers so far are in {parts}. The same command goes on from them.", err=True)

    def _end(self, output: Path) -> None:
        """Write the file, or leave that to the process that ends last."""
        if self._processes > 1:
            self._read_parts(output)
            self.has_all = len(self._known) == len(self._asked)
        if self.has_all:
            self._publish(output)
            for part in _parts_of(output):
                part.unlink(missing_ok=True)
        elif not output.exists():
            typer.echo(
                f"Process {self._process} has given its answers. The last of the {self._processes} processes to end "
                f"writes {output}; if one of them fails, the same command goes on.",
                err=True,
            )

    def _publish(self, output: Path) -> None:
        """Write all rows under their name, unless somebody else has taken it meanwhile."""
        whole = output.with_name(f".{output.name}.{os.getpid()}.whole")
        write_whole(whole, "".join(map(_line, self.known.values())))
        try:
            _rename(whole, output)
        except FileExistsError as error:
            if self._processes > 1 and output.read_bytes() == whole.read_bytes():  # two have ended last
                self.has_all = False
                return
            parts = ", ".join(repr(str(part)) for part in _parts_of(output))
            raise OutputError(
                f"{str(output)!r} was made by somebody else meanwhile. The answers are in {parts}."
            ) from error
        finally:
            whole.unlink(missing_ok=True)


def _rename(file: Path, new: Path) -> None:
    """Give a file a name unless another has it."""
    try:
        os.link(file, new)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        new.touch(exist_ok=False)
        os.replace(file, new)


def part_of(output: Path, process: int = 0) -> Path:
    """Where the rows of a file are that a process has found, until all are known."""
    return output.with_name(f"{output.name}.part{process or ''}")


def _parts_of(output: Path, *, only_with_rows: bool = False) -> list[Path]:
    """The parts that there are, also of more processes than now."""
    found = []
    for path in sorted(output.parent.glob(f"{glob.escape(output.name)}.part*")):
        with suppress(FileNotFoundError):  # its process has just removed it
            has_rows = path.stat().st_size > 0
            if re.fullmatch(r"\.part\d*", path.name.removeprefix(output.name)) and (has_rows or not only_with_rows):
                found.append(path)
    return found


def _meet(output: Path, processes: int) -> None:
    """Wait for the other processes before any writes, so that all have read the same and deal out the same."""
    from accelerate import PartialState

    try:
        state = PartialState(cpu=True)
        state.wait_for_everyone()
        unseen = [part for n in range(processes) if not (part := part_of(output, n)).exists()]
        state.wait_for_everyone()
    except RuntimeError as error:
        raise L2DError(
            f"The {processes} processes did not meet, or one has ended ({error}). Start them again."
        ) from error
    if unseen:
        raise ConfigError(f"{str(unseen[0])!r} is not seen here. Name an --out that lies where all machines see it.")


def check_answer_file(output: Path | None, asked: Sequence[Row]) -> None:
    """Refuse a file that is there already, and say of one with an answer to each of `asked` that it is finished."""
    if output is not None and output.is_file() and _answers(output, asked):
        raise ConfigError(
            f"{str(output)!r} is finished: it has answers to all of these {len(asked)}. Name another --out for others, "
            "or move it elsewhere."
        )
    check_file(output, "--out")


def _answers(output: Path, asked: Sequence[Row]) -> bool:
    try:
        rows = [parse_json(line, str(output)) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
        return all(row.pop("answers") for row in rows) and rows == [*asked]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, L2DError):
        return False


def show_answers(names: Sequence[str], file: AnswerFile) -> None:
    """Print what is known, each answer below a line that says whose it is; where one was asked for, it stands alone."""
    is_single = len(names) == 1 and sum(len(row["answers"]) for row in file.known.values()) == 1
    is_first = True
    for number, row in file.known.items():
        answers = row["answers"]
        for sample, answer in enumerate(answers):
            if not is_single:
                which = f", answer {sample + 1} of {len(answers)}" if len(answers) > 1 else ""
                typer.echo(f"{'' if is_first else chr(10)}==> {names[number]}{which} <==")
            is_first = False
            typer.echo(answer["text"])


@contextmanager
def shown_if_interrupted(file: AnswerFile, names: Sequence[str]) -> Iterator[None]:
    """Print the answers that are known where they would be lost, if no more are waited for."""
    try:
        yield
    except KeyboardInterrupt:
        if not file.is_kept:
            show_answers(names, file)
            if len(names) > 1:
                typer.echo(f"{len(file.known)} of {len(names)} are answered. --out FILE would keep them.", err=True)
        raise


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
