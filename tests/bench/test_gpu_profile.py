"""The profile `gpu` at a tiny size on the CPU, and the comparison of devices that it ends with."""

import json
import sys

import pytest
import torch
import yaml
from diffusion_models import diffusion_lm, shared_lm, shared_tess, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer
from tiny_runs import write_sums
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from l2d_bench import folder as bench_folder
from l2d_bench.data.templated import TemplatedRows
from l2d_bench.measures.agreement import AgreementMeasure
from l2d_bench.measures.base import Subject
from l2d_bench.measures.devices import Reading, difference, tokens
from l2d_framework.config import ModelSection, load_run
from l2d_framework.errors import ConfigError, DataError, L2DError
from l2d_framework.models.checkpoint import save
from l2d_framework.models.diffusion_lm import Origin
from l2d_framework.models.unloaded import UnloadedModel

FEW = {"num_inference_steps": 5}
TINY_BASE = {
    "scratch.tokenizer.vocab_size": 300,
    "scratch.config.hidden_size": 32,
    "scratch.config.intermediate_size": 64,
    "scratch.config.num_hidden_layers": 2,
    "scratch.config.num_attention_heads": 2,
    "scratch.config.num_key_value_heads": 1,
}
TINY_TRAINING = {
    "training.max_steps": 2,
    "training.batch_size": 4,
    "training.warmup_steps": 1,
    "training.eval_steps": 2,
    "training.save_steps": 2,
    "training.dataloader_workers": 0,
    "data.eval.0.limit": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An L2D checkpoint over a language model, and questions."""
    root = tmp_path_factory.mktemp("agreement")
    lm, tokenizer = tiny_lm(), tiny_tokenizer(chat=True)
    for part in (lm, tokenizer):
        part.save_pretrained(root / "base")
    for name, model in (("l2d", diffusion_lm(lm)), ("tess", tess_lm(tiny_lm()))):
        section = ModelSection(base=str(root / "base"), dtype="float32")
        model.origin, model.tokenizer = Origin(model=section, sampling=model.origin.sampling), tokenizer
        save(model, root / name)
    write_sums(root / "sums.jsonl")
    return root


@pytest.fixture
def reading():
    def make(model, *lengths, **options):
        rows = [
            {"input_ids": [(7 * n + i) % 250 + 4 for i in range(n)], "supervised": [False] * 3 + [True] * (n - 3)}
            for n in lengths
        ]
        rows = [{**row, "class_id": -1, "index": number} for number, row in enumerate(rows)]
        return Reading(rows, model.sampling(**{**FEW, **options}), [0.0, 0.5])

    return make


def moved(scale):
    """`shared_lm` with every own weight moved."""
    other = diffusion_lm("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.own_parameters().values():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return other


def test_a_model_agrees_with_itself_in_batches_of_any_size(reading):
    model = shared_lm()
    how = reading(model, 9, 5, 12)
    alone = tokens(model, how, 1)
    assert len(alone) == 6 + 2 + 9
    assert torch.equal(tokens(model, how, 2), alone) and torch.equal(tokens(model, how, 3), alone)
    assert difference(model, model, how, 2) == 0


def test_the_further_the_weights_the_larger_the_difference(reading):
    model = shared_lm()
    how = reading(model, 9, 5, 12)
    near, far = (difference(model, moved(scale), how, 3) for scale in (1e-4, 1e-2))
    assert 0 < near < far
    assert not torch.equal(tokens(moved(1.0), how, 3), tokens(model, how, 3))


def test_at_time_zero_only_the_base_model_is_compared(reading):
    model = shared_lm()
    how = Reading(reading(model, 9).rows, model.sampling(num_inference_steps=0), [0.0])
    assert difference(model, moved(1.0), how, 1) == 0
    assert torch.equal(tokens(moved(1.0), how, 1), tokens(model, how, 1))


def test_noise_that_is_drawn_on_the_device_cannot_be_compared(reading):
    model = shared_tess()
    with pytest.raises(ConfigError, match="drawn on the device"):
        difference(model, model, reading(model, 9), 1)


@pytest.mark.parametrize("name", ["l2d", "base"])
def test_a_machine_without_gpu_agrees_with_itself(folder, name):
    options = {"num_inference_steps": 0} if name == "base" else FEW
    measure = AgreementMeasure(data=str(folder / "sums.jsonl"), limit=4)
    found = measure.run(Subject(str(folder / name), options, seed=0))
    assert list(found.values) == measure.metrics()
    assert found.values["difference"].value == found.values["flips"].value == 0
    assert found.values["flips_bf16"].items == found.details["tokens"] > 8
    assert all(0 <= found.values[key].value < 1 for key in ("flips_bf16", "flips_bf16_batch"))


@pytest.mark.parametrize("limits", [{"allowed_flips": 0.99}, {"tolerance": 1e3}])
def test_devices_that_disagree_fail_the_measure(folder, limits, monkeypatch):
    made = []

    def load(self, device):
        made.append(moved(float(len(made))))
        return made[-1]

    monkeypatch.setattr(UnloadedModel, "load", load)
    measure = AgreementMeasure(data=str(folder / "sums.jsonl"), limit=4, **limits)
    with pytest.raises(L2DError, match="CPU and cpu disagree in float32"):
        measure.run(Subject(str(folder / "l2d"), FEW, seed=0))


@pytest.mark.gpu
def test_cpu_and_gpu_agree_in_float32(folder):
    measure = AgreementMeasure(data=str(folder / "sums.jsonl"), limit=8)
    found = measure.run(Subject(str(folder / "l2d"), {"num_inference_steps": 15}, seed=0, device="cuda"))
    assert found.details["devices"] == ["cpu", "cuda"]


def test_templates_write_rows_of_every_split(tmp_path):
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(json.dumps({"q": f"{split}?", "a": "{yes}"}) + "\n")
    made = {"path": str(source), "splits": ["train", "test"], "prompt": "Q: {q}\nA:", "completion": " {a}"}
    TemplatedRows(**made).make(out)
    assert json.loads((out / "test.jsonl").read_text()) == {"prompt": "Q: test?\nA:", "completion": " {yes}"}
    assert (out / "train.jsonl").is_file()
    with pytest.raises(DataError, match="no column 'b'"):
        TemplatedRows(**{**made, "completion": "{b}"}).make(out)


def test_the_base_has_a_hundred_million_parameters_and_all_runs_fit_half_an_hour():
    base, lora, l2d = load_run(bench_folder() / "runs" / "gpu.yaml")
    assert base.training.bf16 and lora.training.bf16 and l2d.training.bf16
    assert lora.training == l2d.training
    fields = dict(base.scratch.config) | {"vocab_size": base.scratch.tokenizer.vocab_size}
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    parameters = sum(weight.numel() for weight in lm.parameters())
    assert parameters == 106_980_096
    rows = [run.training.max_steps * run.training.batch_size * run.data.max_length for run in (base, lora, l2d)]
    # Every row as long as any, forward and back through all weights, at a tenth of an H100's 990 TFLOP/s.
    assert 6 * parameters * sum(rows) / 99e12 < 15 * 60


def test_without_a_gpu_the_profile_says_so(tmp_path, monkeypatch):
    from l2d_bench.bench import Bench

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: cuda.*finds no GPU"):
        Bench(["own/gpu"], "gpu", tmp_path).prepare()


def test_the_profile_runs_to_its_end_at_a_tiny_size(tmp_path, datasets_dir, monkeypatch):
    pytest.importorskip("lm_eval")
    from l2d_bench.bench import Bench
    from l2d_bench.pool import Surroundings, run_jobs

    profile = yaml.safe_load((bench_folder() / "profiles" / "gpu.yaml").read_text())
    profile |= {"device": "cpu", "batch_size": 2, "threads": 1}
    profile["measures"]["gsm8k"] |= {"limit": 1, "generation": {"max_gen_toks": 3}}
    profile["measures"]["agreement"] |= {"limit": 2}
    for name, model in profile["models"].items():
        model["set"] = {**model["set"], **TINY_TRAINING, **(TINY_BASE if name == "base" else {})}
        model["set"]["data.train.0.limit"] = 12
    table = yaml.safe_load((bench_folder() / "tables" / "own" / "gpu.yaml").read_text())
    table["rows"][-1]["sweep"]["values"] = [3]
    for name, content in (("profile", profile), ("table", table)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(datasets_dir)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    made = Bench([str(tmp_path / "table.yaml")], str(tmp_path / "profile.yaml"), tmp_path / "out")
    made.prepare()
    failures = run_jobs(made.jobs, Surroundings(workers=0), lambda event: None)
    (filled,) = made.fill(failures)
    assert not failures and not filled.has_failed
    labels = [row.label for row in filled.plan.rows]
    assert labels[:2] == ["base", "LoRA"] and len(labels) == 3
    assert all(filled.cells[number, name].value is not None for number in range(3) for name in table["columns"])
    assert filled.cells[0, "Flips"].value == 0
