"""Layers that torch.compile has made say what they say as they are."""

import warnings

import pytest
import torch
from diffusion_models import diffusion_lm, shared_lm, tess_lm
from tape_graph import TapeGraph
from torch._dynamo.utils import counters

from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.errors import ConfigError
from l2d_framework.generation import replay
from l2d_framework.generation.prompts import pad_left
from l2d_plugins.backbones import compiling


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Layers are traced, which needs no compiler, and nothing is made of it."""
    monkeypatch.setattr(compiling, "COMPILER", "eager")


def generate(model, **options):
    options = {"max_new_tokens": 4, "num_inference_steps": 3, "eos_token_id": None, **options}
    return model.generate(pad_left([[9, 30, 71, 100, 42], [55, 44]]), **options)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_compiled_once_for_all_say_what_they_do_as_they_are(compiler, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILER", compiler)
    torch._dynamo.reset()
    counters.clear()
    counts = []
    for length in (2, 9):
        seen: list[Evaluation] = []
        found = generate(shared_lm(), compile=True, max_new_tokens=length, observer=seen.append)
        counts.append(counters["stats"]["unique_graphs"])
    wanted: list[Evaluation] = []
    assert torch.equal(found.sequences, generate(shared_lm(), max_new_tokens=9, observer=wanted.append).sequences)
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    assert counts == [1, 1]


def test_that_layers_are_compiled_is_said_once_and_only_then(caplog):
    compiling._compiled.cache_clear()
    for compiled, said in ((False, 0), (True, 1), (True, 1)):
        generate(shared_lm(), compile=compiled, max_new_tokens=1)
        assert len([one for one in caplog.messages if "compiled" in one]) == said


def test_requests_at_the_same_time_are_each_compiled_or_not_as_they_ask(monkeypatch):
    model, asked = shared_lm(), []
    monkeypatch.setattr(
        compiling.Compiled, "__call__", lambda self, *given: asked.append(True) or compiling.run(*given[:4])
    )

    def look(evaluation):
        """Between the evaluations of a request without, another one with compiled layers is answered."""
        asked.clear()
        generate(model, compile=True, max_new_tokens=1)
        assert asked
        asked.clear()

    generate(model, observer=look, max_new_tokens=2)
    assert not asked
    generate(model, compile=True, observer=lambda _: generate(model, max_new_tokens=1))
    # Every evaluation of every token but those at t = 0, though another request came between.
    assert len(asked) == 4 * 2 * len(model.backbone.shadows)


def test_they_are_captured_in_a_graph(monkeypatch):
    graphs, wanted = [], generate(shared_lm(), graph=False)
    monkeypatch.setitem(replay.GRAPHS, "cpu", lambda device: graphs.append(TapeGraph()) or graphs[-1])
    assert torch.equal(generate(shared_lm(), compile=True).sequences, wanted.sequences)
    assert any(graph.made is not None for graph in graphs)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch):
    def broken(graph, inputs):
        raise OSError("there is no compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "COMPILER", broken)
    model = diffusion_lm()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [generate(model, compile=True) for _ in range(2)]
    (said,) = [str(warning.message) for warning in seen if "not compiled" in str(warning.message)]
    assert "there is no compiler" in said
    assert all(torch.equal(one.sequences, generate(model).sequences) for one in found)


def test_layers_that_come_and_go_are_not_compiled(monkeypatch):
    model = shared_lm()
    monkeypatch.setattr(model.backbone, "is_offloaded", True)
    with pytest.raises(ConfigError, match="compile=True needs all layers in one place"):
        generate(model, compile=True)


def test_a_backbone_that_compiles_nothing_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"compile=True .* backbone 'in_place'"):
        tess_lm().generate(torch.tensor([[5, 6]]), max_new_tokens=2, compile=True)
