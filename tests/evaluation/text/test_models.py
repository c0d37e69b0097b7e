"""Perplexity under a language model and MAUVE on its features."""

import math
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.evaluation.text.judge import Judge, Pretrained, open_tokenizer, pretrained
from l2d_framework.evaluation.text.mauve_score import Features
from l2d_framework.evaluation.text.measure import AUTHORS, CORRECTED, evaluate_texts
from l2d_framework.evaluation.text.samples import Sample

SAMPLES = [
    Sample("The sky", " is blue."),
    Sample("", "No prefix here at all, and a longer text."),
    Sample("The sky", ""),
    Sample("Two", " " + "words and more " * 3),
]


def untracked(batches, title):
    return batches


@pytest.fixture
def source(tiny_lm, tiny_tokenizer):
    """`source(family)`: a language model in memory."""

    def make(family="llama", model=None, **overrides):
        model = tiny_lm(family, **overrides) if model is None else model
        return Pretrained("tiny", model.config, tiny_tokenizer(), lambda: model)

    return make


@pytest.fixture
def library():
    return pytest.importorskip("mauve", reason="the extra text-metrics is not installed")


def random_texts(seed, letters, count=60, size=40):
    draws = np.random.default_rng(seed)
    return ["".join(draws.choice(list(letters), size)) for _ in range(count)]


def test_a_uniform_judge_is_as_perplexed_as_its_vocabulary_is_large(source):
    uniform = source(tie_word_embeddings=False)
    torch.nn.init.zeros_(uniform.model.get_output_embeddings().weight)
    found = evaluate_texts(SAMPLES, judge=Judge(uniform))["metrics"]["perplexity"]
    for variant in (AUTHORS, CORRECTED):
        assert found[variant]["value"] == pytest.approx(uniform.config.vocab_size)
        assert found[variant]["standard_error"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_that_of_the_text_given_its_prefix(source, family):
    lm = source(family)
    expected = []
    for sample in SAMPLES:
        prefix = [1, *lm.tokenizer(sample.prefix, add_special_tokens=False)["input_ids"]]
        text = lm.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([prefix + text])).logits[0]
        steps = range(len(text))
        expected.append([-float(logits[len(prefix) - 1 + i].log_softmax(-1)[text[i]]) for i in steps])
    found = evaluate_texts(SAMPLES, judge=Judge(lm))["metrics"]["perplexity"]
    per_sample = [math.exp(sum(nll) / len(nll)) for nll in expected if nll]
    flat = [x for nll in expected for x in nll]
    assert found[AUTHORS]["value"] == pytest.approx(np.mean(per_sample), rel=1e-4)
    assert found[CORRECTED]["value"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-4)
    assert found[AUTHORS]["samples"] == 3
    assert found[AUTHORS]["left_out"] == found[CORRECTED]["left_out"] == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_batch_size_changes_neither_likelihoods_nor_features(source, family):
    lm = source(family)
    one, all_ = (Judge(lm, batch_size=n).judge(SAMPLES, untracked) for n in (1, 16))
    np.testing.assert_allclose(one.nll, all_.nll, rtol=1e-5, atol=1e-4)
    features = source(model=lm.model.base_model)
    texts = [sample.prefix + sample.text for sample in SAMPLES]
    alone, together = (Features(features, batch_size=n).read(texts, untracked)[0] for n in (1, 16))
    np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # their library's call
def test_features_are_those_of_the_authors_library(source, library):
    lm = source(model=source("gpt2").model.base_model)
    texts = ["some text", "longer than the other", "x"]
    features, cut = Features(lm, batch_size=2).read(texts, untracked)
    ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts]
    expected = library.utils.featurize_tokens_from_model(lm.model, ids, batch_size=3)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    assert cut == 0


def test_a_long_text_keeps_its_beginning_and_is_counted(source):
    lm, long = source(), "x" * 500
    found = evaluate_texts([Sample("p", long), Sample("p", "short")], judge=Judge(lm))
    room = lm.config.max_position_embeddings - 1
    same = evaluate_texts([Sample("p", long[: room - 1]), Sample("p", "short")], judge=Judge(lm))
    values = [result["metrics"]["perplexity"][AUTHORS] for result in (found, same)]
    assert values[0]["value"] == values[1]["value"]
    assert [value["truncated"] for value in values] == [1, 0]


def test_a_prefix_longer_than_the_limit_leaves_no_text_to_judge(source):
    found = Judge(source(), max_length=5).judge([Sample("prefix", "text"), Sample("p", "text")], untracked)
    assert math.isnan(found.perplexities[0])
    assert list(found.tokens) == [0, 3]


def test_prefixes_that_melt_into_the_text_are_counted(source):
    lm = source()

    class Pairs:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, **options):
            return {"input_ids": [10 + len(text[i : i + 2]) for i in range(0, len(text), 2)]}

    found = Judge(Pretrained("pairs", lm.config, Pairs(), lm.load)).judge(
        [Sample("abc", "d"), Sample("ab", "cd")], untracked
    )
    assert found.merged == 1


def test_what_was_judged_is_not_judged_again(source):
    judge, titles = Judge(source()), []
    for _ in range(2):
        judge.judge(SAMPLES, lambda batches, title: titles.append(title) or batches)
    assert titles == ["perplexity"]


def test_mauve_of_equal_texts_is_one_and_of_others_less(source, library):
    features = Features(source(model=source("gpt2").model.base_model))
    golds = random_texts(0, string.ascii_lowercase)

    def mauve(texts):
        samples = [Sample("", text, gold) for text, gold in zip(texts, golds, strict=True)]
        return evaluate_texts(samples, features=features)["metrics"]["mauve"][CORRECTED]["value"]

    assert mauve(golds) == pytest.approx(1)
    assert mauve(random_texts(1, string.digits)) < 0.5


def test_a_long_shared_prefix_hides_the_difference_from_the_authors_mauve_only(source, library):
    features = Features(source(model=source("gpt2").model.base_model), max_length=30)
    golds, texts = random_texts(0, string.ascii_lowercase), random_texts(1, string.digits)
    prefixes = random_texts(2, string.ascii_lowercase)
    samples = [Sample(*row) for row in zip(prefixes, texts, golds, strict=True)]
    found = evaluate_texts(samples, features=features)["metrics"]["mauve"]
    assert found[AUTHORS]["value"] == pytest.approx(1)
    assert found[CORRECTED]["value"] < 0.5
    assert found[AUTHORS]["truncated"] == 120
    assert found[CORRECTED]["truncated"] == 120


def test_empty_texts_do_not_enter_mauve(source, library):
    features = Features(source(model=source("gpt2").model.base_model))
    samples = [Sample("", text, text) for text in random_texts(0, string.ascii_lowercase)]
    found = evaluate_texts([*samples, Sample("", "", "x")], features=features)["metrics"]["mauve"][CORRECTED]
    assert (found["samples"], found["left_out"]) == (60, 1)


def test_mauve_without_golds_is_refused_before_the_weights_are_used(source, library):
    def load():
        pytest.fail("the weights were loaded")

    lm = source()
    features = Features(Pretrained("tiny", lm.config, lm.tokenizer, load))
    with pytest.raises(DataError, match="1 of the 2 samples"):
        evaluate_texts([Sample("", "a"), Sample("", "b", "c")], features=features)
    with pytest.raises(DataError, match="fewer than 2"):
        evaluate_texts([Sample("", "a", "b")], features=features)


def test_nothing_to_measure_is_refused():
    with pytest.raises(DataError, match="no text"):
        evaluate_texts([])


def test_a_tokenizer_without_a_first_token_is_refused(source):
    lm = source()
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="beginning-of-text"):
        Judge(lm)


def test_models_that_cannot_judge_are_refused_without_their_weights(saved_tiny_lm, tmp_path):
    where = {"device": "cpu", "dtype": "float32"}
    folder = saved_tiny_lm()
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match="holds no"):
        pretrained(str(folder), causal=True, **where)
    small = saved_tiny_lm(vocab_size=100)
    with pytest.raises(ConfigError, match="260 tokens and the model 100"):
        pretrained(str(small), causal=True, **where)
    with pytest.raises(ConfigError, match="no folder"):
        pretrained(str(tmp_path / "missing"), causal=True, **where)
    with pytest.raises(ConfigError, match="tokenizer"):
        open_tokenizer(str(tmp_path))


def test_a_judge_without_a_head_of_its_own_is_refused(saved_tiny_lm):
    folder = saved_tiny_lm(tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    judge = pretrained(str(folder), causal=True, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"lacks the weights \['lm_head.weight'\]"):
        judge.model  # noqa: B018 -- loads
    assert pretrained(str(folder), causal=False, device="cpu", dtype="float32").model is not None


def test_a_diffusion_model_is_no_judge(saved_tiny_lm, tmp_path):
    (tmp_path / "l2d.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a diffusion model"):
        pretrained(str(tmp_path), causal=True, device="cpu", dtype="float32")


def test_a_token_that_the_model_lacks_is_refused(source):
    lm = source(vocab_size=100)
    with pytest.raises(ConfigError, match="only 100 tokens"):
        Judge(lm).judge([Sample("", "é")], untracked)


def test_a_model_from_a_folder_judges_as_the_one_in_memory(source, saved_tiny_lm):
    saved = pretrained(str(saved_tiny_lm("gpt2")), causal=True, device="cpu", dtype="float32")
    here, there = (Judge(lm).judge(SAMPLES, untracked).nll for lm in (source("gpt2"), saved))
    np.testing.assert_allclose(here, there, rtol=1e-5)
