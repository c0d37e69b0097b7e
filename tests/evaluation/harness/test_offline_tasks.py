"""The tasks that the folder of data sets serves run to their end without network, and say what they lack."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import tiny_lm, tiny_tokenizer

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from l2d_framework.config import ModelSection
from l2d_framework.errors import ConfigError, DataError, L2DError, PluginError
from l2d_framework.evaluation.code.sandbox import ALLOW_NETWORK, CONSENT
from l2d_framework.evaluation.harness.command import run
from l2d_framework.evaluation.harness.errors import explain
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.models.checkpoint import save

pytestmark = pytest.mark.filterwarnings("ignore")  # of the data sets and the tasks

FOLDERS = (
    "gsm8k", "gsm_plus", "mgsm", "mmlu_pro", "mmlu", "hendrycks_math", "minerva_math", "bbh", "arc", "humaneval",
    "mbpp", "cruxeval", "piqa", "winogrande", "commonsense_qa", "leaderboard", "ifeval",
)  # fmt: skip
GENERATING = (
    "gsm8k", "gsm8k_cot", "gsm_plus_mini", "mgsm_direct_en", "mmlu_pro_math", "mmlu_pro_biology", "hendrycks_math500",
    "bbh_zeroshot_boolean_expressions", "arc_challenge_chat", "humaneval", "humaneval_instruct", "humaneval_plus",
    "mbpp", "mbpp_instruct", "mbpp_plus", "cruxeval_input", "cruxeval_output",
)  # fmt: skip
COMPARING = (
    "mmlu_anatomy", "mmlu_astronomy", "arc_easy", "arc_challenge", "piqa", "winogrande", "commonsense_qa",
    "leaderboard_mmlu_pro",
)  # fmt: skip
EXTRAS = {"minerva_math500": "math_verify", "ifeval": "langdetect", "leaderboard_ifeval": "langdetect"}
"""Tasks whose packages the extra `eval` does not bring."""

SERVED = (
    "gsm8k_cot_zeroshot", "gsm8k_cot_llama", "gsm8k_llama", "mmlu_pro", "mmlu_pro_llama", "mmlu", "mmlu_generative",
    "arc_challenge_llama", "bbh", "leaderboard_bbh", "humaneval_64", "mbpp_plus_instruct",
    "humaneval_single_line_infilling", "humaneval_random_span_infilling_light", "cruxeval_output_cot", "mgsm_direct",
    "wikitext",
)  # fmt: skip
"""Larger ones; `slow`."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An L2D and a TESS checkpoint that read 4096 bytes."""
    root, size = tmp_path_factory.mktemp("models"), {"max_position_embeddings": 4096}
    lm, tokenizer = tiny_lm("llama", **size), tiny_tokenizer(chat=True)
    tokenizer.model_max_length = 4096
    for part in (lm, tokenizer):
        part.save_pretrained(root / "base")
    for name, model in (("l2d", diffusion_lm(lm)), ("tess", tess_lm(tiny_lm("llama", **size)))):
        section = ModelSection(base=str(root / "base"), dtype="float32")
        model.origin = dataclasses.replace(model.origin, model=section)
        model.tokenizer = tokenizer
        save(model, root / name)
    return {name: root / name for name in ("l2d", "tess")}


@pytest.fixture(scope="module")
def sentence_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for NLTK_DATA with a splitter that knows next to nothing, in the files of `punkt_tab`."""
    root = tmp_path_factory.mktemp("nltk")
    folder = root / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    rows = {"abbrev_types.txt": "dr\n", "collocations.tab": "", "sent_starters.txt": "we\n", "ortho_context.tab": ""}
    for name, text in rows.items():
        (folder / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Finds the tasks of a few folders; reading all of lm_eval's takes long."""
    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[str(root / name) for name in FOLDERS], include_defaults=False)


@pytest.fixture
def evaluated(checkpoints, datasets_dir, sentence_data, manager, monkeypatch) -> Callable[..., dict[str, Any]]:
    """`evaluated(model, options, *tasks)`: results of one evaluation in the folder of data sets."""
    monkeypatch.chdir(datasets_dir)
    monkeypatch.setenv(CONSENT, "1")

    def evaluate(name: str, options: str, *tasks: str) -> dict[str, Any]:
        if installed(EXTRAS):
            import nltk

            monkeypatch.setattr(nltk.data, "path", [str(sentence_data)])
        return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
            "l2d",
            model_args=f"pretrained={checkpoints[name]},num_inference_steps=3,noise_samples=1,{options}",
            tasks=list(tasks),
            task_manager=manager,
            limit=1,
            gen_kwargs="max_gen_toks=4",
            batch_size=8,
            confirm_run_unsafe_code=True,
            bootstrap_iters=0,
        )

    return evaluate


def installed(tasks: dict[str, str]) -> list[str]:
    return [name for name, module in tasks.items() if importlib.util.find_spec(module)]


def check(results: dict[str, Any], datasets_dir: Path, *tasks: str) -> None:
    """Every task has a number, and its data came from the folder."""
    for task in tasks:
        numbers = [value for value in results["results"][task].values() if isinstance(value, float | int)]
        assert numbers, task
        assert results["config"]["l2d"]["data"][task]["local_folder"].startswith(str(datasets_dir.resolve())), task


def test_an_l2d_model_runs_tasks_of_every_kind(evaluated, datasets_dir):
    tasks = (*GENERATING, *COMPARING, *installed(EXTRAS))
    check(evaluated("l2d", "seed=1", *tasks), datasets_dir, *tasks)


def test_a_tess_model_runs_tasks_of_every_kind(evaluated, datasets_dir):
    tasks = ("gsm8k", "mmlu_pro_math", "humaneval", "mbpp", "arc_easy", "mmlu_anatomy", "piqa")
    check(evaluated("tess", "pseudo_times=1,scoring=pseudo", *tasks), datasets_dir, *tasks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_larger_groups_run_from_the_command_line(checkpoints, datasets_dir, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "l2d_framework.evaluation.harness", "--tasks", ",".join(SERVED)),
            *("--model_args", f"pretrained={checkpoints['l2d']},num_inference_steps=3,noise_samples=1"),
            *("--limit", "1", "--gen_kwargs", "max_gen_toks=4", "--batch_size", "8"),
            *("--confirm_run_unsafe_code", "--output_path", str(tmp_path / "out")),
        ],
        cwd=datasets_dir,
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    # A tag has no row of its own, but its tasks have.
    assert [task for task in SERVED if not any(name.startswith(task) for name in found)] == []


def test_a_text_longer_than_the_context_is_scored_piece_by_piece(tmp_path):
    lm, tokenizer = tiny_lm("llama", max_position_embeddings=16), tiny_tokenizer()
    model = diffusion_lm(lm)
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model.origin = dataclasses.replace(model.origin, model=ModelSection(base=str(tmp_path / "base"), dtype="float32"))
    model.tokenizer = tokenizer
    save(model, tmp_path / "l2d")
    opened = L2DLM(str(tmp_path / "l2d"), device="cpu", max_length=16, num_inference_steps=3, noise_samples=1)
    text = "a text of more than sixteen bytes"
    (score,) = opened.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1))])
    tokens = [opened.prefix_token_id, *opened.tok_encode(text, add_special_tokens=False)]
    # Each piece fills the context but for its last token, which is only asked for.
    pieces = [(tokens[:1], tokens[1:17]), (tokens[16:17], tokens[17:33]), (tokens[17:33], tokens[33:])]
    found = opened._loglikelihood_tokens([(None, *piece) for piece in pieces], disable_tqdm=True)
    assert score == pytest.approx(sum(part for part, _ in found), abs=1e-4)


@pytest.fixture
def refused(checkpoints, datasets_dir, manager, monkeypatch) -> Callable[..., L2DError]:
    """`refused(task)`: the error in which an evaluation ends before any weights are loaded."""
    monkeypatch.chdir(datasets_dir)
    monkeypatch.delenv(CONSENT, raising=False)
    monkeypatch.setattr(L2DLM, "diffusion", property(lambda _: pytest.fail("weights were loaded")))

    def evaluate(task: str) -> L2DError:
        arguments = {"model_args": f"pretrained={checkpoints['l2d']}", "tasks": [task], "task_manager": manager}
        with pytest.raises((OSError, ValueError)) as caught:
            lm_eval.simple_evaluate("l2d", limit=1, **arguments)
        found = explain(caught.value)
        assert found is not None
        return found

    return evaluate


@pytest.mark.parametrize("task", ["humaneval", "mbpp", "cruxeval_output"])
def test_code_tasks_without_consent_are_refused(refused, monkeypatch, task):
    for name in ("humaneval", "mbpp"):
        monkeypatch.delitem(sys.modules, f"lm_eval.tasks.{name}.utils", raising=False)
    error = refused(task)
    assert isinstance(error, ConfigError) and "--confirm_run_unsafe_code" in str(error)


def test_instructions_that_count_sentences_need_their_data(refused, monkeypatch):
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    error = refused("ifeval")
    assert isinstance(error, DataError) and "punkt_tab" in str(error) and "/nowhere" in str(error)


def test_data_out_of_reach_name_the_folder_that_would_serve(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("piqa")
    assert isinstance(error, DataError) and f"{tmp_path}/baber/piqa" in str(error)


def test_network_may_be_allowed_by_an_option_of_our_own(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv(ALLOW_NETWORK, "")
    run(["--model", "dummy", "--allow-network-in-sandbox", "--tasks", "mbpp"])
    assert len(seen) == 1 and seen[0][-4:] == ["--model", "dummy", "--tasks", "mbpp"]
    assert "--allow-network-in-sandbox" not in seen[0] and os.environ[ALLOW_NETWORK] == "1"


@pytest.mark.parametrize(
    ("module", "extra"), [("math_verify", "math"), ("langdetect", "ifeval"), ("nltk.data", "ifeval")]
)
def test_a_missing_package_names_the_extra_that_brings_it(module, extra):
    error = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert isinstance(error, PluginError) and f"lm_eval[{extra}]" in str(error)


def test_other_errors_are_left_alone():
    assert explain(ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")) is None
    assert explain(ConnectionError("another host")) is None
    wrapped = RuntimeError("while loading")
    wrapped.__cause__ = ConfigError("the reason")
    assert explain(wrapped) is wrapped.__cause__
