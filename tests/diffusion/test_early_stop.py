"""Early stop: a row ends once its tokens have not changed for a while, whatever its batch mates do."""

import pytest
import torch
from diffusion_models import random_tokens, shared_lm, shared_tess

from l2d_framework.diffusion import ode
from l2d_framework.diffusion.diffusion import Diffusion
from l2d_framework.diffusion.early_stop import EarlyStop, Settled
from l2d_framework.diffusion.logits import Logits
from l2d_framework.errors import ConfigError
from l2d_framework.generation.prompts import pad_left

PROMPTS = [random_tokens(1, 3 + row % 3, seed=row)[0].tolist() for row in range(8)]
OPTIONS = {"max_new_tokens": 2, "num_inference_steps": 14, "eos_token_id": None, "solver": "renoise"}


def generated(prompts, **options):
    return shared_tess().generate(pad_left(prompts), **{**OPTIONS, **options})


def tokens_of_every_evaluation(model, prompts, **options):
    """(evaluations, B, L)."""
    seen = []
    model.generate(pad_left(prompts), observer=lambda e: seen.append(e.logits.argmax(-1)), **{**OPTIONS, **options})
    return torch.stack(seen)


def first_settled(tokens, patience):
    """Evaluation, from 0, after which a row's tokens (evaluations, L) have been the same for `patience` more."""
    unchanged = 0
    for number in range(1, len(tokens)):
        unchanged = unchanged + 1 if torch.equal(tokens[number], tokens[number - 1]) else 0
        if unchanged >= patience:
            return number
    return len(tokens) - 1


@pytest.mark.parametrize("estimate", [{"mode": "argmax"}, {"mode": "nucleus", "top_p": 0.9}])
@pytest.mark.parametrize("patience", [1, 2])
def test_a_row_answers_what_it_said_when_it_settled_and_costs_no_more(patience, estimate):
    tokens = tokens_of_every_evaluation(shared_tess(), PROMPTS, estimate=estimate)
    found = generated(PROMPTS, estimate=estimate, patience=patience)
    ends = [first_settled(tokens[:, row], patience) for row in range(len(PROMPTS))]
    assert len(set(ends)) > 1, "the rows should settle at different times"
    for row, end in enumerate(ends):
        assert torch.equal(found.answers[row], tokens[end, row])
        assert found.evaluations[row].tolist() == [end + 1] * 2


@pytest.mark.parametrize("limit", [1, 6 * 2 * 260, 10**6])
@pytest.mark.parametrize(
    "options", [{}, {"estimate": {"mode": "average"}}, {"solver": "midpoint", "num_inference_steps": 13}], ids=str
)
def test_a_row_that_has_settled_is_asked_of_the_network_no_more(options, limit, monkeypatch):
    monkeypatch.setattr(ode, "CHUNK", limit)
    asked, run = [], Diffusion.features
    with monkeypatch.context() as patch:
        patch.setattr(Diffusion, "features", lambda self, query: asked.append(len(query.t)) or run(self, query))
        found = generated(PROMPTS, patience=1, **options)
    spent = found.evaluations[:, 0]
    assert asked == [int((spent > number).sum()) for number in range(int(spent.max()))]
    assert asked[-1] < len(PROMPTS)
    watched = generated(PROMPTS, patience=1, observer=lambda _: None, **options)
    assert torch.equal(found.answers, watched.answers)
    assert torch.equal(found.evaluations, watched.evaluations)


@pytest.mark.parametrize("patience", [1, 3])
def test_a_row_settles_alike_alone_and_beside_others(patience):
    together = generated(PROMPTS, patience=patience)
    for row, prompt in enumerate(PROMPTS):
        alone = generated([prompt], patience=patience)
        assert torch.equal(alone.answers[0], together.answers[row])
        assert torch.equal(alone.evaluations[0], together.evaluations[row])


def test_nothing_is_evaluated_once_every_row_has_settled():
    seen = []
    found = generated(PROMPTS[:3], patience=1, observer=seen.append)
    assert len(seen) == int(found.evaluations.max()) < OPTIONS["num_inference_steps"]


@pytest.mark.parametrize("model", [shared_tess, shared_lm])
def test_patience_that_is_never_exhausted_changes_nothing(model):
    options = {**OPTIONS, "num_inference_steps": 5}
    without, with_patience = (
        model().generate(pad_left(PROMPTS), **options, **extra) for extra in ({}, {"patience": 5})
    )
    assert torch.equal(without.sequences, with_patience.sequences)
    assert torch.equal(without.evaluations, with_patience.evaluations)


def test_each_block_settles_for_itself():
    options = {"patience": 1, "max_new_tokens": 4, "block_size": 2}
    found = generated(PROMPTS, **options)
    first = generated(PROMPTS, **{**options, "max_new_tokens": 2})
    assert torch.equal(found.answers[:, :2], first.answers)
    assert torch.equal(found.evaluations[:, :2], first.evaluations)
    assert not torch.equal(found.evaluations[:, :2], found.evaluations[:, 2:])


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
def test_a_solver_of_any_number_of_stages_may_stop_within_a_step(solver):
    options = {"solver": solver, "num_inference_steps": 13}
    tokens = tokens_of_every_evaluation(shared_tess(), PROMPTS, **options)
    found = generated(PROMPTS, patience=2, **options)
    for row in range(len(PROMPTS)):
        end = first_settled(tokens[:, row], 2)
        assert torch.equal(found.answers[row], tokens[end, row])
        assert found.evaluations[row].tolist() == [end + 1] * 2


@pytest.mark.parametrize("solver", ["fehlberg2", "bosh3"])
def test_a_solver_that_chooses_its_own_steps_is_refused(solver):
    with pytest.raises(ConfigError, match=f"patience=2 counts evaluations on a fixed grid; solver '{solver}'"):
        generated(PROMPTS, patience=2, solver=solver, num_inference_steps=None)


def answer(*tokens):
    """Rows of two tokens each, marked by a hidden number."""
    answer.count += 1
    values = torch.full((len(tokens), 2, 3), float(answer.count))
    return Logits(values, 5), torch.tensor(tokens)


answer.count = 0


def test_a_change_starts_the_count_again():
    settling = EarlyStop(2, 1)
    for tokens in ([1, 1], [1, 1], [1, 2], [1, 2], [1, 1], [1, 1]):
        settling.add(*answer(tokens), is_last=False)
        assert settling.going.all()
    last = answer([1, 1])
    with pytest.raises(Settled) as end:
        settling.add(*last, is_last=False)
    assert torch.equal(end.value.logits.values, last[0].values)


def test_a_settled_row_keeps_its_answer_even_if_its_tokens_would_change():
    settling = EarlyStop(1, 2)
    settling.add(*answer([1, 1], [3, 3]), is_last=False)
    kept = answer([1, 1], [3, 4])
    settling.add(*kept, is_last=False)
    assert settling.going.tolist() == [False, True]
    last = answer([2, 2], [4, 4])
    found = settling.add(*last, is_last=True)
    assert torch.equal(found.values[0], kept[0].values[0])
    assert torch.equal(found.values[1], last[0].values[1])


def test_the_read_out_ends_a_block_without_a_stop():
    settling = EarlyStop(1, 1)
    settling.add(*answer([1, 1]), is_last=False)
    last = answer([1, 1])
    assert torch.equal(settling.add(*last, is_last=True).values, last[0].values)
