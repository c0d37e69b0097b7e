"""What tells one configuration from another, as messages and records have it."""

import re

import pytest

from l2d_framework.config.differences import differences, told


def test_every_value_that_differs_is_there_whole_by_its_path_and_no_other():
    there = {"a": {"b": [1, 2], "c": {}}, "same": [], "gone": "x" * 300}
    now = {"a": {"b": [1, 3, 4], "c": {"d": 0}}, "same": []}
    assert differences(there, there) == {}
    assert differences(there, now) == {
        "a.b.1": (2, 3),
        "a.b.2": (None, 4),
        "a.c": ({}, None),
        "a.c.d": (None, 0),
        "gone": ("x" * 300, None),
    }


def test_a_message_names_the_first_and_counts_the_others():
    found = differences({}, {str(number): number for number in range(10)})
    assert told(found).startswith("0: None there, 0 now; 1: ")
    assert told(found).endswith("; 7: None there, 7 now; and 2 more")


@pytest.mark.parametrize("word", ["word ", "x"])
def test_of_long_texts_a_message_shows_both_and_where_they_differ(word):
    long = word * 1000
    assert re.fullmatch(
        r"template: '\.\.\..{0,30}A.{,200}\.\.\.' there, '\.\.\..{0,30}B' now",
        told(differences({"template": f"{long}A{long}"}, {"template": f"{long}B"})),
    )
    assert re.fullmatch(
        rf"template: None there, '{word}.{{,200}}\.\.\.' now", told(differences({}, {"template": long}))
    )
    assert told(differences({"a": "b  c"}, {"a": "b c"})) == "a: 'b  c' there, 'b c' now"
