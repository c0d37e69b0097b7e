import subprocess
import sys
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import typer
from fake_plugins import TOYS, FakeEntryPoint, Toy, broken, forget_afterwards, installed, module, plugin
from toy_components import Circle, Doubling, Forward, Sharpen

from l2d_framework.errors import ConfigError, PluginError
from l2d_framework.hooks import EXTENSIONS, GROUP
from l2d_framework.registry import Registry, registry
from l2d_framework.schedule import Schedule


class OtherForward(Forward):
    pass


class NeedsNothingThere(Forward):
    name: Literal["needy"] = "needy"
    requires: ClassVar[tuple[str, ...]] = ("no_such_module", "no_such_parent.child", "json")
    extra: ClassVar[str] = "acme[fast]"


class Pair(Forward):
    name: Literal["pair"] = "pair"
    both: tuple[int, int] = (1, 2)


class Nameless(Circle):
    name: str = "nameless"


class TwoNames(Circle):
    name: Literal["one", "two"] = "one"


class Unschematic(Circle):
    name: Literal["unschematic"] = "unschematic"
    size: "Nowhere"  # noqa: F821 -- an unresolved reference is the point


class Unfinished(Schedule):
    name: Literal["unfinished"] = "unfinished"


def offering(answer: Any) -> FakeEntryPoint:
    return FakeEntryPoint("bad", lambda: module(l2d_components=lambda: answer))


def raising() -> Any:
    raise RuntimeError("no luck today")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    forget_afterwards(monkeypatch)


@pytest.mark.parametrize(
    "error", [ImportError("no luck today"), SystemExit("no luck today"), ValueError("no luck today")]
)
def test_a_plugin_that_fails_to_load_hurts_nobody_else(error):
    found = Registry.load([broken("bad", error), TOYS])
    assert found.get("solver", "forward") is Forward
    assert found.broken["bad"].distribution == "acme-bad"
    assert "no luck today" in found.broken["bad"].error


@pytest.mark.parametrize("hook", ["l2d_components", "l2d_presets"])
def test_a_hook_that_raises_hurts_nobody_else(hook):
    bad = FakeEntryPoint("bad", lambda: module(**{hook: raising}))
    found = Registry.load([bad, TOYS])
    assert "no luck today" in found.broken["bad"].error
    assert set(found.components("schedule")) == {"circle"}
    assert "toy-default" in found.presets()


def test_a_misspelt_hook_is_an_error_of_its_plugin():
    bad = FakeEntryPoint("bad", lambda: module(l2d_componets=lambda: [Circle]))
    found = Registry.load([bad, TOYS])
    assert "'l2d_componets'; did you mean 'l2d_components'" in found.broken["bad"].error
    assert set(found.components("schedule")) == {"circle"}


def test_a_module_without_hooks_is_an_error():
    assert "@hookimpl" in Registry.load([FakeEntryPoint("bad", module)]).broken["bad"].error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([Circle()], "Return the class"),
        ([int], "must inherit from exactly one of Schedule"),
        ([Unfinished], "abstract. Implement alpha, sigma"),
        ([Nameless], 'name: Literal["..."]'),
        ([TwoNames], 'name: Literal["..."]'),
        ([Unschematic], "Nowhere"),
        ([Circle, Circle], "'circle' is offered twice"),
        (3, "TypeError"),
    ],
)
def test_a_malformed_offer_keeps_its_whole_plugin_out(answer, message):
    found = Registry.load([offering(answer)])
    assert message in found.broken["bad"].error
    assert not any(found.components(kind) for kind in found.kinds())


def test_a_preset_that_is_no_section_is_an_error():
    assert "'fast' must hold the fields" in Registry.load([plugin("bad", presets={"fast": 3})]).broken["bad"].error


def test_kind_is_the_base_class_and_name_the_literal():
    found = Registry.load([TOYS])
    assert {kind: set(found.components(kind)) for kind in found.kinds()} == {
        "schedule": {"circle"},
        "parametrization": {"projected"},
        "backbone": {"beside", "canvas"},
        "solver": {"forward", "doubling"},
        "guidance": {"sharpen"},
        "drafter": {"again"},
    }


def test_an_unknown_name_lists_suggestions_names_and_broken_plugins():
    found = Registry.load([broken("bad", ImportError("no luck today")), TOYS])
    with pytest.raises(PluginError) as caught:
        found.get("solver", "forwad")
    for part in ("'forwad'", "did you mean 'forward'", "doubling, forward", "'bad' (acme-bad 1.0)", "no luck today"):
        assert part in str(caught.value)


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(PluginError, match=r"'solvr'; did you mean 'solver'.*guidance"):
        Registry.load([]).components("solvr")


def test_a_name_offered_twice_is_refused_and_names_both_distributions():
    found = Registry.load([plugin("a", [Forward, Doubling]), plugin("b", [OtherForward, Circle])])
    for ask in (lambda: found.get("solver", "forward"), lambda: found.create("solver", {"name": "forward"})):
        with pytest.raises(PluginError, match=r"offered by 2 plugins: 'a' \(acme-a 1.0\) and 'b' \(acme-b 1.0\)"):
            ask()
    assert set(found.components("solver")) == {"doubling"}
    assert set(found.components("schedule")) == {"circle"}
    clashing = [row for row in found.table() if row.status == "clash"]
    assert [(row.name, row.distribution) for row in clashing] == [("forward", "acme-a"), ("forward", "acme-b")]


def test_a_preset_offered_twice_is_refused_and_names_both_distributions():
    found = Registry.load([plugin("a", presets={"fast": {}, "slow": {"seed": 1}}), plugin("b", presets={"fast": {}})])
    with pytest.raises(PluginError, match=r"Preset 'fast'.*acme-a.*acme-b"):
        found.preset("fast")
    assert found.presets() == {"slow": {"seed": 1}}
    with pytest.raises(PluginError, match=r"Unknown preset 'slw'; did you mean 'slow'"):
        found.preset("slw")


def test_a_missing_extra_says_what_to_install():
    found = Registry.load([plugin("a", [NeedsNothingThere, Forward])])
    with pytest.raises(PluginError, match=r"needs no_such_module, no_such_parent.child, .*pip install 'acme\[fast\]'"):
        found.create("solver", {"name": "needy"})
    assert {row.name: row.status for row in found.table()} == {"forward": "ok", "needy": "missing extra"}


@pytest.mark.parametrize(
    ("listed", "solvers"),
    [(None, {"forward", "doubling"}), ("", {"forward"}), ("b", {"forward", "doubling"}), ("c", {"forward"})],
)
def test_the_allow_list_restricts_all_but_the_built_ins(monkeypatch, listed, solvers):
    if listed is not None:
        monkeypatch.setenv("L2D_PLUGINS", listed)
    found = Registry.load([plugin("a", [Forward], distribution="l2d_framework"), plugin("b", [Doubling])])
    assert set(found.components("solver")) == solvers
    assert ("c" in found.broken) == (listed == "c")


def test_a_plugin_left_out_is_not_loaded_but_remembered(monkeypatch):
    monkeypatch.setenv("L2D_PLUGINS", " b , c")
    found = Registry.load([broken("a", AssertionError("loaded")), plugin("b", [Forward]), plugin("c")])
    assert not found.broken
    assert [row.name for row in found.table() if row.status == "disabled"] == ["a"]
    with pytest.raises(PluginError, match=r"Disabled by L2D_PLUGINS: 'a' \(acme-a 1.0\)"):
        found.get("solver", "euler")


def test_plugins_of_two_distributions_may_share_a_plugin_name():
    found = Registry.load(
        [
            plugin("p", [Forward], distribution="x"),
            plugin("p", [Circle], distribution="y"),
            broken("p", ImportError("1")),
            broken("p", ImportError("2")),
        ]
    )
    assert set(found.components("solver")) | set(found.components("schedule")) == {"forward", "circle"}
    assert [b.error for b in found.broken.values()] == ["ImportError: 1", "ImportError: 2"]


def test_the_table_says_who_ships_what():
    found = Registry.load(
        [plugin("a", [Sharpen], {"fast": {}}, distribution="acme", version="1.2.3"), broken("b", ImportError("no"))]
    )
    rows = [(row.kind, row.name, row.distribution, row.version, row.status, row.error) for row in found.table()]
    assert rows == [
        ("guidance", "sharpen", "acme", "1.2.3", "ok", ""),
        ("preset", "fast", "acme", "1.2.3", "ok", ""),
        ("", "b", "acme-b", "1.0", "broken", "ImportError: no"),
    ]


def test_create_restores_what_to_json_wrote():
    found = Registry.load([plugin("a", [Pair, Toy, Sharpen])])
    for component in (Pair(both=(3, 4)), Toy(size=3), Sharpen(scale=0.5)):
        assert found.create(component.kind, component.to_json()) == component


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "doubling", "max_evaluations": 3}, "max_evaluations: .*greater than or equal to 10, got 3"),
        ({"name": "doubling", "budget": 3}, "budget: .*Fields: name, max_evaluations"),
        ({}, "needs a `name`.*doubling, forward"),
        ({"name": "doubling", "max_evaluations": Path("a")}, "'doubling': its fields should be numbers, texts.*Path"),
    ],
)
def test_create_refuses_wrong_fields(data, message):
    with pytest.raises(ConfigError, match=message):
        Registry.load([TOYS]).create("solver", data)


def test_plugins_are_loaded_once_and_at_first_use():
    loads = []
    with installed(FakeEntryPoint("a", lambda: loads.append(1) or module(l2d_components=lambda: [Forward]))):
        assert not loads
        assert registry() is registry()
        assert set(registry().components("solver")) == {"forward"}
        assert loads == [1]


def test_every_built_in_plugin_loads():
    assert registry().broken == {}
    assert all(registry().components(kind) for kind in registry().kinds())


def declaring(monkeypatch, *entry_points: EntryPoint) -> Registry:
    """Names that these entry points declare."""
    everything = EntryPoints(entry_points)
    monkeypatch.setattr(metadata, "entry_points", lambda **query: everything.select(**query))
    return Registry.declared()


MINE = EntryPoint("mine", "acme", GROUP)
OTHER = EntryPoint("other", "acme.other", GROUP)


def test_names_are_known_from_metadata_alone(monkeypatch):
    presets = [EntryPoint(name, "acme", f"{GROUP}.preset") for name in ("fast", "exact")]
    names = declaring(monkeypatch, MINE, EntryPoint("leap", "acme", f"{GROUP}.solver"), *presets)
    assert (names.names("solver"), names.names("preset"), names.names("guidance")) == (["leap"], ["exact", "fast"], [])
    names.check_name("solver", "leap")
    with pytest.raises(PluginError, match="Unknown preset 'fats'; did you mean 'fast'"):
        names.check_name("preset", "fats")


@pytest.mark.parametrize(
    "declared",
    [
        EntryPoint("leap", "acme", f"{GROUP}.solver"),  # by `mine`, so `other` may offer anything
        EntryPoint("leap", "acme.another", f"{GROUP}.solver"),  # by no plugin
    ],
    ids=str,
)
def test_beside_a_plugin_that_declares_nothing_no_name_is_refused(declared, monkeypatch):
    names = declaring(monkeypatch, MINE, OTHER, declared)
    names.check_name("solver", "laep")


def test_names_of_a_plugin_that_is_left_out_are_refused_and_it_is_named(monkeypatch):
    declared = [EntryPoint("leap", "acme", f"{GROUP}.solver"), EntryPoint("hop", "acme.other", f"{GROUP}.solver")]
    monkeypatch.setenv("L2D_PLUGINS", "mine")
    names = declaring(monkeypatch, MINE, OTHER, *declared)
    assert names.names("solver") == ["leap"]
    with pytest.raises(PluginError, match=r"Available: leap\.\nDisabled by L2D_PLUGINS: 'other'"):
        names.check_name("solver", "hop")
    monkeypatch.setenv("L2D_PLUGINS", "mine,nobody")  # which is told once plugins are loaded
    declaring(monkeypatch, MINE, OTHER, *declared).check_name("solver", "hop")


def test_a_name_that_two_plugins_declare_is_refused_as_when_they_are_loaded(monkeypatch):
    twice = [EntryPoint("leap", value, f"{GROUP}.solver") for value in ("acme", "acme.other")]
    names = declaring(monkeypatch, MINE, OTHER, *twice)
    with pytest.raises(PluginError, match=r"Solver 'leap' is offered by 2 plugins: 'mine' .* and 'other'"):
        names.check_name("solver", "leap")


def test_importing_the_registry_imports_no_torch():
    program = "import sys, l2d_framework.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def extending(**functions: Any) -> Registry:
    return Registry.load([FakeEntryPoint("acme", lambda: module(**functions))], EXTENSIONS)


def test_a_plugin_adds_commands_and_a_folder_of_tasks(tmp_path):
    app = typer.Typer()
    app.command()(print)
    found = extending(l2d_commands=lambda: {"shine": app}, l2d_tasks=lambda: tmp_path)
    assert found.commands() == {"shine": app}
    assert found.task_folders() == [tmp_path]
    assert [(row.kind, row.name, row.status) for row in found.table()] == [
        ("command", "shine", "ok"),
        ("tasks", "acme", "ok"),
    ]


@pytest.mark.parametrize(
    ("hook", "answer", "says"),
    [
        ("l2d_commands", {"shine": print}, "Command 'shine' must be a typer.Typer"),
        ("l2d_commands", {3: typer.Typer()}, "Command 3 must be"),
        ("l2d_commands", {"shine": typer.Typer()}, "Could not get a command"),
        ("l2d_components", [Forward], "read from the entry-point group 'l2d_framework', not from 'l2d_framework.ext"),
        ("l2d_tasks", "tasks", "l2d_tasks must return a folder that exists, as a Path, got 'tasks'"),
        ("l2d_tasks", Path("nowhere"), "l2d_tasks must return a folder that exists"),
    ],
)
def test_malformed_commands_and_tasks_keep_their_plugin_out(hook, answer, says):
    found = extending(**{hook: lambda: answer})
    assert says in found.broken["acme"].error
    assert not found.commands() and not found.task_folders()


def test_commands_among_the_components_are_refused_with_their_group():
    found = Registry.load([FakeEntryPoint("acme", lambda: module(l2d_commands=lambda: {}))])
    assert "read from the entry-point group 'l2d_framework.extensions'" in found.broken["acme"].error
