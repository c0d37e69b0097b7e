"""TESS 2 through the same run files, commands and checkpoints as any other method."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, TrainerCallback
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.config import parse_run
from l2d_framework.errors import CheckpointError, ConfigError
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models import checkpoint
from l2d_framework.models.checkpoint import load, save
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run import train_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model beside its data; the base it came from is gone."""
    folder = tmp_path_factory.mktemp("tess")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    train_runs([parse_run(run(folder, "whole"))])
    return folder


def run(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    return tiny_runs.tess_run(folder / "base", folder / "sums.jsonl", folder / name, **training)


@pytest.fixture(scope="module")
def lm(folder: Path) -> DiffusionLM:
    return load(folder / "whole")


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_training_lowers_the_loss_with_and_without_pads(folder: Path) -> None:
    found = tiny_runs.losses(folder / "whole")
    for name, share in (("eval_loss", 0.9), ("eval_loss_without_pads", 0.99)):
        assert found[9][name] < share * found[3][name], name
    assert found[9]["eval_loss"] < found[9]["eval_loss_without_pads"]


def test_a_run_that_was_interrupted_goes_on_as_if_it_was_not(folder: Path) -> None:
    given = run(folder, "resumed")
    with pytest.raises(KeyboardInterrupt):
        train_runs([parse_run(given)], callbacks=lambda _: [Stop()])
    train_runs([parse_run(given)])
    assert tiny_runs.losses(folder / "resumed") == tiny_runs.losses(folder / "whole")
    whole, resumed = (load(folder / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_micro_batches_change_nothing(folder: Path) -> None:
    train_runs([parse_run(run(folder, "micro", micro_batch_size=1))])
    whole, micro = tiny_runs.losses(folder / "whole"), tiny_runs.losses(folder / "micro")
    for step, entries in whole.items():
        for name, value in entries.items():
            assert abs(micro[step][name] - value) < 1e-4, (step, name)


def test_a_checkpoint_needs_no_other_model(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "whole" / "l2d.json").read_text())
    (folder / "whole").rename(tmp_path / "moved")
    try:
        moved = load(tmp_path / "moved")
        assert moved.origin.model is not None
        assert moved.origin.model.base == manifest["model"]["base"]
        with pytest.raises(CheckpointError, match="Leave base out"):
            load(tmp_path / "moved", base=str(folder / "base"))
        save(moved, tmp_path / "again")
        first, second = moved.state_dict(), load(tmp_path / "again").state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        (tmp_path / "moved").rename(folder / "whole")


def test_the_language_model_inside_is_a_transformers_folder(folder: Path, lm: DiffusionLM) -> None:
    inside = AutoModelForCausalLM.from_pretrained(folder / "whole" / "language_model").state_dict()
    assert all(torch.equal(inside[name], value) for name, value in lm.backbone.lm.state_dict().items())


def test_trained_weights_are_kept_in_the_type_of_the_base(folder: Path) -> None:
    given = run(folder, "half", max_steps=3)
    given["model"]["dtype"] = "bfloat16"
    train_runs([parse_run(given)])
    half = load(folder / "half")
    assert half.backbone.lm.dtype == torch.bfloat16
    assert half.generate(["1+1="], max_new_tokens=3).lengths.tolist() == [3]
    state = checkpoint.load_file(folder / "half" / "checkpoint-3" / "language_model" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_the_time_embedding_has_a_rate_of_its_own(folder: Path) -> None:
    before = checkpoint.build_model(parse_run(run(folder, "x"))).get_parameter("backbone.time.weight")
    train_runs([parse_run(run(folder, "slow", time_learning_rate=1e-12, max_steps=3))])
    train_runs([parse_run(run(folder, "even", max_steps=3))])
    slow, even = (load(folder / name).get_parameter("backbone.time.weight") for name in ("slow", "even"))
    assert (slow - before).abs().max() < 1e-6 < 1e-4 < (even - before).abs().max()


def test_a_pad_token_is_added_where_there_is_none(tmp_path: Path) -> None:
    base = tiny_runs.write_base(tmp_path / "base")
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    given = run(tmp_path, "padded", max_steps=2)
    tiny_runs.write_sums(tmp_path / "sums.jsonl")
    given["model"]["pad_token"] = "[PAD]"
    train_runs([parse_run(given)])
    padded = load(tmp_path / "padded")
    assert padded.tokenizer is not None
    assert padded.tokenizer.pad_token == "[PAD]"
    assert padded.backbone.vocab_size == len(padded.tokenizer) > 260


def test_a_row_answers_alike_alone_and_among_others(lm: DiffusionLM) -> None:
    prompts = ["1+1=", "123+45=", "7+"]
    together = lm.generate(prompts, max_new_tokens=6, preset="tess2-release", num_inference_steps=5)
    for row, prompt in enumerate(prompts):
        alone = lm.generate([prompt], max_new_tokens=6, preset="tess2-release", num_inference_steps=5)
        assert torch.equal(alone.answers[0], together.answers[row])


def test_every_prompt_may_have_a_seed(lm: DiffusionLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "preset": "tess2-release", "num_inference_steps": 5}
    found = lm.generate(["1+1=", "1+2="], seed=[3, 4], **options)
    assert torch.equal(found.answers[1], lm.generate(["1+1=", "1+2="], seed=4, **options).answers[1])
    assert torch.equal(found.answers[0], lm.generate(["1+1="], seed=3, **options).answers[0])


def test_an_answer_may_grow_block_by_block_until_it_ends(lm: DiffusionLM) -> None:
    grown = lm.generate(["1+1="], max_new_tokens=20, block_size=4)
    again = lm.generate(["1+1="], max_new_tokens=20, block_size=4)
    assert torch.equal(grown.sequences, again.sequences)
    first = lm.generate(["1+1="], max_new_tokens=4)
    assert torch.equal(grown.answers[:, :4], first.answers)
    end = int(first.answers[0, 1])
    cut = lm.generate(["1+1="], max_new_tokens=20, block_size=4, eos_token_id=end)
    place = first.answers[0].tolist().index(end)
    assert cut.lengths.tolist() == [place + 1]
    assert cut.answers.shape[1] == 4, "blocks after the end are not computed"


def test_what_follows_the_end_is_no_answer(lm: DiffusionLM) -> None:
    whole = lm.generate(["1+1="], max_new_tokens=8)
    end = int(whole.answers[0, 3])
    cut = lm.generate(["1+1="], max_new_tokens=8, eos_token_id=end)
    length = whole.answers[0].tolist().index(end) + 1
    assert cut.lengths.tolist() == [length]
    assert torch.equal(cut.answers[0, :length], whole.answers[0, :length])
    assert (cut.answers[0, length:] == lm.backbone.lm.generation_config.pad_token_id).all()


def test_infilling_keeps_what_is_known_and_looks_ahead(lm: DiffusionLM) -> None:
    assert lm.tokenizer is not None
    text = lm.infill("12+<mask:3>=4<mask:1>").texts(lm.tokenizer)[0]
    assert text.startswith("12+")
    assert "=4" in text
    options: dict[str, Any] = {"preset": "tess2-release", "num_inference_steps": 4}
    several = ["1<mask:2>", "12+<mask:3>=4<mask:1>", "1<mask:4>=7"]
    together = lm.infill(several, **options).texts(lm.tokenizer)
    assert together == [lm.infill(one, **options).texts(lm.tokenizer)[0] for one in several]
    seen: list[torch.Tensor] = []
    for end in ("7", "8"):
        lm.infill(f"1<mask:4>={end}", observer=lambda e: seen.append(e.logits), num_inference_steps=1)
    assert not torch.allclose(seen[0], seen[1])
    with pytest.raises(ConfigError, match="There is no text"):
        lm.infill([])


def test_infilling_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    text, pages = "1+<mask:2>=3", []
    for number, how in enumerate([(), ("--stream",), ("--trace",), ("--stream", "--trace")]):
        page, out = tmp_path / f"{number}.html", tmp_path / f"{number}.jsonl"
        pages.append(page)
        found = cli(folder / "whole", "--infill", text, *how, *([page] if "--trace" in how else []), "--out", out)
        assert found.exit_code == 0, found.exception
        row = json.loads(out.read_text())
        assert row["infill"] == text
        assert row["answers"][0]["text"] == found.stdout.rstrip("\n")
        assert out.read_text() == (tmp_path / "0.jsonl").read_text()
    assert pages[2].read_text() == pages[3].read_text()
    several = cli(folder / "whole", "--infill", text, "--infill", "2+<mask:1>=3").stdout.splitlines()
    assert several[:2] == ["==> Text 0 <==", row["answers"][0]["text"]]
    assert several[2:4] == ["", "==> Text 1 <=="]


def test_a_page_and_a_picture_of_an_answer(folder: Path, tmp_path: Path) -> None:
    plain = cli(folder / "whole", "--prompt", "1+1=", "--max-new-tokens", 5)
    for name in ("trace.html", "trace.png"):
        found = cli(folder / "whole", "--prompt", "1+1=", "--max-new-tokens", 5, "--trace", tmp_path / name)
        assert found.exit_code == 0, found.exception
        assert found.stdout == plain.stdout
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--infill", "no gap"), "has no gap"),
        (("--infill", "1<mask:300>"), "context is 128"),
        (("--infill", "1<mask:99999999999>"), "has 100000000000 tokens with its gaps"),
        (("--infill", "<mask:3>=4"), "begins with a gap"),
        (("--infill", "1<mask:2>", "--do-sample"), "most likely tokens"),
        (("--infill", "1<mask:2>", "--stop", "x"), "most likely tokens"),
        (("--infill", "1<mask:2>", "--class", "x"), "most likely tokens"),
        (("--infill", "<mask:3>", "--prompt", "x"), "fills gaps and answers nothing"),
        (("--trace", "x.html", "--prompt", "a", "--prompt", "b"), "one answer takes shape"),
        (("--trace", "x.html", "--infill", "a<mask:1>", "--infill", "b<mask:1>"), "one answer takes shape"),
        (("--stream", "--infill", "a<mask:1>", "--infill", "b<mask:1>"), "got 2 texts"),
        (("--chat", "--out", "x.jsonl"), "a talk has none"),
        (("--trace", "x.gif", "--prompt", "a"), r"\.html"),
        (("--prompt", "a", "--set", "patience=2", "--solver", "bosh3"), "chooses its own steps"),
        (("--prompt", "a", "--num-inference-steps", "0"), "plain language model"),
        (("--prompt", "a", "--base", "elsewhere"), "Leave base out"),
    ],
)
def test_wrong_requests_are_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    found = cli(folder / "whole", *options, "--max-new-tokens", 4)
    assert found.exit_code != 0
    with pytest.raises((ConfigError, CheckpointError), match=message):
        raise found.exception


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1, "backbone": {"attention": "causal"}}, "its noise would go unseen"),
        ({"training": {"draws_per_token": 2}}, "see each other"),
        ({"data": {"masking": {}}}, "text"),
    ],
)
def test_wrong_runs_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    given = run(folder, "refused")
    for name, value in changes.items():
        given[name] = {**given[name], **value} if isinstance(value, dict) else value
    with pytest.raises(Exception, match=message):
        train_runs([parse_run(given)])


def test_a_run_in_blocks_trains_and_its_checkpoint_answers_in_blocks(folder: Path) -> None:
    train_runs([parse_run({**run(folder, "blocks", gradient_checkpointing=True), "block_size": 4})])
    found = tiny_runs.losses(folder / "blocks")
    assert found[9]["eval_loss"] < 0.9 * found[3]["eval_loss"]
    model = load(folder / "blocks")
    assert model.block_size == 4
    assert model.generate(["1+1="], max_new_tokens=9, eos_token_id=None).lengths.tolist() == [9]
    refused = cli(folder / "blocks", "--infill", "1+<mask:1>=2")
    assert "block_size: null" in str(refused.exception)


def test_infilling_needs_a_model_that_looks_ahead(folder: Path) -> None:
    given = tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / "l2d", max_steps=2)
    train_runs([parse_run(given)])
    found = cli(folder / "l2d", "--infill", "1+<mask:1>=2")
    assert isinstance(found.exception, ConfigError)
    assert "sees the tokens after a gap" in str(found.exception)


def test_padding_on_the_left_changes_no_answer(lm: DiffusionLM) -> None:
    ids = [5, 9, 17, 33]
    alone = lm.generate(pad_left([ids]), max_new_tokens=5)
    padded = lm.generate(pad_left([ids, [7] * 11]), max_new_tokens=5)
    assert torch.equal(alone.answers[0], padded.answers[0])


@pytest.fixture(scope="module")
def reward(folder: Path) -> Path:
    """A random reward model over the same tokens."""
    config = LlamaForSequenceClassification.config_class.from_pretrained(folder / "base", num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    return folder / "reward"


def test_a_reward_guides_from_the_command_line(folder: Path, reward: Path, tmp_path: Path) -> None:
    asked = ("--prompt", "1+1=", "--max-new-tokens", 5, "--out")
    guided = ("--guidance", "reward_gradient", "--set", f"guidance.0.model={reward}")
    rows = []
    for name, options in {"plain": (), "zero": (*guided, "--guidance-scale", 0), "guided": guided}.items():
        found = cli(folder / "whole", *asked, tmp_path / name, *options)
        assert found.exit_code == 0, found.exception
        rows.append(json.loads((tmp_path / name).read_text())["answers"][0])
    plain, zero, steered = rows
    assert plain == zero
    assert len(steered["reward"]) == 6, "one per evaluation"


def test_a_reward_model_of_other_tokens_is_refused_before_weights_load(
    folder: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tiny_tokenizer()
    strange.add_tokens(["<|other|>"])
    for file in reward.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    strange.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "load_language_model", None)
    options = ("--guidance", "reward_gradient", "--set", f"guidance.0.model={tmp_path}")
    found = cli(folder / "whole", "--prompt", "1+1=", "--max-new-tokens", 5, *options)
    assert isinstance(found.exception, ConfigError)
    assert "vocabular" in str(found.exception)
