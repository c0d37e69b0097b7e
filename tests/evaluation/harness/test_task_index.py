"""Tasks of lm_eval are found in the folders that name them, as in the index of all."""

import pytest

pytest.importorskip("lm_eval")

from l2d_framework.evaluation.harness import run as harness

NAMES = ("gsm8k", "arc_easy", "bbh", "mmlu", "ai2_arc")
"""Tasks, a group, and two names that hold tags, whose tasks may lie anywhere."""


class Everything(Exception):
    pass


def test_a_task_is_found_without_reading_all(monkeypatch):
    index = harness._index

    def few(*arguments, has_defaults=False, **options):
        if has_defaults:
            raise Everything
        return index(*arguments, **options)

    monkeypatch.setattr(harness, "_index", few)
    for name in NAMES[:3]:
        assert name in harness.task_manager(name).task_index
    for name in (*NAMES[3:], "no_such_task"):
        with pytest.raises(Everything):
            harness.task_manager(name)


@pytest.mark.slow
def test_it_is_the_task_that_the_index_of_all_has(monkeypatch):
    found = [harness.task_identity(name) for name in NAMES]
    everything = harness._index(None, has_defaults=True)
    monkeypatch.setattr(harness, "task_manager", lambda *_: everything)
    assert [harness.task_identity(name) for name in NAMES] == found
