"""L2D on top of a finetuned language model, by the run files of the L2D paper at a few kilobytes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_runs import SMALL, write_base, write_sums
from transformers import AutoModelForCausalLM

from l2d_framework.config import load_run
from l2d_framework.models import checkpoint
from l2d_framework.training.run import train_runs

RUNS = Path(__file__).parents[2] / "bench" / "runs"
SMALLER = {**SMALL, "max_steps": 2, "micro_batch_size": 2, "bf16": "false"}


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    """Overrides that make a pipeline of two stages small."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    data = write_sums(tmp_path / "sums.jsonl")
    changes = ["stages.0.model.base=base", "stages.1.parametrization.size=8"]
    changes += [f"stages.1.backbone.{name}={n}" for name, n in (("rank", 2), ("conditioning_size", 8))]
    for stage in (0, 1):
        where = f"stages.{stage}"
        changes += [f"{where}.model.dtype=float32", f"{where}.data.max_length=64"]
        changes += [f"{where}.data.{split}=[{{path: {data}}}]" for split in ("train", "eval")]
        changes += [f"{where}.training.{name}={value}" for name, value in SMALLER.items()]
    return changes


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_l2d_starts_from_what_the_baseline_became(small, kind):
    train_runs(load_run(RUNS / f"l2d_from_{kind}.yaml", small))
    if kind == "lora":
        base = AutoModelForCausalLM.from_pretrained("base")
        tuned = PeftModel.from_pretrained(base, "runs/l2d_baseline_lora").merge_and_unload()
    else:
        tuned = AutoModelForCausalLM.from_pretrained("runs/l2d_baseline_full")
    untouched = AutoModelForCausalLM.from_pretrained("base").state_dict()
    lm = checkpoint.load(f"runs/l2d_from_{kind}")
    found = lm.backbone.lm.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in tuned.state_dict().items())
    assert any(not torch.equal(value, found[name]) for name, value in untouched.items())
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(lm.generate(ids, num_inference_steps=0, **options).sequences, tuned.generate(ids, **options))


def test_an_adapter_may_also_be_named_beside_its_base(small):
    runs = load_run(RUNS / "l2d_from_lora.yaml", small)
    train_runs(runs)
    beside = [*small, "stages.1.model.base=base", "stages.1.model.adapter=runs/l2d_baseline_lora"]
    beside += ["stages.1.output_dir=runs/beside"]
    train_runs(load_run(RUNS / "l2d_from_lora.yaml", beside))
    first, second = (checkpoint.load(path) for path in ("runs/l2d_from_lora", "runs/beside"))
    assert first.origin.fingerprint == second.origin.fingerprint
    weights = second.own_parameters()
    assert all(torch.equal(value, weights[name]) for name, value in first.own_parameters().items())
