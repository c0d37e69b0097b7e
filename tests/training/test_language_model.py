import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from l2d_framework.config import TrainingSection, check_runs, parse_run, parse_stages
from l2d_framework.errors import ConfigError
from l2d_framework.models import checkpoint
from l2d_framework.models.unloaded import UnloadedModel
from l2d_framework.training import language_model
from l2d_framework.training.language_model import NextToken
from l2d_framework.training.run import train_runs

# Emitted by peft itself.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SCRATCH = {
    "tokenizer": {"vocab_size": 280},
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    return folder


def fields(folder: Path, name: str, **given: Any) -> dict[str, Any]:
    return tiny_runs.language_model_run(folder / "sums.jsonl", folder / name, **given)


def train(run: dict[str, Any], *callbacks: TrainerCallback) -> dict[str, Any]:
    return train_runs([parse_run(run)], callbacks=lambda _: callbacks)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    lm = tiny_lm(family)
    ids = torch.randint(4, 260, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.5, -100)
    labels[:, 0] = -100
    nothing = torch.zeros(2, dtype=torch.int64)
    learner = NextToken(lm, tiny_tokenizer(), TrainingSection(loss_chunk=2))
    unused = dict.fromkeys(("length", "class_id", "index", "epoch"), nothing)
    found = learner(input_ids=ids, blocks=(labels >= 0).long(), labels=labels, **unused)
    expected = lm(input_ids=ids, labels=labels).loss
    count = (labels >= 0).sum()
    torch.testing.assert_close(found["loss"] / count, expected)
    assert found["row"].bincount().tolist() == (labels >= 0).sum(1).tolist()
    parameters = dict(lm.named_parameters())
    ours = torch.autograd.grad(found["loss"] / count, list(parameters.values()))
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-6)


def test_a_model_from_scratch_becomes_the_base_of_a_diffusion_run(folder: Path) -> None:
    first = fields(folder, "scratch", scratch=SCRATCH)
    second = tiny_runs.diffusion_run(folder / "scratch", folder / "sums.jsonl", folder / "diffusion", max_steps=2)
    stages = parse_stages({"stages": [first, second]})
    cards = train_runs(stages)
    found = tiny_runs.losses(folder / "scratch")
    assert found[9]["eval_loss"] < found[3]["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "scratch")
    lm = AutoModelForCausalLM.from_pretrained(folder / "scratch")
    assert lm.config.vocab_size == len(tokenizer) == 280
    assert lm.config.eos_token_id == tokenizer.eos_token_id
    assert (folder / "scratch" / "best" / "config.json").is_file()
    assert tokenizer.decode(tokenizer("12+3=15")["input_ids"]) == "12+3=15"
    model = checkpoint.load(folder / "diffusion")
    assert torch.equal(model.backbone.table(), lm.get_input_embeddings().weight)
    assert [card["kind"] for card in cards] == ["language_model", "diffusion"]
    assert "## Training" in (folder / "scratch" / "README.md").read_text()
    # Both stages are finished: neither is started again.
    assert train_runs(stages, callbacks=lambda _: [tiny_runs.Stop(0)]) == cards


def test_the_loss_at_pure_noise_is_that_of_the_language_model_at_first(folder: Path) -> None:
    common = {"max_steps": 1, "learning_rate": 1e-30, "final_learning_rate": 0.0, "weight_decay": 0.0}
    train(fields(folder, "plain", model={"base": str(folder / "base")}, training=common))
    train(tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / "denoise", **common))
    plain = tiny_runs.losses(folder / "plain")[1]["eval_loss"]
    assert tiny_runs.losses(folder / "denoise")[1]["eval_loss"] == pytest.approx(plain, abs=1e-5)


LORA = {"rank": 2, "targets": ["q_proj", "v_proj"]}


def test_a_lora_run_writes_an_adapter_that_later_runs_start_from(folder: Path) -> None:
    train(fields(folder, "lora", model={"base": str(folder / "base")}, lora=LORA))
    weights = load_file(folder / "lora" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(base, str(folder / "lora")).merge_and_unload()
    later = tiny_runs.diffusion_run(folder / "lora", folder / "sums.jsonl", folder / "later", max_steps=1)
    train(later)
    lm = checkpoint.load(folder / "later").backbone.lm
    for name, value in merged.state_dict().items():
        assert torch.equal(value, lm.state_dict()[name]), name


def test_an_adapter_over_a_relative_path_is_opened_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    base = shutil.copytree(folder / "base", tmp_path / "models" / "x")
    monkeypatch.chdir(tmp_path)
    training = {"max_steps": 1, "eval_steps": 1}
    card = train(fields(folder, "adapter", model={"base": "models/x"}, lora=LORA, training=training))
    assert card["trained_in"] == str(tmp_path)

    def check(path: str) -> None:
        given = tiny_runs.diffusion_run(Path(path), folder / "sums.jsonl", folder / "over", max_steps=1)
        check_runs([parse_run(given)])

    for adapter, here in ((folder / "adapter", folder), (folder / "adapter" / "best", folder / "adapter" / "best")):
        monkeypatch.chdir(here)
        for opened in (UnloadedModel, check):
            opened(str(adapter))
            hidden = base.rename(tmp_path / "moved")
            text = rf"for from here, from '{tmp_path}' and '{adapter}'\. The PEFT adapter '{adapter}' was trained"
            with pytest.raises(ConfigError, match=text):
                opened(str(adapter))
            hidden.rename(base)
    assert UnloadedModel(".").reference.base == "."


@pytest.mark.parametrize("lora", [None, {**LORA, "dropout": 0.5}], ids=["full", "lora"])
def test_finetuning_resumes_with_the_same_losses(folder: Path, lora: dict[str, Any] | None) -> None:
    def run(name: str) -> dict[str, Any]:
        return fields(folder, f"{name}_{lora is None}", model={"base": str(folder / "base")}, lora=lora)

    train(run("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(run("stopped"), tiny_runs.Stop(5))
    train(run("stopped"))
    whole, stopped = (tiny_runs.losses(folder / f"{name}_{lora is None}") for name in ("whole", "stopped"))
    assert stopped == whole
    assert whole[9]["eval_loss"] < whole[3]["eval_loss"]


def test_a_bfloat16_base_is_trained_in_float32_and_saved_as_it_was(folder: Path) -> None:
    tiny_lm("llama").to(torch.bfloat16).save_pretrained(folder / "half")
    tiny_tokenizer().save_pretrained(folder / "half")
    train(fields(folder, "halved", model={"base": str(folder / "half")}, training={"max_steps": 2}))
    assert {value.dtype for value in load_file(folder / "halved" / "model.safetensors").values()} == {torch.bfloat16}
    kept = load_file(folder / "halved" / "checkpoint-2" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_loss(folder: Path) -> None:
    for name, on in (("kept", False), ("recomputed", True)):
        training = {"max_steps": 3, "gradient_checkpointing": on}
        train(fields(folder, name, model={"base": str(folder / "base")}, training=training))
    kept, again = tiny_runs.losses(folder / "kept"), tiny_runs.losses(folder / "recomputed")
    for step, expected in kept.items():
        assert again[step] == pytest.approx(expected, abs=1e-5)


def test_unknown_lora_targets_are_refused_before_weights_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "load_language_model", lambda _: pytest.fail("weights were loaded"))
    run = fields(folder, "typo", model={"base": str(folder / "base")}, lora={"targets": ["q_porj"]})
    with pytest.raises(ConfigError, match=r"no linear module 'q_porj'.*did you mean 'q_proj'"):
        train(run)


def test_a_lora_on_an_adapter_is_refused(folder: Path) -> None:
    train(fields(folder, "first_lora", model={"base": str(folder / "base")}, lora=LORA, training={"max_steps": 1}))
    run = fields(folder, "second_lora", model={"base": str(folder / "first_lora")}, lora=LORA)
    with pytest.raises(ConfigError, match="Save the merged model first"):
        train(run)


def test_chats_made_of_two_columns_train_the_tokenizer_and_a_model(folder: Path) -> None:
    rows = folder / "columns.jsonl"
    rows.write_text('{"question": "2+2?", "answer": "It is 4."}\n' * 8)
    run = fields(folder, "columns", scratch=SCRATCH, training={"max_steps": 1, "eval_steps": None})
    source = {"path": str(rows), "format": "messages", "columns": {"prompt": "question", "completion": "answer"}}
    run["data"] = {"train": [source], "max_length": 64}
    assert train(run)["data"]["splits"]["train"]["examples"] == 8


def test_messages_train_the_tokenizer_and_are_answered_with_its_template(folder: Path) -> None:
    rows = folder / "chat.jsonl"
    turn = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]}\n'
    rows.write_text(turn * 8)
    run = fields(folder, "chat", scratch=SCRATCH, training={"max_steps": 1, "eval_steps": None})
    run["data"] = {"train": [{"path": str(rows)}], "max_length": 64}
    card = train(run)
    assert card["data"]["splits"]["train"]["examples"] == 8
    own = AutoTokenizer.from_pretrained(folder / "chat").chat_template
    assert own is not None
    run = fields(
        folder, "other_chat", model={"base": str(folder / "chat")}, training={"max_steps": 1, "eval_steps": None}
    )
    run["data"] = {"train": [{"path": str(rows)}], "max_length": 64, "chat_template": own + "{# other #}"}
    train(run)
    assert AutoTokenizer.from_pretrained(folder / "other_chat").chat_template == own + "{# other #}"
