"""Whose code failed: what goes wrong in a third party's component names the component and its distribution."""

import sys
from importlib import metadata
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
import toy_components as toys
from diffusion_models import all_known, fresh_lm, shared_lm, shared_tess
from fake_plugins import FakeEntryPoint, broken, installed, module, plugin
from pydantic import Field
from tiny_models import tiny_lm

from l2d_framework.config import SamplingSection
from l2d_framework.diffusion.loss import denoising_loss
from l2d_framework.diffusion.training_noise import NoiseRule, draw
from l2d_framework.errors import ConfigError, EvaluationBudgetError, PluginError
from l2d_framework.guidance import Guidance
from l2d_framework.models.diffusion_lm import DiffusionLM, Origin
from l2d_framework.registry import Registry
from l2d_framework.types import Prediction
from l2d_plugins.schedules.linear import Linear
from l2d_plugins.solvers.runge_kutta import Euler

IDS = torch.tensor([[5, 6, 7]])
HOW: dict[str, Any] = {"max_new_tokens": 1, "num_inference_steps": 3, "eos_token_id": None}


class Stumbles(toys.Forward):
    name: Literal["stumbles"] = "stumbles"
    error: ClassVar[Exception] = KeyError("no luck")

    def step(self, problem, x, t, s):
        raise self.error


class Misasks(toys.Forward):
    name: Literal["misasks"] = "misasks"

    def step(self, problem, x, t, s):
        return x + problem.velocity(x[..., :1], t)


class Bent(toys.Circle):
    name: Literal["bent"] = "bent"

    def alpha(self, t):
        raise ZeroDivisionError("no luck")


class DeafSpace(toys.ProjectedSpace):
    def estimate(self, logits, t, codebook, random):
        raise RuntimeError("no luck")


class Deaf(toys.Projected):
    name: Literal["deaf"] = "deaf"
    module = DeafSpace


class BlindNetwork(toys.BesideNetwork):
    def features(self, h, t, positions, context, condition, *, shared_time=None):
        return {}["no luck"]


class Blind(toys.Beside):
    name: Literal["blind"] = "blind"
    module = BlindNetwork


class Returns(Guidance):
    """Returns what a test put there."""

    name: Literal["returns"] = "returns"
    tokens: list[int] = Field([1])
    answer: ClassVar[Any] = None

    def __call__(self, predict, query, space):
        return type(self).answer(predict(query), query)


@pytest.fixture(scope="module", autouse=True)
def acme():
    """The built-in plugins and one of somebody else's."""
    built_in: Any = list(metadata.entry_points(group="l2d_framework"))
    with installed(*built_in, plugin("acme", [Stumbles, Misasks, Bent, Deaf, Blind, Returns], distribution="acme-odd")):
        yield


def model(schedule=None, space=None, backbone=None):
    built = fresh_lm()
    network = built.backbone if backbone is None else backbone.build(tiny_lm("llama"))
    state = built.parametrization if space is None else space.build(network.vocab_size, network.hidden_size)
    found = DiffusionLM(schedule or Linear(), state, network)
    found.origin = Origin(sampling=SamplingSection(solver=Euler(), num_inference_steps=3))
    return found.eval()


FAILING = {
    "solver 'stumbles'": lambda: shared_lm().generate(IDS, solver="stumbles", **HOW),
    "schedule 'bent'": lambda: model(schedule=Bent()).generate(IDS, **HOW),
    "parametrization 'deaf'": lambda: model(space=Deaf()).generate(IDS, **HOW),
    "backbone 'blind'": lambda: model(backbone=Blind()).generate(IDS, **HOW),
    "guidance 'returns'": lambda: shared_lm().generate(IDS, guidance=[{"name": "returns"}], **HOW),
}


@pytest.mark.parametrize("component", FAILING)
def test_an_error_in_a_third_partys_component_names_it_and_its_distribution(component, monkeypatch):
    monkeypatch.setattr(Returns, "answer", lambda found, query: {}["no luck"])
    with pytest.raises(PluginError, match=f"(?is){component} of acme-odd 1.0 failed in .*no luck") as caught:
        FAILING[component]()
    assert caught.value.__cause__ is not None


def test_an_error_in_infilling_and_in_the_face_of_transformers_names_it_too():
    with pytest.raises(PluginError, match="Solver 'stumbles' of acme-odd"):
        shared_tess(tokenizer=True).infill("a<mask:2>", solver="stumbles", num_inference_steps=2)
    with pytest.raises(PluginError, match="Solver 'stumbles' of acme-odd"):
        shared_lm().as_transformers(solver="stumbles", num_inference_steps=2)(IDS, logits_to_keep=1)


@pytest.mark.parametrize("error", [EvaluationBudgetError("enough"), ConfigError("no"), MemoryError("full")])
def test_errors_that_callers_act_on_stay_what_they_are(error, monkeypatch):
    monkeypatch.setattr(Stumbles, "error", error)
    with pytest.raises(type(error)) as caught:
        shared_lm().generate(IDS, solver="stumbles", **HOW)
    assert caught.value is error


def test_memory_of_a_device_that_runs_out_is_not_the_plugins_error(monkeypatch):
    monkeypatch.setattr(Stumbles, "error", torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        shared_lm().generate(IDS, solver="stumbles", **HOW)


def test_an_error_of_our_own_code_that_a_plugin_called_notes_the_plugin():
    with pytest.raises(RuntimeError) as caught:
        shared_lm().generate(IDS, solver="misasks", **HOW)
    assert caught.value.__notes__ == ["It came up in a call from solver 'misasks' of acme-odd 1.0."]


def test_an_error_of_a_users_observer_is_nobodys():
    with pytest.raises(ValueError, match="not in list") as caught:
        shared_lm().generate(IDS, observer=[].index, **HOW)
    assert type(caught.value) is ValueError
    assert not hasattr(caught.value, "__notes__")


def test_an_error_in_training_names_the_component():
    blind = model(backbone=Blind())
    layout = all_known(IDS)
    layout.blocks[:, 1:] = torch.tensor([1, 2])
    with pytest.raises(PluginError, match="Backbone 'blind' of acme-odd"):
        denoising_loss(blind, layout, draw(blind, layout, NoiseRule([(0, 0, 0)])))


UNSOUND = {
    "NaN": (lambda found, query: Prediction(found.logits * float("nan")), "returned logits that are NaN"),
    "one NaN": (lambda found, query: Prediction(_one_nan(found.logits)), "returned logits that are NaN"),
    "integers": (lambda found, query: Prediction(found.logits.long()), "logits of torch.int64"),
    "width": (lambda found, query: Prediction(found.logits[..., :-1]), "instead of float"),
    "rows": (lambda found, query: Prediction(found.logits[:0]), "instead of float"),
    "nothing": (lambda found, query: None, "logits of None"),
    "numbers": (lambda found, query: Prediction(found.logits.tolist()), "instead of float"),
    "clean": (lambda found, query: Prediction(found.logits, found.logits[..., :3]), "clean of torch.float32"),
    "whole clean": (lambda found, query: Prediction(found.logits, query.x.long()), "clean of torch.int64"),
}
WAYS: dict[str, Any] = {
    "L2D": lambda: shared_lm().generate(IDS, guidance=[{"name": "returns"}], **HOW),
    "TESS 2": lambda: shared_tess().generate(IDS, guidance=[{"name": "returns"}], **HOW),
    "adaptive": lambda: shared_lm().generate(
        IDS, guidance=[{"name": "returns"}], solver="fehlberg2", max_new_tokens=1, eos_token_id=None
    ),
    "face": lambda: shared_lm().as_transformers(guidance=[{"name": "returns"}], num_inference_steps=3)(IDS),
    "patience": lambda: shared_tess().generate(IDS, guidance=[{"name": "returns"}], patience=1, **HOW),
}


def _one_nan(logits):
    return logits.index_fill(-1, torch.tensor([7]), float("nan"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", UNSOUND)
def test_what_a_guidance_returns_is_sound_or_refused_with_its_name(what, way, monkeypatch):
    answer, message = UNSOUND[what]
    monkeypatch.setattr(Returns, "answer", answer)
    with pytest.raises(PluginError, match=f"guidance 'returns' of acme-odd 1.0 .*{message}"):
        WAYS[way]()


class Twice(Guidance):
    """Asks about every row twice."""

    name: Literal["twice"] = "twice"

    def __call__(self, predict, query, space):
        rows = torch.arange(len(query.positions)).repeat(2)
        part = {name: getattr(query, name)[rows] for name in ("x", "t", "positions")}
        found = predict(query.replace(context=query.context.select(rows), **part)).logits
        return Prediction(found[: len(rows) // 2])


@pytest.mark.parametrize("how", [HOW, {"solver": "fehlberg2", "max_new_tokens": 2, "eos_token_id": None}])
def test_a_guidance_may_ask_about_more_rows_than_there_are(how, monkeypatch):
    ids = torch.cat([IDS, IDS.flip(1)])
    monkeypatch.setattr(Returns, "answer", lambda found, query: found)
    guided = shared_lm().generate(ids, guidance=[{"name": "returns"}, Twice()], **how)
    assert torch.equal(guided.sequences, shared_lm().generate(ids, **how).sequences)
    monkeypatch.setattr(Returns, "answer", lambda found, query: Prediction(found.logits * float("nan")))
    with pytest.raises(PluginError, match=r"guidance 'returns' .* NaN"):
        shared_lm().generate(ids, guidance=[{"name": "returns"}, Twice()], **how)


def test_a_sound_guidance_is_taken(monkeypatch):
    monkeypatch.setattr(Returns, "answer", lambda found, query: found)
    for way in WAYS.values():
        way()


class Mute(BaseException):
    def __str__(self):
        raise RuntimeError("not even that")


TOYS = plugin("toys", [toys.Forward, toys.Circle])


@pytest.mark.parametrize("error", [Mute(), GeneratorExit("no"), SystemExit(3), RecursionError()])
def test_a_plugin_may_fail_at_import_in_any_way(error):
    found = Registry.load([broken("bad", error), TOYS])
    assert set(found.broken) == {"bad"}
    assert type(error).__name__ in found.broken["bad"].error
    assert set(found.components("solver")) == {"forward"}


def test_the_users_interrupt_still_interrupts():
    with pytest.raises(KeyboardInterrupt):
        Registry.load([broken("bad", KeyboardInterrupt()), TOYS])


class Unreadable(toys.Forward):
    name: Literal["unreadable"] = "unreadable"
    requires: ClassVar[Any] = (3,)


def test_requirements_that_cannot_be_read_keep_their_plugin_out():
    found = Registry.load([plugin("bad", [Unreadable]), TOYS])
    assert set(found.broken) == {"bad"}
    assert [row.name for row in found.table() if row.status == "ok"] == ["circle", "forward"]


def _replacing(name: str) -> Any:
    def load() -> Any:
        sys.modules[name] = ModuleType(name)
        return module(l2d_components=lambda: [toys.Doubling])

    return load


@pytest.mark.parametrize("name", ["json", "dataclasses", "l2d_framework.diffusion.rng", "torch", "xdrlib"])
def test_a_plugin_that_replaces_a_shared_module_is_itself_blamed_and_the_module_put_back(name):
    before = sys.modules.get(name)
    built_in: Any = list(metadata.entry_points(group="l2d_framework"))
    found = Registry.load([FakeEntryPoint("bad", _replacing(name)), *built_in, TOYS])
    assert set(found.broken) == {"bad"}
    assert f"replaces modules that others rely on: '{name}'" in found.broken["bad"].error
    assert sys.modules.get(name) is before
    assert {"euler", "forward"} <= set(found.components("solver"))


def test_a_file_named_like_a_standard_module_is_kept_out(tmp_path):
    (tmp_path / "this.py").write_text("zen = None\n")
    sys.modules.pop("this", None)

    def load() -> Any:
        sys.path.insert(0, str(tmp_path))
        import this

        assert this.zen is None
        return module(l2d_components=lambda: [toys.Doubling])

    path = list(sys.path)
    found = Registry.load([FakeEntryPoint("bad", load), TOYS])
    assert "'this'" in found.broken["bad"].error
    assert sys.path == path
    assert "this" not in sys.modules


def test_the_built_in_plugins_are_loaded_before_anybody_elses():
    order: list[str] = []
    entries: Any = [
        FakeEntryPoint(name, lambda name=name: order.append(name) or module(l2d_presets=lambda: {}), distribution=who)
        for name, who in (("a", "acme"), ("b", "l2d-framework"), ("c", "acme"), ("d", "l2d_framework"))
    ]
    Registry.load(entries)
    assert order == ["b", "d", "a", "c"]
