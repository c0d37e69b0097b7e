"""The start-up hook: `lm_eval --model l2d` as anyone types it, and nothing changed for anyone else."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from diffusion_models import diffusion_lm
from tiny_models import tiny_lm, tiny_tokenizer

pytest.importorskip("lm_eval")

import l2d_framework
from l2d_framework.config import ModelSection
from l2d_framework.models.checkpoint import save

LM_EVAL = Path(sysconfig.get_path("scripts"), "lm_eval")
MODELS = "import lm_eval.models, lm_eval.api.registry as r; print(sorted(r.model_registry.keys()))"
NAME = "_l2d_lm_eval_hook.py"
HERE = Path(l2d_framework.__file__).parents[1]


@pytest.fixture
def started(repository, tmp_path):
    """`started(program)`: result of a program that sees the hook at the top of `tmp_path` and installs it first."""
    files = repository / "l2d_framework/evaluation/harness/start_up"

    def run(program: str, *options: str, first: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / NAME).write_text((files / NAME).read_text())
        line = (files / "l2d_lm_eval.pth").read_text()
        command = f"{first}\nimport sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HERE)!r}]\n{line}\n{program}"
        arguments = [sys.executable, *options, "-c", command]
        return subprocess.run(arguments, env={"PATH": "", **environ}, capture_output=True, text=True, check=False)

    return run


def test_the_model_is_found_beside_all_others(started):
    plain = subprocess.run([sys.executable, "-c", MODELS], capture_output=True, text=True, check=True).stdout
    found = started(MODELS)
    assert found.returncode == 0, found.stderr
    assert set(json.loads(found.stdout.replace("'", '"'))) == {"l2d", *json.loads(plain.replace("'", '"'))}


def test_the_off_switch(started):
    program = "import sys; print([f for f in sys.meta_path if 'l2d_lm_eval' in repr(f)])"
    assert started(program, L2D_NO_LM_EVAL_HOOK="1").stdout == "[]\n"
    assert started(program).stdout != "[]\n"


def test_only_what_python_itself_starts_with_is_imported(started):
    listing = "import sys; before = set(sys.modules)"
    found = started("print(*sorted(sys.modules.keys() - before))", first=listing)
    assert found.stderr == ""
    assert set(found.stdout.split()) <= {"__future__", "_l2d_lm_eval_hook"}


@pytest.mark.parametrize("broken", ["raise RuntimeError", "model_registry = None", "import missing_module"])
def test_a_broken_lm_eval_breaks_no_more_than_itself(started, tmp_path, broken):
    package = tmp_path / "lm_eval"
    for name, text in (
        ("api/registry.py", broken),
        ("models.py", "ok = 1"),
        ("__init__.py", ""),
        ("api/__init__.py", ""),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = started("import lm_eval.models; print(lm_eval.models.ok)")
    assert (found.stdout, found.stderr) == ("1\n", "")


def test_python_without_lm_eval_or_arguments_starts(started):
    found = started("del sys.argv[:]\ntry:\n    import lm_eval.nothing\nexcept ImportError:\n    print('fine')")
    assert (found.stdout, found.stderr) == ("fine\n", "")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_the_real_command_in_a_clean_environment(new_environment, wheel, repository, editable):
    environment = new_environment()
    # Only the packages outside, not what they start Python with: a hook found here is this environment's own.
    (outer,) = environment.folder.rglob("outer.pth")
    outer.write_text(sysconfig.get_path("purelib") + "\n")
    assert "'l2d'" not in environment.run("-c", MODELS).stdout
    pip = [sys.executable, "-m", "pip", "--python", environment.python]
    source = ["--no-build-isolation", "--editable", repository] if editable else [wheel]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *source], check=True, capture_output=True)
    options = ("--tasks", "gsm8k,mmlu_pro")
    missing = environment.run("-X", "importtime", LM_EVAL, "--model", "l2d", *options, L2D_PRETRAINED="")
    assert not re.search(r"\| +torch$", missing.stderr, re.MULTILINE)  # whose import takes seconds
    assert missing.returncode == 2
    assert "pretrained=PATH" in missing.stderr and "L2D_PRETRAINED" in missing.stderr
    for arguments in ((LM_EVAL,), ("-m", "lm_eval")):
        nowhere = environment.run(*arguments, "--model", "l2d", *options, L2D_PRETRAINED="/nowhere")
        assert "There is no folder '/nowhere'" in nowhere.stderr
    assert "'l2d'" in environment.run("-c", MODELS).stdout
    assert "'l2d'" not in environment.run("-c", MODELS, L2D_NO_LM_EVAL_HOOK="1").stdout
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "l2d-framework"], check=True, capture_output=True)
    assert not list(environment.folder.rglob("*l2d_lm_eval*"))
    assert environment.run(LM_EVAL, "--help").returncode == 0
    left = environment.run("-c", MODELS).stdout
    assert "'dummy'" in left and "'hf'" in left and "'l2d'" not in left


LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


@pytest.mark.slow
def test_models_are_evaluated_by_the_real_command(new_environment, wheel, datasets_dir, tmp_path):
    lm, tokenizer = tiny_lm("llama", max_position_embeddings=4096), tiny_tokenizer()
    tokenizer.model_max_length = 4096
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = diffusion_lm(lm)
    section = ModelSection(base=str(tmp_path / "base"), dtype="float32")
    model.origin = dataclasses.replace(model.origin, model=section)
    save(model, tmp_path / "l2d")
    environment = new_environment()
    (outer,) = environment.folder.rglob("outer.pth")
    outer.write_text(sysconfig.get_path("purelib") + "\n")
    environment.install(wheel)
    both = ("--tasks", "gsm8k,mmlu_pro", "--limit", "2", "--num_fewshot", "0", "--gen_kwargs", "max_gen_toks=4")
    one = ("--tasks", "gsm8k", *both[2:])
    l2d = f"pretrained={tmp_path / 'l2d'},num_inference_steps=3"
    for arguments in (
        (LM_EVAL, "--model", "l2d", *both),
        (*LAUNCH, LM_EVAL, "--model", "l2d", "--model_args", l2d, *one),
        (LM_EVAL, "--model", "hf", "--model_args", f"pretrained={tmp_path / 'base'}", *one),
        (LM_EVAL, "--model", "dummy", *one),
    ):
        found = subprocess.run(
            [environment.python, *arguments],
            cwd=datasets_dir,
            env=os.environ
            | {"PYTHONSAFEPATH": "1", "L2D_PRETRAINED": str(tmp_path / "l2d"), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        # Two processes print one table.
        assert found.stdout.count("strict-match") == 1
