"""One object knows a model without its weights: the command line, lm_eval and Python refuse the same in its words."""

import re

import pytest
from diffusion_models import NETWORK, SPACE
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.config import parse_run
from l2d_framework.errors import CheckpointError, ConfigError, L2DError
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.models import checkpoint, unloaded
from l2d_framework.models.checkpoint import build_model, load, save
from l2d_framework.models.unloaded import UnloadedModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def folder(saved_tiny_lm, tmp_path):
    run = {
        "model": {"base": str(saved_tiny_lm())},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", "num_classes": 2, **NETWORK},
        "classes": ["math", "code"],
    }
    save(build_model(parse_run(run)), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--solver", "midpont"), {"solver": "midpont"}),
        (("--num-inference-steps", "4"), {"num_inference_steps": 4}),
        (("--preset", "l2d-papr"), {"preset": "l2d-papr"}),
        (("--class", "mth"), {"class_name": "mth"}),
        (("--set", "guidance=[]", "--guidance-scale", "2"), {"guidance": [], "guidance_scale": 2.0}),
        (("--set", "block_size=2"), {"block_size": 2}),
    ],
)
def test_three_ways_to_a_model_refuse_in_the_same_words(folder, arguments, options):
    def python():
        own = dict(options)
        classes = [own.pop("class_name")] if "class_name" in own else None
        load(folder).generate(["a"], classes=classes, max_new_tokens=1, **own)

    said = []
    for way in (python, lambda: L2DLM(folder, device="cpu", **options)):
        with pytest.raises(L2DError) as caught:
            way()
        said.append(str(caught.value))
    told = str(CliRunner().invoke(app, ["generate", folder, "--prompt", "a", *arguments]).exception)
    # It calls arguments what their options are called.
    said.append(re.sub(r"--[a-z-]+", lambda option: option[0][2:].replace("-", "_"), told))
    assert len(set(said)) == 1


def test_a_class_that_a_guidance_waits_for_is_asked_for_with_the_names_there_are(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_language_model", lambda *_: pytest.fail("weights were loaded"))
    found = CliRunner().invoke(app, ["generate", folder, "--prompt", "a", "--guidance-scale", "2"])
    with pytest.raises(ConfigError, match=r"guides towards a class.*\['math', 'code'\]. Add --class NAME"):
        raise found.exception


def test_a_plain_language_model_answers_without_steps_and_with_none_else(saved_tiny_lm):
    base = str(saved_tiny_lm())
    ask = ["generate", base, "--prompt", "ab", "--max-new-tokens", "3"]
    model = UnloadedModel(base)
    assert model.is_plain and not model.classes
    wanted = model.load("cpu").generate(["ab"], max_new_tokens=3, num_inference_steps=0).answers
    found = CliRunner().invoke(app, [*ask, "--num-inference-steps", "0"])
    assert found.exit_code == 0, found.exception
    assert found.stdout.strip("\n") == model.tokenizer.decode(wanted[0], skip_special_tokens=True).strip("\n")
    with pytest.raises(CheckpointError, match="no diffusion checkpoint"):
        raise CliRunner().invoke(app, ask).exception


def test_a_large_vocabulary_and_the_base_weights_are_read_once_however_much_is_checked_first(folder, monkeypatch):
    read = []
    for name in ("load_tokenizer", "fingerprint"):
        for module in (unloaded, checkpoint):
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, name=name, do=original: read.append(name) or do(*a))
    model = UnloadedModel(folder)
    lm = model.load("cpu")
    assert sorted(read) == ["fingerprint", "load_tokenizer"]
    assert lm.tokenizer is model.tokenizer
    assert load(folder).tokenizer.get_vocab() == model.tokenizer.get_vocab()
