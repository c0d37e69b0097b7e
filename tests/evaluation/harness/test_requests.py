"""lm_eval's `--use_cache`: resumed is uninterrupted, and answers of others are refused."""

import dataclasses
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusion_models import diffusion_lm
from tiny_models import tiny_lm, tiny_tokenizer
from transformers import AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.dummy import DummyLM

from l2d_framework.config import ModelSection
from l2d_framework.errors import CheckpointError
from l2d_framework.evaluation.harness import scorer
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.evaluation.harness.requests import PIECE
from l2d_framework.evaluation.harness.scorer import Scorer
from l2d_framework.models.checkpoint import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model, tokenizer = diffusion_lm(tiny_lm("llama")), tiny_tokenizer()
    model.backbone.lm.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model.origin = dataclasses.replace(model.origin, model=ModelSection(base=str(root / "base"), dtype="float32"))
    save(model, root / "l2d")
    return root / "l2d"


def cached(folder: Path, database: Path, **options: Any) -> tuple[L2DLM, Any]:
    model = L2DLM(
        str(folder), device="cpu", **{"batch_size": 2, "num_inference_steps": 3, "noise_samples": 1, **options}
    )
    return model, CachingLM(model, str(database))


def generation(**options: Any) -> list[Instance]:
    kwargs = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False, **options}
    made = [Instance("generate_until", {}, (text, kwargs), 0, metadata=("task", n, 3)) for n, text in enumerate("abcd")]
    return [request for request in made for _ in range(3)]


def choices() -> list[Instance]:
    pairs = [(text, choice) for text in ("ab", "abc", "b") for choice in (" x", " yz")]
    return [Instance("loglikelihood", {}, pair, 0, metadata=("task", n, 1)) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("sampled", [False, True])
def test_resumed_is_uninterrupted(folder, tmp_path, monkeypatch, sampled):
    options = {"do_sample": True, "temperature": 1.0} if sampled else {}
    whole = cached(folder, tmp_path / "whole.db")[1].generate_until(generation(**options))
    assert len(set(whole[:3])) > 1 or len(set(whole[3:6])) > 1
    scores = cached(folder, tmp_path / "scores.db")[1].loglikelihood(choices())

    model, caching = cached(folder, tmp_path / "part.db")
    kept, keep = [], model.answers.keep

    def interrupted(*arguments: Any) -> None:
        # However the process ends, as by a signal that lm_eval does not hear; beside them stands whose they are.
        with closing(sqlite3.connect(tmp_path / "part.db")) as disk:
            assert disk.execute("select count(*) from unnamed").fetchone() == (len(kept) + 1,)
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(arguments)
        keep(*arguments)

    monkeypatch.setattr(model.answers, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caching.generate_until(generation(**options))
    caching.dbdict.close()
    resumed, caching = cached(folder, tmp_path / "part.db")
    count, keep = [], resumed.answers.keep
    monkeypatch.setattr(resumed.answers, "keep", lambda *a: count.append(1) or keep(*a))
    assert caching.generate_until(generation(**options)) == whole
    assert len(count) == 7  # of twelve answers, five were kept, the last in the middle of a question's repeats
    assert caching.loglikelihood(choices()) == scores
    assert resumed.get_model_info()["l2d"]["cost"]["generation"]["tokens"] > 0


@pytest.mark.parametrize("scoring", ["mixture", "main"])
def test_a_long_text_goes_on_where_it_was_left(folder, tmp_path, monkeypatch, scoring):
    texts = [
        Instance("loglikelihood_rolling", {}, (letter * 300,), 0, metadata=("task", n, 1))
        for n, letter in enumerate("ab")
    ]
    whole = cached(folder, tmp_path / "whole.db", scoring=scoring)[1].loglikelihood_rolling(texts)
    model, caching = cached(folder, tmp_path / "part.db", scoring=scoring)
    asked, score = [], L2DLM._score

    def interrupted(self: L2DLM, requests: Any, *options: Any) -> Any:
        asked.append(len(requests))
        if self is model and len(asked) == 3:
            raise KeyboardInterrupt
        return score(self, requests, *options)

    monkeypatch.setattr(L2DLM, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caching.loglikelihood_rolling(texts)
    assert asked == [2, 2, 2]  # of six pieces
    caching.dbdict.close()
    asked.clear()
    caching = cached(folder, tmp_path / "part.db", scoring=scoring)[1]
    assert caching.loglikelihood_rolling(texts) == pytest.approx(whole, abs=1e-4)
    assert asked == [2]
    assert caching.loglikelihood_rolling(texts) == pytest.approx(whole, abs=1e-4)
    assert asked == [2]


def test_a_long_text_in_one_batch_goes_on_piece_by_piece(folder, tmp_path, monkeypatch):
    text = [Instance("loglikelihood_rolling", {}, ("".join(map(str, range(203))),), 0, metadata=("task", 0, 1))]
    whole = cached(folder, tmp_path / "whole.db", batch_size=8)[1].loglikelihood_rolling(text)
    monkeypatch.setattr(scorer, "_LOGITS", 2**12)  # those of a few positions
    asked, mixture = [], Scorer.mixture

    def interrupted(self: Scorer, questions: Any) -> Any:
        asked.extend(questions)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return mixture(self, questions)

    caching = cached(folder, tmp_path / "part.db", batch_size=8)[1]
    monkeypatch.setattr(Scorer, "mixture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caching.loglikelihood_rolling(text)
    caching.dbdict.close()
    caching = cached(folder, tmp_path / "part.db", batch_size=8)[1]
    assert caching.loglikelihood_rolling(text) == pytest.approx(whole, abs=1e-4)
    assert len(asked) == 3 + 2  # of four pieces


def test_short_texts_beside_a_long_one_are_scored_together(folder, tmp_path, monkeypatch):
    texts = ["a" * 100, *(f"{number}." for number in range(7))]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("task", n, 1)) for n, text in enumerate(texts)]
    monkeypatch.setattr(scorer, "_LOGITS", 2**13)
    sizes, mixture = [], Scorer.mixture
    monkeypatch.setattr(Scorer, "mixture", lambda self, asked: sizes.append(len(asked)) or mixture(self, asked))
    cached(folder, tmp_path / "answers.db", batch_size=8)[1].loglikelihood_rolling(asked)
    assert sorted(sizes) == [1, 7]


def test_a_piece_is_kept_once(folder, tmp_path, monkeypatch):
    text = [Instance("loglikelihood_rolling", {}, ("a" * 300,), 0, metadata=("task", 0, 1))]
    for scoring in ("mixture", "main"):
        model, caching = cached(folder, tmp_path / f"{scoring}.db", scoring=scoring)
        kept, keep = [], model.answers.keep
        monkeypatch.setattr(model.answers, "keep", lambda *a, kept=kept, keep=keep: kept.append(a[0]) or keep(*a))
        caching.loglikelihood_rolling(text)
        assert kept.count(PIECE) == 3


def together(caches: list[Any], ask: Callable[[Any], Any]) -> list[Any]:
    """What each of several processes answers, here threads that exchange values as processes do."""
    slots, barrier = [None] * len(caches), threading.Barrier(len(caches), timeout=60)

    def gather(number: int, value: Any) -> list[Any]:
        slots[number] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()
        return values

    for number, cache in enumerate(caches):
        cache.lm.process, cache.lm.processes, cache.lm.gather = number, len(caches), partial(gather, number)
    with ThreadPoolExecutor(len(caches)) as pool:
        return list(pool.map(ask, caches))


def test_several_processes_answer_as_one_and_none_asks_what_another_knows(folder, tmp_path):
    texts = [Instance("loglikelihood_rolling", {}, ("a text",), 0, metadata=("task", 0, 1))]
    ask: list[Callable[[Any], Any]] = [
        lambda model: model.generate_until(generation(do_sample=True, temperature=1.0)),
        lambda model: model.loglikelihood(choices()),
        lambda model: model.loglikelihood_rolling(texts),
    ]
    alone, processes = cached(folder, tmp_path / "alone.db", batch_size=1)[1], 3
    wanted = [one(alone) for one in ask]
    for attempt in range(2):
        caches = [cached(folder, tmp_path / f"{n}.db", batch_size=1)[1] for n in range(processes)]
        models = [cache.lm for cache in caches]
        for one, answer in zip(ask, wanted, strict=True):
            assert together(caches, one) == [answer] * processes
        assert sum(model._diffusion is not None for model in models) == (0 if attempt else processes)
        costs = [model.get_model_info()["l2d"]["cost"]["generation"]["tokens"] for model in (alone.lm, *models)]
        assert len(set(costs)) == 1
        for cache in caches:
            cache.dbdict.close()


def test_what_is_known_needs_no_weights(folder, tmp_path):
    first, caching = cached(folder, tmp_path / "answers.db")
    found = caching.generate_until(generation()), caching.loglikelihood(choices())
    caching.dbdict.close()
    again, caching = cached(folder, tmp_path / "answers.db")
    assert (caching.generate_until(generation()), caching.loglikelihood(choices())) == found
    assert again._diffusion is None and first._diffusion is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 1}, r"\(sampling\.seed: 0 there, 1 now\)"),
        ({"solver": "euler"}, r"sampling\.solver\.name: 'midpoint' there, 'euler' now"),
        ({"noise_samples": 2}, r"\(noise_samples: 1 there, 2 now\)"),
        ({"scoring": "main"}, r"\(scoring: 'mixture' there, 'main' now\)"),
    ],
)
def test_answers_of_other_settings_are_refused_by_option_with_both_values(folder, tmp_path, options, text):
    cached(folder, tmp_path / "answers.db")[1].dbdict.close()
    with pytest.raises(CheckpointError, match=rf"{text}.*--use_cache"):
        cached(folder, tmp_path / "answers.db", **options)


def test_a_model_that_moved_is_the_same_and_another_tokenizer_is_not(folder, tmp_path):
    cached(folder, tmp_path / "answers.db")[1].dbdict.close()
    shutil.copytree(folder.parent / "base", tmp_path / "base")
    cached(folder, tmp_path / "answers.db", base=str(tmp_path / "base"))[1].dbdict.close()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["Hello"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"\(tokenizer: '\w{64}' there, '\w{64}' now\)"):
        cached(folder, tmp_path / "answers.db", base=str(tmp_path / "base"))


def test_answers_of_another_model_are_refused(folder, tmp_path):
    dummy = CachingLM(DummyLM(), str(tmp_path / "answers.db"))
    dummy.loglikelihood(choices())
    dummy.dbdict.close()
    with pytest.raises(CheckpointError, match=r"answers of a model that is not of l2d-framework.*--use_cache"):
        cached(folder, tmp_path / "answers.db")
