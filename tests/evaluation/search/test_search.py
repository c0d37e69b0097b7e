"""Token search: what it finds, what decides it, and how the adapter of lm_eval runs it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import diffusion_lm, random_tokens, shared_lm
from tiny_models import tiny_lm, tiny_tokenizer

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.search import search as module
from l2d_framework.evaluation.search.search import Search, check_search, read_search, search

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DECODING = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 10}
FEW = {"num_inference_steps": 5}


def found(steps: int = 5, name: str = "a", *, seed: int = 0, **settings: Any) -> tuple[list[int], list[int]]:
    face = shared_lm().as_transformers(num_inference_steps=steps, seed=seed)
    settings = Search(**{"beams": 4, **settings})
    return search(face, random_tokens(1, 6)[0], settings, name=name, decoding=DECODING)


def test_only_the_request_and_the_seed_decide():
    first = found()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert found() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(found(name=name)[0]) for name in "abcde"}) > 1
    assert len({tuple(found(seed=seed)[0]) for seed in range(5)}) > 1


def test_every_pass_is_counted_once(monkeypatch):
    steps: list[int] = []
    face = shared_lm().as_transformers(**FEW)
    inner = type(face)._solve
    solve = lambda self, cache, kept: steps.append(len(cache.names)) or inner(self, cache, kept)  # noqa: E731
    monkeypatch.setattr(type(face), "_solve", solve)
    tokens, passes = search(face, random_tokens(1, 6)[0], Search(beams=4), name="a", decoding=DECODING)
    assert len(passes) == len(tokens) and sum(passes) == len(steps) * (4 * (5 + 1) - 1)
    assert set(found(steps=0)[1][:-1]) <= {3}


def hypotheses(monkeypatch, **settings: Any) -> tuple[list[list[int]], torch.Tensor, list[int]]:
    """All hypotheses of one search with their scores, and the answer picked."""
    face = shared_lm().as_transformers(**FEW)
    seen: list[Any] = []
    inner = type(face).generate
    with monkeypatch.context() as patched:
        patched.setattr(type(face), "generate", lambda *a, **k: seen.append(inner(*a, **k)) or seen[0])
        tokens, _ = search(face, random_tokens(1, 6)[0], Search(beams=4, **settings), name="a", decoding=DECODING)
    out = seen[0]
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    return (
        [row[6 : 6 + n].tolist() for row, n in zip(out.sequences, lengths, strict=True)],
        out.sequences_scores,
        tokens,
    )


@pytest.mark.parametrize("power", [0.0, 0.7])
def test_the_score_is_the_log_likelihood_over_a_power_of_the_length(monkeypatch, power):
    answers, scores, _ = hypotheses(monkeypatch, length_power=power)
    face, prompt = shared_lm().as_transformers(**FEW), random_tokens(1, 6)[0].tolist()
    for answer, score in zip(answers, scores.tolist(), strict=True):
        text = torch.tensor([[*prompt, *answer]])
        context = face(text[:, :6], request_keys=["a"], logits_to_keep=1)
        logits = context.logits[:, -1:]
        if len(answer) > 1:
            rest = face(text[:, 6:-1], past_key_values=context.past_key_values).logits
            logits = torch.cat([logits, rest], 1)
        total = float(logits.log_softmax(-1)[0].gather(1, torch.tensor(answer)[:, None]).sum())
        assert score == pytest.approx(total / len(answer) ** power, abs=1e-3)


def test_temperature_zero_picks_the_best_and_a_high_one_any(monkeypatch):
    answers, scores, chosen = hypotheses(monkeypatch, temperature=0.0)
    assert chosen == answers[int(scores.argmax())]
    monkeypatch.undo()
    picks = [tuple(found(temperature=1e4, name=name)[0]) for name in "abcdef"]
    best = [tuple(found(temperature=0.0, name=name)[0]) for name in "abcdef"]
    assert picks != best


def test_the_pick_follows_the_scores(monkeypatch):
    answers, scores, _ = hypotheses(monkeypatch)
    share = (scores / 0.5).softmax(-1)

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self, dtype: str) -> float:
            return self.value

    for number in (0.05, 0.35, 0.65, 0.95):
        monkeypatch.setattr(module, "keyed_generator", lambda *parts, value=number: Fixed(value))
        assert found(temperature=0.5)[0] == answers[int((share.cumsum(0) <= number).sum())]


def test_a_penalty_on_repetition_repeats_less():
    def repeats(penalty: float) -> int:
        answers = [found(steps=0, name=str(i), repetition_penalty=penalty)[0] for i in range(8)]
        return sum(len(a) - len(set(a)) for a in answers)

    assert repeats(50.0) < repeats(0.02)


def test_coupled_solvers_are_refused():
    pytest.importorskip("torchdiffeq")
    face = shared_lm().as_transformers(solver="torchdiffeq_adaptive", num_inference_steps=None)
    with pytest.raises(ConfigError, match="influence each other"):
        search(face, random_tokens(1, 4)[0], Search(), name="a", decoding=DECODING)


def write(folder: Path, **categories: dict[str, Any]) -> str:
    path = folder / "search.json"
    path.write_text(json.dumps({"categories": categories}), encoding="utf-8")
    return str(path)


def test_options_win_over_the_file_and_the_hint_chooses_in_it(tmp_path):
    file = write(tmp_path, math={"beams": 3, "temperature": 0.5}, coding={"beams": 4})
    assert read_search({"search": file}, "math") == Search(beams=3, temperature=0.5)
    assert read_search({"search": file, "search_category": "coding"}, "math") == Search(beams=4)
    assert read_search({"search": file, "search_beams": 7}, "math") == Search(beams=7, temperature=0.5)
    assert read_search({}) is None
    assert read_search({"search_length_power": 0}) == Search(length_power=0.0)
    assert check_search({"search": file}) == {
        name: read_search({"search": file}, name).model_dump() for name in ("math", "coding")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_beams": 1}, r"search\.beams"),
        ({"search_temperature": -1.0}, r"search\.temperature"),
        ({"search_category": "math"}, "Add search=FILE"),
        ({"search": "nowhere.json"}, "nowhere"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        check_search(options)


def test_an_unknown_category_is_named(tmp_path):
    file = write(tmp_path, math={"beams": 3}, coding={"beams": 4})
    with pytest.raises(ConfigError, match=r"no category 'maths', did you mean 'math'\?|no category 'maths'"):
        check_search({"search": file, "search_category": "maths"})
    with pytest.raises(ConfigError, match="search_category"):
        read_search({"search": file})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    pytest.importorskip("lm_eval")
    from l2d_framework.config import ModelSection
    from l2d_framework.evaluation.harness.model import L2DLM
    from l2d_framework.models.checkpoint import save

    root = tmp_path_factory.mktemp("models")
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer(chat=True)
    for part in (lm, tokenizer):
        part.save_pretrained(root / "base")
    model = diffusion_lm(lm)
    model.origin = dataclasses.replace(model.origin, model=ModelSection(base=str(root / "base"), dtype="float32"))
    model.tokenizer = tokenizer
    save(model, root / "l2d")

    def make(name: str = "l2d", **options: Any) -> Any:
        return L2DLM(str(root / name), device="cpu", **{"num_inference_steps": 3 if name == "l2d" else 0, **options})

    return make


def requests(**options: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    kwargs = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False, **options}
    texts = ["2+2=", "The sky is", "a"]
    return [Instance("generate_until", {}, (t, kwargs), 0, metadata=("task", i, 1)) for i, t in enumerate(texts)]


@pytest.mark.parametrize("name", ["base", "l2d"])
def test_the_adapter_searches_whatever_the_batch(adapter, name):
    alone = adapter(name, batch_size=1, search_beams=3)
    answers = alone.generate_until(requests())
    assert adapter(name, batch_size="auto", search_beams=3).generate_until(requests()[::-1])[::-1] == answers
    assert adapter(name, batch_size=4).generate_until(requests(search_beams=3)) == answers
    assert adapter(name, batch_size=4).generate_until(requests()) != answers
    info = alone.get_model_info()["l2d"]
    passes = 3 * (1 + (3 if name == "l2d" else 0))
    assert info["cost"]["generation"]["cost_ratio_by_evaluations"] >= passes
    assert info["sampling_of_generation"][0]["search"]["beams"] == 3
    assert info["search"] == {"None": Search(beams=3).model_dump()}


def test_search_makes_another_model_of_it_for_the_cache(adapter):
    plain, searching = adapter(), adapter(search_beams=3)
    assert "search" not in plain.identity()
    assert searching.identity() != adapter(search_beams=4).identity()


def test_the_adapter_refuses_wrong_search_before_weights_load(adapter):
    with pytest.raises(ConfigError, match=r"search\.beams"):
        adapter(search_beams=1)
    with pytest.raises(ConfigError, match="search_beams"):
        adapter(search_beam=4)
