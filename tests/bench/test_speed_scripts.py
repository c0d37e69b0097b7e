"""The files of bench/: run files that parse and fit their models, reports that say what was measured."""

import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_models import tiny_lm, tiny_tokenizer

from l2d_framework.cli import run_script
from l2d_framework.config import check_runs, load_run
from l2d_framework.diffusion.rng import keyed_generator, stream_key
from l2d_plugins.backbones import compiling

FAMILIES = {"Qwen": "qwen2", "istral": "mistral", "roberta": "roberta"}
RUNS = sorted((Path(__file__).parents[2] / "bench" / "runs").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def common() -> Iterator[ModuleType]:
    yield from _script("common")


@pytest.fixture(scope="module")
def speed() -> Iterator[ModuleType]:
    yield from _script("l2d")


@pytest.fixture(scope="module")
def speed_tess(speed: ModuleType) -> Iterator[ModuleType]:
    yield from _script("tess")


@pytest.fixture(scope="module")
def blocks() -> Iterator[ModuleType]:
    yield from _script("blocks")


@pytest.fixture(scope="module")
def overhead(blocks: ModuleType) -> Iterator[ModuleType]:
    yield from _script("overhead")


@pytest.fixture(scope="module")
def noise(overhead: ModuleType) -> Iterator[ModuleType]:
    yield from _script("noise")


@pytest.fixture(scope="module")
def kernels(blocks: ModuleType) -> Iterator[ModuleType]:
    yield from _script("fused")


@pytest.fixture(scope="module")
def batching(speed: ModuleType, blocks: ModuleType) -> Iterator[ModuleType]:
    yield from _script("batching")


@pytest.fixture(scope="module")
def decoding(speed: ModuleType) -> Iterator[ModuleType]:
    yield from _script("gpu")


@pytest.fixture(scope="module")
def drafters(decoding: ModuleType) -> Iterator[ModuleType]:
    yield from _script("drafters")


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    yield from _script("memory")


@pytest.fixture(scope="module")
def sizes() -> Iterator[ModuleType]:
    yield from _script("sizes")


def _script(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, RUNS[0].parents[1] / "speed" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and scripts import one another by these names
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def _stand_in(name):
    """A random model of the family of the hub's model of this name."""
    family = next((family for word, family in FAMILIES.items() if word in name), "llama")
    return tiny_lm(family, max_position_embeddings=514 if family == "roberta" else 4096)


NOTED = re.compile(r"^#   (.+?): ((?:\S+=\S+ ?)+)$", re.MULTILINE)
"""Overrides that a run file names for other rows of a table."""


def _noted(path):
    return [text.split() for _, text in NOTED.findall(path.read_text(encoding="utf-8"))]


CASES = [
    pytest.param(path, chosen, id="-".join([path.stem, *chosen[-1:]]))
    for path in RUNS
    for chosen in ([], *_noted(path))
]


@pytest.mark.parametrize(("path", "chosen"), CASES)
def test_run_files_fit_a_model_of_their_family(path, chosen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = load_run(path, chosen)
    for source in (source for run in runs for source in (*run.data.train, *run.data.eval)):
        if source.path.endswith(".jsonl"):  # written by the script that trains the run
            Path(source.path).parent.mkdir(parents=True, exist_ok=True)
            Path(source.path).touch()
    written = [run.output_dir for run in runs]
    overrides = []
    for index, run in enumerate(runs):
        where = f"stages.{index}." if len(runs) > 1 else ""
        overrides.append(f"{where}output_dir={tmp_path / run.output_dir}")
        if run.model is not None:
            base = run.model.base
            overrides.append(f"{where}model.base={tmp_path / base}")
            if base not in written:  # stands in for the model of this name on the hub
                _stand_in(base).save_pretrained(tmp_path / base)
                tiny_tokenizer().save_pretrained(tmp_path / base)
    check_runs(load_run(path, [*chosen, *overrides]))


def test_every_preset_trains_on_the_papers_data():
    runs = [run for path in RUNS if path.stem.startswith("l2d_") for run in load_run(path)]
    unlabelled = [[s.model_copy(update={"class_name": None, "class_column": None}) for s in r.data.train] for r in runs]
    assert all(sources == unlabelled[0] for sources in unlabelled)
    assert {source.split for run in runs for source in run.data.eval} == {"test"}


def test_l2d_and_its_baselines_have_equal_budgets():
    def budget(run):
        training = run.training.model_dump(exclude={"learning_rate"})
        return training | {"max_length": run.data.max_length, "seed": run.seed}

    (l2d,), (lora,), (full,) = (
        load_run(RUNS[0].parent / f"{name}.yaml")
        for name in ("l2d_llama_3.2_1b", "l2d_baseline_lora", "l2d_baseline_full")
    )
    assert budget(lora) == budget(full) == budget(l2d)
    # The paper's peaks, and its alpha of LoRA baselines.
    assert [run.training.learning_rate for run in (l2d, lora, full)] == [1e-4, 1e-5, 1e-5]
    assert lora.lora.alpha == 64


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_l2d_on_top_of_a_baseline_is_l2d_after_that_very_baseline(kind):
    first, second = load_run(RUNS[0].parent / f"l2d_from_{kind}.yaml")
    assert [first] == load_run(RUNS[0].parent / f"l2d_baseline_{kind}.yaml")
    changes = [f"model.base={first.output_dir}", f"output_dir={second.output_dir}"]
    assert [second] == load_run(RUNS[0].parent / "l2d_llama_3.2_1b.yaml", changes)


def test_tess_presets_share_the_papers_optimizer():
    full = [path for path in RUNS if path.stem.startswith("tess_") and "small" not in path.stem]
    runs = [run for path in full for run in load_run(path) if run.kind == "diffusion"]
    assert {run.training.batch_size for run in runs} == {112}
    assert {(run.training.learning_rate, run.training.betas, run.training.weight_decay) for run in runs} == {
        (1e-5, (0.9, 0.999), 0.0)
    }
    assert {run.training.decay for run in runs if run.data.masking} == {"constant"}
    assert {(run.training.decay, run.data.padding) for run in runs if not run.data.masking} == {("linear", "target")}


def _samples(speed, **seconds):
    return {name: [speed.Sample(cpu, 2 * cpu, 0.5) for cpu in row] for name, row in seconds.items()}


def test_ratios_are_medians_over_rounds_so_that_a_slow_round_does_not_count(speed):
    samples = {"decode, batch 1": _samples(speed, plain=[1.0, 9.0, 1.0], other=[4.0, 36.0, 8.0])}
    case = speed.summarize(samples, unit="cpu", memory={})["groups"]["decode, batch 1"]["other"]
    assert case["cost"] == 4.0
    assert case["speed"] == 0.25
    assert case["seconds"] == 8.0


def test_targets_are_met_from_the_right_side(speed):
    def met(cost):
        groups = {group for group, *_ in speed.TARGETS}
        names = {name for _, name, *_ in speed.TARGETS}
        samples = {g: {"reference": [speed.Sample(1.0, 1.0)]} for g in groups}
        for row in samples.values():
            row |= {name: [speed.Sample(cost, cost)] for name in names}
        return {t["what"]: t["met"] for t in speed.summarize(samples, unit="wall", memory={})["targets"]}

    assert met(0.5) == {"cost": True, "speed": True}
    assert met(1.3) == {"cost": True, "speed": False}
    assert met(99.0) == {"cost": False, "speed": False}


def test_tables_show_every_case_with_its_ratio_and_memory(speed):
    samples = {
        "decode, batch 1": _samples(speed, plain=[0.002], other=[0.03]),
        "train, 25 % supervised": _samples(speed, LoRA=[0.01], L2D=[0.005]),
    }
    result = speed.summarize(samples, unit="cpu", memory={"decode, batch 1": {"other": 3 * 2**20}})
    console = Console(width=200, record=True, file=io.StringIO())
    for table in speed.tables(result):
        console.print(table)
    rows = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.split()}
    assert rows["other"] == ["30.0", "15.00", "500", "3"]
    assert rows["L2D"][:2] == ["200.0", "2.00"]


def test_the_floor_of_a_step_is_the_sum_of_its_parts_in_the_same_round(speed, speed_tess):
    parts = {name: [speed.Sample(1.0, 10.0), speed.Sample(weight, 0.0)] for weight, name in enumerate(speed_tess.PARTS)}
    row = speed_tess.with_floor({**parts, "step": [speed.Sample(4.5, 0.0), speed.Sample(3.0, 0.0)]})
    assert next(iter(row)) == speed_tess.FLOOR
    assert [(sample.cpu, sample.wall) for sample in row[speed_tess.FLOOR]] == [(3.0, 30.0), (3.0, 0.0)]
    found = speed.summarize({"g": row}, unit="cpu", memory={}, targets=[("g", "step", "cost", 1.2)])
    assert found["groups"]["g"]["step"]["cost"] == 1.25
    assert [target["met"] for target in found["targets"]] == [False]


TINY = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def test_a_step_is_measured_with_all_or_some_of_the_canvas_noised(speed_tess):
    lm = speed_tess.model({**speed_tess.SHAPE, **TINY})
    for noised in (6, 4):
        steps = speed_tess.Steps(lm, 6, noised)
        samples = [steps.part(name) for name in (*speed_tess.PARTS, *speed_tess.OTHERS)]
        samples += [steps.step(estimate) for estimate in speed_tess.ESTIMATES.values()]
        assert all(sample.wall > 0 for sample in samples)


def test_cases_about_prompts_answers_and_wider_models_are_measured(speed_tess, monkeypatch):
    monkeypatch.setattr(speed_tess, "SHAPE", {**speed_tess.SHAPE, **TINY})
    monkeypatch.setattr(speed_tess, "CALLS", 1)
    monkeypatch.setattr(speed_tess, "WIDER", speed_tess.SHAPE)
    cases = speed_tess.prompt_cases() | speed_tess.answer_cases(speed_tess.model(speed_tess.SHAPE))
    cases |= speed_tess.wider_cases()
    assert all(run().cpu > 0 for run in cases.values())


def test_memory_is_that_of_a_generation_of_the_wanted_length(speed_tess):
    lm = speed_tess.model({**speed_tess.SHAPE, **TINY})
    assert len(speed_tess.generate(lm, 5, "argmax", steps=2)) == 5


def test_the_kernel_is_measured_without_the_network_and_as_a_share_of_an_evaluation(overhead, monkeypatch):
    cases = overhead.Cases(overhead.SHAPES["tiny"], torch.device("cpu"))
    work = cases.all()
    calls = []
    monkeypatch.setattr(cases.lm.backbone, "features", lambda *_, **__: calls.append(1) or torch.ones(1, 1, 32))
    for name, case in work.items():
        with torch.no_grad():
            case()
        assert len(calls) == 1, name  # the evaluation, which is first
    rows = overhead.compare(overhead.SHAPES["tiny"], torch.device("cpu"), rounds=1, evaluations=1)
    assert list(rows) == list(work)
    assert rows[overhead.EVALUATION]["share"] == 1
    assert all(row["seconds"] >= 0 for row in rows.values())


def test_mixed_lengths_and_several_answers_are_measured_per_token(batching, monkeypatch, tmp_path):
    monkeypatch.setattr(batching, "SHAPE", {**batching.SHAPE, **TINY, "vocab_size": 512})
    monkeypatch.setattr(batching, "SHORTEST", 1)
    monkeypatch.setattr(batching, "LONGEST", 6)
    out = tmp_path / "batching.json"
    batching.main(device="cpu", rounds=1, count=5, batch=2, steps=3, width=4, out=out)
    card = json.loads(out.read_text())
    unlike, ten = card["groups"].values()
    lengths = card["settings"]["lengths"]
    assert unlike[batching.WHOLE]["tokens"] == unlike[batching.QUEUE]["tokens"] == sum(lengths)
    assert len(set(lengths)) > 1
    assert ten[batching.TOGETHER]["tokens"] == ten[batching.APART]["tokens"] == 200
    assert {next(iter(rows.values()))["cost"] for rows in (unlike, ten)} == {1}


def test_figures_of_decoding_are_kept_question_by_question_and_drawn(decoding, tmp_path, monkeypatch):
    kept = tmp_path / "decode.json"

    def asked(number):
        def question():
            if number:
                assert len(json.loads(kept.read_text())["questions"]) >= number
            if number == 8:
                raise torch.OutOfMemoryError("Out of memory. Tried to allocate")
            [
                lambda: decoding.bandwidth(bench),
                lambda: decoding.same_tokens(bench),
                lambda: decoding.ways(bench, 2),
                lambda: decoding.adaptive(bench, 2),
                lambda: decoding.compiled(bench, 2),
                lambda: decoding.evaluations(bench),
                lambda: decoding.lengths(bench),
                lambda: decoding.vocabularies(bench),
            ][number]()

        return question

    bench = decoding.Bench(torch.device("cpu"), "tiny", 4, 2, 1)
    monkeypatch.setattr(decoding, "Bench", lambda *_: bench)
    monkeypatch.setattr(compiling, "_compiled", lambda backend: compiling.run)
    monkeypatch.setattr(decoding, "parts", lambda _: map(asked, range(9)))
    decoding.main(device="cpu", size="tiny", minutes=5, rounds=1, prompt=4, new_tokens=2, out=kept)
    questions = json.loads(kept.read_text())["questions"]
    assert set(questions["share of equal tokens"].values()) == {1.0}
    assert questions["batch, 2"]["cases"][decoding.PLAIN]["cost"] == 1
    assert questions["adaptive, batch 2"]["evaluations"] >= 4
    assert questions["compiled, batch 2"]["cases"]["L2D, compiled"]["cost"] > 0
    assert questions["out of memory"] == ["Out of memory"]
    assert kept.with_suffix(".png").stat().st_size > 1000
    times, *others = [panel.lines(questions) for panel in decoding.PANELS]
    assert [count for count, _ in times["L2D"]] == [1, 3, 7, 15, 31]
    # The floor is as many passes as an answer takes, the language model's own among them.
    assert [floor / times["floor"][0][1] for _, floor in times["floor"]] == pytest.approx([1, 2, 4, 8, 16])
    assert sorted(questions[name]["vocabulary"] for name in questions if "vocab" in name) == [128, 256, 512, 1024]
    assert sum(map(bool, others)) == 2  # vocabularies and lengths


def test_memory_of_a_case_has_nothing_of_the_models_of_other_questions(decoding, monkeypatch):
    held, peak = [5 * 2**30], [0]

    def work(taken):
        peak[0] = max(peak[0], held[0] + taken * 2**30)
        return 1

    fakes = {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: peak.__setitem__(0, held[0]),
        "max_memory_allocated": lambda: peak[0],
        "memory_allocated": lambda: held[0],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    bench = decoding.Bench(torch.device("cuda"), "tiny", 4, 2, 1)
    for name in ("alone", "beside another model"):
        bench.ask(name, {"one": lambda: work(1), "two": lambda: work(2)})
        assert {case: row["peak_gib"] for case, row in bench.questions[name]["cases"].items()} == {"one": 1, "two": 2}
        held[0] *= 3


@pytest.mark.parametrize("name", ["L2D, LoRA", "reward"])
def test_a_dry_run_knows_the_measured_peak_within_its_limit(memory, name, tmp_path):
    shape = {**memory.SHAPE, **TINY, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    memory.write_model(tmp_path / "base", {**shape, **heads})
    found = memory.compare(memory.run_of(memory.CASES[name], tmp_path / "base", tmp_path, rows=4, length=64))
    assert found["peak"] == pytest.approx(found["measured"], rel=memory.LIMIT)
    # A guess of the weights alone would not do.
    assert found["activations"] > memory.LIMIT * found["measured"]


def test_sizes_are_tabulated_by_model_method_and_number_of_gpus(sizes, monkeypatch, tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(sizes, "SHAPES", {"tiny": {**sizes.LLAMA, **TINY, **heads}})
    monkeypatch.setattr(sizes, "METHODS", {"TESS, full": sizes.METHODS["TESS, full"]})
    sizes.main(length=8, out=tmp_path / "sizes.json")
    card = json.loads((tmp_path / "sizes.json").read_text())
    one, eight, most = card["models"]["tiny"]["TESS, full"].values()
    assert one["trained"] == pytest.approx(8 * eight["trained"], abs=8) == pytest.approx(64 * most["trained"], abs=64)
    assert one["peak"] > eight["peak"] > most["peak"]
    assert (tmp_path / "sizes.md").read_text().count("| yes |") == 3


def test_noise_on_a_device_is_numpys_philox(noise, monkeypatch, tmp_path):
    names = [("a", number) for number in range(20)]
    words = np.frombuffer(b"".join(stream_key(*name) for name in names), "<i8").copy()
    keys = torch.from_numpy(words).view(-1, 2)
    found = noise.philox(keys, 5).numpy().view(np.uint64)
    assert (found == np.stack([keyed_generator(*name).bit_generator.random_raw(20) for name in names])).all()
    uniform = np.stack([keyed_generator(*name).random(15, dtype=np.float32) for name in names])
    assert (noise.uniform(keys, 15).numpy() == uniform).all()
    normal = noise.normal(keys, 1001)
    assert normal.shape == (20, 1001)
    assert torch.stack([normal.mean(), normal.std()]).tolist() == pytest.approx([0, 1], abs=0.02)
    monkeypatch.setattr(noise, "ROWS", (64,))
    monkeypatch.setattr(noise, "SIZES", (8,))
    noise.main(device="cpu", rounds=1, out=tmp_path / "noise.json")
    assert json.loads((tmp_path / "noise.json").read_text())["cases"]["D 8, batch 64"]["ratio"] > 0


def test_what_kernels_save_is_measured_beside_the_plain_way(kernels, tmp_path):
    kernels.main(device="cpu", size="tiny", rounds=1, out=tmp_path / "fused.json")
    cases = json.loads((tmp_path / "fused.json").read_text())["cases"]
    assert len(cases) == 2
    assert all(case["difference"] == 0 and len(case["samples"]["kernel"]) == 1 for case in cases.values())


def test_drafters_are_measured_by_the_text_and_the_evaluations(drafters, monkeypatch, tmp_path):
    monkeypatch.setattr(drafters, "TASKS", {"copy": "to be or not to be or not"})
    tiny_lm().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    out = tmp_path / "drafters.json"
    lm = str(tmp_path / "lm")
    drafters.main(lm, rounds=1, new_tokens=14, steps=[1], scales=[0.0], assistant=[lm], layers=1, out=out)
    (question,) = json.loads(out.read_text())["questions"].values()
    assert question["answers_are_equal"]
    assert question["agreement"] == question["right"]["main path, 4"] == question["right"]["assistant lm, 4"] == 1
    assert question["right"]["assistant of its first 1 layers, 4"] < 1


MISTAKES = {
    "gpu": [
        (["--only", "bandwith"], r"--only: unknown 'bandwith'; did you mean 'bandwidth'\? Choose from 'bandwidth', "),
        (["--size", "2b"], r"--size: unknown '2b'.* Choose from 'tiny', 'small', '1b'\."),
        (["--out", "{folder}"], r"'.*' cannot be written\. Name another --out\."),
        (["--out", "{file}/out.json"], r"'.*/out\.json' cannot be written\. Name another --out\."),
    ],
    "fused": [(["--size", "2B"], r"--size: unknown '2B'")],
    "drafters": [
        (["{folder}/none"], r"There is no folder '.*/none'"),
        (["{folder}"], r"'.*' holds no config\.json"),
        (["{lm}", "--assistant", "./none"], r"There is no folder '\./none'"),
    ],
    "memory": [
        (["--case", "all"], r"--case: unknown 'all'"),
        (["--model", "{folder}/none"], r"There is no folder '.*/none'"),
    ],
}
WITH_DEVICE = ["l2d", "blocks", "batching", "overhead", "noise", "fused", "gpu", "drafters"]


@pytest.fixture(scope="module")
def scripts(speed, speed_tess, blocks, overhead, noise, kernels, batching, decoding, drafters, memory, sizes):
    loaded = (speed, speed_tess, blocks, overhead, noise, kernels, batching, decoding, drafters, memory, sizes)
    return {module.__name__: module for module in loaded}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        *((name, *mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes),
        *((name, ["--device", "gpu0"], "--device 'gpu0' cannot be used here") for name in WITH_DEVICE),
        *((name, ["--device", "meta"], "--device 'meta' computes nothing") for name in WITH_DEVICE),
    ],
)
def test_what_a_user_gets_wrong_ends_a_script_in_a_line_before_anything_is_measured(
    scripts, name, given, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    if "{lm}" in given:
        tiny_lm().save_pretrained("lm")
        tiny_tokenizer().save_pretrained("lm")
        capsys.readouterr()
    (tmp_path / "file").touch()
    arguments = [text.format(folder=tmp_path, file=tmp_path / "file", lm="./lm") for text in given]
    if name == "drafters" and arguments[0] == "--device":
        arguments = ["model", *arguments]
    if name == "gpu":
        arguments += ["--device", "cpu"] if "--device" not in arguments else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(scripts[name].main)
    out, errors = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert re.fullmatch(rf"Error: {message}.*\n", errors)


def test_every_script_is_started_so():
    for path in {*(RUNS[0].parents[1] / "speed").glob("*.py")} - {RUNS[0].parents[1] / "speed" / "common.py"}:
        assert path.read_text().endswith('if __name__ == "__main__":\n    run_script(main)\n'), path


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_a_result_file_is_named_by_the_kind_of_device(scripts, name, monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(scripts[name], "result_file", lambda _, name: sys.exit(names.append(name)))
    if name == "drafters":
        tiny_lm().save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    given = [str(tmp_path)] if name == "drafters" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given, "--device", "cpu:0"])
    with pytest.raises(SystemExit):
        run_script(scripts[name].main)
    assert len(names) == 1 and names[0].endswith("_cpu.json")


def test_the_shortest_prompt_can_be_measured(decoding, tmp_path):
    out = tmp_path / "decode.json"
    options = {"device": "cpu", "size": "tiny", "minutes": 5, "rounds": 1, "new_tokens": 2, "only": ["lengths"]}
    shortest = next(one.min for one in get_type_hints(decoding.main, include_extras=True)["prompt"].__metadata__)
    decoding.main(**options, prompt=int(shortest), out=out)
    questions = json.loads(out.read_text())["questions"]
    assert len(questions) == 4
    assert all(case["cost"] > 0 for question in questions.values() for case in question["cases"].values())
