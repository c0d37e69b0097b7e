"""Large corpora: Dolma's layout, streamed, packed, masked and resumed."""

import gzip
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
import zstandard
from transformers import AutoTokenizer

from l2d_framework import lines
from l2d_framework.config import DataSection, parse_run
from l2d_framework.errors import DataError
from l2d_framework.models import checkpoint
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.masking import Masker
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.run import train_runs
from l2d_framework.training.samplers import RunStream

LENGTH = 48
# What a corpus of many origins does to its other columns.
METADATA = [{"url": "x"}, {"url": 1, "deep": [{"a": 1}]}, {"length": 3.5}, None]
CREATED = ["2019-01-01T00:00:00Z", "unknown", None, "2024"]
SHARDS = ["wiki/wiki-0000.jsonl.gz", "algebra-train-0000.jsonl.zst", "c4/c4-0001.json.gz", "c4/c4-0002.jsonl.zst"]


def document(i, kind):
    row = {"id": f"d{i}", "text": f"Document {i}\u2028 says" + " more" * (i % 9) + "."}
    row |= {"source": f"s{kind}", "added": "2024-04-24T10:00:00.000Z", "created": CREATED[kind]}
    return {**row, "metadata": METADATA[kind], **({"version": "v0"} if kind == 3 else {})}


def pack_file(path, rows):
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else zstandard.compress(raw))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_runs.write_base(folder / "base")
    for kind, name in enumerate(SHARDS):
        pack_file(folder / "dolma" / name, [document(i, kind) for i in range(kind * 20, kind * 20 + 20)])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "base")


def fields(folder, **options):
    source = {"path": f"{folder}/dolma"}
    return {"train": [source], "streaming": True, "pack": True, "max_length": LENGTH, "shuffle_buffer": 4, **options}


@pytest.mark.parametrize("path", ["dolma", "dolma/**/*.json*"], ids=["folder", "pattern"])
def test_every_document_of_every_shard_is_read_whatever_its_metadata(folder, tokenizer, path):
    options = {"train": [{"path": str(folder / path)}], "pack": False, "max_length": 512, "shuffle_buffer": 1}
    data = prepare(DataSection.model_validate(fields(folder) | options), tokenizer)
    kinds = sorted(range(4), key=lambda kind: SHARDS[kind])
    expected = [document(i, kind)["text"] for kind in kinds for i in range(kind * 20, kind * 20 + 20)]
    eos = tokenizer.eos_token
    assert [tokenizer.decode(row["input_ids"]).removesuffix(eos) for row in data.train] == expected
    assert data.card["sources"]["train"][0]["sha256_of_first_rows"]


def test_a_packed_stream_has_full_rows_of_the_whole_corpus_in_order(folder, tokenizer):
    loose = prepare(DataSection.model_validate(fields(folder, pack=False, max_length=512)), tokenizer)
    packed = prepare(DataSection.model_validate(fields(folder)), tokenizer)
    expected, found = (
        [token for row in sorted(data.train, key=lambda row: row["index"]) for token in row["input_ids"]]
        for data in (loose, packed)
    )
    lengths = [len(row["input_ids"]) for row in sorted(packed.train, key=lambda row: row["index"])]
    assert set(lengths[:-1]) == {LENGTH}
    assert found == expected[: len(found)]
    assert len(expected) - len(found) <= 1


def test_rows_masks_and_order_are_the_same_after_a_kill(folder, tokenizer):
    section = DataSection.model_validate(fields(folder, masking={}))
    collate = Collator(0, None, masker=Masker(("t5", "aggressive_t5", "prefix"), 4, 7))

    def portions(begun=0, places=()):
        # Two and a half epochs.
        stream = RunStream(prepare(section, tokenizer).train, collate, updates=75, batch_size=2, rows=range(2))
        stream.begun, stream.places = begun, dict(places)
        return list(stream)

    whole = portions()
    # As of a checkpoint, and of one from before these had places.
    for rest in portions(40, whole[39].places), portions(40):
        assert len(rest) == len(whole) - 40
        for one, other in zip(whole[40:], rest, strict=True):
            assert all(torch.equal(one.batch[name], other.batch[name]) for name in one.batch)
    indices = torch.cat([portion.batch["index"] for portion in whole]).tolist()
    count = max(indices) + 1
    assert sorted(indices[:count]) == list(range(count))
    assert indices[:count] not in (sorted(indices[:count]), indices[count : 2 * count])


def test_an_adaptation_run_resumes_and_micro_batches_change_nothing(folder):
    def run(name, **training):
        made = tiny_runs.diffusion_run(folder / "base", folder, folder / name, eval_steps=None, **training)
        made["data"] = fields(folder, masking={})
        return parse_run(made)

    train_runs([run("whole")])
    with pytest.raises(KeyboardInterrupt):
        train_runs([run("stopped")], callbacks=lambda _: [tiny_runs.Stop(5)])
    train_runs([run("stopped")])
    assert tiny_runs.losses(folder / "stopped") == tiny_runs.losses(folder / "whole")
    train_runs([run("micro", micro_batch_size=1)])
    whole, micro = tiny_runs.losses(folder / "whole"), tiny_runs.losses(folder / "micro")
    for step, expected in whole.items():
        assert micro[step] == pytest.approx(expected, abs=2e-5)
    ours = checkpoint.load(folder / "stopped").own_parameters()
    for name, value in checkpoint.load(folder / "whole").own_parameters().items():
        assert torch.equal(value, ours[name]), name


def test_a_folder_with_a_file_of_another_split_keeps_the_splits_apart(tokenizer, tmp_path):
    for name in ("train", "test"):
        pack_file(tmp_path / "set" / f"{name}.jsonl.gz", [{"text": name}])
    found = {}
    for split in ("train", "test"):
        options = {"train": [{"path": str(tmp_path / "set"), "split": split}], "streaming": True}
        found[split] = [
            tokenizer.decode(row["input_ids"]) for row in prepare(DataSection.model_validate(options), tokenizer).train
        ]
    eos = tokenizer.eos_token
    assert found == {"train": [f"train{eos}"], "test": [f"test{eos}"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"text": "fine"}\n\n{"text": '), ":3 is not a JSON object"),
        (gzip.compress(b'{"text": "fine"}\n[1]'), ":2 is not a JSON object"),
        (gzip.compress(b'{"text": "fine"}\n')[:-5], "EOFError"),
    ],
    ids=["line", "list", "cut"],
)
def test_a_broken_file_is_reported_with_the_place(tokenizer, tmp_path, content, words):
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.jsonl\.gz.*{words}"):
        prepare(DataSection.model_validate({"train": [{"path": str(path)}], "streaming": True}), tokenizer)


def test_a_packing_that_nothing_installed_can_open_is_named(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(lines, "infer_compression", lambda file: None)
    with pytest.raises(DataError, match="pip install zstandard"):
        prepare(DataSection.model_validate(fields(folder)), tokenizer)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_masking_is_for_plain_text_only(folder, tokenizer, streaming):
    sums = tiny_runs.write_sums(Path(folder, "sums.jsonl"))
    options = {"train": [{"path": str(sums)}], "masking": {}, "streaming": streaming}
    with pytest.raises(DataError, match=r"data\.masking .* 'prompt_completion', whose answers are generated"):
        prepare(DataSection.model_validate(options), tokenizer)
