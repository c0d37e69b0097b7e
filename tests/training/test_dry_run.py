"""What a dry run says is what training then does, and no weights are loaded for it."""

import json

import pytest
import tiny_runs
from transformers import PreTrainedModel

from l2d_framework.config import parse_run
from l2d_framework.errors import ConfigError, DataError
from l2d_framework.training.arguments import micro_batch
from l2d_framework.training.data.collate import IGNORED
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.dry_run import Machine, dry_run
from l2d_framework.training.run import check_rows, collator, first_tokenizer, pad_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def counts_only(monkeypatch):
    """For what memory has no part in."""
    monkeypatch.setattr("l2d_framework.training.dry_run._memory", lambda *_: {})


def planned(*runs, **machine):
    return dry_run([parse_run(run) for run in runs], Machine(**machine))


def token_run(folder, kind, **training):
    make = {"l2d": tiny_runs.diffusion_run, "tess": tiny_runs.tess_run}[kind]
    fields = make(folder / "base", folder / "sums.jsonl", folder / "out", **training)
    return {
        **fields,
        "data": {**fields["data"], "eval_fraction": 0.0},
        "training": {**fields["training"], "eval_steps": None},
    }


@pytest.mark.parametrize(("kind", "padding"), [("l2d", "none"), ("tess", "target"), ("tess", "context")])
@pytest.mark.usefixtures("counts_only")
def test_tokens_and_steps_are_those_that_training_counts(folder, kind, padding):
    fields = token_run(folder, kind, max_steps=None, epochs=2.0)
    fields["data"]["padding"] = padding
    training = planned(fields, tokens_per_second=10.0)[0]["training"]
    run = parse_run(fields)
    tokenizer = first_tokenizer(run, [])
    data = prepare(run.data, tokenizer, seed=run.seed)
    batch = collator(run, run.data, pad_id(tokenizer), run.seed)(list(data.train))
    share = run.training.batch_size / len(data.train)
    assert training["examples"] == len(data.train) == 22
    assert training["steps"] == 11
    assert training["tokens_per_step"] == round(share * int((batch["blocks"] >= 0).sum()))
    assert training["supervised_tokens_per_step"] == round(share * int((batch["labels"] != IGNORED).sum()))
    assert training["hours"] == pytest.approx(11 * training["tokens_per_step"] / 10 / 3600)


@pytest.mark.usefixtures("counts_only")
def test_examples_are_measured_before_they_are_cut_and_shown_whole(folder, tmp_path):
    rows = [{"prompt": "a" * n, "completion": "bc"} for n in (4, 8, 30, 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = token_run(folder, "l2d")
    fields["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 32, "drop_unsupervised": True}
    found = planned(fields)[0]["examples"]
    # The longest prompt leaves nothing to learn; of the one before, the end of text is cut off.
    assert (found["looked_at"], found["left_out"], found["truncated"]) == (3, 1, 1)
    assert (found["lengths"]["shortest"], found["lengths"]["longest"]) == (7, 33)
    assert found["shown"]["example"] == [{"text": "aaaa", "learnt": False}, {"text": "bc</s>", "learnt": True}]


@pytest.mark.usefixtures("counts_only")
def test_nothing_to_learn_is_refused(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 90, "completion": "b"}) + "\n")
    fields = token_run(folder, "l2d")
    fields["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 32}
    with pytest.raises(DataError, match=r"has a token to learn within data.max_length 32"):
        planned(fields)


def test_sequences_beyond_the_context_are_refused_by_whatever_looks_at_a_run(folder):
    fields = token_run(folder, "l2d")
    fields["data"]["max_length"] = 4096
    with pytest.raises(ConfigError, match="max_length 4096 exceeds the 128 tokens"):
        planned(fields)
    with pytest.raises(ConfigError, match="max_length 4096 exceeds the 128 tokens"):
        check_rows([parse_run(fields)])


def test_later_stages_stand_on_what_is_still_to_be_trained(folder):
    scratch = {
        "tokenizer": {"vocab_size": 300},
        "config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                   "num_attention_heads": 2},
    }  # fmt: skip
    first = tiny_runs.language_model_run(folder / "sums.jsonl", folder / "first", scratch=scratch)
    second = tiny_runs.tess_run(folder / "first", folder / "sums.jsonl", folder / "second")
    plans = planned(first, second)
    assert [plan["examples"] for plan in plans] == [None, None]  # there is no tokenizer yet
    assert plans[0]["parameters"]["total"] == plans[1]["parameters"]["total"] - 16  # the time embedding
    assert plans[0]["training"]["steps"] == 9
    assert all(plan["memory"]["peak"] > 16 * plan["parameters"]["trained"] for plan in plans)


def test_a_reward_run_is_planned_too(folder, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = planned({
        "kind": "reward",
        "model": {"base": str(folder / "base")},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}], "max_length": 64},
        "training": {"batch_size": 4},
    })[0]  # fmt: skip
    assert plan["training"]["steps"] == 2
    assert plan["parameters"]["trained"] == plan["parameters"]["total"]
    assert list(plan["examples"]["shown"]) == ["chosen", "rejected"]
    own, recomputing = (case for case in plan["memory"]["cases"] if case["length"] == 64)
    assert recomputing["activations"] < own["activations"]


def test_devices_share_a_batch_that_they_must_be_able_to_divide(folder):
    training = parse_run(token_run(folder, "l2d", batch_size=12, micro_batch_size=2)).training
    assert micro_batch(training, 2) == (2, 3)
    assert micro_batch(training.model_copy(update={"micro_batch_size": None}), 3) == (4, 1)
    with pytest.raises(ConfigError, match="batch_size 12 is no multiple of micro_batch_size 2 on each of 5 devices"):
        micro_batch(training, 5)


def test_weights_in_shares_want_a_micro_batch_whose_size_is_known(folder):
    run = parse_run(token_run(folder, "l2d", batch_size=12, micro_batch_size="auto"))
    with pytest.raises(ConfigError, match="micro_batch_size is 'auto', but where anything is in shares"):
        dry_run([run], Machine(2, "full"))
