"""The generation loop: what a request's answer depends on, what it costs, and when it ends."""

import pytest
import torch
import toy_components as toys
from diffusion_models import PROVEN, diffusion_lm, fresh_lm, random_tokens, shared_lm
from tiny_models import tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from l2d_framework.errors import ConfigError, EvaluationBudgetError, L2DError
from l2d_framework.generation.prompts import Encoded, encode_prompts, pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.parametrizations.embedding import EmbeddingConfig
from l2d_plugins.schedules.linear import Linear

PROMPTS = [[9, 30, 71, 100, 42, 17, 201], [55, 44], [120, 9, 8, 7], [55, 44, 200, 13, 99]]
"""Unequal lengths, so that a batch is padded."""

families = pytest.mark.parametrize("family", PROVEN)


def run(model, prompts, **options):
    """Answers as lists, with the read-out logits of every token of a batch that ends together."""
    read_out = []
    options = {"max_new_tokens": 4, "num_inference_steps": 5, "eos_token_id": None, **options}
    encoded = prompts if isinstance(prompts, Encoded) else pad_left(prompts)
    found = model.generate(encoded, observer=lambda e: read_out.append(e.logits) if e.is_read_out else None, **options)
    return found, torch.cat(read_out, 1) if read_out and len({len(part) for part in read_out}) == 1 else None


def answers(model, prompts, **options):
    return run(model, prompts, **options)[0].answers.tolist()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@families
def test_without_steps_the_answer_is_the_language_models_own(family):
    model, batch = shared_lm(family), pad_left(PROMPTS)
    lm = model.backbone.lm
    wanted = lm.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=6, do_sample=False, eos_token_id=99
    )
    found, _ = run(model, batch, num_inference_steps=0, max_new_tokens=6, eos_token_id=99)
    assert torch.equal(found.sequences, wanted)
    assert not found.evaluations.any()


@families
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_batch_is_its_requests_one_by_one(family, variant):
    model = shared_lm(family, variant=variant, classes=("a", "b"))
    options = {"guidance": [ClassifierFree(scale=1.5)]}
    classes = ["a", None, "b", "a"]
    together, logits = run(model, PROMPTS, classes=classes, **options)
    for row, prompt in enumerate(PROMPTS):
        alone, single = run(model, [prompt], classes=classes[row : row + 1], **options)
        assert torch.equal(together.answers[row], alone.answers[0])
        assert torch.equal(together.evaluations[row], alone.evaluations[0])
        close(logits[row], single[0])


def test_noise_does_change_the_logits_that_batching_does_not():
    model = shared_lm()
    assert (run(model, PROMPTS)[1] - run(model, PROMPTS, seed=1)[1]).abs().max() > 0.1


def test_the_order_of_requests_and_their_padding_change_nothing():
    model, order = shared_lm(), [2, 0, 3, 1]
    first = answers(model, PROMPTS, do_sample=True)
    assert answers(model, [PROMPTS[i] for i in order], do_sample=True) == [first[i] for i in order]
    batch = pad_left(PROMPTS)
    wider = Encoded(
        torch.nn.functional.pad(batch.input_ids, (3, 0), value=77),
        torch.nn.functional.pad(batch.attention_mask, (3, 0)),
    )
    assert answers(model, wider, do_sample=True) == first


def test_equal_prompts_get_noise_of_their_own():
    model, prompt = shared_lm(), PROMPTS[0]
    logits = run(model, [prompt, prompt, prompt])[1]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert (logits[1] - logits[2]).abs().max() > 0.1
    close(logits[:1], run(model, [prompt])[1])


def test_requests_that_are_named_alike_get_the_same_noise():
    model, prompt = shared_lm(), PROMPTS[0]
    found = answers(model, pad_left([prompt, prompt, PROMPTS[1]], ["x", "x", "y"]))
    assert found[0] == found[1]
    assert answers(model, pad_left([prompt], ["other"])) != found[:1]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_inference_steps": 0, "do_sample": True}])
def test_the_seed_decides_and_the_global_generator_does_not(options):
    model = shared_lm()
    torch.manual_seed(1)
    first = answers(model, PROMPTS, **options)
    torch.manual_seed(2)
    assert answers(model, PROMPTS, **options) == first
    assert answers(model, PROMPTS, seed=5, **options) != first


def test_greedy_tokens_of_the_plain_language_model_need_no_seed():
    model = shared_lm()
    assert answers(model, PROMPTS, num_inference_steps=0, seed=1) == answers(model, PROMPTS, num_inference_steps=0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_several_answers_share_the_prompt_and_the_first_is_the_only_one_of_a_single(do_sample):
    model, read = shared_lm(), []
    handle = model.backbone.main.layers[0].register_forward_hook(lambda m, a, out: read.append(a[0].shape))
    try:
        many = answers(model, PROMPTS, num_return_sequences=3, do_sample=do_sample)
    finally:
        handle.remove()
    assert read[0][:2] == (len(PROMPTS), 7)
    assert answers(model, PROMPTS, do_sample=do_sample) == many[::3]
    assert answers(model, PROMPTS[2:3], num_return_sequences=3, do_sample=do_sample) == many[6:9]
    assert len({tuple(answer) for answer in many[:3]}) == 3


SOLVERS = [
    ("euler", 4),
    ("midpoint", 5),
    ("heun", 5),
    ("rk4", 9),
    ("euler", 1),
    ("midpoint", 1),
]


@pytest.mark.parametrize(("solver", "steps"), SOLVERS)
def test_fixed_solvers_make_exactly_the_evaluations_they_were_given(solver, steps):
    model, seen = shared_lm(), []
    how = {"solver": solver, "num_inference_steps": steps, "max_new_tokens": 3, "eos_token_id": None}
    found = model.generate(pad_left(PROMPTS), observer=seen.append, **how)
    assert (found.evaluations == steps).all()
    assert len(seen) == 3 * steps
    assert sum(e.is_read_out for e in seen) == 3
    times = [float(e.t[0, 0]) for e in seen[:steps]]
    # With a single evaluation there is nothing to move: the prior is read out.
    assert times[0] == 0
    assert times == sorted(times)
    if steps > 1:
        assert times[-1] == (1 - 1 / model.parametrization.prior_scale if solver in ("heun", "rk4") else 1.0)


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_adaptive_solvers_treat_each_row_as_if_it_were_alone(solver):
    model = shared_lm()
    how = {"name": solver, "rtol": 1e-3, "atol": 1e-3}
    options = {"solver": how, "num_inference_steps": None, "max_new_tokens": 3, "estimate": {"mode": "average"}}
    together, _ = run(model, PROMPTS, **options)
    assert len(together.evaluations.unique()) > 1
    for row, prompt in enumerate(PROMPTS):
        alone, _ = run(model, [prompt], **options)
        assert torch.equal(together.answers[row], alone.answers[0])
        assert torch.equal(together.evaluations[row], alone.evaluations[0])


def test_evaluations_of_adaptive_solvers_are_those_the_network_made():
    model, seen = shared_lm(), []
    options = {"solver": {"name": "bosh3", "rtol": 0.05, "atol": 0.05}, "num_inference_steps": None}
    found = model.generate(pad_left(PROMPTS[:1]), max_new_tokens=2, observer=seen.append, **options)
    assert int(found.evaluations.sum()) == len(seen)


def test_an_adaptive_solver_does_not_mistake_drawn_estimates_for_errors_of_its_own():
    drawn = {"mode": "sample", "temperature": {"name": "constant"}}
    how = {"solver": {"name": "bosh3", "rtol": 0.01, "atol": 0.01}, "max_new_tokens": 2}
    # Were they drawn anew at every evaluation, it would take more than a hundred.
    run(shared_lm(), PROMPTS, estimate=drawn, num_inference_steps=90, **how)


def test_an_adaptive_solver_stops_at_its_budget():
    with pytest.raises(EvaluationBudgetError, match="may use 6 evaluations"):
        run(shared_lm(), PROMPTS, solver={"name": "bosh3", "rtol": 1e-7, "atol": 1e-7}, num_inference_steps=6)


def test_no_evaluation_is_spent_on_padding_or_on_answers_that_have_ended():
    model, sizes = shared_lm(), []
    ends = {int(token) for token in run(model, PROMPTS)[0].answers[[0, 2], 0]}
    found = model.generate(
        pad_left(PROMPTS),
        num_inference_steps=5,
        max_new_tokens=4,
        eos_token_id=sorted(ends),
        observer=lambda e: sizes.append(len(e.t)),
    )
    assert 1 in found.lengths
    answered = torch.arange(found.answers.shape[1]) < found.lengths[:, None]
    assert sizes == [int(going) for going in answered.sum(0) for _ in range(5)]
    assert torch.equal(found.evaluations, 5 * answered)
    assert (found.answers[~answered] == 0).all()


def test_an_answer_ends_with_its_end_token_and_is_what_it_is_without_batch_mates():
    model = shared_lm()
    free = run(model, PROMPTS)[0].answers
    end = int(free[1, 1])
    ended, _ = run(model, PROMPTS, eos_token_id=end)
    for row, tokens in enumerate(free.tolist()):
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert int(ended.lengths[row]) == length
        assert ended.answers[row, :length].tolist() == tokens[:length]


def test_generation_stops_when_every_answer_has_ended():
    model = shared_lm()
    first = run(model, PROMPTS)[0].answers[:, 0].tolist()
    found, _ = run(model, PROMPTS, eos_token_id=first, max_new_tokens=50)
    assert found.answers.shape == (4, 1)


def test_guidance_at_scale_one_is_conditional_generation():
    model, classes = shared_lm(classes=("a", "b")), ["a", "b", "a", "b"]
    plain, logits = run(model, PROMPTS, classes=classes, guidance=[])
    guided, same = run(model, PROMPTS, classes=classes, guidance_scale=1.0)
    assert torch.equal(guided.sequences, plain.sequences)
    assert torch.equal(same, logits)
    assert (run(model, PROMPTS, classes=classes, guidance_scale=3.0)[1] - logits).abs().max() > 1e-2
    assert (run(model, PROMPTS, guidance=[])[1] - logits).abs().max() > 1e-2


def test_each_request_is_guided_by_its_own_scale():
    model, classes = shared_lm(classes=("a", "b")), ["a", "b", None, "b"]
    scales = [1.0, 2.5, 4.0, 0.0]
    together, logits = run(model, PROMPTS, classes=classes, guidance_scale=scales)
    for row, (prompt, scale) in enumerate(zip(PROMPTS, scales, strict=True)):
        alone, single = run(model, [prompt], classes=classes[row : row + 1], guidance_scale=scale)
        assert torch.equal(together.answers[row], alone.answers[0])
        close(logits[row], single[0])


def test_guidance_in_one_pass_is_guidance_in_two(monkeypatch):
    model, classes = shared_lm(classes=("a", "b")), ["a", "b", "a", "b"]
    _, logits = run(model, PROMPTS, classes=classes, guidance_scale=2.0)
    monkeypatch.setattr(type(model), "together", lambda self, queries: [self(query) for query in queries])
    close(run(model, PROMPTS, classes=classes, guidance_scale=2.0)[1], logits)


def test_logits_processors_and_criteria_of_transformers_are_heard():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    found, _ = run(
        shared_lm(),
        PROMPTS,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([AtLength()]),
    )
    assert found.answers.tolist() == [[5] * 3] * 4


def test_options_of_transformers_reach_the_final_logits():
    model = shared_lm()
    plain = answers(model, PROMPTS)
    banned = [[token] for answer in plain for token in answer]
    found = answers(model, PROMPTS, bad_words_ids=banned)
    assert not {token for answer in found for token in answer} & {token for (token,) in banned}
    config = GenerationConfig(max_new_tokens=2, do_sample=True, top_k=1)
    assert model.generate(pad_left(PROMPTS), generation_config=config, num_inference_steps=5).answers.tolist() == [
        answer[:2] for answer in plain
    ]
    assert config.max_new_tokens == 2
    assert config.do_sample


def test_what_a_generation_config_leaves_open_is_the_models_and_an_explicit_none_stays_none():
    model, how = diffusion_lm(), {"num_inference_steps": 3}
    free = model.generate(pad_left(PROMPTS[:1]), max_new_tokens=4, eos_token_id=None, **how).answers
    model.backbone.lm.generation_config.eos_token_id = int(free[0, 0])
    config = GenerationConfig(max_new_tokens=4)
    assert model.generate(pad_left(PROMPTS[:1]), generation_config=config, **how).answers.shape == (1, 1)
    found = model.generate(pad_left(PROMPTS[:1]), generation_config=config, eos_token_id=None, **how)
    assert torch.equal(found.answers, free)


def test_drawn_tokens_follow_the_last_logits():
    model, count = fresh_lm(), 400
    found = model.generate(
        torch.tensor([PROMPTS[0]]),
        num_inference_steps=1,
        max_new_tokens=1,
        do_sample=True,
        top_k=3,
        num_return_sequences=count,
        end_time=0.5,
    )
    with torch.no_grad():
        logits = model.backbone.lm(torch.tensor([PROMPTS[0]])).logits[0, -1]
    weights, tokens = logits.topk(3)
    share = (found.answers == tokens).float().mean(0)
    torch.testing.assert_close(share, weights.softmax(-1), rtol=0, atol=0.1)


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end():
    got = []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value.flatten().tolist())

        def end(self):
            got.append("end")

    model = shared_lm()
    found, _ = run(model, PROMPTS[:1], streamer=Streamer())
    assert got == [PROMPTS[0], *([token] for token in found.answers[0].tolist()), "end"]


class Letters(LogitsProcessor):
    """Leaves the letters from a to h."""

    def __init__(self, tokenizer):
        self.allowed = torch.tensor(tokenizer("abcdefgh")["input_ids"])

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, self.allowed, scores[:, self.allowed])


def test_stop_strings_end_an_answer():
    model = diffusion_lm(tokenizer=True)
    texts, letters = ["Hello", "A longer prompt."], LogitsProcessorList([Letters(model.tokenizer)])
    options = {"max_new_tokens": 8, "num_inference_steps": 3, "logits_processor": letters}
    free = [model.tokenizer.decode(answer) for answer in model.generate(texts, **options).answers]
    stop = free[0][2:4]
    found = model.generate(texts, stop_strings=[stop], **options)
    for text, answer, length in zip(free, found.answers, found.lengths.tolist(), strict=True):
        wanted = text[: text.index(stop) + len(stop)] if stop in text else text
        assert model.tokenizer.decode(answer[:length]) == wanted
    assert int(found.lengths[0]) < 8


def test_the_answer_length_defaults_to_the_papers_and_the_models_own_config_wins(tiny_lm):
    lm = tiny_lm("llama", max_position_embeddings=512)
    model = fresh_lm(lm)
    assert model.generate(torch.tensor([[5, 6]]), num_inference_steps=0, eos_token_id=None).answers.shape == (1, 256)
    lm.generation_config.max_new_tokens = 3
    assert model.generate(torch.tensor([[5, 6]]), num_inference_steps=0).answers.shape == (1, 3)


def test_blocks_of_several_tokens_go_through_the_same_loop(tiny_lm):
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = EmbeddingConfig(size=8, hidden=8, prior_scale=8.0).build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None).eval()
    options = {"max_new_tokens": 5, "num_inference_steps": 5, "eos_token_id": None}
    seen = []
    together = model.generate(pad_left(PROMPTS[:3]), observer=seen.append, **options)
    assert [tuple(e.t.shape) for e in seen] == [(3, 5)] * 5
    # Every token starts from noise of its own.
    assert len(seen[0].x.flatten(0, 1).unique(dim=0)) == 15
    assert (together.evaluations == 5).all()
    for row, prompt in enumerate(PROMPTS[:3]):
        assert torch.equal(model.generate(torch.tensor([prompt]), **options).answers[0], together.answers[row])
    model.block_size = 2
    seen.clear()
    model.generate(pad_left(PROMPTS[:3]), observer=seen.append, **options)
    assert [e.t.shape[1] for e in seen] == [2] * 10 + [1] * 5


def test_tokens_after_the_end_inside_a_block_are_padding(tiny_lm):
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = EmbeddingConfig(size=8, hidden=8, prior_scale=8.0).build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None).eval()
    free = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, num_inference_steps=5, eos_token_id=None)
    end = int(free.answers[0, 2])
    found = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, num_inference_steps=5, eos_token_id=end)
    length = free.answers[0].tolist().index(end) + 1
    assert found.answers[0, :length].tolist() == free.answers[0, :length].tolist()
    assert found.lengths.tolist() == [length]
    assert not found.answers[0, length:].any()
    assert found.evaluations[0].tolist() == [5] * length + [0] * (found.answers.shape[1] - length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_step": 3}, "Unknown option num_inference_step=3; did you mean 'num_inference_steps'"),
        ({"max_new_token": 3}, "Unknown option max_new_token=3; did you mean 'max_new_tokens'"),
        ({"num_inference_steps": 4}, "num_inference_steps=4. Use 3 or 5"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"num_inference_steps": None}, "needs a number, got None"),
        ({"solver": "eulr"}, "did you mean 'euler'"),
        ({"solver": {"name": "euler", "step": 1}}, "solver.step"),
        ({"solver": "heun", "end_time": 1.0}, "singular at 1. Leave end_time out"),
        ({"guidance": [{"name": "classifier_free", "scale": 2.0}]}, "scale 2 needs a model trained with class labels"),
        ({"guidance_scale": 2.0}, "needs a model trained with class labels"),
        ({"guidance_scale": 2.0, "guidance": []}, "needs exactly one guidance; 0 are set"),
        ({"estimate": {"mod": "average"}}, "estimate.mod"),
        ({"preset": "l2d-papr"}, "did you mean 'l2d-paper'"),
        ({"classes": ["math"] * 4}, "trained without classes, got the class 'math'"),
        ({"stop_strings": ["x"]}, r"stop_strings=\['x'\] needs a tokenizer"),
        ({"max_new_tokens": 125}, "Prompt 0 has 7 tokens and with its answer would reach 132, but .* context is 128"),
    ],
)
def test_what_cannot_be_is_refused_before_the_network_runs(options, message):
    model, calls = shared_lm(), []
    handle = model.backbone.lm.register_forward_pre_hook(lambda *a: calls.append(1))
    try:
        with pytest.raises(L2DError, match=message):
            model.generate(pad_left(PROMPTS), **{"max_new_tokens": 4, **options})
    finally:
        handle.remove()
    assert not calls


def test_zero_steps_are_refused_for_a_network_that_does_not_contain_the_language_model(tiny_lm):
    torch.manual_seed(0)
    network = toys.Canvas().build(tiny_lm())
    space = EmbeddingConfig(size=8, hidden=8).build(network.vocab_size, network.hidden_size)
    model = DiffusionLM(Linear(), space, network, None)
    with pytest.raises(ConfigError, match="plain language model, which CanvasNetwork does not contain"):
        model.generate(torch.tensor(PROMPTS[:1]), num_inference_steps=0, max_new_tokens=2)


def test_gradients_are_not_recorded():
    found, logits = run(shared_lm(), random_tokens(1, 4).tolist(), max_new_tokens=1)
    assert not logits.requires_grad
    assert found.prompt_length == 4


class OnlyOne(LogitsProcessor):
    """Allows one token per row, by the row's place in the batch, as transformers' prefix-constrained search does."""

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        rows = torch.arange(len(scores))
        allowed[rows, 10 + rows] = 0
        return scores + allowed


def test_processors_know_a_row_by_its_place_after_others_have_ended():
    options = {"logits_processor": LogitsProcessorList([OnlyOne()]), "eos_token_id": 10, "pad_token_id": 0}
    assert answers(shared_lm(), PROMPTS[:3], **options) == [[10, 0, 0, 0], [11] * 4, [12] * 4]


def test_a_repetition_penalty_serves_rows_that_end_at_different_times():
    model = shared_lm()
    plain = answers(model, PROMPTS)
    options = {"repetition_penalty": 1.3, "eos_token_id": plain[0][0], "num_return_sequences": 2, "do_sample": True}
    assert len(answers(model, PROMPTS, **options)) == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a"], "guidance_scale": 2.0}, "one value per prompt: got 1 for 4"),
        ({"classes": ["a"] * 4, "guidance_scale": [1.5]}, "one value per prompt: got 1 for 4"),
        ({"guidance_scale": 2.0}, "Give the class of each prompt"),
        ({"guidance_scale": [1.0, 1.0, 2.0, 1.0]}, "Give the class of each prompt"),
        ({"num_beams": 3}, "there is no beam search"),
        ({"max_length": 30, "max_new_tokens": None}, "Set max_new_tokens instead"),
        ({"streamer": BaseStreamer()}, "A streamer takes one answer, got 4 prompts"),
        ({"guidance": [ClassifierFree(scale=2.0), ClassifierFree()], "classes": ["a"] * 4}, "Put it last"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(shared_lm(classes=("a", "b")), PROMPTS, **options)


def test_there_must_be_a_prompt():
    with pytest.raises(ConfigError, match="no prompt"):
        encode_prompts(tiny_tokenizer(), [])
