from typing import Literal

import pytest
from fake_plugins import TOYS, installed, plugin
from pydantic import BaseModel
from toy_components import Forward

from l2d_framework.config import json_schema
from l2d_framework.registry import registry


class Depth(BaseModel):
    metres: float = 2.0
    """How deep."""


class Diver(Forward):
    """Goes down.

    And up again.
    """

    name: Literal["diver"] = "diver"
    depth: Depth = Depth()
    """Where it turns."""
    plain: int = 1

    @classmethod
    def unrelated(cls):
        """Is no field."""


class Hurried(Diver):
    """Goes down fast."""

    name: Literal["hurried"] = "hurried"
    depth: Depth = Depth(metres=30)


def described(schema):
    """What the schema says of every field, by section and name."""
    return {
        (owner, name): field.get("description")
        for owner, part in schema["$defs"].items()
        for name, field in part.get("properties", {}).items()
    }


def test_every_option_of_a_run_file_is_described():
    options = described(json_schema())
    assert len(options) > 200
    assert not [option for option, text in options.items() if not text or not text.endswith(".")]


def test_every_method_is_explained(l2d):
    lines = [" ".join(line.split()) for line in l2d("help", "method")[1].splitlines()]
    methods = registry().methods()
    assert methods
    for name, fields in methods.items():
        assert f"{name} {fields['description'].removesuffix('.')}" in lines
    assert "default null" in lines and not [line for line in lines if "any" in line.split()]


@pytest.fixture
def divers():
    with installed(TOYS, plugin("divers", [Diver, Hurried], distribution="acme", version="1.2")):
        yield


def test_a_plugins_options_are_described_by_the_docstrings_of_its_fields_its_bases_and_its_sections(divers):
    options = described(json_schema())
    assert options["Diver", "depth"] == options["Hurried", "depth"] == "Where it turns."
    assert options["Depth", "metres"] == "How deep."
    assert options["Diver", "name"] == "Goes down."
    assert options["Diver", "plain"] is None


def test_help_shows_of_a_component_who_ships_it_and_its_fields(l2d, divers):
    code, out, _ = l2d("help", "solver", "diver")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "sampling.solver.diver  (kind: diffusion)"
    assert {"Goes down.", "And up again.", "from   acme 1.2", "depth  Where it turns"} <= set(lines)


@pytest.mark.parametrize("question", ["solver diver depth metres", "sampling.solver.diver.depth.metres"])
def test_a_question_may_name_the_sections_above_an_option_with_dots_or_without(l2d, divers, question):
    code, out, _ = l2d("help", *question.split())
    assert code == 0
    assert out.splitlines()[0].startswith("sampling.solver.diver.depth.metres")
    assert "How deep." in out and "2.0" in out


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        ("training.draws_per_token", ["Noisy copies", "whole number", "default  1", "at least 1"]),
        ("training", ["How to train to predict tokens", "Source: arXiv:2501.15781, Table 3", "draws_per_token"]),
        ("data.train.0.limit", ["whole number or none", "null", "at least 1"]),
        ("training.decay", ["text", '"linear"', "linear, cosine, constant"]),
        ("model.base", ["none, it must be given"]),
        ("seed", ["new weights", "See also: sampling.seed"]),
        ("drafter", ["assistant", "prompt_lookup", "(kind: request)"]),
        ("drafter assistant", ["arXiv:2211.17192", "model  Folder or hub id"]),
        ("prompt_lookup max_matching_ngram_size", ["whole number", "default  2", "at least 1"]),
    ],
)
def test_help_tells_what_an_option_does_its_type_default_and_limits(l2d, question, facts):
    code, out, _ = l2d("help", *question.split())
    assert code == 0
    assert [fact for fact in facts if fact not in out] == []
    assert [line for line in out.splitlines() if line != line.rstrip()] == []


def test_the_source_of_a_sections_defaults_is_none_of_its_fields(l2d):
    for field in ("training.draws_per_token", "lora.dropout"):
        assert "arXiv" not in l2d("help", field)[1]


def test_help_says_what_the_schema_says(l2d):
    options = described(json_schema())
    names = [name for _, name in options]
    once = {name: text for (_, name), text in options.items() if names.count(name) == 1 and name != "stages"}
    for name, text in list(once.items())[::10]:
        code, out, _ = l2d("help", name)
        assert code == 0
        assert "".join(text.split()) in "".join(out.split())


def test_help_without_a_name_lists_the_sections_of_every_kind_of_run(l2d):
    code, out, _ = l2d("help")
    assert code == 0
    for section in ("model", "schedule", "sampling", "scratch", "lora", "noise", "output_dir"):
        assert any(line.startswith(f"{section}  (kind: ") for line in out.splitlines())


def test_an_unknown_option_is_answered_with_a_suggestion(l2d):
    code, _, err = l2d("help", "training.learning_rte")
    assert code == 2
    assert "'training learning_rte'" in err and "did you mean 'learning_rate'" in err


@pytest.mark.parametrize(
    ("question", "there", "elsewhere"),
    [
        ("solver ab3", "Solver: diver, doubling, forward, hurried.", "learning_rate"),
        ("solver diver.deep", "did you mean 'depth'? Solver diver: depth, plain.", "hurried"),
        ("training.nonsense", "draws_per_token, epochs, ", "hurried"),
        ("nonsense", "Sections: backbone, block_size, ", "learning_rate"),
    ],
)
def test_a_name_that_is_unknown_is_answered_with_those_that_may_stand_there(l2d, divers, question, there, elsewhere):
    code, _, err = l2d("help", *question.split())
    assert code == 2
    assert there in err and elsewhere not in err
