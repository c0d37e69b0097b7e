"""Options of `--gen_kwargs` are refused by name before a model is loaded."""

from typing import Any

import pytest

pytest.importorskip("lm_eval")

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.harness.options import diffusing, read_plan
from l2d_framework.registry import registry

WRONG: list[tuple[str, Any]] = [
    *(("max_gen_toks", value) for value in (0, -1, 1.5, "x", True)),
    *(("max_new_tokens", value) for value in (0, 2.5)),
    *(("until", value) for value in (3, [3], {"a": 1}, [None])),
    *(("temperature", value) for value in ("x", float("nan"), -1.0, [1])),
    *(("top_p", value) for value in (2, "x")),
    *(("top_k", value) for value in (-1, 1.5)),
    *(("pad_token_id", value) for value in (10**9, -1)),
    *(("eos_token_id", value) for value in ([], 10**9)),
    *(("num_beams", value) for value in (4, "x")),
    *(("output_scores", value) for value in (True,)),
    *(("nonsense", value) for value in (1,)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_generation_option_is_named(name, value):
    with pytest.raises(ConfigError, match=name[:4]):
        read_plan({"do_sample": True, "temperature": 1.0} | {name: value}, 256, "</s>", vocab_size=300)


def test_options_without_an_effect_are_left_out_and_others_kept():
    plan = read_plan({"num_beams": 1, "use_cache": True, "do_sample": 1, "temperature": 0.5, "top_k": 3}, 256, "</s>")
    assert plan.decoding == {"do_sample": True, "temperature": 0.5, "top_k": 3}
    assert read_plan({"max_gen_toks": "12", "until": "."}, 256, "</s>").count == 12


@pytest.mark.parametrize("one", ["mine", {"name": "mine"}, registry().create("guidance", {"name": "classifier_free"})])
def test_a_single_guidance_is_a_list_of_one(one):
    assert diffusing({"guidance": one, "until": []}) == {"guidance": [one]}
