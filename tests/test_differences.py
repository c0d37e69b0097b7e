"""What tells one configuration from another, as messages and records have it."""

from l2d_framework.config.differences import differences, told


def test_every_value_that_differs_is_there_whole_by_its_path_and_no_other():
    there = {"a": {"b": [1, 2], "c": {}}, "same": [], "gone": "x" * 300}
    now = {"a": {"b": [1, 3, 4], "c": {"d": 0}}, "same": []}
    assert differences(there, there) == {}
    assert differences(there, now) == {
        "a.b.1": "2 there, 3 now",
        "a.b.2": "None there, 4 now",
        "a.c": "{} there, None now",
        "a.c.d": "None there, 0 now",
        "gone": f"'{'x' * 300}' there, None now",
    }


def test_a_message_names_the_first_and_counts_the_others():
    found = differences({}, {str(number): number for number in range(10)})
    assert told(found).startswith("0: None there, 0 now; 1: ")
    assert told(found).endswith("; 7: None there, 7 now; and 2 more")
    assert len(told(differences({}, {"template": "word " * 1000}))) < 600
