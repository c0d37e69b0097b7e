"""Distributions of somebody else's, installed by pip, are found by the command line; a broken one is reported."""

import pytest

SHARPEN = """
from typing import Literal
from l2d_framework import Guidance, hookimpl

class Sharpen(Guidance):
    name: Literal["sharpen"] = "sharpen"
    def __call__(self, predict, query, space):
        return predict(query)

@hookimpl
def l2d_components():
    return [Sharpen]
"""

BROKEN = "raise RuntimeError('no luck today')\n"


@pytest.fixture(scope="module")
def acme(new_environment, make_plugin):
    """Environment with a working and a broken plugin."""
    environment = new_environment()
    environment.install(make_plugin("acme-sharpen", SHARPEN), make_plugin("acme-broken", BROKEN))
    return environment


CHOSEN = (None, "acme_sharpen", "")


def rows(table):
    """Rows of a table of plugins, as words."""
    return [line.split() for line in table.splitlines()]


def row(table, *words):
    """The one row that holds all the words."""
    (found,) = [line for line in rows(table) if set(words) <= set(line)]
    return found


@pytest.fixture(scope="module")
def tables(acme):
    """What `l2d plugins` prints, where L2D_PLUGINS is unset, names one plugin, and is empty."""
    return acme.l2d(*(({} if chosen is None else {"L2D_PLUGINS": chosen}, ["plugins"]) for chosen in CHOSEN))


@pytest.fixture(scope="module")
def table(tables):
    return tables[0]


def test_an_installed_plugin_is_listed_with_its_distribution_and_version(table):
    assert {"guidance", "acme-sharpen", "1.2.3", "ok"} <= set(row(table, "sharpen"))


def test_a_broken_plugin_is_listed_with_its_error_and_hurts_no_other(table):
    assert {"acme_broken", "1.2.3", "broken"} <= set(row(table, "acme-broken"))
    assert "RuntimeError: no luck today" in table
    for name in ("linear", "embedding", "two_stream", "euler", "classifier_free", "l2d-paper"):
        assert "ok" in row(table, name, "l2d-framework")


def test_l2d_plugins_names_the_third_party_plugins_that_are_loaded(tables):
    table = tables[1]
    assert "ok" in row(table, "sharpen")
    assert "luck" not in table


def test_an_empty_l2d_plugins_loads_no_third_party(tables):
    table = tables[2]
    assert "luck" not in table
    assert not [line for line in rows(table) if "sharpen" in line]
    assert "ok" in row(table, "euler")


def test_an_unknown_component_error_mentions_the_broken_plugin(acme):
    program = "from l2d_framework.registry import registry; registry().get('guidance', 'sharpne')"
    result = acme.run("-c", program)
    assert "did you mean 'sharpen'" in result.stderr
    assert "acme-broken" in result.stderr
    assert "no luck today" in result.stderr
