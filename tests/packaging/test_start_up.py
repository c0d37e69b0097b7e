"""What commands import: asking for help costs no torch and no plugin, others only what they need."""

import json
import resource
import statistics
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from diffusion_models import SPACE
from tiny_models import tiny_lm, tiny_tokenizer

import l2d_framework.cli
from l2d_framework.cli import main
from l2d_framework.config import parse_run
from l2d_framework.models.checkpoint import build_model, save
from l2d_framework.registry import Registry, declared
from l2d_framework.registry.offers import DECLARED


def command(*arguments: object) -> str:
    """A program that does what `l2d` does."""
    return f"import sys; sys.argv = {['l2d', *map(str, arguments)]}; from l2d_framework.cli import main; main()"


COMMANDS = {"import": "import l2d_framework", "help": command("--help"), "version": command("--version")}

HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "huggingface_hub", "l2d_plugins"}
TRAINING = {
    "datasets",
    "pandas",
    "sklearn",
    "tensorboard",
    "trl",
    "matplotlib",
    "lm_eval",
    "l2d_framework.training",
    "transformers.trainer",
    "transformers.trainer_utils",
    "transformers.integrations.integration_utils",
}
"""What training, evaluation and pictures need."""
MODELS = {"transformers.modeling_utils", "transformers.quantizers", "scipy", "torchao", "torch._inductor"}
"""What comes with the first model of transformers."""

REPORT = f"""
import atexit, sys
def report():
    print("HEAVY", sorted({HEAVY | TRAINING | MODELS} & sys.modules.keys()), file=sys.stderr)
atexit.register(report)
"""


def run(program: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Result of a program and the processor seconds it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", COMMANDS)
def test_no_torch_and_no_plugin_is_imported(name):
    result, _ = run(REPORT + COMMANDS[name])
    assert result.returncode == 0, result.stderr
    assert "HEAVY []" in result.stderr


GENERATE = ("generate", "model", "--prompt", "Hello")
MISTAKES = [
    (*GENERATE, "--solver", "ab3"),
    (*GENERATE, "--guidance", "classifer_free"),
    (*GENERATE, "--preset", "l2d-papr"),
    (*GENERATE, "--set", "solvr=euler"),
    (*GENERATE, "--set", "guidance=[{name: reward}]"),
    (*GENERATE, "--class", "mth"),
    (*GENERATE, "--stream", "--num-return-sequences", "2"),
    ("generate", "model"),
    ("convert", "base", "out", "--from", "l2d-refrence"),
    ("diagnose", "model", "--data", "rows.jsonl", "--solver", "ab3"),
    ("diagnose", "model", "--data", "rows.jsonl", "--adaptive-solver", "fehlberg"),
    ("config", "check", "run.json", "method=l2"),
    ("config", "check", "run.json", "schedule.name=linaer"),
    ("config", "check", "run.json", "sampling.preset=l2d-papr"),
    ("config", "check", "run.json", "data={train: [{path: a.jsonl, format: mesages}]}"),
    ("train", "run.json", "training.solvr=1"),
    ("train", "run.json", "backbone=two_stream"),
    ("train", "run.json", "kind=difusion"),
    ("train", "stages.json", "stages.0.training.solvr=1"),
    ("train-reward", "reward.json", "training.margn=1"),
    ("train-reward", "reward.json", "noise.schedule.name=cosin"),
    ("params", "run.json", "backbone.name=two_strem"),
]
"""Names that nothing installed has, fields that there are not, and options that exclude each other."""


@pytest.fixture(scope="module")
def fully_trained(tmp_path_factory):
    """A checkpoint without an adapter, and run files without a mistake; `run.json` needs no more to be checked."""
    folder = tmp_path_factory.mktemp("start_up")
    tiny_lm().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    sections = {
        "model": {"base": str(folder / "base")},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "in_place"},
        "block_size": None,
    }
    save(build_model(parse_run(sections)), folder / "model")
    reward = {"kind": "reward", "model": sections["model"], "data": {"train": [{"path": "a.jsonl"}]}}
    for name, run in {"run": sections, "reward": reward, "stages": {"stages": [sections]}}.items():
        (folder / f"{name}.json").write_text(json.dumps(run))
    return folder


FORKED = """
import json, os, resource
os.environ["L2D_PLUGINS"] = ""
import rich.console
from l2d_framework.cli import config, generate, main
from l2d_framework.config import parsing, reference, reward

for arguments in json.loads(sys.argv[1]):
    before = resource.getrusage(resource.RUSAGE_SELF)
    if (child := os.fork()) == 0:
        sys.argv = ["l2d", *arguments]
        main()
    _, status, used = os.wait4(child, 0)
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (before, used))
    print(json.dumps([os.waitstatus_to_exitcode(status), seconds]), flush=True)
    print("\\f", end="", file=sys.stderr, flush=True)
atexit.unregister(report)
"""


@pytest.fixture(scope="module")
def refused(fully_trained):
    """By arguments with a mistake: exit code, processor seconds and standard error of a process of their own."""
    program = [sys.executable, "-c", REPORT + FORKED, json.dumps(MISTAKES)]
    result = subprocess.run(program, cwd=fully_trained, capture_output=True, text=True, timeout=250, check=True)
    numbers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    found = zip(numbers, result.stderr.split("\f"), strict=False)
    return {arguments: (*pair, text) for arguments, (pair, text) in zip(MISTAKES, found, strict=True)}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_wrong_name_is_refused_in_the_same_words_before_torch_is_imported(
    arguments, refused, fully_trained, monkeypatch, capsys
):
    monkeypatch.chdir(fully_trained)
    code, seconds, text = refused[arguments]
    assert code == 2, text
    message, _, modules = text.partition("HEAVY ")
    assert modules.strip() == "[]"
    assert seconds < 2
    assert message.startswith("Error: ")
    # The other path: what plugins declare is not asked, so that loading them tells.
    monkeypatch.setattr(declared(), "knows_all", False)
    monkeypatch.setattr(sys, "argv", ["l2d", *arguments])
    with pytest.raises(SystemExit) as late:
        main()
    assert late.value.code == 2
    assert capsys.readouterr().err.endswith(message)


def test_built_in_plugins_declare_what_they_offer(monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")
    rows = Registry.load().table()
    assert {(row.kind, row.name) for row in rows} == {
        (kind, name) for kind in DECLARED for name in Registry.declared().names(kind)
    }


def test_what_an_option_completes_to_costs_no_torch(monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")

    result, _ = run(f"{REPORT}\nlines = {[*COMPLETED]}\n{COMPLETE}")
    assert heavy(result) == set()
    offers = [part.split() for part in result.stdout.split("|")[1:]]
    assert dict(zip(COMPLETED, offers, strict=True)) == COMPLETED


COMPLETED = {
    "l2d generate MODEL --solver mid": ["midpoint"],
    "l2d generate MODEL --preset l2d-release-": ["l2d-release-coding"],
    "l2d generate MODEL --guidance c": ["classifier_free"],
    "l2d generate MODEL --set num": ["num_inference_steps="],
    "l2d generate MODEL --merge a": ["auto", "always"],
    "l2d generate MODEL --speculate ": ["auto", "off"],
    "l2d diagnose MODEL --adaptive-solver no": ["none"],
    "l2d convert FOLDER OUT --from l2d": ["l2d-reference"],
    "l2d init --method l2d-s": ["l2d-steps"],
    "l2d train run.json training.max_s": ["training.max_steps="],
    "l2d config check run.json data.train.0.pa": ["data.train.0.path="],
    "l2d help tra": ["training"],
    "l2d help training.dra": ["training.draws_per_token"],
    "l2d help data train pa": ["path"],
    "l2d help masking obj": ["objectives"],
    "l2d help solver mid": ["midpoint"],
    "l2d help sampling.solver.mid": ["sampling.solver.midpoint"],
}
"""What shells offer behind a line."""

COMPLETE = """
import os
from l2d_framework.cli import main
os.environ["_L2D_COMPLETE"] = "complete_bash"
sys.argv = ["l2d"]
for line in lines:
    print("|")
    os.environ.update(COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    try:
        main()
    except SystemExit:
        pass
"""


@pytest.mark.parametrize("name", l2d_framework.cli.COMMANDS)
def test_every_option_with_known_values_offers_them(name):
    def options(command: Any, context: Any) -> Iterator[Any]:
        for parameter in command.params:
            yield context, parameter
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner, typer.Context(inner, parent=context))

    command = l2d_framework.cli._load(name)
    for context, parameter in options(command, typer.Context(command)):
        offered = [item for item in parameter.shell_complete(context, "") if item.type == "plain"]
        assert bool(offered) == (parameter.name in KNOWN), parameter.name


KNOWN = {
    *("solver", "adaptive_solver", "guidance", "preset", "method", "reader"),
    *("dtype", "device", "device_map", "shard", "merge", "speculate", "drafter", "set_", "overrides", "names"),
}
"""Parameters of commands whose values are known without looking at the user's files."""


def test_the_report_sees_torch():
    result, _ = run(REPORT + "import torch")
    assert "torch" in heavy(result)


def heavy(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Heavy modules that a program with `REPORT` imported."""
    assert result.returncode in (0, 2), result.stderr
    return set(literal_eval(result.stderr.partition("HEAVY ")[2].splitlines()[0]))


def test_listing_plugins_imports_no_model_of_transformers(monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")
    result, _ = run(REPORT + command("plugins"))
    assert heavy(result) == {"torch", "transformers", "numpy", "huggingface_hub", "l2d_plugins"}


PLAIN = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (auto.from_pretrained("base") for auto in (AutoTokenizer, AutoModelForCausalLM))
model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=2, do_sample=False)
"""
LARGE = {"torch", "transformers", "numpy", "scipy", "sympy", "accelerate", "huggingface_hub", "tokenizers"}
LISTING = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))"


@pytest.fixture(scope="module")
def imported(fully_trained):
    """Modules that transformers imports to generate, and that `l2d` does to check a run file and to generate."""
    check = command("config", "check", "run.json")
    generate = command("generate", "model", "--prompt", "Hello", "--max-new-tokens", "2", "--num-inference-steps", "3")
    ours = f"try:\n    {check}\nexcept SystemExit as end:\n    assert not end.code\n{generate}"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2D_PLUGINS", "")
        patch.chdir(fully_trained)
        for program in (PLAIN, ours):
            result, _ = run(f"{LISTING}\n{program}")
            assert result.returncode == 0, result.stderr
            found.append(set(result.stderr.partition("MODULES ")[2].split()))
    return found


def test_without_adapter_training_or_data_nothing_is_imported_for_them(imported):
    theirs, ours = imported
    assert "transformers.modeling_utils" in ours
    assert "peft" not in ours
    assert not (ours - theirs) & TRAINING  # old releases of transformers need scikit-learn


def test_generating_imports_of_the_large_libraries_what_transformers_does_by_itself(imported):
    theirs, ours = ({name for name in found if name.partition(".")[0] in LARGE} for found in imported)
    assert {"torch", "transformers.modeling_utils"} <= theirs
    assert ours - theirs <= {"transformers.generation.streamers"}


@pytest.mark.parametrize("name", COMMANDS)
def test_half_a_second_is_enough(name):
    bare, cost = (statistics.median(run(program)[1] for _ in range(3)) for program in ("pass", COMMANDS[name]))
    assert cost - bare < 0.5


def test_help_names_the_commands_and_version_the_version():
    result, _ = run(COMMANDS["help"])
    for command in ("train", "generate", "convert", "config", "plugins", "params", "demo"):
        assert command in result.stdout
    result, _ = run(COMMANDS["version"])
    assert "0.1.0" in result.stdout


def test_a_component_may_leave_its_name_to_the_method():
    run = parse_run({"model": {"base": "org/model"}, "method": "l2d", "backbone": {"rank": 4}})
    assert (run.backbone.component_name(), run.backbone.rank) == ("two_stream", 4)
