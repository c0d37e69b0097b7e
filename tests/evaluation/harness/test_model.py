"""The model `l2d` of lm_eval: answers and scores that nothing but the question, the model and the seed decides."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusion_models import diffusion_lm, tess_lm
from tiny_models import ADDING, tiny_lm, tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from l2d_framework.config import ModelSection
from l2d_framework.errors import CheckpointError, ConfigError, DataError
from l2d_framework.evaluation.harness import scorer
from l2d_framework.evaluation.harness.model import L2DLM
from l2d_framework.evaluation.harness.requests import occurrences
from l2d_framework.generation import prefix
from l2d_framework.generation.chat_template import TEMPLATE_DATE
from l2d_framework.generation.prompts import encode_prompts, encode_text
from l2d_framework.models.checkpoint import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUESTIONS = ["2+2=", "What is the capital of France? ", "a", "The sky is", "Count: one two three", "2+2=?", "x" * 40]
CHOICES = [" A", " Bee", " the sea", " c"]
FEW = {"num_inference_steps": 5, "noise_samples": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, an L2D and a TESS checkpoint over it."""
    root = tmp_path_factory.mktemp("models")
    lm, tokenizer = tiny_lm("llama", max_position_embeddings=256), tiny_tokenizer(chat=True)
    tokenizer.model_max_length = 256
    for part in (lm, tokenizer):
        part.save_pretrained(root / "base")
    made = {
        "l2d": diffusion_lm(lm, classes=("math", "code")),
        "tess": tess_lm(tiny_lm("llama", max_position_embeddings=256)),
    }
    for name, model in made.items():
        section = ModelSection(base=str(root / "base"), dtype="float32")
        model.origin = dataclasses.replace(model.origin, model=section)
        model.tokenizer = tokenizer
        save(model, root / name)
    return {name: root / name for name in ("base", *made)}


@pytest.fixture
def opened(folders) -> Callable[..., L2DLM]:
    def make(name: str = "l2d", **options: Any) -> L2DLM:
        few = {} if name == "base" else {"num_inference_steps": 4} if name == "tess" else FEW
        return L2DLM(str(folders[name]), device="cpu", **{**few, **options})

    return make


def asked(kind: str, arguments: Sequence[Any], *, repeats: int = 1) -> list[Instance]:
    """Requests as the harness makes them, each document with all its repeats."""
    made = [Instance(kind, {}, a, 0, metadata=("task", number, repeats)) for number, a in enumerate(arguments)]
    return [request for request in made for _ in range(repeats)]


def to_generate(texts: Sequence[str] = QUESTIONS, *, repeats: int = 1, **options: Any) -> list[Instance]:
    kwargs = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0} | options
    return asked("generate_until", [(text, kwargs) for text in texts], repeats=repeats)


def to_score(texts: Sequence[str] = QUESTIONS) -> list[Instance]:
    return asked("loglikelihood", [(text, choice) for text in texts for choice in CHOICES])


@pytest.mark.parametrize("name", ["l2d", "tess"])
def test_answers_do_not_depend_on_batch_or_order(opened, name):
    requests = to_generate(QUESTIONS[:5], repeats=2)
    alone = opened(name, batch_size=1).generate_until(requests)
    assert opened(name, batch_size=8).generate_until(requests) == alone
    assert opened(name, batch_size="auto").generate_until(requests) == alone
    order = random.Random(0).sample(range(len(requests)), len(requests))
    # Repeats of one request are told apart by their order alone.
    order = sorted(order, key=lambda i: (order.index(i - i % 2), i))
    shuffled = opened(name, batch_size=4).generate_until([requests[i] for i in order])
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize(("name", "options"), [("l2d", {}), ("tess", {"scoring": "pseudo"})])
def test_scores_do_not_depend_on_batch_or_order(opened, name, options):
    requests = to_score()
    alone = opened(name, batch_size=1, **options).loglikelihood(requests)
    order = random.Random(0).sample(range(len(requests)), len(requests))
    for size in (8, "auto"):
        found = opened(name, batch_size=size, **options).loglikelihood([requests[i] for i in order])
        for i, (score, greedy) in zip(order, found, strict=True):
            assert score == pytest.approx(alone[i][0], abs=1e-4)
            assert greedy == alone[i][1]


def test_auto_takes_the_largest_batch_that_memory_allows(opened, monkeypatch):
    model, answers, scores = (
        opened(batch_size="auto", max_batch_size=8),
        to_generate(QUESTIONS[:5]),
        to_score(QUESTIONS[:3]),
    )
    assert model.diffusion.device.type == "cpu"
    answer, mixture = model.generator.answer, scorer.Scorer.mixture

    def tight(rows: Sequence[Any]) -> None:
        if len(rows) > 3:
            raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(model, "_device", torch.device("cuda"))
    monkeypatch.setattr(
        model.generator, "answer", lambda plan, batch, **o: tight([1] * o["size"]) or answer(plan, batch, **o)
    )
    monkeypatch.setattr(scorer.Scorer, "mixture", lambda self, jobs: tight(jobs) or mixture(self, jobs))
    monkeypatch.setattr(model.generator, "_plain_seconds", lambda *_: 1.0)
    found = model.generate_until(answers), [score for score, _ in model.loglikelihood(scores)]
    assert len(model.batch_sizes) == 2 and set(model.batch_sizes.values()) <= {1, 2, 3}
    monkeypatch.undo()
    alone = opened(batch_size=1)
    assert found[0] == alone.generate_until(answers)
    assert found[1] == pytest.approx([score for score, _ in alone.loglikelihood(scores)], abs=1e-4)


def test_chunks_of_positions_do_not_change_scores(opened, monkeypatch):
    requests = to_score(QUESTIONS[:3])
    whole = opened(batch_size=4).loglikelihood(requests)
    monkeypatch.setattr(scorer, "_LOGITS", 4 * 2 * 260 * 3)
    parts = opened(batch_size=4).loglikelihood(requests)
    assert [s for s, _ in parts] == pytest.approx([s for s, _ in whole], abs=1e-4)
    assert [g for _, g in parts] == [g for _, g in whole]


@pytest.mark.parametrize("name", ["l2d", "tess"])
def test_repeats_and_seeds_differ(opened, name):
    requests = to_generate(QUESTIONS[:1], repeats=8)
    found = opened(name, batch_size=3).generate_until(requests)
    assert len(set(found)) > 4
    assert opened(name, batch_size=3, seed=1).generate_until(requests) != found


@pytest.mark.parametrize("name", ["l2d", "tess"])
def test_a_prompt_is_read_once_for_all_its_repeats(opened, monkeypatch, name):
    requests = to_generate(QUESTIONS[:3], repeats=4) + to_generate(QUESTIONS[1:2], repeats=4)
    every = {}
    for size in (1, 7, 32):
        model = opened(name, batch_size=size)
        read, whole = [], model.diffusion.backbone.read
        monkeypatch.setattr(
            model.diffusion.backbone, "read", lambda x, w=whole, r=read: r.append(len(x.tokens)) or w(x)
        )
        every[size] = model.generate_until(requests)
        assert sum(read) == 3
    assert every[1] == every[7] == every[32]
    assert len(set(every[1])) > 12
    # Neither the repeats before nor those after a request change its answer.
    assert opened(name).generate_until(to_generate(QUESTIONS[:1], repeats=2)) == every[1][:2]


def test_the_diffusion_noise_alone_makes_repeats_differ(opened):
    found = opened(batch_size=8).generate_until(to_generate(QUESTIONS[:1], repeats=8, do_sample=False))
    assert len(set(found)) > 1


def test_the_main_path_scores_as_lm_eval_s_own_model(opened, folders):
    requests = to_score()
    plain = HFLM(str(folders["base"]), device="cpu", batch_size=4, dtype="float32").loglikelihood(requests)
    assert opened(batch_size=4, scoring="main").loglikelihood(requests) == plain
    assert opened(batch_size=4, num_inference_steps=0, noise_samples=3).loglikelihood(requests) == plain
    assert opened("base", batch_size=4, num_inference_steps=0).loglikelihood(requests) == plain
    assert opened(batch_size=4).loglikelihood(requests) != plain


def test_no_inference_steps_answer_as_lm_eval_s_own_model(opened, folders):
    requests = to_generate(do_sample=False, temperature=0.0)
    plain = HFLM(str(folders["base"]), device="cpu", batch_size=4, dtype="float32").generate_until(requests)
    assert opened(batch_size=3, num_inference_steps=0).generate_until(requests) == plain
    assert opened("base", batch_size=3, num_inference_steps=0).generate_until(requests) == plain


def token_scores(model: L2DLM, context: str, answers: Sequence[Sequence[int]]) -> torch.Tensor:
    requests = [(None, model.tok_encode(context), list(answer)) for answer in answers]
    return torch.tensor([score for score, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)])


def test_the_mixture_is_a_distribution_and_obeys_the_chain_rule(opened):
    model = opened(batch_size=4)
    every = range(260)
    single = token_scores(model, "2+2=", [[token] for token in every])
    assert float(single.exp().sum()) == pytest.approx(1, abs=1e-4)
    # Also says that answers to one question meet the same noise.
    pairs = token_scores(model, "2+2=", [[65, token] for token in every])
    assert float(pairs.exp().sum()) == pytest.approx(float(single[65].exp()), rel=1e-3)


def test_probabilities_are_averaged_over_noises(opened, monkeypatch):
    answers = [[token] for token in range(260)]
    mean = token_scores(opened(noise_samples=2), "The sky is", answers).exp()
    first = token_scores(opened(noise_samples=1), "The sky is", answers).exp()
    plain = scorer.Scorer._logarithms
    monkeypatch.setattr(
        scorer.Scorer, "_logarithms", lambda self, *a: plain(self, *a[:-1], [sample + 1 for sample in a[-1]])
    )
    second = token_scores(opened(noise_samples=1), "The sky is", answers).exp()
    assert torch.allclose(mean, (first + second) / 2, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-4)


SHOTS = "".join(f"Q: {n}+{n}?\nA: {2 * n}\n\n" for n in range(1, 5))
TASK = [(f"{SHOTS}Q: {q}\nA:", c) for q in ("5+1?", "12+30?", "2-2?") for c in (" 6", " 42", " no", " none at all")]


@pytest.mark.parametrize("size", [1, 3, 8, 12])
@pytest.mark.parametrize("shots", [True, False])
def test_questions_and_what_they_begin_with_are_read_once(opened, monkeypatch, size, shots):
    # A question of its own kind stands among those of the task.
    pairs = [(q if shots else q.removeprefix(SHOTS), c) for q, c in TASK]
    requests = asked("loglikelihood", [*pairs[:5], ("The sky is", " blue"), *pairs[5:]])
    monkeypatch.setattr(prefix, "SHARED", 10**6)
    alone = opened(batch_size=1).loglikelihood(requests)
    monkeypatch.undo()
    model, read = opened(batch_size=size), []
    main = model.diffusion.backbone.main.layers[0]
    main.register_forward_hook(lambda module, given, out: read.append(tuple(given[0].shape[:2])))
    found = model.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
    if shots:
        assert [rows for rows, length in read if length >= len(SHOTS)] == [1]
    elif size == 12:
        assert read[0][0] in (3, 4)  # questions, of which each has four answers


def test_whole_texts_are_scored_token_by_token(opened):
    model = opened(batch_size=2)
    requests = asked("loglikelihood_rolling", [("ab",), ("a longer text",)])
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    for score, text in zip(found, ("ab", "a longer text"), strict=True):
        tokens = model.tok_encode(text, add_special_tokens=False)
        ((direct, _),) = model._loglikelihood_tokens([(None, [model.prefix_token_id], tokens)], disable_tqdm=True)
        assert score == pytest.approx(direct, abs=1e-4)


def test_models_of_whole_answers_have_no_likelihood(opened):
    model = opened("tess")
    with pytest.raises(ConfigError, match=r"'task'.*scoring=pseudo"):
        model.loglikelihood(to_score())
    with pytest.raises(ConfigError, match="likelihood"):
        opened("tess", scoring="pseudo").loglikelihood_rolling(asked("loglikelihood_rolling", [("ab",)]))
    with pytest.raises(ConfigError, match=r"scoring='mixture'.*pseudo"):
        opened("tess", scoring="mixture")
    assert model._diffusion is None


def test_a_batch_coupled_solver_sees_one_row(opened):
    pytest.importorskip("torchdiffeq")
    options = {"solver": {"name": "torchdiffeq_adaptive", "rtol": 0.3, "atol": 0.3}, "num_inference_steps": None}
    options["noise_samples"] = 1
    requests = to_generate(QUESTIONS[:2], max_gen_toks=1)
    alone = opened(batch_size=1, **options)
    assert alone.settings.solver.batch_coupled
    assert opened(batch_size=8, **options).generate_until(requests) == alone.generate_until(requests)
    scores = to_score(QUESTIONS[:1])[:2]
    found = opened(batch_size=8, **options).loglikelihood(scores)
    assert found == alone.loglikelihood(scores)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"num_inference_step": 3}, "num_inference_steps"),
        ({"solver": "midpont"}, "midpoint"),
        ({"num_inference_steps": 4}, "Use 3 or 5"),
        ({"guidance_scale": 1.5}, "class"),
        ({"class_name": "maths"}, "math"),
        ({"temprature": 1.0}, "temperature"),
        ({"max_gen_toks": 256}, "no room"),
    ],
)
def test_generation_options_are_refused_before_weights_load(opened, options, hint):
    model = opened()
    with pytest.raises(ValueError, match=hint):
        model.generate_until(to_generate(**options))
    assert model._diffusion is None


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"pretraind": "x"}, "pretrained"),
        ({"scoring": "mian"}, "main"),
        ({"noise_samples": 0}, "above 0"),
        ({"parallelize": True}, "Unknown model argument"),
        ({"drafter": "prompt_lookup"}, "guesses nothing with speculate='off'"),
        ({"speculate": 2, "drafter": {"name": "assistant", "model": "./none"}}, "There is no folder './none'"),
    ],
)
def test_model_options_are_refused(opened, options, hint):
    with pytest.raises(ConfigError, match=hint):
        opened(**options)


def test_a_drafter_with_options_changes_no_answer(opened, folders):
    requests, assistant = to_generate(QUESTIONS[:3]), {"name": "assistant", "model": str(folders["base"])}
    wanted = opened().generate_until(requests)
    assert opened(speculate=2, drafter=assistant).generate_until(requests) == wanted


def test_generation_options_win_over_model_options(opened):
    model = opened(seed=5)
    requests = to_generate(num_inference_steps=3, solver="euler", guidance_scale=1.5, class_name="math", seed=7)
    model.generate_until(requests)
    (used,) = model.get_model_info()["l2d"]["sampling_of_generation"]
    assert used["num_inference_steps"] == 3
    assert used["solver"]["name"] == "euler"
    assert used["guidance"][0]["scale"] == 1.5
    assert used["class_name"] == "math"
    assert used["seed"] == 7
    whole = opened(num_inference_steps=3, solver="euler", guidance_scale=1.5, class_name="math", seed=7)
    assert whole.generate_until(to_generate()) == model.generate_until(requests)


def test_a_class_hint_serves_models_that_know_it_and_stops_no_other(opened, caplog):
    few = QUESTIONS[:3]
    chosen = opened().generate_until(to_generate(few, class_name="math", guidance_scale=1.5))
    model = opened()
    assert model.generate_until(to_generate(few, class_hint="math", guidance_scale=1.5)) == chosen
    assert model.get_model_info()["l2d"]["sampling_of_generation"][0]["class_name"] == "math"
    # What the user names for certain is stronger than what a task proposes.
    assert opened(class_name="math").generate_until(to_generate(few, class_hint="code", guidance_scale=1.5)) == chosen
    assert "ignored" not in caplog.text
    for name, options in (("l2d", {}), ("tess", {}), ("base", {"num_inference_steps": 0})):
        other = opened(name, **options)
        unasked = other.generate_until(to_generate(few))
        caplog.clear()
        assert other.generate_until(to_generate(few, class_hint="history")) == unasked
        other.generate_until(to_generate(QUESTIONS[:1], class_hint="history", max_gen_toks=2))
        assert caplog.text.count("class_hint='history' is ignored") == 1
    with pytest.raises(ConfigError, match="class_hint must be the name"):
        opened().generate_until(to_generate(class_hint=3))


def test_a_guided_model_waits_for_the_class_of_each_task(opened):
    guided = opened(guidance_scale=1.5)
    for ask in (lambda: guided.loglikelihood(to_score()), lambda: guided.generate_until(to_generate())):
        with pytest.raises(ConfigError, match=r"\['math', 'code'\].*class_name=NAME to --gen_kwargs.*class_hint"):
            ask()
    assert guided._diffusion is None
    chosen = opened().generate_until(to_generate(class_name="code", guidance_scale=1.5))
    assert guided.generate_until(to_generate(class_hint="code")) == chosen
    with pytest.raises(ConfigError, match="trained with class labels"):
        opened("tess", guidance=[{"name": "classifier_free", "scale": 1.5}])


def test_results_say_first_what_was_used(opened):
    model = opened(seed=3)
    model.generate_until(to_generate(QUESTIONS[:1], num_inference_steps=3, max_gen_toks=2))
    found = model.get_model_info()["l2d"]
    assert (found["num_inference_steps"], found["seed"], found["class_name"]) == (3, 3, None)
    model.loglikelihood(to_score(QUESTIONS[:1]))
    assert model.get_model_info()["l2d"]["num_inference_steps"] == [3, 5]


def test_a_plain_model_is_evaluated_as_one_only(opened):
    with pytest.raises(CheckpointError, match="num_inference_steps=0"):
        opened("base")


def test_no_checkpoint_at_all_names_both_ways(monkeypatch, folders):
    monkeypatch.delenv("L2D_PRETRAINED", raising=False)
    with pytest.raises(ConfigError, match=r"pretrained=.*L2D_PRETRAINED"):
        L2DLM()
    monkeypatch.setenv("L2D_PRETRAINED", str(folders["l2d"]))
    assert L2DLM(device="cpu").source.path == str(folders["l2d"])


def test_a_model_without_tokenizer_is_refused(folders, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        L2DLM(str(tmp_path), num_inference_steps=0, device="cpu")


def test_lm_eval_still_has_what_is_replaced():
    ours = {
        name
        for kind in L2DLM.__mro__[: L2DLM.__mro__.index(HFLM)]
        for name in vars(kind)
        if name in ("max_length", "tok_encode", "chat_template", "apply_chat_template", "get_model_info")
        or name.startswith(("_get_", "_create_", "_loglikelihood", "_detect", "loglikelihood", "generate_", "set_"))
    }
    assert len(ours) > 10
    assert all(hasattr(HFLM, name) for name in ours)


def test_answers_end_before_a_stop_string(opened):
    texts = opened(num_inference_steps=0).generate_until(to_generate(QUESTIONS, max_gen_toks=32))
    letter = max((c for c in "".join(texts) if c.isascii() and c.isprintable()), key="".join(texts).count)
    cut = opened(num_inference_steps=0).generate_until(to_generate(QUESTIONS, max_gen_toks=32, until=[letter]))
    assert any(letter in text for text in texts)
    assert cut == [text.partition(letter)[0] for text in texts]


def test_conversations_get_no_second_beginning(opened):
    model = opened()
    model.tokenizer.add_bos_token = True
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|turn|>assistant\n")
    assert model.tok_encode(text) == model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_conversations_are_rendered_as_in_training_and_within_its_bounds(opened, monkeypatch):
    model = opened()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    monkeypatch.setattr(model.tokenizer, "chat_template", refuses + "{% endfor %}{{ date_string }}")
    assert model.apply_chat_template(turns) == f"Hi{TEMPLATE_DATE}"
    assert model.apply_chat_template([*turns, {"role": "assistant", "content": "Yo"}], False) == "HiYo"
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ 'a' * 10 ** 9 }}")
    for asks in (True, False):
        with pytest.raises(DataError, match="more than 10,000,000 characters"):
            model.apply_chat_template(turns, asks)


@pytest.mark.parametrize("content", ["Yo", " Yo \n", "{{ x }}"])
@pytest.mark.parametrize("printed", ["{{ m.content }}", "{{ m.content|trim }}"], ids=["whole", "trimmed"])
def test_a_turn_that_goes_on_stands_open_as_in_transformers(opened, monkeypatch, printed, content):
    model = opened()
    template = f"{{% for m in messages %}}<s>{printed}</s>\n{{% endfor %}}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    theirs = model.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert model.apply_chat_template(turns, False) == theirs
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(DataError, match="does not print the last turn"):
        model.apply_chat_template(turns, False)


def test_results_say_what_was_used_and_what_it_cost(opened):
    model = opened(seed=3)
    model.generate_until(to_generate())
    model.loglikelihood(to_score(QUESTIONS[:1]))
    found = model.get_model_info()["l2d"]
    assert found["seed"] == 3
    assert found["solver"]["name"] == "midpoint"
    assert found["num_inference_steps"] == 5
    assert found["scoring"]["name"] == "mixture"
    assert len(found["base_fingerprint"]) == len(found["adapter_fingerprint"]) == 64
    assert found["plugins"]["l2d-framework"] == found["l2d_framework"]
    cost = found["cost"]["generation"]
    assert cost["evaluations_per_token_mean"] == cost["evaluations_per_token_p95"] == 5
    assert cost["cost_ratio_by_evaluations"] == 6
    assert cost["tokens_per_second"] > 0 and cost["cost_ratio_measured"] > 0
    assert found["cost"]["scoring"]["evaluations_per_token_mean"] == 10


def test_repeats_are_numbered_by_document_whatever_the_order_of_requests():
    def request(text: str, document: int, repeats: int) -> Any:
        return SimpleNamespace(args=(text, {}), task_name="task", doc_id=document, idx=0, repeats=repeats)

    documents = [request("same", 0, 2), request("other", 1, 2), request("same", 2, 2), request("same", 3, 2)]
    whole = [one for one in documents for _ in range(2)]
    assert occurrences(whole) == [0, 1, 0, 1, 2, 3, 4, 5]
    assert occurrences(whole[::-1]) == [4, 5, 2, 3, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def adding(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], L2DLM]:
    """`adding(what)`: the same plain language model beside a tokenizer that adds this to every text."""
    root = tmp_path_factory.mktemp("adding")

    def make(what: str, **options: Any) -> L2DLM:
        if not (root / what).exists():
            tiny_lm("llama").save_pretrained(root / what)
            tiny_tokenizer(chat=True, adding=what).save_pretrained(root / what)
        return L2DLM(str(root / what), device="cpu", num_inference_steps=0, batch_size=1, **options)

    return make


@pytest.mark.parametrize("what", ADDING)
def test_prompts_are_encoded_as_in_training(adding, what):
    model, chat = adding(what), [{"role": "user", "content": "2+2?"}]
    for text in ("2+2=", "<s>2+2="):
        assert model.tok_encode(text) == encode_text(model.tokenizer, text)
        assert model.tok_encode(text, left_truncate_len=3) == encode_text(model.tokenizer, text)[-3:]
    text = model.apply_chat_template(chat)
    assert [model.tok_encode(text)] == encode_prompts(model.tokenizer, [chat])


def test_what_a_tokenizer_puts_behind_a_text_changes_no_score(adding):
    for fewer, more in (("nothing", "eos"), ("bos", "both")):
        wanted = adding(fewer).loglikelihood(to_score(QUESTIONS[:3]))
        assert adding(more).loglikelihood(to_score(QUESTIONS[:3])) == wanted


ENDED_BY_TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(("ends", "is_chat"), [(None, True), (None, False), ((3,), True), ((3,), False)])
@pytest.mark.parametrize("searching", [{}, {"search_beams": 2}], ids=["alone", "searched"])
def test_an_answer_ends_with_its_turn(tmp_path, monkeypatch, ends, is_chat, searching):
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    tokenizer.chat_template = ENDED_BY_TURNS
    # Nothing can be said but the end of a turn and a few letters.
    lm.generation_config.suppress_tokens = [i for i in range(lm.config.vocab_size) if i not in (3, 80, 81, 82)]
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = diffusion_lm(lm)
    section = ModelSection(base=str(tmp_path / "base"), dtype="float32")
    model.origin = dataclasses.replace(model.origin, model=section, ends=ends)
    save(model, tmp_path / "model")
    opened = L2DLM(str(tmp_path / "model"), device="cpu", num_inference_steps=0, **searching)
    found, answer = [], opened.generator.answer
    monkeypatch.setattr(opened.generator, "answer", lambda *a, **k: found.append(answer(*a, **k)) or found[-1])
    asked = [opened.apply_chat_template([{"role": "user", "content": q}]) if is_chat else q for q in QUESTIONS]
    opened.generate_until(to_generate(asked, max_gen_toks=8))
    goes_on = [3 in tokens[:-1] for answers in found for tokens, _ in answers]
    assert any(goes_on) == (ends is None and not is_chat)
