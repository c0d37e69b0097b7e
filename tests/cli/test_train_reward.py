import json

import pytest
import tiny_runs
import yaml
from transformers import AutoModelForSequenceClassification


@pytest.fixture
def run_file(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(24)]
    rows.append({"prompt": "q", "chosen": "x" * 90, "rejected": "bad"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "kind": "reward",
        "model": {"base": str(tiny_runs.write_base(tmp_path / "base"))},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}], "eval_fraction": 0.3, "max_length": 64},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2},
        "output_dir": str(tmp_path / "reward"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def table(out: str) -> dict[str, list[str]]:
    rows = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


def test_a_run_ends_with_a_model_and_a_table_of_its_held_out_numbers(l2d, run_file, tmp_path, caplog):
    code, out, err = l2d("train-reward", run_file, "training.max_steps=4")
    assert code == 0, err
    card = json.loads((tmp_path / "reward" / "run.json").read_text())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").config.num_labels == 1
    shown, held_out = table(out), card["result"]["held_out"]
    assert shown["pairs"] == [str(card["data"]["splits"][which]["pairs"]) for which in ("train", "eval")]
    assert shown["pairs ranked right"][1] == f"{held_out['accuracy']:.1%}"
    assert shown["mean margin"][1] == f"{held_out['margin']:.3f}"
    assert shown["pairs left out as too long"] == ["1"]
    assert "4/4" in out  # progress, a line per log where there is no terminal

    # Once more: nothing is trained, which is said, and the same table comes.
    assert "nothing was trained now" not in out
    again = l2d("train-reward", run_file, "training.max_steps=4")
    assert (again[0], table(again[1])["updates"], "4/4" in again[1]) == (0, ["4"], False)
    assert f"had finished before, at {card['ended']}, so nothing was trained now" in again[1]
    assert "raise training.max_steps or training.epochs" in again[1]

    # With more updates it goes on, and says so.
    code, out, _ = l2d("train-reward", run_file, "training.max_steps=6")
    assert (code, "nothing was trained" in out, table(out)["updates"]) == (0, False, ["6"])
    assert "5/6" in out
    assert "4/6" not in out
    assert "has made 4 updates and goes on to 6 (training.max_steps: 4 there, 6 now)" in caplog.text


def test_a_taken_folder_is_refused_and_moved_aside_when_asked(l2d, run_file, tmp_path):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "mine.txt").write_text("mine")
    code, _, err = l2d("train-reward", run_file, "training.max_steps=1")
    assert code == 2
    assert "--overwrite" in err
    assert l2d("train-reward", "--overwrite", run_file, "training.max_steps=1")[0] == 0
    assert (tmp_path / "reward.old-1" / "mine.txt").read_text() == "mine"


def test_config_check_and_schema_know_reward_runs(l2d, run_file):
    code, out, _ = l2d("config", "check", run_file)
    assert (code, out.startswith("ok: reward run")) == (0, True)
    schema = json.loads(l2d("config", "schema")[1])
    assert {"kind", "model"} == set(schema["$defs"]["RewardRun"]["required"])


def test_each_command_points_to_the_other_for_the_others_runs(l2d, run_file, tmp_path):
    code, _, err = l2d("train", run_file)
    assert (code, "l2d train-reward" in err) == (2, True)
    other = tiny_runs.language_model_run(
        tmp_path / "pairs.jsonl", tmp_path / "lm", model={"base": str(tmp_path / "base")}
    )
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump(other))
    code, _, err = l2d("train-reward", tmp_path / "lm.yaml")
    assert (code, "`l2d train`" in err) == (2, True)
