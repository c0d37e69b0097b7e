"""Layers in the host's memory or on the disk change no answer and no score."""

import gc
import json
from pathlib import Path
from threading import Thread

import pytest
import tiny_runs
import torch
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.config import TrainingSection, parse_run
from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.generation import replay
from l2d_framework.models import checkpoint
from l2d_framework.training.learner import Denoiser

PROMPTS = ["1+1=", "22+13="]
FEW = {"max_new_tokens": 4, "num_inference_steps": 3}
ALL = {"model.layers": "disk"}
SCORING = {"l2d": "mixture", "tess": "pseudo"}
MAPS = {
    "all layers": (ALL, {"0", "1", "2"}),
    "the first": ({"": "cpu", "model.layers.0": "disk"}, {"0"}),
    # One layer's worth is kept free for those that come in.
    "those that do not fit": ("auto", {"1", "2"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    base, data = tiny_runs.write_base(folder / "base", num_hidden_layers=3), tiny_runs.write_sums(folder / "sums.jsonl")
    for kind, run in (("l2d", tiny_runs.diffusion_run), ("tess", tiny_runs.tess_run)):
        model = checkpoint.build_model(parse_run(run(base, data, folder / kind)))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.own_parameters().values():
                weight += 0.05 * torch.randn(weight.shape, generator=draw)
        checkpoint.save(model, folder / kind)
    return folder


def load(folder, kind, device_map, **options):
    return checkpoint.load(folder / kind, device_map=device_map, offload_folder=folder / "away", **options)


@pytest.fixture(scope="module")
def whole(folder):
    return {kind: checkpoint.load(folder / kind) for kind in ("l2d", "tess")}


def away(model):
    """Layers whose weights are elsewhere."""
    return {name.split(".layers.")[1][0] for name, p in model.backbone.lm.named_parameters() if p.is_meta}


def no_graph(device):
    raise AssertionError("weights that come and go were to be captured")


@pytest.mark.parametrize(("device_map", "layers"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("kind", ["l2d", "tess"])
def test_answers_are_those_of_a_model_in_one_place(folder, whole, monkeypatch, kind, device_map, layers):
    wanted = whole[kind].generate(PROMPTS, **FEW)
    size = sum(p.numel() * p.element_size() for p in (*whole[kind].parameters(), *whole[kind].buffers()))
    limits = {"max_memory": {"cpu": size - 1}} if device_map == "auto" else {}
    monkeypatch.setitem(replay.GRAPHS, "cpu", no_graph)
    before = set((folder / "away").glob("*"))
    model = load(folder, kind, device_map, **limits)
    assert away(model) == layers
    assert model._facts() == whole[kind]._facts()
    assistant = {"name": "assistant", "model": str(folder / "base")}
    for guessing in ({}, {"speculate": 2, "drafter": assistant}) if kind == "l2d" else ({},):
        found = model.generate(PROMPTS, **FEW, **guessing)
        assert torch.equal(found.sequences, wanted.sequences)
    assert away(model) == layers
    assert len(set((folder / "away").glob("*")) - before) == 1
    del model
    gc.collect()
    assert set((folder / "away").glob("*")) <= before


@pytest.mark.parametrize("kind", ["l2d", "tess"])
def test_scores_of_lm_eval_are_those_of_a_model_in_one_place(folder, kind):
    request = (("a", "b"), [5, 6, 7], [8, 9, 10])
    placing = {"device_map": ALL, "offload_folder": str(folder / "away")}
    found = []
    for options in ({}, placing):
        lm = L2DLM(str(folder / kind), scoring=SCORING[kind], noise_samples=1, pseudo_times=1, **options)
        found.append(lm._loglikelihood_tokens([request], disable_tqdm=True))
    assert away(lm.diffusion) == {"0", "1", "2"}
    assert found[0] == found[1]


def test_the_command_takes_a_map(folder):
    def run(*options):
        asked = ["generate", str(folder / "l2d"), "--prompt", "1+1=", "--max-new-tokens", "3", *options]
        return CliRunner().invoke(app, [*asked, "--num-inference-steps", "1"], catch_exceptions=False)

    mapped = run("--device-map", json.dumps({"model.layers.1": "disk"}), "--offload-folder", str(folder / "away"))
    assert mapped.exit_code == 0
    assert mapped.stdout == run().stdout != ""


def rewarding(folder):
    """A sequence classifier with the base's tokenizer."""
    config = tiny_lm().config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("beside", ["assistant", "reward_gradient"])
def test_auto_leaves_room_for_a_model_that_comes_beside_it(folder, beside):
    if beside == "assistant":
        name, kind, dtype = str(folder / "base"), AutoModelForCausalLM, torch.float32
        options = {"speculate": 2, "drafter": {"name": "assistant", "model": name}}
    else:
        name, kind, dtype = rewarding(folder / "reward"), AutoModelForSequenceClassification, torch.bfloat16
        options = {"guidance": [{"name": "reward_gradient", "model": name, "precision": "bfloat16"}]}

    def held(model):
        return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))

    size = held(checkpoint.load(folder / "l2d"))
    more = held(kind.from_pretrained(name, dtype=dtype))

    def places(limit, **options):
        placing = {"device_map": "auto", "max_memory": {"cpu": limit}, "offload_folder": str(folder / "away")}
        return L2DLM(str(folder / "l2d"), **placing, **options).source.plan("cpu").places

    assert not any(places(size))
    assert not any(places(size + more, **options))
    assert any(places(size + more - 1, **options))
    with pytest.raises(ConfigError, match=r"one layer and other models take .* Raise max_memory"):
        places(more, **options)


def test_threads_and_errors_leave_weights_where_they_lie(folder, whole):
    model = load(folder, "l2d", ALL)
    for error in (ArithmeticError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        with pytest.raises(error):
            model.generate(PROMPTS, max_new_tokens=1, observer=fail)
        hook = model.backbone.lm.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model.generate(PROMPTS, max_new_tokens=1)
        hook.remove()
        assert away(model) == {"0", "1", "2"}
    found = []
    threads = [Thread(target=lambda: found.append(model.generate(PROMPTS, **FEW)), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wanted = whole["l2d"].generate(PROMPTS, **FEW).sequences
    assert [bool(torch.equal(one.sequences, wanted)) for one in found] == [True, True]


def test_what_needs_all_weights_is_refused(folder, tmp_path):
    model = load(folder, "l2d", ALL)
    for words, use in {
        "merge='always' needs": lambda: model.generate(PROMPTS, max_new_tokens=1, merge="always"),
        "Saving needs all weights": lambda: checkpoint.save(model, tmp_path / "out"),
        "Moving or casting a model needs": lambda: model.to(torch.float64),
        "Training needs all weights": lambda: Denoiser(model, TrainingSection(), 0),
    }.items():
        with pytest.raises(ConfigError, match=words):
            use()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "balanced"}, "device_map should be 'auto' or name devices by module"),
        ({"device_map": {"model.layers.0": "gpu"}}, "names the device 'gpu', which cannot be used here"),
        ({"device_map": {"model.layers.0": "meta:x"}}, "which cannot be used here"),
        ({"device_map": {"model.layer.0": "disk"}}, "names 'model.layer.0', .* no such module; did you mean"),
        ({"device_map": {"model.layers.0.mlp": "disk"}}, "only whole layers can wait elsewhere than on 'cpu'"),
        ({"device_map": {"model.embed_tokens": "disk"}}, "only whole layers can wait"),
        ({"device_map": ALL}, "3 layers are to lie on the disk, but offload_folder is not set"),
        ({"device_map": "auto", "max_memory": {"cpu": "170KiB"}}, "layers are to lie on the disk"),
        ({"device_map": "auto", "max_memory": {"cpu": "1KiB"}}, "Embeddings, head and one layer take .* Raise max_mem"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "max_memory is .*'lots'.* cannot be read"),
        ({"device_map": "auto", "max_memory": "10GiB"}, "should name devices, such as .*; got '10GiB'"),
        ({"device_map": "auto", "max_memory": '{"cpu": 1'}, "max_memory is no JSON"),
        ({"device_map": "auto", "max_memory": {"disk": 1}}, "Leave 'disk' out"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "max_memory is for device_map='auto'"),
        ({"max_memory": {"cpu": 1}}, "max_memory is for models with a device_map"),
        ({"device_map": "{"}, "device_map is no JSON"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_weights_load(folder, monkeypatch, options, words):
    def load_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoint, "load_language_model", load_weights)
    with pytest.raises(ConfigError, match=words):
        checkpoint.load(folder / "l2d", **options)


@pytest.mark.parametrize(
    ("option", "running"), [("--compile", {"compile": True}), ("--merge=always", {"merge": "always"})]
)
def test_a_way_to_run_that_a_map_rules_out_is_refused_before_weights_load(folder, monkeypatch, option, running):
    path, away_folder = str(folder / "l2d"), str(folder / "away")
    ask = ["generate", path, "--prompt", "1+1=", "--max-new-tokens", "3", "--offload-folder", away_folder, option]
    ask += ["--device-map", json.dumps(ALL)]
    # Without evaluations neither is asked of the layers, and the same holds for the command and in Python.
    plain = {"num_inference_steps": 0, "max_new_tokens": 3}
    load(folder, "l2d", ALL).generate(["1+1="], **plain, **running)
    assert CliRunner().invoke(app, [*ask, "--num-inference-steps", "0"], catch_exceptions=False).exit_code == 0
    monkeypatch.setattr(checkpoint, "load_language_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="but some lie elsewhere"):
        L2DLM(path, device_map=ALL, offload_folder=away_folder, **running)
    with pytest.raises(ConfigError, match="but some lie elsewhere"):
        CliRunner().invoke(app, ask, catch_exceptions=False)


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device_map is for one process, and 2 were launched"):
        checkpoint.load(Path(folder) / "l2d", device_map="auto")
