"""GGUF files as bases: unpacked, with their own tokenizer, told apart, refused by name where they cannot be read."""

import importlib.util
import shutil

import pytest
import torch
import transformers
from diffusion_models import NETWORK, SPACE
from tiny_models import VOCAB_SIZE, tiny_lm, tiny_tokenizer
from tiny_runs import diffusion_run, losses, tess_run, write_sums
from typer.testing import CliRunner

from l2d_framework.base_model import fetch, fingerprint, load_config, load_language_model, load_tokenizer, locate
from l2d_framework.cli import app
from l2d_framework.config import ModelSection, check_run, parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.training.run import train_runs

is_old = transformers.__version__.startswith("5.17.")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None or is_old, reason="needs gguf, read aright")
PROMPT = torch.tensor([[40, 41, 42, 43]])


@pytest.fixture
def packed(tmp_path):
    """A folder with one GGUF file: (folder, weights it keeps)."""
    from gguf_files import write_gguf

    folder = tmp_path / "packed"
    folder.mkdir()
    lm = tiny_lm("qwen2", intermediate_size=64, vocab_size=VOCAB_SIZE + 2)
    return folder, write_gguf(lm, folder / "tiny.gguf")


def section(folder, **fields):
    return ModelSection(base=str(folder), **{"gguf_file": "tiny.gguf", **fields})


def over(folder, run, tmp_path, **training):
    """A small run over the GGUF file of a folder."""
    data = write_sums(tmp_path / "sums.jsonl")
    fields = run(folder, data, tmp_path / "out", **training)
    return parse_run({**fields, "model": {"base": str(folder), "gguf_file": "tiny.gguf"}})


@needs_gguf
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_gguf_file_is_the_model_whose_weights_it_keeps(packed, dtype):
    folder, kept = packed
    lm = load_language_model(section(folder, dtype=dtype))
    found = lm.state_dict()
    assert found.keys() == kept.keys()
    wanted = torch.float32 if dtype == "auto" else torch.bfloat16
    assert all(torch.equal(found[name], kept[name].to(wanted)) for name in kept)
    assert load_config(section(folder)).vocab_size == VOCAB_SIZE + 2


@needs_gguf
def test_the_tokenizer_comes_from_the_file_unless_one_lies_beside_it(packed):
    folder, _ = packed
    found = load_tokenizer(section(folder))
    assert found("1+2=3 é</s>").input_ids == tiny_tokenizer()("1+2=3 é</s>").input_ids
    assert (found.chat_template, found.eos_token, found.pad_token) == (
        tiny_tokenizer(chat=True).chat_template,
        "</s>",
        "<pad>",
    )
    beside = tiny_tokenizer()
    beside.chat_template = "beside"
    beside.save_pretrained(folder)
    assert load_tokenizer(section(folder)).chat_template == "beside"


@needs_gguf
def test_the_fingerprint_of_a_gguf_file_is_that_of_its_content(packed, tmp_path):
    folder, _ = packed
    first = fingerprint(section(folder))
    assert fingerprint(section(shutil.copytree(folder, tmp_path / "copy"))) == first
    content = bytearray((folder / "tiny.gguf").read_bytes())
    content[-40] ^= 1
    (folder / "tiny.gguf").write_bytes(content)
    assert fingerprint(section(folder)) != first


@needs_gguf
def test_l2d_over_a_gguf_file_is_trained_saved_and_loaded_and_is_its_model_at_zero(packed, tmp_path):
    folder, _ = packed
    run = over(folder, diffusion_run, tmp_path)
    check_run(run)
    train_runs([run])
    assert losses(tmp_path / "out")[9]["eval_loss"] < losses(tmp_path / "out")[3]["eval_loss"]
    lm = load_language_model(section(folder))
    wanted = lm.generate(PROMPT, max_new_tokens=9, do_sample=False, eos_token_id=None)[:, PROMPT.shape[1] :]
    model = load(tmp_path / "out")
    assert torch.equal(
        model.generate(PROMPT, num_inference_steps=0, max_new_tokens=9, eos_token_id=None).answers, wanted
    )
    moved = shutil.move(folder, tmp_path / "moved")
    assert load(tmp_path / "out", base=str(moved)).origin.model.gguf_file == "tiny.gguf"


@needs_gguf
def test_tess_over_a_gguf_file_saves_an_ordinary_language_model(packed, tmp_path):
    folder, kept = packed
    run = over(folder, tess_run, tmp_path)
    check_run(run)
    model = build_model(run)
    save(model, tmp_path / "model")
    shutil.rmtree(folder)
    found = load(tmp_path / "model").backbone.lm.state_dict()
    assert all(torch.equal(found[name], kept[name]) for name in kept)


@needs_gguf
def test_a_missing_gguf_file_is_named_with_those_there_are(packed):
    folder, _ = packed
    with pytest.raises(ConfigError, match=r"has no file 'other.gguf'. Set model.gguf_file to one of \['tiny.gguf'\]"):
        locate(section(folder, gguf_file="other.gguf"))


@pytest.mark.parametrize("check", [locate, lambda model: check_run(parse_run({"model": model.model_dump(), **REST}))])
def test_a_folder_with_a_gguf_file_says_which_field_names_it(tmp_path, check):
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ConfigError, match=r"no config.json.*Set model.gguf_file to one of \['tiny.gguf'\]"):
        check(section(tmp_path, gguf_file=None))
    with pytest.raises(
        ConfigError, match=r"is a file. Set model.base to its folder and model.gguf_file to 'tiny.gguf'"
    ):
        fetch(str(tmp_path / "tiny.gguf"))


REST = {
    "schedule": {"name": "linear"},
    "parametrization": {"name": "embedding", **SPACE},
    "backbone": {"name": "two_stream", **NETWORK},
}


@pytest.mark.skipif(is_old, reason="refused for its release first")
def test_without_the_package_a_gguf_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr("l2d_framework.base_model.is_gguf_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install gguf"):
        check_run(parse_run({"model": {"base": str(tmp_path), "gguf_file": "tiny.gguf"}, **REST}))


@needs_gguf
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.95])
def test_a_damaged_gguf_file_is_refused_in_one_line(packed, share):
    folder, _ = packed
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(content[: int(share * len(content))])
    headless = [load_config, load_tokenizer] if share < 0.1 else []
    for opened in [*headless, load_language_model]:
        with pytest.raises(CheckpointError, match=r"^[^\n]*packed[^\n]* cannot be read [^\n]*$"):
            opened(section(folder))


@needs_gguf
def test_a_family_that_transformers_does_not_read_from_gguf_is_refused(packed):
    folder, _ = packed
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(content.replace(b"qwen2", b"qwen9"))
    with pytest.raises(CheckpointError, match=r"The tiny.gguf of .* cannot be read .*qwen9"):
        load_config(section(folder))


@needs_gguf
def test_config_check_reads_a_gguf_base(packed, tmp_path):
    folder, _ = packed
    file = tmp_path / "run.yaml"
    file.write_text(over(folder, diffusion_run, tmp_path).model_dump_json())
    found = CliRunner().invoke(app, ["config", "check", str(file)])
    assert found.exit_code == 0, found.output


def test_a_release_that_loses_the_control_tokens_of_a_file_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("l2d_framework.base_model.transformers.__version__", "5.17.0")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"transformers 5.17.0 loses the control tokens of GGUF files"):
        locate(section(tmp_path))
