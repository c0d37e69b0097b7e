"""Streams go on from any place, are shared out, and outlast a source that does not answer."""

import errno
import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError
from tiny_models import tiny_tokenizer
from torch.utils.data import DataLoader

from l2d_framework import lines
from l2d_framework.config import DataSection, LanguageModelRun
from l2d_framework.errors import CheckpointError, DataError, UnreachableError
from l2d_framework.training.data import sources, stream
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.data.stream import BATCH, Place
from l2d_framework.training.samplers import RunStream

BUFFER, ROWS, STRETCH, GROUP = 32, 640, 2000, 20
SECTIONS = {
    "rows": {},
    "packed": {"pack": True, "max_length": 24},
    "long documents": {"pack": True, "max_length": 3},
    "mixture": {"train": [{"path": "a.jsonl", "weight": 3.0}, {"path": "b.jsonl", "limit": 100}]},
    "joined": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "exclude": {"kind": ["odd"]}}]},
    "text": {"train": [{"path": "c.txt"}]},
    "parquet": {"train": [{"path": "d.parquet"}], "shards": 2},
    "shards": {"shards": 2},
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Files in stretches of some thirty rows, and the list of rows that are read of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_STRETCH", STRETCH)
    for name in "ab":
        rows = [{"text": f"{name} {i} says {i * i}", "kind": "odd" if i % 2 else "even"} for i in range(ROWS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.txt").write_text("".join(f"c {i}\n" for i in range(ROWS)))
    table = pyarrow.table({"text": [f"d {i} says {i * i}" for i in range(ROWS)]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=GROUP)
    reads = []

    def counted(file, span):
        for number, row in lines.read_objects(file, span):
            reads.append(row["text"])
            yield number, row

    monkeypatch.setattr(sources, "read_objects", counted)
    return reads


def made(tokenizer, **options):
    fields = {"train": [{"path": "a.jsonl"}], "streaming": True, "shuffle_buffer": BUFFER, **options}
    return prepare(DataSection.model_validate(fields), tokenizer, seed=1).train


def plain(row):
    return {name: value if isinstance(value, int) else list(value) for name, value in row.items()}


@pytest.mark.parametrize("options", SECTIONS.values(), ids=SECTIONS)
def test_rows_go_on_from_any_place_that_json_has_kept(tokenizer, options):
    data = made(tokenizer, **options)
    count = len([*data.epoch(0)]) // data.shards
    for shard in range(data.shards):
        whole = list(itertools.islice(data.rows(shard), count + 60))
        assert {place.epoch for _, place in whole} == {0, 1}
        # At a window's beginning and end, within one, near the end of an epoch, and in the next one.
        for at in (0, BUFFER - 1, BUFFER // 2 - 1, 70, 71, count // 2, count - 2, count - 1, count + 20):
            place = Place.of_json(json.loads(json.dumps(whole[at][1].as_json())))
            rest = [row for row, _ in itertools.islice(data.rows(shard, place), 35)]
            assert [plain(row) for row in rest] == [plain(row) for row, _ in whole[at + 1 :][:35]]


def test_going_on_reads_no_more_of_the_source_than_a_stretch_and_the_buffer(tokenizer, files):
    data = made(tokenizer)
    whole = list(itertools.islice(data.rows(), ROWS))
    files.clear()
    row, _ = next(data.rows(place=whole[ROWS - 60][1]))
    assert plain(row) == plain(whole[ROWS - 59][0])
    in_a_stretch = STRETCH // len('{"text": "a 1 says 1"}')
    assert len(files) <= in_a_stretch + BUFFER + 2 * BATCH < ROWS / 3


def test_going_on_in_a_parquet_file_reads_none_of_the_row_groups_far_before(tokenizer, tmp_path):
    data = made(tokenizer, train=[{"path": "d.parquet"}])
    whole = list(itertools.islice(data.rows(), ROWS))
    file = tmp_path / "d.parquet"
    middle = pyarrow.parquet.read_metadata(file).row_group(ROWS // GROUP // 2).column(0).dictionary_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(middle - 4) + content[middle:])
    row, _ = next(data.rows(place=whole[ROWS - 60][1]))
    assert plain(row) == plain(whole[ROWS - 59][0])
    with pytest.raises(DataError):
        next(data.rows())


@pytest.mark.parametrize(("name", "refused"), [("parquet", True), ("shards", False)])
def test_a_place_counted_in_other_parts_is_refused(tokenizer, tmp_path, name, refused):
    def run():
        return RunStream(made(tokenizer, **SECTIONS[name]), list, updates=9, batch_size=8, rows=range(8))

    before, file = run(), tmp_path / "stream-0.json"
    before.places = next(iter(before)).places
    before.write(tmp_path)
    again = run()
    again.resume(tmp_path, 1)
    assert again.places[0] == Place.of_json({k: v for k, v in json.loads(file.read_text()).items() if k != "parts"})
    fields = json.loads(file.read_text())
    for changed, wrong in ((fields | {"parts": [7]}, True), ({k: fields[k] for k in {*fields} - {"parts"}}, refused)):
        file.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"--overwrite or another output_dir") if wrong else nullcontext():
            run().resume(tmp_path, 1)


@pytest.mark.parametrize(("count", "shards"), [(2, 2), (2, 1), (4, 2), (1, 4)])
def test_processes_have_together_what_one_has_and_read_their_own_shards_alone(tokenizer, files, count, shards):
    def run(process, processes, **options):
        share = 8 // processes
        rows = range(process * share, (process + 1) * share)
        return RunStream(made(tokenizer, shards=shards), list, updates=30, batch_size=8, rows=rows)

    whole = [portion.batch for portion in run(0, 1)]
    found, read = [], []
    for process in range(count):
        one = run(process, count)
        files.clear()
        found.append([portion.batch for portion in one])
        read.append(set(files))
    for update, parts in enumerate(zip(*found, strict=True)):
        assert [plain(row) for part in parts for row in part] == [plain(row) for row in whole[update]]
    everything = [row for batch in whole for row in batch]
    assert [row["ordinal"] for row in everything] == list(range(240))
    assert len({row["index"] for row in everything}) == 240
    if count == shards == 2:
        assert not read[0] & read[1]


def test_a_worker_changes_no_row_and_an_epoch_has_every_row_once(tokenizer):
    mixture = {**SECTIONS["mixture"], "shards": 2}
    run = RunStream(made(tokenizer, **mixture), list, updates=20, batch_size=8, rows=range(8))
    here, there = ([portion.batch for portion in DataLoader(run, None, num_workers=n)] for n in (0, 1))
    assert [[plain(row) for row in batch] for batch in here] == [[plain(row) for row in batch] for batch in there]
    data = made(tokenizer, shards=3)
    for epoch in (0, 1):
        rows = list(data.epoch(epoch))
        assert len(rows) == len({row["index"] for row in rows}) == ROWS
        assert len({tuple(row["input_ids"]) for row in rows}) == ROWS


def test_held_out_rows_stay_in_order_whatever_is_trained_on(tokenizer):
    source = {"path": "a.jsonl", "limit": 40}
    fields = {"train": [source], "eval": [source], "streaming": True, "shuffle_buffer": 8}
    data = prepare(DataSection.model_validate(fields), tokenizer)
    assert [row["index"] for row in data.eval] == list(range(40)) != [row["index"] for row in data.train]


def test_more_shards_than_the_data_have_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"data\.shards is 3, but 'c.txt' .* in 1 parts only"):
        made(tokenizer, train=[{"path": "c.txt"}], shards=3)
    with pytest.raises(ValueError, match="shards 2 divides a stream"):
        made(tokenizer, shards=2, streaming=False)


class Flaky:
    """Fails with an error wherever a source is read for the given times."""

    def __init__(self, monkeypatch, error, times):
        self.error, self.times, self.reads, self.waits = error, set(times), 0, []
        monkeypatch.setattr(stream.time, "sleep", self.waits.append)
        plain_read = sources.read_objects

        def read(file, span):
            for found in plain_read(file, span):
                self.reads += 1
                if self.reads in self.times:
                    raise self.error
                yield found

        monkeypatch.setattr(sources, "read_objects", read)


def responding(status):
    error = OSError("the server says so")
    error.response = SimpleNamespace(status_code=status)
    return error


def caused(error):
    outer = DatasetGenerationError("while reading")
    outer.__cause__ = error
    return outer


PASSING = [
    *(ConnectionError("Server Disconnected"), TimeoutError("timed out"), OSError(errno.EIO, "mount"), responding(503)),
    *(responding(429), caused(ConnectionResetError("reset"))),
]


@pytest.mark.parametrize(
    ("name", "error"), [*(("packed", error) for error in PASSING), ("mixture", PASSING[0])], ids=repr
)
def test_a_source_that_answers_again_costs_no_row(tokenizer, monkeypatch, caplog, name, error):
    whole = [plain(row) for row, _ in itertools.islice(made(tokenizer, **SECTIONS[name]).rows(), 200)]
    data = made(tokenizer, **SECTIONS[name])
    flaky = Flaky(monkeypatch, error, [1, 2, 90, 91, 92])
    assert [plain(row) for row, _ in itertools.islice(data.rows(), 200)] == whole
    if name == "packed":  # those of a mixture are read at the same time
        assert flaky.waits == [5.0, 10.0, 5.0, 10.0, 20.0]
    said = [record.getMessage().rpartition(". ")[2] for record in caplog.records]
    assert len(said) == len(flaky.waits) > 0
    assert said[0] == "New try 1 of 5 in 5 s."


def test_a_source_that_never_answers_again_is_named_with_its_last_error(tokenizer, monkeypatch):
    data = made(tokenizer)
    flaky = Flaky(monkeypatch, ConnectionError("Server Disconnected"), range(100, 10**6))
    words = r"'a.jsonl' .* does not answer any more, after 5 new tries: ConnectionError: Server Disconnected\."
    with pytest.raises(UnreachableError, match=words):
        list(data.rows())
    assert flaky.waits == list(stream.WAITS)


@pytest.mark.parametrize("error", [responding(404), FileNotFoundError("gone"), ValueError("broken")], ids=repr)
def test_what_will_not_pass_is_not_waited_for(tokenizer, monkeypatch, error):
    data = made(tokenizer)
    flaky = Flaky(monkeypatch, error, [100])
    with pytest.raises(DataError, match=rf"'a.jsonl' .* cannot be read on: {type(error).__name__}: "):
        list(data.rows())
    assert not flaky.waits


def test_a_batch_is_a_multiple_of_the_shards():
    data = {"train": [{"path": "a.jsonl"}], "streaming": True, "shards": 3}
    run = {"kind": "language_model", "model": {"base": "here"}, "data": data, "training": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"batch_size 32 is no multiple of data\.shards 3"):
        LanguageModelRun.model_validate(run)
