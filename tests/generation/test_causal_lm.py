"""A diffusion model with the interface of transformers' causal models."""

import itertools

import pytest
import torch
from diffusion_models import diffusion_lm, random_tokens, shared_lm, shared_tess, tess_lm
from tiny_models import tiny_lm
from transformers import pipeline

from l2d_framework.errors import ConfigError
from l2d_framework.generation.causal_lm import DiffusionForCausalLM

FEW = {"num_inference_steps": 5, "seed": 3}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_greedy_tokens_are_those_of_the_diffusion_model(family):
    lm, ids = shared_lm(family), random_tokens(3, 6)
    face = lm.as_transformers(**FEW)
    assert torch.equal(face.generate(ids, **GREEDY), lm.generate(ids, **FEW, **GREEDY).sequences)
    other = lm.as_transformers(num_inference_steps=5, seed=4).generate(ids, **GREEDY)
    assert not torch.equal(other, face.generate(ids, **GREEDY))


def test_equal_rows_are_samples_of_one_request():
    lm, ids = shared_lm(), random_tokens(2, 6)
    samples = lm.generate(ids, num_return_sequences=3, **FEW, **GREEDY).sequences
    assert torch.equal(lm.as_transformers(**FEW).generate(ids.repeat_interleave(3, 0), **GREEDY), samples)


def test_padding_and_batch_mates_change_nothing():
    lm, face = shared_lm(), shared_lm().as_transformers(**FEW)
    short, long = random_tokens(1, 4), random_tokens(1, 7, seed=1)
    ids = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1), long])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    together = face.generate(ids, attention_mask=mask, **GREEDY)
    for row, alone in zip(together, (short, long), strict=True):
        assert torch.equal(row[7:], lm.generate(alone, **FEW, **GREEDY).answers[0])


@pytest.mark.parametrize("search", [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}])
def test_without_steps_it_is_the_language_model_bit_for_bit(search):
    lm, ids = shared_lm(), random_tokens(2, 6)
    face, base = lm.as_transformers(num_inference_steps=0), lm.backbone.lm
    assert torch.equal(face(ids).logits, base(ids).logits)
    assert torch.equal(face.generate(ids, **GREEDY, **search), base.generate(ids, **GREEDY, **search))


def test_without_steps_sampling_draws_as_the_language_model_does():
    lm, ids = shared_lm(), random_tokens(2, 6)
    found = []
    for model in (lm.as_transformers(num_inference_steps=0), lm.backbone.lm):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(model.generate(ids, max_new_tokens=6, do_sample=True, num_beams=3))
    assert torch.equal(*found)


def test_logits_of_a_prompt_are_those_met_while_generating():
    face, ids = shared_lm().as_transformers(**FEW), random_tokens(2, 6)
    named = {"request_keys": ["a", "b"]}
    whole = face(ids, **named).logits
    assert whole.shape == (2, 6, 260)
    first = face(ids[:, :4], **named, logits_to_keep=2)
    rest = face(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole[:, 2:], atol=1e-4)
    assert not torch.allclose(face(ids, request_keys=["c", "d"]).logits, whole, atol=1e-2)


def test_beam_search_finds_the_likeliest_answer_under_one_noise():
    lm = diffusion_lm(tiny_lm("llama", vocab_size=8, eos_token_id=None, pad_token_id=0, bos_token_id=None))
    face, prompt = lm.as_transformers(**FEW), torch.tensor([[1, 2, 3]])
    answers = torch.tensor(list(itertools.product(range(8), repeat=2)))
    texts = torch.cat([prompt.expand(len(answers), -1), answers], 1)
    logits = torch.cat([face(text[None, :-1], request_keys=["a"]).logits[:, 2:] for text in texts])
    scores = logits.log_softmax(-1).gather(2, answers[..., None]).sum((1, 2))
    found = face.generate(
        prompt, num_beams=8, max_new_tokens=2, do_sample=False, length_penalty=0.0, num_return_sequences=8,
        request_keys=["a"], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    best = scores.topk(8)
    assert torch.equal(found.sequences[:, 3:], answers[best.indices])
    assert torch.allclose(found.sequences_scores, best.values, atol=1e-4)


def test_the_pipeline_generates(caplog):
    lm = shared_lm(tokenizer=True)
    made = pipeline("text-generation", model=lm.as_transformers(**FEW), tokenizer=lm.tokenizer)
    found = made("2+2=", **GREEDY, return_full_text=False)[0]["generated_text"]
    assert found == lm.tokenizer.decode(lm.generate("2+2=", **FEW, **GREEDY).answers[0], skip_special_tokens=True)
    assert "not supported" not in caplog.text


def test_it_shares_weights_and_cannot_be_saved(tmp_path):
    lm = shared_lm()
    face = lm.as_transformers(num_inference_steps=0)
    assert isinstance(face, DiffusionForCausalLM) and type(face).__name__ == type(lm.backbone.lm).__name__
    assert face.get_input_embeddings() is lm.backbone.lm.get_input_embeddings()
    with pytest.raises(ConfigError, match=r"l2d_framework\.save"):
        face.save_pretrained(tmp_path)


def test_classes_and_guidance_reach_the_model():
    lm, ids = diffusion_lm(classes=("math", "code")), random_tokens(2, 6)
    options = {**FEW, "guidance": ["classifier_free"]}
    face = lm.as_transformers(class_name="code", guidance_scale=2.0, **options)
    wanted = lm.generate(ids, classes=["code"] * 2, guidance_scale=2.0, **options, **GREEDY).sequences
    assert torch.equal(face.generate(ids, **GREEDY), wanted)
    with pytest.raises(ConfigError, match="Unknown class"):
        lm.as_transformers(class_name="cod")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shared_tess().as_transformers(), "one token per block"),
        (lambda: tess_lm(block_size=1).as_transformers(), "each asked about by itself"),
        (lambda: shared_lm().as_transformers(block_size=4), "block_size=4"),
        (lambda: shared_lm().as_transformers()(random_tokens(3, 4), request_keys=["a", "b"]), "2 for 3 rows"),
        (
            lambda: shared_lm().as_transformers()(
                random_tokens(1, 4), torch.tensor([[1, 1, 1, 0]]), logits_to_keep=1
            ),
            "on the left",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
