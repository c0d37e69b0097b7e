import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
import yaml
from fake_plugins import TOYS, broken, installed, plugin
from torch import nn
from toy_components import Forward
from typer import Context

from l2d_framework import cli
from l2d_framework.cli import COMMANDS
from l2d_framework.cli.config import count_by_module
from l2d_framework.config import config_hash, load_run
from l2d_framework.errors import ConfigError, install
from l2d_framework.models.checkpoint import build_model
from l2d_framework.registry import BrokenPlugin, PluginRow, Registry, extensions


@pytest.fixture
def run_file(tmp_path, saved_tiny_lm):
    run = {
        "model": {"base": str(saved_tiny_lm())},
        "schedule": {"name": "circle"},
        "parametrization": {"name": "projected"},
        "backbone": {"name": "beside"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    with installed(TOYS):
        yield path


def test_help_lists_every_command_with_its_purpose(l2d):
    code, out, _ = l2d("--help")
    assert code == 0
    for name, entry in COMMANDS.items():
        assert name in out
        assert entry.help in out


PATHS = [[], *([name] for name in COMMANDS), ["config", "check"], ["config", "schema"], ["bench"]]


@pytest.mark.parametrize("path", [path for path in PATHS if path != ["eval"]], ids=" ".join)  # lm_eval's own
def test_help_cuts_nothing_on_a_narrow_terminal(path, l2d, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = l2d(*path, "--help")
    assert code == 0
    command = typer.main.get_command(cli.app)
    context = Context(command)
    for name in path:
        _, command, _ = command.resolve_command(context, [name])
    shown = re.split(r"[\s,/]+", out)
    for parameter in command.get_params(context):
        for option in (*parameter.opts, *parameter.secondary_opts) if parameter.param_type_name == "option" else ():
            assert option in shown
    for name in getattr(command, "commands", ()):
        assert name in shown
    assert not re.search(r"[^\])}]\.\.\.$|…", out.replace("files...", ""), re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in PATHS if path != ["eval"]], ids=" ".join)
def test_help_names_values_by_words_and_shows_no_type_of_python(path, l2d):
    code, out, _ = l2d(*path, "--help")
    assert code == 0
    assert not re.search(r"<(int|float|str|path|list)\b|\[\[|\{[a-z_]+\}", out)


def test_results_go_where_out_says_and_output_is_another_word_for_it():
    command = typer.main.get_command(cli.app)
    context = Context(command, **command.context_settings)
    having = set()
    for name in COMMANDS:
        _, one, _ = command.resolve_command(context, [name])
        options = {option for parameter in one.get_params(context) for option in parameter.opts}
        assert "--output" not in options
        if "--out" in options:
            given = one.make_context(name, ["--output", "x.png"], parent=context, resilient_parsing=True)
            assert str(given.params["out"]) == "x.png"
            having.add(name)
    assert having == {"demo", "generate", "eval-text", "plot", "diagnose", "eval-steps", "tune-search"}


def test_the_version_is_the_distributions(l2d):
    assert l2d("--version") == (0, f"l2d-framework {version('l2d-framework')}\n", "")


def test_every_command_can_explain_itself_without_heavy_modules():
    program = (
        "import sys\n"
        "from l2d_framework.cli import main\n"
        f"for name in {sorted(COMMANDS, key='eval'.__eq__)}:\n"
        "    sys.argv = ['l2d', name, '--help']\n"
        "    try:\n        main()\n    except SystemExit as stop:\n        assert not stop.code, name\n"
        "    heavy = {'torch', 'transformers', 'l2d_plugins'}\n"
        "    if name != 'eval':\n"  # whose help is that of lm_eval
        "        heavy |= {'numpy', 'huggingface_hub', 'lm_eval'}\n"
        "    assert not heavy & sys.modules.keys(), name\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_an_unknown_command_is_answered_with_a_suggestion(l2d):
    code, _, err = l2d("trian")
    assert code == 2
    assert "'train'" in err


def test_plugins_shows_a_table_and_errors_below(l2d):
    entry_points = [plugin("a", [Forward], distribution="acme", version="1.2.3"), plugin("b", [Forward])]
    with installed(*entry_points, broken("c", ImportError("no [luck] today"))):
        code, out, _ = l2d("plugins")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["solver", "forward", "acme", "1.2.3", "clash"] in rows
    assert ["-", "c", "acme-c", "1.0", "broken"] in rows
    assert out.index("ImportError: no [luck] today") > out.index("broken")


def test_plugins_tells_of_a_name_that_metadata_lacks(l2d, monkeypatch):
    names = Registry()
    names._offers[("solver", "other")] = []
    monkeypatch.setattr("l2d_framework.cli.plugins.declared", lambda: names)
    with installed(plugin("a", [Forward])):
        _, out, _ = l2d("plugins")
    assert ["solver", "forward", "acme-a", "1.0", "undeclared"] in [line.split() for line in out.splitlines()]
    assert 'Add it there, in [project.entry-points."l2d_framework.solver"], and install acme-a again.' in out


def test_plugins_says_how_many_the_allow_list_leaves_out(l2d, monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", "")
    with installed(plugin("a", [Forward]), broken("b", ImportError())):
        _, out, _ = l2d("plugins")
    assert "L2D_PLUGINS leaves out 2 more" in out
    assert "forward" not in out


def test_config_check_accepts_a_good_run(l2d, run_file):
    code, out, err = l2d("config", "check", run_file, "seed=3")
    assert (code, err) == (0, "")
    assert config_hash(load_run(run_file, ["seed=3"])[0])[:12] in out


def test_config_check_prints_a_configuration_that_reloads(l2d, run_file, tmp_path):
    _, out, _ = l2d("config", "check", "--resolved", run_file, "sampling.num_inference_steps=3")
    (tmp_path / "resolved.json").write_text(out)
    assert load_run(tmp_path / "resolved.json") == load_run(run_file, ["sampling.num_inference_steps=3"])


def test_config_schema_prints_json_alone(l2d, run_file):
    code, out, err = l2d("config", "schema")
    assert (code, err) == (0, "")
    assert {"Circle", "Beside", "LanguageModelRun"} <= set(json.loads(out)["$defs"])


def test_a_users_mistake_ends_with_its_message_and_code_2(l2d, run_file):
    code, out, err = l2d("config", "check", run_file, "seed=x", "schedule.name=circl")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {run_file} cannot be used:\n")
    assert "seed: should be a valid integer, got 'x'" in err
    assert "did you mean 'circle'" in err
    assert "Traceback" not in err


def test_debug_mode_shows_the_traceback(l2d, run_file, monkeypatch):
    monkeypatch.setenv("L2D_DEBUG", "1")
    with pytest.raises(ConfigError):
        l2d("config", "check", run_file, "seed=x")


def test_a_terminal_gets_one_panel_with_brackets_intact(l2d, run_file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = l2d("config", "check", run_file, "stages=[bold]")
    assert code == 2
    assert err.count("╭") == err.count("╰") == 1
    assert "stages: must stand alone" in err


def test_params_agrees_with_the_model(l2d, run_file):
    (run,) = load_run(run_file)
    expected = sum(p.numel() for p in build_model(run).parameters() if p.requires_grad)
    code, out, _ = l2d("params", run_file)
    assert code == 0
    assert f"{expected:,}" in out


def test_params_needs_no_weights(l2d, run_file):
    (run,) = load_run(run_file)
    os.truncate(os.path.join(run.model.base, "model.safetensors"), 10)
    assert l2d("params", run_file)[0] == 0


LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_7B = QWEN_1_5B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("shape", "variant", "total"),
    [
        (LLAMA_1B, "lora", "73,344,256"),
        (QWEN_1_5B, "lora", "103,324,928"),
        (LLAMA_8B, "lora", "281,036,032"),
        (QWEN_7B, "lora", "233,008,384"),
        (LLAMA_1B, "full", "992,945,408"),
    ],
)
def test_params_counts_what_the_l2d_paper_counts(l2d, tmp_path, shape, variant, total):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    run = {
        "model": {"base": str(tmp_path)},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding"},
        "backbone": {"name": "two_stream", "variant": variant},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    _, out, _ = l2d("params", tmp_path / "run.yaml")
    assert total in out.splitlines()[-2]


def test_params_needs_a_diffusion_run(l2d, tmp_path):
    scratch = {"tokenizer": {"vocab_size": 300}, "config": {"model_type": "llama"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"kind": "language_model", "scratch": scratch}))
    code, _, err = l2d("params", tmp_path / "run.yaml")
    assert code == 2
    assert "holds no diffusion run" in err


def test_counts_add_up_over_numbered_layers_and_leave_out_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
    model[0].bias.requires_grad_(False)
    assert count_by_module(model) == {"0": 6, "1.a.*": 12}


def test_a_command_of_a_plugin_runs_like_a_built_in_one(l2d, monkeypatch):
    app = typer.Typer()
    app.command(name="shine", help="Shine on.")(lambda times: typer.echo(f"shone {times} times"))
    monkeypatch.setattr(Registry, "commands", lambda self: {"shine": app, "train": app})
    assert l2d("shine", "3")[:2] == (0, "shone 3 times\n")
    # The name of a built-in command is taken.
    assert "times" not in l2d("train", "--help")[1].lower().split("usage")[1].splitlines()[0]


def test_the_benchmarks_say_what_to_install_where_they_are_missing(l2d, monkeypatch):
    monkeypatch.setattr(Registry, "commands", lambda self: {})
    code, _, err = l2d("bench", "--list")
    assert code == 2
    assert install("l2d-framework[bench]") in " ".join(err.replace("│", " ").split())


def test_a_broken_plugin_of_the_benchmarks_says_why(l2d, monkeypatch):
    monkeypatch.setattr(Registry, "commands", lambda self: {})
    monkeypatch.setattr(extensions(), "broken", {"bench": BrokenPlugin("l2d-bench", "1", "ImportError: no luck today")})
    _, _, err = l2d("bench", "--list")
    assert "no luck today" in " ".join(err.replace("│", " ").split())


def test_a_plugins_command_with_the_name_of_a_built_in_one_is_a_clash(l2d, monkeypatch):
    rows = [PluginRow("command", "train", "acme", "1", "ok"), PluginRow("command", "shine", "acme", "1", "ok")]
    monkeypatch.setattr(extensions(), "table", lambda: rows)
    _, out, _ = l2d("plugins")
    assert "clash" in next(line for line in out.splitlines() if "train" in line and "acme" in line)
    assert "ok" in next(line for line in out.splitlines() if "shine" in line)
    assert "Command 'train' is built in; the plugin must choose another name." in out
