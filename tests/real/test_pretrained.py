"""A real pretrained model: tied weights, grouped keys, 49,152 tokens, pad == eos, a default system prompt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import all_known, ask_everywhere
from foreign_checkpoints import write_l2d, write_tess2
from tiny_runs import losses
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from l2d_framework.config import parse_run
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.models.convert import convert
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.training.run import train_runs

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PROMPTS = ["The capital of France is", "Q: How many legs have seven spiders? Let us count them one by one. A:"]
CHAT = [{"role": "user", "content": "Name three colours."}]
NEW_TOKENS = 12


def run(base: Path, method: str, **fields: Any) -> dict[str, Any]:
    """Fields of a run file over the real model."""
    l2d = {
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream", "rank": 32},
    }
    tess = {
        "schedule": {"name": "cosine"},
        "parametrization": {"name": "simplex"},
        "backbone": {"name": "in_place"},
        "sampling": {"num_inference_steps": 4},
    }
    return {"model": {"base": str(base), "dtype": "float32"}, **(l2d if method == "l2d" else tess), **fields}


def trained(base: Path, method: str) -> DiffusionLM:
    """A model whose own weights have moved away from where training starts, the final ones of L2D most."""
    model = build_model(parse_run(run(base, method)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own = dict(model.own_parameters()) if method == "l2d" else {"time": model.backbone.time.weight}
        for name, weight in own.items():
            scale = 4.0 if ".final.2." in name else 0.2 if ".conditioning." in name else 0.02
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def logits(model: DiffusionLM) -> Tensor:
    tokens = torch.arange(1000, 1012)[None]
    with torch.no_grad():
        return model(ask_everywhere(model, all_known(tokens))).logits


@pytest.fixture(scope="module")
def plain(real_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(real_model: Path) -> DiffusionLM:
    return trained(real_model, "l2d")


@pytest.fixture(scope="module")
def wanted(plain: PreTrainedModel, model: DiffusionLM) -> list[str]:
    """Greedy answers of transformers, the same in one batch and one by one."""
    found = answers(plain, model.tokenizer, PROMPTS)
    assert found == [answers(plain, model.tokenizer, [prompt])[0] for prompt in PROMPTS]
    return found


def answers(plain: PreTrainedModel, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers of transformers, in one batch padded on the left."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        found = plain.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, top_k=None, top_p=None)
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("steps", [0, 1])
def test_no_step_and_one_step_write_what_the_pretrained_model_writes(model, wanted, steps):
    def ours(prompts: list[str]) -> list[str]:
        found = model.generate(prompts, num_inference_steps=steps, max_new_tokens=NEW_TOKENS)
        return model.tokenizer.batch_decode(found.answers)

    assert ours(PROMPTS) == wanted
    assert [ours([prompt])[0] for prompt in PROMPTS] == wanted


def test_more_steps_are_felt(model, wanted):
    found = model.generate(PROMPTS[0], num_inference_steps=3, max_new_tokens=NEW_TOKENS)
    assert model.tokenizer.batch_decode(found.answers) != wanted[:1]


def test_a_conversation_is_answered_as_transformers_answers_it_and_ends_with_its_turn(model, plain):
    tokens = model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = plain.generate(tokens, max_new_tokens=40, do_sample=False, top_k=None, top_p=None)
    found = model.generate([CHAT], num_inference_steps=1, max_new_tokens=40)
    assert found.sequences.tolist() == wanted.tolist()


@pytest.mark.filterwarnings("ignore")  # of the data sets and the tasks
def test_the_harness_scores_as_its_own_model_does(real_model, model, datasets_dir, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from l2d_framework.evaluation.harness.model import L2DLM

    save(model, tmp_path / "l2d")
    monkeypatch.chdir(datasets_dir)

    # All of lm_eval's tasks take longer to read than these to answer.
    folders = [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in ("arc", "piqa")]
    tasks = TaskManager(include_path=folders, include_defaults=False)

    def scores(lm: Any) -> dict[str, list[Any]]:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=["arc_easy", "piqa"],
            task_manager=tasks,
            limit=6,
            num_fewshot=0,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        return {task: [sample["filtered_resps"] for sample in rows] for task, rows in found["samples"].items()}

    from lm_eval.models.huggingface import HFLM

    theirs = scores(HFLM(pretrained=str(real_model), dtype="float32", batch_size=8, device="cpu"))
    ours = scores(L2DLM(pretrained=str(tmp_path / "l2d"), scoring="main", batch_size=8, device="cpu"))
    assert ours == theirs
    assert sum(map(len, ours.values())) == 12


# TESS 2 trains every weight, so its model is the real one's first layers.
@pytest.mark.parametrize(("method", "base", "rate"), [("l2d", "real_model", 1e-3), ("tess", "shallow_model", 1e-4)])
def test_updates_lower_the_loss_on_their_own_batch(request, tmp_path, method, base, rate):
    rows = [
        {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": f"{a + b}."}]}
        for a, b in ((3, 4), (12, 30), (7, 9), (21, 5))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"path": str(tmp_path / "rows.jsonl")}]
    training = {"max_steps": 3, "batch_size": 4, "learning_rate": rate, "warmup_steps": 0, "decay": "constant"}
    fields = {
        "data": {"train": data, "eval": data, "max_length": 64},
        "training": training | {"eval_steps": 1, "save_steps": 3, "logging_steps": 1},
        "output_dir": str(tmp_path / "out"),
    }
    train_runs([parse_run(run(request.getfixturevalue(base), method, **fields))])
    seen = [found["eval_loss"] for _, found in sorted(losses(tmp_path / "out").items()) if "eval_loss" in found]
    assert len(seen) == 3 and all(map(math.isfinite, seen))
    assert seen[-1] < seen[0]


def test_an_l2d_checkpoint_is_small_and_keeps_every_bit(model, tmp_path):
    save(model, tmp_path / "whole")
    model.backbone.merge("never")
    assert torch.equal(logits(load(tmp_path / "whole")), logits(model))
    save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert sum(path.stat().st_size for path in (tmp_path / "half").rglob("*") if path.is_file()) < 100e6
    again = load(tmp_path / "half")
    save(again, tmp_path / "again", dtype=torch.bfloat16)
    for file in ("diffusion.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "half" / file).read_bytes()


def test_an_l2d_checkpoint_of_the_authors_layout_converts_bit_for_bit(model, tmp_path):
    settings = {"noise_rescaling": model.parametrization.config.prior_scale, "flow_lora_alpha": 32.0}
    write_l2d(tmp_path / "theirs", model, **settings)
    convert(str(tmp_path / "theirs"), tmp_path / "ours", reader="l2d-reference")
    model.backbone.merge("never")
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_a_tess_checkpoint_keeps_every_bit_and_converts(shallow_model, tmp_path):
    model = trained(shallow_model, "tess")
    wanted = logits(model)
    save(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)
    model.tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    write_tess2(tmp_path / "theirs", model.backbone.lm, model.backbone.time.weight.detach())
    model.tokenizer.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours", reader="tess2")
    assert torch.equal(logits(load(tmp_path / "ours")), wanted)
