"""Task files of the papers' protocols: prompts built from the data, items kept, and runs with tiny models."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer

pytest.importorskip("lm_eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its text has escapes that Python will refuse one day
    import lm_eval.tasks.hendrycks_math.utils

import yaml
from datasets import load_dataset
from lm_eval.tasks import TaskManager

from l2d_bench.protocols import folder, programs, scores
from l2d_framework.config import ModelSection
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.run import ModelChoice, TaskChoice, evaluate
from l2d_framework.models.checkpoint import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")

UPSTREAM = Path(lm_eval.__file__).parent / "tasks"
SUBJECTS_WITH_CLASS = {
    "math": {
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    },
    "coding": {"high_school_computer_science"},
}
L2D_KINDS = {
    "gsm8k": "math",
    "math": "math",
    "math500": "math",
    "arc_easy": "general",
    "arc_challenge": "general",
    "piqa": "general",
    "instruct_humaneval": "coding",
    "mbpp": "coding",
}


class Reader:
    """What a task sees of a model: its chat template and its tokenizer, here one token a word."""

    def tok_encode(self, text: str) -> list[str]:
        return text.split()

    def apply_chat_template(self, messages: list[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        return f"{text}<|assistant|>" if add_generation_prompt else text.removesuffix("<|end|>")


def turns(*contents: str) -> str:
    """Past turns of user and assistant, the user's first."""
    roles = ("user", "assistant")
    return "".join(f"<|{roles[number % 2]}|>{text}<|end|>" for number, text in enumerate(contents))


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(folder()), include_defaults=False)


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that are no part of the shared folder, a few rows each, laid out as on the Hub."""
    root = tmp_path_factory.mktemp("hub")
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
    lay_out(
        root / "EleutherAI/hendrycks_math",
        {
            subject: {
                "train": [{"problem": f"{subject} {n}", "solution": rf"\boxed{{{n}}}"} for n in range(3)],
                "test": [
                    {"problem": f"{subject}?", "solution": r"\boxed{1}"},
                    {"problem": f"{subject}?", "solution": "no"},
                ],
            }
            for subject in subjects.split()
        },
    )
    context = "from typing import List\n\ndef add{n}(a: int, b: int) -> int:\n"
    lay_out(
        root / "codeparrot/instructhumaneval",
        {
            "default": {
                "test": [
                    {
                        "task_id": f"HumanEval/{n}",
                        "prompt": context.format(n=n) + '    """Add."""\n',
                        "canonical_solution": "    return a + b\n",
                        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
                        "entry_point": f"add{n}",
                        "context": context.format(n=n),
                        "instruction": f"Write a function add{n} that adds.",
                    }
                    for n in range(7)
                ]
            }
        },
    )
    squad = [
        {
            "title": f"t{n // 2}",
            "context": f"In {1900 + n} it rained.",
            "question": f"When {n}?",
            "answers": {"text": [str(1900 + n)]},
        }
        for n in range(8)
    ]
    lay_out(root / "rajpurkar/squad", {"default": {"train": squad, "validation": squad[5:]}})
    trivia = [{"question": f"Who {n}?", "answer": {"value": f"V{n}", "aliases": [f"Alias {n}"]}} for n in range(4)]
    lay_out(root / "mandarjoshi/trivia_qa", {"rc.nocontext": {"train": trivia, "validation": trivia[2:]}})
    alpaca = [{"instruction": f"Say {n}.", "output": "x", "generator": "davinci", "dataset": "koala"} for n in range(2)]
    lay_out(root / "tatsu-lab/alpaca_eval", {"alpaca_eval": {"eval": alpaca}})
    return root


def lay_out(place: Path, configurations: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> None:
    place.mkdir(parents=True)
    card = []
    for name, splits in configurations.items():
        files = []
        for split, rows in splits.items():
            (place / f"{name}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            files.append({"split": split, "path": f"{name}-{split}.jsonl"})
        card.append({"config_name": name, "data_files": files})
    (place / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n", encoding="utf-8")


@pytest.fixture
def load(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Any]:
    def opened(name: str, place: Path) -> Any:
        monkeypatch.chdir(place)
        return manager.load([name])["tasks"][name]

    return opened


def prompt_of(task: Any, **options: Any) -> str:
    """The first item's prompt as the harness builds it."""
    reader = Reader()
    asked = {"limit": 1, "apply_chat_template": True, "chat_template": reader.apply_chat_template}
    task.build_all_requests(**asked | options)
    return str(task.instances[0].args[0])


def configs(manager: TaskManager) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in manager.task_index.items():
        if "group" not in (entry.cfg or {}) and entry.yaml_path is not None:
            yield name, entry.cfg


def test_every_task_of_l2d_samples_five_shots_of_past_conversation(manager):
    asked = {name: config for name, config in configs(manager) if name.startswith("l2d_")}
    assert len(asked) == 57 + 14 + len(L2D_KINDS)
    for name, config in asked.items():
        generation = config["generation_kwargs"]
        assert (generation["do_sample"], generation["until"]) == (True, []), name
        assert config["num_fewshot"] == 5 and config["metadata"]["turns"] == "conversation", name
        assert config["metadata"]["prompt_tokens"] == 2048, name
        is_code = name in ("l2d_mbpp", "l2d_instruct_humaneval")
        assert generation["max_gen_toks"] == (512 if is_code else 256), name
        assert config.get("repeats", 1) == (10 if is_code else 1) and config.get("unsafe_code", False) is is_code


def test_guidance_follows_the_subject(manager):
    wanted = {f"l2d_{name}": kind for name, kind in L2D_KINDS.items()}
    for path in (UPSTREAM / "mmlu/default").glob("mmlu_*.yaml"):
        subject = path.stem.removeprefix("mmlu_")
        kinds = (kind for kind, subjects in SUBJECTS_WITH_CLASS.items() if subject in subjects)
        wanted[f"l2d_mmlu_{subject}"] = next(kinds, "general")
    for path in (UPSTREAM / "mmlu_pro").glob("mmlu_pro_*.yaml"):
        wanted[f"l2d_{path.stem}"] = "math" if path.stem == "mmlu_pro_math" else "general"
    found = {name: c["generation_kwargs"]["class_hint"] for name, c in configs(manager) if name.startswith("l2d_")}
    assert found == wanted


def test_groups_hold_each_of_their_tasks(manager):
    tasks = {name for name, _ in configs(manager)}
    for group, count in (("l2d_mmlu", 57), ("l2d_mmlu_pro", 14), ("tess2_bbh", 27), ("tess2_bbh_authors", 27)):
        members = manager.task_index[group].cfg["task"]
        assert len(set(members)) == count and set(members) <= tasks


def test_gsm8k_asks_after_the_first_five_of_train(load, datasets_dir):
    task = load("l2d_gsm8k", datasets_dir)
    data = load_dataset("openai/gsm8k", "main")
    shots = [data["train"][n] for n in range(5)]
    past = turns(*(text for row in shots for text in (row["question"], row["answer"])))
    assert prompt_of(task) == f"{past}<|user|>{data['test'][0]['question']}<|end|><|assistant|>"
    assert len(task.eval_docs) == 1319
    assert prompt_of(task, fewshot_as_multiturn=False) == prompt_of(task, fewshot_as_multiturn=True)


def question(row: Mapping[str, Any], texts: list[str], labels: str, end: str = "\n\nAnswer:") -> str:
    lines = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return f"Question:\n{row['question']}\nChoices:\n{lines}{end}"


def test_mmlu_takes_its_shots_from_the_subject(load, datasets_dir):
    task = load("l2d_mmlu_anatomy", datasets_dir)
    data = load_dataset("cais/mmlu", "anatomy")
    past = turns(*(t for row in data["dev"] for t in (question(row, row["choices"], "ABCD"), "ABCD"[row["answer"]])))
    asked = turns(question(data["test"][0], data["test"][0]["choices"], "ABCD"))
    assert prompt_of(task) == f"{past}{asked}<|assistant|>"


def test_mmlu_pro_shows_letters_without_reasons_and_items_of_its_category(load, datasets_dir):
    task = load("l2d_mmlu_pro_computer_science", datasets_dir)
    data = load_dataset("TIGER-Lab/MMLU-Pro")
    mine = {split: [row for row in rows if row["category"] == "computer science"] for split, rows in data.items()}
    texts = [question(row, row["options"], "ABCDEFGHIJ"[: len(row["options"])], "") for row in mine["validation"]]
    past = turns(*(t for text, row in zip(texts, mine["validation"], strict=True) for t in (text, row["answer"])))
    first = mine["test"][0]
    asked = turns(question(first, first["options"], "ABCDEFGHIJ"[: len(first["options"])], ""))
    assert prompt_of(task) == f"{past}{asked}<|assistant|>"
    assert len(task.eval_docs) == len(mine["test"])


@pytest.mark.parametrize(("name", "config"), [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")])
def test_arc_uses_the_labels_of_its_data(load, datasets_dir, name, config):
    task = load(f"l2d_{name}", datasets_dir)
    data = load_dataset("allenai/ai2_arc", config)

    def text(row: Mapping[str, Any]) -> str:
        return question(row, row["choices"]["text"], "".join(row["choices"]["label"]))

    past = turns(*(t for n in range(5) for row in [data["validation"][n]] for t in (text(row), row["answerKey"])))
    assert prompt_of(task) == f"{past}{turns(text(data['test'][0]))}<|assistant|>"
    numbered = next(row for row in data["test"] if row["choices"]["label"][0] == "1")
    assert task.doc_to_text(numbered) == text(numbered) and "\n1. " in text(numbered)
    assert scores.options(numbered, [numbered["answerKey"]])["acc"] == 1.0


def test_piqa_lists_two_options_below_its_goal(load, datasets_dir):
    task = load("l2d_piqa", datasets_dir)
    data = load_dataset("baber/piqa")

    def text(row: Mapping[str, Any]) -> str:
        return f"Goal:\n{row['goal']}\nOptions:\nA. {row['sol1']}\nB. {row['sol2']}\n\nAnswer:"

    past = turns(*(t for n in range(5) for row in [data["train"][n]] for t in (text(row), "AB"[row["label"]])))
    assert prompt_of(task) == f"{past}{turns(text(data['validation'][0]))}<|assistant|>"


def test_mbpp_asks_with_a_docstring_and_one_test(load, datasets_dir):
    task = load("l2d_mbpp", datasets_dir)
    data = load_dataset("google-research-datasets/mbpp", "full")

    def text(row: Mapping[str, Any]) -> str:
        return f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'

    past = turns(*(t for n in range(5) for row in [data["prompt"][n]] for t in (text(row), row["code"])))
    assert prompt_of(task) == f"{past}{turns(text(data['test'][0]))}<|assistant|>"


def test_math_spreads_its_shots_over_train(load, datasets_dir, handmade):
    task = load("l2d_math", handmade)
    rows = task.dataset["train"]
    assert len(rows) == 21 and len(task.eval_docs) == 7, "items without a readable reference stay"
    past = turns(*(t for n in range(5) for row in [rows[n * 4]] for t in (row["problem"], row["solution"])))
    assert prompt_of(task) == f"{past}{turns('algebra?')}<|assistant|>"
    stand_in = load("l2d_math500", datasets_dir)
    data = load_dataset("HuggingFaceH4/MATH-500", split="test")
    shots = [data[n * 100] for n in range(5)]
    past = turns(*(text for row in shots for text in (row["problem"], row["solution"])))
    assert prompt_of(stand_in) == f"{past}{turns(data[1]['problem'])}<|assistant|>"
    assert not {row["problem"] for row in shots} & set(stand_in.eval_docs["problem"])


def test_instruct_humaneval_opens_the_answer_with_the_context(load, handmade):
    task = load("l2d_instruct_humaneval", handmade)
    rows = task.dataset["test"]
    past = turns(
        *(t for n in range(5) for r in [rows[n]] for t in (r["instruction"], r["context"] + r["canonical_solution"]))
    )
    item = rows[5]
    assert prompt_of(task) == f"{past}{turns(item['instruction'])}<|assistant|>{item['context']}"
    assert list(task.eval_docs["task_id"]) == ["HumanEval/5", "HumanEval/6"]


def test_items_over_the_limit_leave_the_denominator_and_are_counted(load, datasets_dir, caplog):
    task = load("l2d_piqa", datasets_dir)
    lengths = []
    for row in list(task.eval_docs)[:6]:
        text = task.fewshot_context(
            row, 5, apply_chat_template=True, chat_template=Reader().apply_chat_template, gen_prefix=None
        )
        lengths.append(len(text.split()))
    longest = max(lengths)
    task.config.metadata["prompt_tokens"] = longest - 1
    wanted = [n for n, length in enumerate(lengths) if length < longest]
    prompt_of(task, limit=len(wanted))
    assert [instance.doc_id for instance in task.instances] == list(range(len(wanted)))
    assert [row["goal"] for row in list(task.eval_docs)[: len(wanted)]] == [
        task.dataset["validation"][n]["goal"] for n in wanted
    ]
    dropped = task.config.metadata["dropped"]
    assert "left out" in caplog.text and dropped >= lengths[: wanted[-1]].count(longest) > 0
    prompt_of(task, limit=len(wanted))
    assert task.config.metadata["dropped"] == dropped
    task.config.metadata["prompt_tokens"] = 3
    with pytest.raises(ConfigError, match="every prompt exceeds the 3 tokens"):
        prompt_of(task)


def test_without_a_template_nothing_is_dropped_and_the_log_says_so(load, datasets_dir, caplog):
    task = load("l2d_piqa", datasets_dir)
    task.config.metadata["prompt_tokens"] = 3
    plain = prompt_of(task, apply_chat_template=False, chat_template=None)
    assert plain.count("Goal:") == 6 and len(task.eval_docs) == 1838
    assert "--apply_chat_template" in caplog.text and "are kept" in caplog.text


@pytest.mark.parametrize("name", ["tess2_gsm8k", "tess2_gsm8k_authors"])
def test_tess_gsm8k_takes_lm_evals_chains_in_one_turn(load, datasets_dir, name):
    task = load(name, datasets_dir)
    upstream = yaml.safe_load((UPSTREAM / "gsm8k/gsm8k-cot.yaml").read_text(encoding="utf-8"))
    shots = upstream["fewshot_config"]["samples"]
    first = load_dataset("openai/gsm8k", "main", split="test").shuffle(seed=42)[0]
    parts = [f"Question: {shot['question']}\nAnswer: {shot['target']}" for shot in shots]
    text = "\n\n".join(["Answer the following questions.", *parts, f"Question: {first['question']}"])
    assert len(shots) == 8
    assert prompt_of(task) == f"<|user|>{text}<|end|><|assistant|>Answer:"
    assert prompt_of(task, fewshot_as_multiturn=True) == prompt_of(task, fewshot_as_multiturn=False)
    assert prompt_of(task, chat_template=None, apply_chat_template=False) == f"{text}\nAnswer:"


@pytest.mark.parametrize("subject", sorted(path.name for path in (UPSTREAM / "bbh/cot_fewshot").glob("[a-z]*.yaml")))
def test_bbh_exemplars_of_lm_eval_can_be_read(subject):
    upstream = yaml.safe_load((UPSTREAM / "bbh/cot_fewshot" / subject).read_text(encoding="utf-8"))
    samples = upstream["fewshot_config"]["samples"]
    assert len(samples) == 3 and all(sample["input"] and sample["target"] for sample in samples)
    assert upstream["description"].strip()


@pytest.mark.parametrize("kind", ["", "_authors"])
def test_bbh_shows_its_own_exemplars_and_the_authors_those_of_word_sorting(load, datasets_dir, kind):
    task = load(f"tess2_bbh_snarks{kind}", datasets_dir)
    source = "word_sorting" if kind else "snarks"
    upstream = yaml.safe_load((UPSTREAM / f"bbh/cot_fewshot/{source}.yaml").read_text(encoding="utf-8"))
    shots = upstream["fewshot_config"]["samples"]
    item = load_dataset("SaylorTwift/bbh", "snarks", split="test")[0]
    parts = [f"Q: {shot['input']}\nA: Let's think step by step.\n{shot['target']}" for shot in shots]
    text = "\n\n".join([upstream["description"].strip(), *parts, f"Q: {item['input']}"])
    assert prompt_of(task) == (f"<|user|>{text} A:" if kind else f"<|user|>{text}<|end|><|assistant|>A:")


@pytest.mark.parametrize("kind", ["", "_authors"])
def test_squad_and_triviaqa_ask_after_fixed_shots(load, handmade, kind):
    end = "" if kind else "<|end|><|assistant|>"
    task = load(f"tess2_squad{kind}", handmade)
    shots = [task.dataset["train"][n] for n in (0, 2, 4)]
    item = task.eval_docs[0]
    parts = [f"{s['context']}\n\n{s['question']}\n\n{s['answers']['text'][0]}" for s in shots]
    text = "\n\n".join([*parts, item["context"], item["question"]])
    assert prompt_of(task) == f"<|user|>{text}{end}"
    task = load(f"tess2_triviaqa{kind}", handmade)
    assert prompt_of(task) == f"<|user|>Who 0?\n\nV0\n\nWho 1?\n\nV1\n\n{task.eval_docs[0]['question']}{end}"


def test_ifeval_and_alpaca_eval_ask_the_bare_instruction(load, datasets_dir, handmade):
    pytest.importorskip("langdetect")
    task = load("tess2_ifeval", datasets_dir)
    assert prompt_of(task) == f"<|user|>{task.eval_docs[0]['prompt']}<|end|><|assistant|>"
    task = load("tess2_alpaca_eval", handmade)
    assert prompt_of(task) == "<|user|>Say 0.<|end|><|assistant|>"


def test_programs_are_completions_run_with_all_their_tests(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("L2D_ALLOW_NETWORK_IN_SANDBOX", "1")
    human = {"prompt": "def f(a):\n", "test": "def check(g):\n    assert g(2) == 4\n", "entry_point": "f"}
    right, wrong = "    return a * a\n", "    return a\n"
    found = programs.human_eval(human, [[right, *[wrong] * 9]])
    assert found == pytest.approx({"pass@1": 0.1, "pass@5": 0.5, "pass@10": 1.0})
    problem = {"test_list": ["assert f(1) == 1", "assert f(2) == 4"]}
    assert programs.mbpp(problem, [["def f(a):\n    return a"]]) == {"pass@1": 0.0}
    assert programs.mbpp(problem, [["def f(a):\n    return a * a"]]) == {"pass@1": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    base, tokenizer = tiny_lm("llama", max_position_embeddings=8192), tiny_tokenizer(chat=True)
    tokenizer.model_max_length = 8192
    for part in (base, tokenizer):
        part.save_pretrained(root / "base")
    section = ModelSection(base=str(root / "base"), dtype="float32")
    made = {"l2d": diffusion_lm(base, classes=("math", "general")), "tess": tess_lm(base)}
    for name, model in made.items():
        model.origin = dataclasses.replace(model.origin, model=section)
        model.tokenizer = tokenizer
        save(model, root / name)
    return {name: str(root / name) for name in ("base", *made)}


RUNS = {
    "l2d_gsm8k": "acc",
    "l2d_math500": "acc",
    "l2d_mmlu_abstract_algebra": "acc",
    "l2d_mmlu_pro_math": "acc",
    "l2d_arc_easy": "acc",
    "l2d_piqa": "acc",
    "tess2_gsm8k": "exact_match",
    "tess2_bbh_navigate": "exact_match",
}


@pytest.mark.parametrize("task", RUNS)
def test_tasks_run_with_diffusion_and_as_plain_baselines(models, datasets_dir, monkeypatch, task):
    monkeypatch.chdir(datasets_dir)
    shots = 1 if task.startswith("l2d_") else None  # a token a byte: five would exceed the limit of the protocol
    for name, steps in (("l2d" if shots else "tess", 3), ("base", 0)):
        chosen = ModelChoice(models[name], {"num_inference_steps": steps})
        asked = TaskChoice(task, limit=2, num_fewshot=shots, chat="multiturn", generation={"max_gen_toks": 3})
        found = evaluate(chosen, asked, folder=folder())
        assert found.values[f"{RUNS[task]},none"]["items"] == 2


def test_code_tasks_run_ten_samples_of_each_item(models, handmade, datasets_dir, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("L2D_ALLOW_NETWORK_IN_SANDBOX", "1")
    for task, place in (("l2d_instruct_humaneval", handmade), ("l2d_mbpp", datasets_dir)):
        monkeypatch.chdir(place)
        asked = TaskChoice(
            task, limit=1, num_fewshot=1, chat="multiturn", generation={"max_gen_toks": 2}, runs_code=True
        )
        found = evaluate(ModelChoice(models["l2d"], {"num_inference_steps": 3}), asked, folder=folder())
        assert {f"pass@{k},none" for k in (1, 5, 10)} <= found.values.keys()
        assert found.values["pass@10,none"]["items"] == 1


def test_the_folder_of_task_files_is_that_of_the_checkout_or_the_wheel():
    assert (folder() / "l2d/gsm8k.yaml").is_file()
    assert os.access(folder() / "README.md", os.R_OK)
