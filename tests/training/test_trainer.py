import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from l2d_framework.config import TrainingSection, parse_run
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.errors import ConfigError
from l2d_framework.models import checkpoint
from l2d_framework.training.arguments import make_arguments, total_steps
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.data.prepare import prepare
from l2d_framework.training.learner import Denoiser
from l2d_framework.training.metrics import BINS, LossMeter
from l2d_framework.training.run import train_runs
from l2d_framework.training.samplers import HeldOut, RunOrder
from l2d_framework.training.token_trainer import TokenTrainer
from l2d_framework.types import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    return folder


def fields(folder: Path, name: str, **training: Any) -> dict[str, Any]:
    return tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / name, **training)


def train(run: dict[str, Any], *callbacks: TrainerCallback, overwrite: bool = False) -> dict[str, Any]:
    return train_runs([parse_run(run)], overwrite=overwrite, callbacks=lambda _: callbacks)[0]


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[int, dict[str, float]]:
    train(fields(folder, "reference"))
    return tiny_runs.losses(folder / "reference")


def test_every_epoch_of_the_order_is_another_permutation() -> None:
    rows = [{"index": i} for i in range(5)]
    order = RunOrder(rows, seed=1, total=15)
    epochs = [[order[5 * e + i] for i in range(5)] for e in range(3)]
    assert [sorted(row["index"] for row in epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert [{row["epoch"] for row in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert len({tuple(row["index"] for row in epoch) for epoch in epochs}) > 1
    assert [RunOrder(rows, seed=1, total=99)[i] for i in range(15)] == list(itertools.chain(*epochs))


def test_bins_and_mean_of_the_meter_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        def reduce(self, sums: torch.Tensor) -> torch.Tensor:
            return sums

    meter = LossMeter(torch.device("cpu"))
    t, losses = torch.rand(50), torch.rand(50)
    meter.add({"losses": losses[:20], "t": t[:20], "row": torch.zeros(20, dtype=torch.int64)})
    meter.add(
        {"losses": losses.repeat(2), "t": t.repeat(2), "row": torch.arange(100) // 50}, torch.tensor([False, True])
    )
    seen = torch.cat([losses[:20], losses]), torch.cat([t[:20], t])
    found = meter.results(Alone())
    assert found["loss"] == pytest.approx(seen[0].mean().item())
    for i in range(BINS):
        inside = (seen[1] * BINS).long() == i
        if inside.any():
            assert found[f"loss_t{i:02d}"] == pytest.approx(seen[0][inside].mean().item())
    assert meter.results(Alone()) == {}


def test_the_first_logged_loss_is_the_mean_over_supervised_tokens(
    folder: Path, reference: dict[int, dict[str, float]]
) -> None:
    run = parse_run(fields(folder, "reference"))
    model = checkpoint.build_model(run)
    data = prepare(run.data, model.tokenizer, seed=run.seed)
    order = RunOrder(data.train, run.seed, run.training.max_steps * run.training.batch_size)
    rows = [order[i] for i in range(run.training.batch_size)]
    total, count = 0.0, 0
    for row in rows:
        batch = Collator(0)([row])
        layout = Layout(batch["input_ids"], batch["blocks"])
        rule = NoiseRule([(run.seed, row["epoch"], row["index"])])
        losses = denoising_loss(model, layout, draw(model, layout, rule))
        total, count = total + losses.total.item(), count + losses.count
    assert reference[1]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize(
    "training",
    [{"micro_batch_size": 1}, {"micro_batch_size": 2, "gradient_checkpointing": True}, {"loss_chunk": 3}],
    ids=["micro_batch", "gradient_checkpointing", "loss_chunk"],
)
def test_ways_to_save_memory_change_no_loss(
    folder: Path, reference: dict[int, dict[str, float]], training: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    output = folder / request.node.callspec.id
    train(fields(folder, output.name, **training))
    found = tiny_runs.losses(output)
    assert found.keys() == reference.keys()
    for step, expected in reference.items():
        assert found[step] == pytest.approx(expected, abs=2e-5)


def test_training_lowers_the_loss(reference: dict[int, dict[str, float]]) -> None:
    assert reference[9]["eval_loss"] < reference[3]["eval_loss"]


def test_evaluations_use_the_same_noise_each_time(folder: Path) -> None:
    train(fields(folder, "still", learning_rate=1e-30, final_learning_rate=0.0))
    found = tiny_runs.losses(folder / "still")
    evaluations = [{k: v for k, v in entry.items() if k.startswith("eval_")} for entry in found.values()]
    evaluations = [entry for entry in evaluations if entry]
    assert len(evaluations) == 3
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert len({entry["loss"] for entry in found.values()}) == 9


def test_filling_up_a_batch_does_not_change_the_held_out_loss(folder: Path, tmp_path: Path) -> None:
    run = parse_run(fields(folder, "unused", micro_batch_size=4))
    model = checkpoint.build_model(run)
    data = prepare(run.data, model.tokenizer, seed=run.seed)
    arguments = make_arguments(run.training, tmp_path, seed=0)
    learner = Denoiser(model, run.training, run.seed)
    trainer = TokenTrainer(learner, arguments, training=run.training, data=data, collate=Collator(0))
    assert len(data.eval) % 4
    alone = trainer.evaluate(HeldOut(data.eval, 1))
    filled = trainer.evaluate(HeldOut(data.eval, 4))
    assert alone["eval_loss"] == pytest.approx(filled["eval_loss"], abs=1e-6)


def test_only_own_parameters_move_and_checkpoints_hold_nothing_else(
    folder: Path, reference: dict[int, dict[str, float]]
) -> None:
    run = parse_run(fields(folder, "reference"))
    fresh, trained = checkpoint.build_model(run), checkpoint.load(folder / "reference")
    for name, before in fresh.backbone.lm.state_dict().items():
        assert torch.equal(before, trained.backbone.lm.state_dict()[name]), name
    own = trained.own_parameters()
    moved = [name for name, before in fresh.own_parameters().items() if not torch.equal(before, own[name])]
    assert len(moved) > len(own) / 2
    count = 0
    for file in (folder / "reference" / "checkpoint-9").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 -- no mapping
    assert count == sum(p.numel() for p in own.values())


class Spoil(TrainerCallback):
    """Makes the model worse at update 7."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step == 7:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=3)


def test_the_best_model_is_the_one_of_the_lowest_held_out_loss(folder: Path) -> None:
    train(fields(folder, "spoiled", save_total_limit=3, learning_rate=0.1), Spoil())
    found = tiny_runs.losses(folder / "spoiled")
    assert found[6]["eval_loss"] < min(found[3]["eval_loss"], found[9]["eval_loss"])
    card = json.loads((folder / "spoiled" / "run.json").read_text())
    assert card["result"]["best_eval_loss"] == found[6]["eval_loss"]
    best, kept = (checkpoint.load(folder / "spoiled" / name).own_parameters() for name in ("best", "checkpoint-6"))
    for name, value in best.items():
        assert torch.equal(value, kept[name])


def test_as_many_checkpoints_are_kept_as_asked_for(folder: Path, reference: dict[int, dict[str, float]]) -> None:
    found = sorted(path.name for path in (folder / "reference").glob("checkpoint-*"))
    assert found == ["checkpoint-6", "checkpoint-9"]
    assert not [path for path in (folder / "reference").iterdir() if path.name.endswith((".writing", ".replaced"))]


def test_bf16_training_stays_near_float32(folder: Path, reference: dict[int, dict[str, float]]) -> None:
    train(fields(folder, "bf16", bf16=True))
    found = tiny_runs.losses(folder / "bf16")
    assert found[1]["loss"] == pytest.approx(reference[1]["loss"], rel=0.02)
    assert found[1]["loss"] != reference[1]["loss"]


def test_class_labels_reach_the_model(folder: Path) -> None:
    run = fields(folder, "classes")
    run["classes"] = ["even", "odd"]
    run["data"]["train"][0]["class_column"] = "kind"
    train(run)
    model = checkpoint.load(folder / "classes")
    assert model.origin.classes == ("even", "odd")


def test_epochs_become_updates() -> None:
    rows = range(22)
    assert total_steps(TrainingSection(batch_size=4, epochs=1.0), rows) == 6
    assert total_steps(TrainingSection(batch_size=4, epochs=2.0), rows) == 11
    assert total_steps(TrainingSection(batch_size=99, epochs=0.5), rows) == 1
    assert total_steps(TrainingSection(batch_size=4, max_steps=3), rows) == 3


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(ConfigError, match="batch_size 32 is no multiple of 3 devices"):
        make_arguments(TrainingSection(), tmp_path, seed=0)


SHARES = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("variables", "training", "message"),
    [
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {},
            "zero_stage is 3 .*Launch with FSDP2.*or set it to 1",
        ),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "zero_stage is 0 .*Set it to 1 or 2"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "config_file is 'ds.json' .*Name zero_stage"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "optimizer_device is 'cpu'.*to none"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "clipping is 0.5 .*max_grad_norm is 1.0. Leave it out"),
        (ZERO, {"micro_batch_size": "auto"}, "micro_batch_size is 'auto'.*Set a number"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism_config, .*Remove it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true"}, {}, "FSDP and for DeepSpeed. Choose one"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "'bf16' in accelerate's.*training.bf16 is false. Set it to 'no'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"bf16": True}, "'fp16' in accelerate's.*training.bf16 is true"),
        ({**SHARES, "FSDP_VERSION": "1"}, {}, "fsdp_version is 1.*Set it to 2"),
        ({**SHARES, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading is true"),
        ({**SHARES, "FSDP_OFFLOAD_PARAMS": "True"}, {}, "fsdp_offload_params is true"),
        ({**SHARES, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "training.gradient_checkpointing to true"),
        (SHARES, {"micro_batch_size": "auto"}, "micro_batch_size is 'auto'.*Set a number"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused_and_told_what_to_do(
    variables: dict[str, str],
    training: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_arguments(TrainingSection(**training), tmp_path, seed=0)


def test_a_run_without_data_or_folder_is_refused(folder: Path) -> None:
    for missing in ("data", "output_dir"):
        run = fields(folder, "nowhere")
        run.pop(missing)
        with pytest.raises(ConfigError, match=f"no `{missing}`"):
            train(run)


def test_sequences_beyond_the_context_are_refused_before_weights_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "build_model", lambda *_: pytest.fail("weights were loaded"))
    run = fields(folder, "long")
    run["data"]["max_length"] = 4096
    with pytest.raises(ConfigError, match="max_length 4096 exceeds the 128 tokens"):
        train(run)
    assert not (folder / "long").exists()


def test_bad_data_is_refused_before_weights_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "build_model", lambda *_: pytest.fail("weights were loaded"))
    run = fields(folder, "bad_data")
    run["data"]["train"][0]["columns"] = {"prompt": "question"}
    with pytest.raises(ValueError, match="question"):
        train(run)
    assert not (folder / "bad_data").exists()


def test_gradient_checkpointing_without_support_is_refused_before_weights_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = parse_run(fields(folder, "unsupported", gradient_checkpointing=True))
    build = checkpoint.build_model

    def without(run: Any, *, meta: bool = False) -> Any:
        assert meta
        model = build(run, meta=True)
        del model.backbone.gradient_checkpointing
        return model

    monkeypatch.setattr(checkpoint, "build_model", without)
    with pytest.raises(ConfigError, match="backbone 'two_stream' offers none"):
        train_runs([run])


@pytest.mark.parametrize(
    ("part", "training", "message"),
    [
        ({"backbone": {"name": "two_stream", "carry": True}}, {}, "which only training.unroll teaches"),
        ({"schedule": {"name": "information"}}, {"unroll": {}}, "schedule 'information' learns its times"),
        ({}, {"unroll": {"fewest": 5, "most": 4}}, "fewest 5 exceeds most 4"),
    ],
)
def test_what_an_own_trajectory_cannot_teach_is_refused(
    folder: Path, part: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        train_runs([parse_run(fields(folder, "untaught", **training) | part)])
