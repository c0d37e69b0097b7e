"""A checkpoint that was changed since it was saved is refused in this package's words; one of format 1 is not."""

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2d_framework.errors import CheckpointError, L2DError
from l2d_framework.models.checkpoint import load, save
from l2d_framework.models.manifest import file_hash, read_manifest, sealed

FORMAT_1 = Path(__file__).parent / "data" / "format1"
KINDS = ("l2d", "tess")
ANSWERS = {"l2d": {"classes": ["math"], "guidance_scale": 2.0}, "tess": {}}


def base_of(folder):
    """The language model of the L2D checkpoint is the one inside the other."""
    return None if folder.name == "tess" else str(FORMAT_1 / "tess" / "language_model")


def answer(model, kind):
    return model.generate(["Hello there"], max_new_tokens=6, seed=3, **ANSWERS[kind]).sequences.tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of both kinds in today's format."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        save(load(FORMAT_1 / kind, base=base_of(FORMAT_1 / kind)), folder / kind)
    return folder


@pytest.fixture(params=KINDS)
def checkpoint(saved, tmp_path, request):
    return shutil.copytree(saved / request.param, tmp_path / request.param)


def manifest(folder):
    return json.loads((folder / "l2d.json").read_text())


def write(folder, fields):
    (folder / "l2d.json").write_text(json.dumps(fields))


def reseal(folder):
    """Make the hashes those of the files, as somebody does who changes them on purpose."""
    fields = manifest(folder)
    for name in fields["files"]:
        with suppress(OSError):
            fields["files"][name] = file_hash(folder / name)
    write(folder, sealed(fields))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_format_1_answers_as_it_did(kind):
    model = load(FORMAT_1 / kind, base=base_of(FORMAT_1 / kind))
    assert manifest(FORMAT_1 / kind)["format"] == 1
    assert answer(model, kind) == json.loads((FORMAT_1 / "expected.json").read_text())[kind]["sequences"]


def test_a_checkpoint_of_format_1_is_saved_as_the_same_model_in_format_2(checkpoint):
    old = load(FORMAT_1 / checkpoint.name, base=base_of(checkpoint))
    new = load(checkpoint, base=base_of(checkpoint))
    assert manifest(checkpoint)["format"] == 2
    assert answer(new, checkpoint.name) == answer(old, checkpoint.name)
    for name, weight in old.own_parameters().items():
        assert torch.equal(new.own_parameters()[name], weight), name


def test_every_file_but_the_model_card_is_hashed(checkpoint):
    found = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    assert {str(path) for path in found} - {"l2d.json", "README.md"} == set(manifest(checkpoint)["files"])
    for path in found - {Path("README.md")}:
        whole = (checkpoint / path).read_bytes()
        (checkpoint / path).write_bytes(whole.replace(b"1", b"2", 1) if path.name == "l2d.json" else whole + b"\n")
        with pytest.raises(CheckpointError, match=str(path)):
            read_manifest(checkpoint)
        (checkpoint / path).write_bytes(whole)
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert read_manifest(checkpoint)["format"] == 2


@pytest.mark.parametrize("field", ["block_size", "classes", "sampling", "chat_template", "fingerprint", "model"])
def test_a_field_of_the_manifest_is_not_changed_unseen(checkpoint, field):
    other = {"block_size": 3, "classes": ["x"], "chat_template": "x", "fingerprint": None, "sampling": None}
    write(checkpoint, manifest(checkpoint) | {field: other.get(field)})
    with pytest.raises(CheckpointError, match=r"l2d\.json' was changed since it was saved"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"format": -1},
        {"format": 0},
        {"format": True},
        {"format": 1.5},
        {"format": "1"},
        {"files": {}},
        {"files": []},
        {"files": {"diffusion.safetensors": 3}},
        {"chat_template": 5},
        {"backbone": 3},
        {"schedule": []},
        {"parametrization": "simplex"},
        {"sampling": []},
        {"model": 1},
        {"model": {"base": 5}},
        {"classes": "a"},
        {"classes": [1]},
        {"block_size": 0},
        {"block_size": "1"},
        {"fingerprint": 7},
        {"surprise": 1},
    ],
)
def test_a_field_of_the_wrong_kind_is_named(checkpoint, change):
    write(checkpoint, sealed(manifest(checkpoint) | change))
    with pytest.raises(CheckpointError, match=rf"l2d\.json' is damaged \({next(iter(change))}"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("text", ["[" * 5000, '{"format": ' + "9" * 5000 + "}", '{"a": ' * 500 + "1" + "}" * 500, "\0"])
def test_a_manifest_that_is_a_bomb_is_damaged(checkpoint, text):
    (checkpoint / "l2d.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"l2d\.json' is damaged"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "adapter/../../outside", "..\\outside", "", ".", "a\0b"]
)
def test_a_manifest_names_no_file_outside_its_folder(checkpoint, name):
    (checkpoint.parent / "outside").write_text("secret")
    files = manifest(checkpoint)["files"] | {name: file_hash(checkpoint.parent / "outside")}
    write(checkpoint, sealed(manifest(checkpoint) | {"files": files}))
    with pytest.raises(CheckpointError, match="should be a path inside the checkpoint"):
        read_manifest(checkpoint)


def test_a_link_counts_by_what_it_leads_to(checkpoint):
    wanted = answer(load(checkpoint, base=base_of(checkpoint)), checkpoint.name)
    outside = checkpoint.parent / "outside"
    shutil.move(checkpoint / "diffusion.safetensors", outside)
    (checkpoint / "diffusion.safetensors").symlink_to(outside)
    assert answer(load(checkpoint, base=base_of(checkpoint)), checkpoint.name) == wanted
    outside.write_bytes(outside.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"diffusion\.safetensors' is missing, truncated or changed"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("layout", ["blobs of one repository", "blobs of all repositories", "blobs on another disk"])
def test_a_folder_in_the_cache_of_the_hub_is_loaded_and_so_is_a_link_to_one(checkpoint, layout):
    snapshot = checkpoint.parent / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    if layout == "blobs on another disk":
        (checkpoint.parent / "disk").mkdir()
        blobs.symlink_to(checkpoint.parent / "disk")
    else:
        blobs.mkdir()
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / file_hash(path)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if layout == "blobs of all repositories":
            # As huggingface_hub 2 keeps what it gets from Xet.
            shared = checkpoint.parent / "blobs" / blob.name[:2] / blob.name
            shared.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, shared)
            blob.symlink_to(os.path.relpath(shared, blobs))
        else:
            shutil.copy(path, blob)
    (checkpoint.parent / "link").symlink_to(snapshot)
    wanted = answer(load(checkpoint, base=base_of(checkpoint)), checkpoint.name)
    for folder in (snapshot, checkpoint.parent / "link"):
        assert answer(load(folder, base=base_of(checkpoint)), checkpoint.name) == wanted


def test_a_file_that_would_be_opened_beside_the_saved_ones_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "tess", tmp_path / "tess")
    (folder / "language_model" / "notes.json").write_text("mine")
    for name in (".ipynb_checkpoints/config-checkpoint.json", "onnx/config.json", "._config.json"):
        (folder / "language_model" / name).parent.mkdir(exist_ok=True)
        (folder / "language_model" / name).write_text("{}")
    read_manifest(folder)
    (folder / "language_model" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"language_model/adapter_config\.json' is no part of the checkpoint"):
        read_manifest(folder)


def test_files_of_an_earlier_save_do_not_stay_beside_the_new(saved, tmp_path):
    folder = shutil.copytree(FORMAT_1 / "tess", tmp_path / "tess")
    (folder / "language_model" / "special_tokens_map.json").write_text("{}")
    (folder / "language_model" / "model-00002-of-00002.safetensors").write_text("old")
    (folder / "language_model" / "notes.json").write_text("mine")
    save(load(saved / "tess"), folder)
    assert answer(load(folder), "tess") == answer(load(saved / "tess"), "tess")
    assert (folder / "language_model" / "notes.json").read_text() == "mine"


def test_gigabytes_are_hashed_once(checkpoint, monkeypatch):
    read_manifest(checkpoint)
    monkeypatch.setattr("hashlib.file_digest", lambda *a: pytest.fail("hashed again"))
    read_manifest(checkpoint)


LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(["../x", "evil/kernel", "linear", "x.y", "", "cuda", "float16", -1, 10**30])
)
FLAT = LEAF | st.lists(LEAF, max_size=2) | st.dictionaries(st.text(max_size=4), LEAF, max_size=2)
JSON = FLAT | st.lists(FLAT, max_size=2) | st.dictionaries(st.text(max_size=4), FLAT, max_size=2)


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:5]):
            yield from places(inner, (*path, index))


def change_json(data, file):
    """Replace, remove or add one value of a JSON file."""
    fields = json.loads(file.read_text())
    *above, last = data.draw(st.sampled_from([path for path in places(fields) if path]), "place")
    inside = fields
    for step in above:
        inside = inside[step]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]), "how")
    if how == "remove":
        del inside[last]
    elif how == "add" and isinstance(inside, dict):
        inside[data.draw(st.sampled_from(["auto_map", "num_labels", "x", "_attn_implementation"]))] = data.draw(JSON)
    else:
        inside[last] = data.draw(JSON, "value")
    file.write_text(json.dumps(fields))


def change_bytes(data, file):
    whole = file.read_bytes()
    cut, new = data.draw(st.integers(0, min(len(whole), 3000)), "cut"), data.draw(st.binary(max_size=9), "bytes")
    keeps_rest = data.draw(st.booleans(), "keeps rest")
    file.write_bytes(whole[:cut] + new + (whole[cut + len(new) :] if keeps_rest else b""))


def change_place(data, file):
    """Put a folder, a loop, a program or nothing in place of a file."""
    file.unlink()
    how = data.draw(st.sampled_from(["folder", "loop", "program", "nothing"]), "instead")
    if how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file)
    elif how == "program":
        torch.save({"a": Program(file.parents[1] / "it-ran")}, file.with_suffix(".bin"))


class Program:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def state(folder):
    return {str(p): p.read_bytes() if p.is_file() else p.is_dir() for p in folder.rglob("*")}


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_mutated_checkpoint_is_loaded_or_refused_and_never_written_to_or_run(saved, data):
    with tempfile.TemporaryDirectory() as room:
        kind = data.draw(st.sampled_from(KINDS), "kind")
        folder = shutil.copytree(saved / kind, Path(room) / kind)
        for _ in range(data.draw(st.integers(1, 2), "changes")):
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
            file = data.draw(st.sampled_from(files), "file")
            json_change = [change_json] * 4 if file.suffix == ".json" else []
            with suppress(ValueError, UnicodeDecodeError):
                data.draw(st.sampled_from([*json_change, change_bytes, change_bytes, change_place]), "change")(
                    data, file
                )
        if data.draw(st.booleans(), "resealed"):
            with suppress(ValueError, TypeError, AttributeError, KeyError, OSError):
                reseal(folder)
        before = state(Path(room))
        with suppress(L2DError):
            load(folder, base=base_of(folder))
        assert state(Path(room)) == before
