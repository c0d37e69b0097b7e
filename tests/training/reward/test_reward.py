import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from l2d_framework.config import RewardRun, SimplexNoise, load_run, parse_run, resolved_json
from l2d_framework.errors import ConfigError, DataError, UnsupportedModelError, install
from l2d_framework.registry import registry
from l2d_framework.training import output_dir
from l2d_framework.training.reward import run as reward_module
from l2d_framework.training.reward.data import PairWriter, prepare_pairs
from l2d_framework.training.reward.run import load_reward_model, padding_tokenizer, train_reward
from l2d_framework.training.run import train_runs

QUICK = {
    "batch_size": 8,
    "learning_rate": 3e-3,
    "max_steps": 9,
    "save_steps": 3,
    "eval_steps": 3,
    "logging_steps": 3,
    "warmup_ratio": 0.1,
}


def pairs(count: int = 60, longest: int = 4) -> list[dict[str, Any]]:
    """Pairs that a word tells apart; prompts and lengths differ."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        sides = (f"{word} {'x' * draw.randint(0, longest)}" for word in ("good", "bad"))
        rows.append({"prompt": f"q{number}", "chosen": next(sides), "rejected": next(sides)})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tiny_runs.write_base(folder / "base")
    write(folder / "pairs.jsonl", pairs())
    return folder


def fields(folder: Path, name: str = "unused", **sections: Any) -> dict[str, Any]:
    data = {"train": [{"path": str(folder / "pairs.jsonl")}], "eval_fraction": 0.3, "max_length": 64}
    return {
        "kind": "reward",
        "model": {"base": str(folder / "base")},
        "output_dir": str(folder / name),
        **sections,
        "data": {**data, **sections.get("data", {})},
        "training": {**QUICK, **sections.get("training", {})},
    }


def parse(*args: Any, **sections: Any) -> RewardRun:
    run = parse_run(fields(*args, **sections))
    assert isinstance(run, RewardRun)
    return run


def rewards(output: Path, texts: list[list[int]]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(output)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return train_reward(parse(folder, "whole"))


def test_a_separable_preference_is_learnt_and_measured_on_prompts_never_trained_on(whole, folder):
    assert whole["result"]["held_out"]["accuracy"] > 0.9
    assert whole["result"]["held_out"]["margin"] > 0
    splits = whole["data"]["splits"]
    assert splits["train"]["pairs"] + splits["eval"]["pairs"] == 60
    assert whole["finished"]
    assert whole == output_dir.read_card(folder / "whole")


def test_the_output_is_a_plain_sequence_classifier_whose_rewards_are_those_on_the_card(whole, folder):
    run = parse(folder, "whole")
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder / "base").get_vocab()
    held_out = prepare_pairs(run, tokenizer).eval
    lead = rewards(folder / "whole", list(held_out["chosen_ids"])) - rewards(
        folder / "whole", list(held_out["rejected_ids"])
    )
    measured = whole["result"]["held_out"]
    assert measured["margin"] == pytest.approx(lead.mean().item(), abs=1e-5)
    assert measured["accuracy"] == pytest.approx((lead > 0).float().mean().item())
    assert measured["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(lead).mean().item(), abs=1e-5)
    config = AutoModelForSequenceClassification.from_pretrained(folder / "whole").config
    assert (config.num_labels, config.pad_token_id) == (1, tokenizer.pad_token_id)


def test_a_finished_run_is_not_trained_again_and_another_is_refused(whole, folder):
    assert train_reward(parse(folder, "whole"), callbacks=[tiny_runs.Stop(5)]) == whole
    with pytest.raises(ConfigError, match=r"training\.learning_rate: 0\.003 there, 0\.1 now"):
        train_reward(parse(folder, "whole", training={"learning_rate": 0.1}))


def test_an_interrupted_run_resumes_with_the_same_weights(whole, folder):
    run = parse(folder, "stopped")
    with pytest.raises(KeyboardInterrupt):
        train_reward(run, callbacks=[tiny_runs.Stop(5)])
    assert [path.name for path in output_dir.checkpoints(folder / "stopped")] == ["checkpoint-3"]
    card = train_reward(run)
    assert card["sessions"] == 2
    assert card["result"]["held_out"] == whole["result"]["held_out"]
    for name in ("stopped", "other_seed"):
        if name == "other_seed":
            train_reward(parse(folder, name, seed=1, training={"max_steps": 1}))
        ours, theirs = (AutoModelForSequenceClassification.from_pretrained(folder / which) for which in (name, "whole"))
        same = [torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        assert all(same) == (name == "stopped")


def test_a_finished_run_with_more_updates_is_the_longer_run_where_the_rate_is_constant(folder):
    # 40 pairs and batches of 8: an epoch ends with the fifth update.
    constant = {"save_steps": None, "eval_steps": 4, "logging_steps": 1, "warmup_ratio": 0.0, "final_fraction": 1.0}
    for name, training in (
        ("straight", {"max_steps": 8}),
        ("longer", {"max_steps": 4}),
        ("longer", {"max_steps": None, "epochs": 8 / 5}),
    ):
        card = train_reward(parse(folder, name, training=constant | training))
    assert (card["continued"][0]["updates"], card["result"]["steps"]) == (4, 8)
    assert tiny_runs.losses(folder / "longer") == tiny_runs.losses(folder / "straight")
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("longer", "straight"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(ConfigError, match=r"has made 8 updates, and .* ask for 7\."):
        train_reward(parse(folder, "longer", training=constant | {"max_steps": 7}))


def test_overwrite_moves_the_old_folder_aside(folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "precious.txt").write_text("mine")
    run = parse(folder, "taken", training={"max_steps": 1})
    with pytest.raises(ConfigError, match="is not a run's"):
        train_reward(run)
    train_reward(run, overwrite=True)
    assert (folder / "taken.old-1" / "precious.txt").read_text() == "mine"


def test_the_seed_decides_the_order_of_pairs(folder):
    from l2d_framework.training.reward.trainer import PairTrainer, make_reward_arguments

    def order(seed: int) -> list[list[int]]:
        run = parse(folder, "order", seed=seed, data={"eval_fraction": 0.0}, training={"eval_steps": None})
        tokenizer = padding_tokenizer(run)
        trainer = PairTrainer(
            load_reward_model(run, tokenizer),
            make_reward_arguments(run, folder / "order"),
            run=run,
            pairs=prepare_pairs(run, tokenizer),
            tokenizer=tokenizer,
        )
        return [row.tolist() for batch in trainer.get_train_dataloader() for row in batch["input_ids"]]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_the_learning_rate_rises_and_falls_in_straight_lines_to_the_final_fraction(folder):
    run = parse(folder, "rate", training={"logging_steps": 1, "warmup_ratio": 0.3, "final_fraction": 0.1})
    train_reward(run)
    history = json.loads((folder / "rate" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] / run.training.learning_rate for entry in history if "learning_rate" in entry]
    # The rate of an update counts the updates before it: 3 of 9 are warm-up, and 1/10 is reached after the last.
    assert rates == pytest.approx([min(step / 3, 1 - 0.9 * (step - 3) / 6) for step in range(9)])


def test_pairs_with_a_side_that_is_too_long_are_left_out_and_counted(folder):
    rows = [*pairs(8), {"prompt": "q", "chosen": "good" * 20, "rejected": "bad"}]
    rows += [{"prompt": "q", "chosen": "good", "rejected": "bad" * 30}]
    write(folder / "long.jsonl", rows)
    data = {"train": [{"path": str(folder / "long.jsonl")}], "eval_fraction": 0.0}
    tokenizer = tiny_tokenizer()
    found = prepare_pairs(parse(folder, data=data, training={"eval_steps": None}), tokenizer)
    assert len(found.train) == 8
    assert found.card["sources"]["train"][0]["too_long"] == 2
    with pytest.raises(DataError, match=r"Each of the 10 pairs .* more than 3 tokens"):
        prepare_pairs(parse(folder, data={**data, "max_length": 3}, training={"eval_steps": None}), tokenizer)


QUESTION = [{"role": "user", "content": " Q "}]
ANSWERS = {"chosen": "A", "rejected": "B"}
TURNS = {side: [{"role": "assistant", "content": text}] for side, text in ANSWERS.items()}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " Q ", **ANSWERS},
        {"prompt": QUESTION, **ANSWERS},
        {"prompt": " Q ", **TURNS},
        {"prompt": QUESTION, **TURNS},
        {side: [*QUESTION, *answer] for side, answer in TURNS.items()},
        # A prompt beside whole conversations repeats their first turn.
        {"prompt": " Q ", **{side: [*QUESTION, *answer] for side, answer in TURNS.items()}},
        {side: [{"role": "system", "content": "S"}, *QUESTION, *answer] for side, answer in TURNS.items()},
    ],
)
@pytest.mark.parametrize(
    ("layout", "expected"),
    [("authors", "<|user|>\nQ\n<|assistant|>\nA</s>\n"), ("generation", "<s><|user|>\nQ\n<|assistant|>\nA</s>")],
)
def test_every_form_of_a_pair_is_written_alike(folder, tmp_path, row, layout, expected):
    write(tmp_path / "one.jsonl", [row])
    data = {"train": [{"path": str(tmp_path / "one.jsonl")}], "eval_fraction": 0.0, "format": layout}
    tokenizer = tiny_tokenizer()
    (found,) = prepare_pairs(parse(folder, data=data, training={"eval_steps": None}), tokenizer).train
    assert tokenizer.decode(found["chosen_ids"]) == expected
    assert tokenizer.decode(found["rejected_ids"]) == expected.replace("A</s>", "B</s>")


def test_the_authors_template_is_the_reference(golden_file):
    formats = json.loads(golden_file("tess/text_formats.json").read_text())
    data = {"train": [{"path": "x"}]}
    run = parse_run({"kind": "reward", "model": {"base": "x"}, "data": data})
    writer = PairWriter.of(run, tiny_tokenizer())
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert writer.encoder.render(turns) == formats["reward_template_example"]
    run = parse_run({"kind": "reward", "model": {"base": "x"}, "data": {**data, "format": "generation"}})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
    assert PairWriter.of(run, tiny_tokenizer()).encoder.render(turns) == formats["v1_full"]


@pytest.mark.parametrize(
    ("layout", "front", "back"), [("authors", "", "</s>\n"), ("generation", "<s>", "</s>"), ("tokenizer", "", "</s>")]
)
def test_texts_without_prompt_are_only_ended(folder, layout, front, back):
    tokenizer = tiny_tokenizer(chat=True)
    writer = PairWriter.of(parse(folder, data={"format": layout}), tokenizer)
    assert tokenizer.decode(writer.ids("a text")) == f"{front}a text{back}"


def test_another_chat_template_may_be_named(folder):
    tokenizer = tiny_tokenizer(chat=True)
    turns = [*QUESTION, *TURNS["chosen"]]
    own = PairWriter.of(parse(folder, data={"format": "tokenizer"}), tokenizer)
    assert own.encoder.render(turns) == tokenizer.apply_chat_template(turns, tokenize=False)
    named = PairWriter.of(parse(folder, data={"chat_template": "tulu"}), tokenizer)
    generation = PairWriter.of(parse(folder, data={"format": "generation"}), tokenizer)
    assert named.encoder.template == generation.encoder.template


def test_columns_of_other_names_and_margins_are_read(folder, tmp_path):
    rows = [{"q": "Q", "win": "A", "lose": "B", "gap": 2}, {"q": "R", "win": "A", "lose": "B", "gap": 0.5}]
    write(tmp_path / "other.jsonl", rows)
    columns = {"prompt": "q", "chosen": "win", "rejected": "lose", "margin": "gap"}
    data = {"train": [{"path": str(tmp_path / "other.jsonl"), "columns": columns}], "eval_fraction": 0.0}
    run = parse(folder, "margin", data=data, training={"eval_steps": None, "max_steps": 1})
    assert prepare_pairs(run, tiny_tokenizer()).train["margin"][:] == [2, 0.5]
    card = train_reward(run)
    # At step 0 of the warm-up nothing has been learnt: the loss shows the margins.
    assert card["result"]["train"]["loss"] > 0.9


def test_a_prompt_stands_on_one_side_only_whatever_its_pairs(folder, tmp_path):
    rows = [{**row, "chosen": f"{row['chosen']}{n}"} for row in pairs(20) for n in range(3)]
    write(tmp_path / "many.jsonl", rows)
    run = parse(folder, data={"train": [{"path": str(tmp_path / "many.jsonl")}]})
    found = prepare_pairs(run, tiny_tokenizer())
    questions = [
        {tiny_tokenizer().decode(ids).split("\n")[1] for ids in data["chosen_ids"]}
        for data in (found.train, found.eval)
    ]
    assert questions[0].isdisjoint(questions[1])
    assert len(questions[0]) + len(questions[1]) == 20


def test_presets_are_the_papers_and_the_scripts_and_explicit_values_win(tmp_path):
    def preset(name: str, **more: Any) -> RewardRun:
        run = parse_run({"kind": "reward", "preset": name, "model": {"base": "x"}, **more})
        assert isinstance(run, RewardRun)
        return run

    paper, script = preset("tess2-paper"), preset("tess2-script")
    assert paper.data.train[0].path == "weqweasdas/preference_dataset_mixture2_and_safe_pku"
    assert script.data.train[0].path == "argilla/ultrafeedback-binarized-preferences-cleaned"
    for run, length, batch, warmup, final in ((paper, 2048, 512, 0.03, 0.0), (script, 512, 128, 0.0, 0.1)):
        training = run.training
        assert (run.data.max_length, training.batch_size, training.micro_batch_size) == (length, batch, 1)
        assert (training.warmup_ratio, training.final_fraction, training.epochs) == (warmup, final, 1)
        assert (training.learning_rate, training.margin, run.data.format) == (2e-5, 0, "authors")
        assert (run.data.pad_to, run.noise, run.data.add_pad_token) == (None, None, False)
    mine = preset("tess2-script", data={"train": [{"path": "a"}]}, training={"epochs": 2.0})
    assert (mine.data.train[0].path, mine.data.max_length, mine.training.epochs) == ("a", 512, 2)
    (tmp_path / "run.json").write_text(resolved_json(mine))
    assert load_run(tmp_path / "run.json") == [mine]


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families_train_in_bfloat16_with_checkpointing(folder, tmp_path, family):
    tiny_lm(family).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    training = {"bf16": True, "gradient_checkpointing": True, "micro_batch_size": 4, "max_steps": 2}
    card = train_reward(parse(folder, family, model={"base": str(tmp_path / "base")}, training=training))
    model = AutoModelForSequenceClassification.from_pretrained(folder / family)
    assert (model.dtype, model.config.model_type, card["result"]["steps"]) == (torch.bfloat16, family, 2)


def test_a_base_may_be_a_reward_model_or_have_an_adapter(whole, folder, tmp_path):
    run = parse(folder, model={"base": str(folder / "whole")})
    again = load_reward_model(run, padding_tokenizer(run))
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "whole")
    assert torch.equal(again.score.weight, saved.score.weight)

    lm = get_peft_model(tiny_lm(), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    lm.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merged = lm.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    run = parse(folder, model={"base": str(folder / "base"), "adapter": str(tmp_path / "adapter")})
    model = load_reward_model(run, padding_tokenizer(run))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, merged)
    assert model.score.weight.shape == (1, 32)


def without_pad(folder: Path, tmp_path: Path) -> dict[str, str]:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tiny_lm().save_pretrained(tmp_path / "padless")
    tokenizer.save_pretrained(tmp_path / "padless")
    return {"base": str(tmp_path / "padless")}


def test_the_vocabulary_grows_only_if_asked_and_eos_pads_otherwise(folder, tmp_path):
    model = without_pad(folder, tmp_path)
    run = parse(folder, "eos_pads", model=model, training={"max_steps": 1, "warmup_ratio": 0.0})
    train_reward(run)
    tokenizer = AutoTokenizer.from_pretrained(folder / "eos_pads")
    assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", len(tiny_tokenizer()))
    # The end of every text is learnt, though it pads.
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(f) for f in (model["base"], folder / "eos_pads")
    )
    eos = [m.get_input_embeddings().weight[tokenizer.eos_token_id] for m in (before, after)]
    assert not torch.equal(*eos)

    run = parse(folder, model=model, data={"add_pad_token": True})
    tokenizer = padding_tokenizer(run)
    size = load_reward_model(run, tokenizer).get_input_embeddings().weight.shape[0]
    assert (tokenizer.pad_token, tokenizer.pad_token_id, size) == ("[PAD]", size - 1, len(tiny_tokenizer()) + 1)


def test_a_text_that_ends_in_the_padding_token_is_refused_unless_padding_is_seen(folder, tmp_path):
    model = without_pad(folder, tmp_path)
    run = parse(folder, model=model, data={"format": "generation"})
    with pytest.raises(DataError, match=r"Example 0 .* ends in the padding token '</s>'.*data\.pad_to"):
        prepare_pairs(run, padding_tokenizer(run))
    run = parse(folder, model=model, data={"format": "generation", "pad_to": 64})
    assert len(prepare_pairs(run, padding_tokenizer(run)).train)


def test_padded_training_reads_the_reward_at_the_end_of_the_row_as_guidance_does(folder):
    run = parse(folder, "padded", data={"pad_to": 80})
    card = train_reward(run)
    tokenizer = AutoTokenizer.from_pretrained(folder / "padded")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "padded")
    held_out = prepare_pairs(run, tokenizer).eval

    def read(ids: list[int]) -> float:
        row = torch.tensor([[*ids, *[tokenizer.pad_token_id] * (80 - len(ids))]])
        return float(model.score(model.model(row).last_hidden_state[0, -1]))

    with torch.no_grad():
        leads = [read(row["chosen_ids"]) - read(row["rejected_ids"]) for row in held_out]
    assert card["result"]["held_out"]["margin"] == pytest.approx(sum(leads) / len(leads), abs=1e-5)


def noise(k: float = 5.0) -> SimplexNoise:
    return SimplexNoise(schedule=registry().create("schedule", {"name": "linear"}), k=k)


def test_noisy_embeddings_tend_to_the_true_ones_and_to_those_of_noise(monkeypatch):
    from l2d_framework.training.reward.inputs import noisy_embeddings

    ids, matrix = torch.tensor([[1, 2], [3, 1]]), torch.randn(6, 4)
    for time, k in ((1.0, 30.0), (0.0, 1e-6)):
        monkeypatch.setattr(torch, "rand", lambda count, time=time, **_: torch.full((count,), time))
        found = noisy_embeddings(ids, matrix, noise(k), generator=torch.Generator().manual_seed(0))
        expected = matrix[ids] if time == 1 else matrix.mean(0).expand(2, 2, 4)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_noise_is_drawn_again_alike_after_an_interruption(folder):
    sections: dict[str, Any] = {"noise": {"schedule": {"name": "linear"}}, "data": {"pad_to": 64}}
    whole = train_reward(parse(folder, "noisy", **sections))
    with pytest.raises(KeyboardInterrupt):
        train_reward(parse(folder, "noisy_again", **sections), callbacks=[tiny_runs.Stop(5)])
    again = train_reward(parse(folder, "noisy_again", **sections))
    plain = train_reward(parse(folder, "not_noisy", data={"pad_to": 64}))
    assert again["result"]["held_out"] == whole["result"]["held_out"] != plain["result"]["held_out"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": [{"path": "no.jsonl"}]}}, r"data\.train\.0\.path: no such file"),
        ({"data": {"train": []}}, r"data\.train: .*at least 1 item"),
        ({"data": {"eval_fraction": 0.0}}, r"nothing is held out"),
        ({"data": {"pad_to": 32}}, r"pad_to 32 is less than max_length 64"),
        ({"data": {"max_length": 4096}}, r"data\.max_length: exceeds the 128 tokens .* got 4096"),
        ({"noise": {"schedule": {"name": "linear"}}}, r"set data\.pad_to"),
        ({"noise": {"schedule": {"name": "linaer"}}}, r"noise\.schedule: Unknown schedule 'linaer'"),
        ({"training": {"micro_batch_size": 3}}, r"batch_size 8 is no multiple of micro_batch_size 3"),
        ({"preset": "tess3"}, r"preset: should be 'tess2-paper' or 'tess2-script'"),
        ({"output_dir": None}, r"output_dir: is required"),
    ],
)
def test_a_wrong_run_file_is_refused_before_weights_load(folder, monkeypatch, sections, message):
    monkeypatch.setattr(reward_module, "load_reward_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message):
        train_reward(parse(folder, **sections))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "a", "refused": "b"}], r"no column 'rejected' for 'rejected'"),
        ([{"chosen": "a", "rejected": 3}], r"Example 0 .* two texts or two lists of messages"),
        ([{"chosen": QUESTION, "rejected": QUESTION}], r"end in an answer of the role 'assistant'"),
        ([TURNS], r"`prompt` should be a text or a list of messages, got None"),
        ([], r"empty|cannot be loaded"),
    ],
)
def test_unusable_pairs_are_refused_before_weights_load(folder, tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(reward_module, "load_reward_model", lambda *_: pytest.fail("weights were loaded"))
    write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        train_reward(parse(folder, "bad", data={"train": [{"path": str(tmp_path / "bad.jsonl")}]}))
    assert not (folder / "bad").exists()


def test_a_base_that_is_no_text_model_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="of type 'vit' is no text model"):
        train_reward(parse(folder, model={"base": str(tmp_path)}))


def test_without_trl_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(install("l2d-framework[reward]"))):
        train_reward(parse(folder))


def test_train_points_to_train_reward(folder):
    with pytest.raises(ConfigError, match="l2d train-reward"):
        train_runs([parse(folder)])
