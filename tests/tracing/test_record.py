"""What is remembered of every evaluation."""

import json

import numpy as np
import pytest
import torch
from diffusion_models import shared_lm
from tracing_scenes import PROMPT, block, evaluation, record

from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import pad_left
from l2d_framework.tracing import Recorder, Trace, maps


def probabilities(evaluations):
    return torch.cat([one.logits[0].double().softmax(-1) for one in evaluations])


def same(left: Trace, right: Trace) -> bool:
    return json.dumps(left.to_json()) == json.dumps(right.to_json())


def test_probabilities_are_the_softmax_of_the_logits_sorted():
    evaluations = block(4, 6, 40)
    trace, wanted = record(evaluations, top=7), probabilities(evaluations)
    ids = torch.from_numpy(trace.ids)
    torch.testing.assert_close(torch.from_numpy(trace.probabilities).double(), wanted.gather(1, ids), rtol=1e-5, atol=0)
    assert torch.equal(ids, wanted.float().topk(7).indices)


def test_entropy_and_divergence_are_sums_over_the_vocabulary_in_nats():
    evaluations = block(2, 3, 11)
    trace, p = record(evaluations), probabilities(evaluations)
    torch.testing.assert_close(torch.from_numpy(trace.entropy).double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert np.isnan(trace.kl[:3]).all()
    wanted = (p[3:] * (p[3:] / p[:3]).log()).sum(-1)
    torch.testing.assert_close(torch.from_numpy(trace.kl[3:]).double(), wanted, rtol=1e-4, atol=1e-6)


def test_divergence_is_zero_between_equal_evaluations_and_never_negative():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    equal = record([evaluation(logits), evaluation(logits), evaluation(logits + 1e-4, is_read_out=True)])
    assert (equal.kl[4:8] == 0).all()
    assert (equal.kl[8:] >= 0).all() and (equal.kl[8:] < 1e-6).all()
    assert (record(block(5, 4, 300)).kl[4:] > 0).all()


def test_impossible_tokens_add_nothing():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    trace = record([evaluation(logits), evaluation(logits, is_read_out=True)])
    np.testing.assert_allclose(trace.entropy, np.log(2), rtol=1e-6)
    assert trace.kl[1] == 0


def test_at_a_greedy_read_out_the_final_token_is_as_probable_as_the_confidence():
    for memory in (2**29, 0):
        trace = record(block(5, 6, 400), memory=memory)
        found = trace.is_read_out
        assert found.sum() == 6
        assert (trace.final[found] == trace.probabilities[found, 0]).all()
        assert not trace.is_bound[found].any()


def test_the_final_token_is_followed_through_every_evaluation():
    evaluations = block(6, 5, 400)
    answer = [7, 300, 21, 399, 0]
    trace = record(evaluations, answer)
    wanted = probabilities(evaluations)[torch.arange(30), torch.tensor(answer * 6)]
    torch.testing.assert_close(torch.from_numpy(trace.final).double(), wanted, rtol=1e-2, atol=1e-7)
    assert not trace.is_bound.any()


def test_without_memory_the_final_probability_is_exact_among_the_likeliest_and_a_bound_elsewhere():
    evaluations = block(6, 5, 400)
    answer = [7, 300, 21, 399, 0]
    full, tight = record(evaluations, answer), record(evaluations, answer, memory=0)
    p = probabilities(evaluations)
    ranks = (p > p[torch.arange(30), torch.tensor(answer * 6)][:, None]).sum(1).numpy()
    assert (tight.is_bound == (ranks >= 256)).all()
    assert 0 < tight.is_bound.sum() < 30
    exact = ~tight.is_bound
    np.testing.assert_allclose(tight.final[exact], full.final[exact], rtol=1e-2)
    assert (tight.final[~exact] >= full.final[~exact]).all()


def test_a_canvas_in_parts_is_the_canvas_in_one(monkeypatch):
    evaluations = block(3, 7, 50)
    whole = record(evaluations)
    monkeypatch.setattr("l2d_framework.tracing.record._CHUNK", 100)
    assert same(whole, record(evaluations))


def test_tokens_behind_the_end_are_the_likeliest_of_the_last_evaluation():
    evaluations = block(4, 6, 40)
    trace = record(evaluations, [5, 2])
    assert trace.length == len(PROMPT) + 2
    assert trace.tokens == [*PROMPT, 5, 2, *evaluations[-1].logits[0, 2:].argmax(-1).tolist()]
    assert trace.is_predicted.tolist() == [False] * 3 + [True] * 6


def test_json_survives_a_round_trip():
    trace = record(block(3, 4, 30))
    again = Trace.from_json(json.loads(json.dumps(trace.to_json(), allow_nan=False)))
    assert same(trace, again)
    for name in ("evaluation", "position", "ids", "is_bound", "is_read_out"):
        assert (getattr(trace, name) == getattr(again, name)).all()
    np.testing.assert_allclose(trace.kl, again.kl, rtol=1e-5)
    np.testing.assert_allclose(trace.probabilities, again.probabilities, rtol=1e-5)


def test_several_answers_at_once_and_no_evaluation_are_refused():
    recorder = Recorder()
    with pytest.raises(ConfigError, match="at least 1 step"):
        recorder.finish([1, 2])
    one = evaluation(torch.zeros(2, 5))
    two = type(one)(
        *(value.repeat(2, *[1] * (value.ndim - 1)) for value in (one.positions, one.t, one.x, one.logits)), False
    )
    with pytest.raises(ConfigError, match="one answer, got 2"):
        recorder(two)
    with pytest.raises(ConfigError, match=r"top must be at least 2, .* got 1"):
        Recorder(top=1)


@pytest.mark.parametrize("options", [{"num_inference_steps": 5}, {"preset": "l2d-adaptive"}], ids=["fixed", "adaptive"])
def test_a_trace_of_l2d_counts_what_generation_counts(options):
    model, recorder = shared_lm(), Recorder()
    found = model.generate(
        pad_left([[9, 30, 71, 100]]), observer=recorder, max_new_tokens=5, eos_token_id=None, **options
    )
    trace = recorder.finish(found.sequences[0].tolist())
    assert trace.tokens == found.sequences[0].tolist()
    counts = np.bincount(trace.position, minlength=9)
    assert counts.tolist() == [0] * 4 + found.evaluations[0].tolist()
    last = trace.is_read_out
    assert trace.position[last].tolist() == [4, 5, 6, 7, 8]
    assert (trace.final[last] == trace.probabilities[last, 0]).all()
    # Every token starts anew: nothing is compared across positions.
    arranged = maps(trace)
    assert np.isnan(arranged.kl[0, 4:]).all()
    assert (arranged.kl[1, 4:] >= 0).all()
    assert not recorder._before
