"""States as wide as the vocabulary: what they say must not depend on whether they are kept small."""

from itertools import pairwise

import pytest
import torch

from l2d_framework.diffusion import logits as chunks
from l2d_framework.diffusion.logits import dense, pieces
from l2d_plugins.parametrizations.simplex.state import WideState
from l2d_plugins.schedules.cosine import Cosine
from l2d_plugins.schedules.linear import Linear

CPU = torch.device("cpu")
B, L, D = 3, 4, 7
SEEDS = torch.randint(2**62, (B, L), generator=torch.Generator().manual_seed(3))


def simplex(seed=0, rows=B):
    return WideState.simplex(torch.randint(D, (rows, L), generator=torch.Generator().manual_seed(seed)), 5.0, D)


def noise(seeds=SEEDS):
    return WideState.normal(seeds, D, CPU)


def mixture():
    """Several tokens and noises at weights of their own."""
    return torch.rand(B, L, 1) * simplex() - 0.3 * noise() + torch.rand(B, 1, 1) * simplex(1) + noise(SEEDS + 1) / 2


def close(found, wanted):
    torch.testing.assert_close(dense(found), dense(wanted), rtol=1e-6, atol=5e-6)


def test_a_simplex_is_its_value_at_the_token_and_minus_it_elsewhere():
    tokens = torch.tensor([[2, 0]])
    wanted = torch.tensor([[[-5.0, -5, 5], [5, -5, -5]]])
    assert torch.equal(WideState.simplex(tokens, 5.0, 3).dense(), wanted)


def test_noise_is_standard_normal():
    values = WideState.normal(torch.arange(400).view(4, 100), 500, CPU).dense()
    assert abs(float(values.mean())) < 0.01
    assert float(values.std()) == pytest.approx(1, abs=0.01)
    assert float((values.mean(-1) * 500**0.5).std()) == pytest.approx(1, abs=0.15)


LINEAR = {
    "times a number": lambda x, y: x * 3.0,
    "a number times": lambda x, y: -0.5 * x,
    "times a weight of each position": lambda x, y: torch.linspace(-1, 1, B * L).view(B, L, 1) * x,
    "times a weight of each row": lambda x, y: x * torch.arange(1.0, B + 1).view(B, 1, 1),
    "times a weight of each column": lambda x, y: x * torch.arange(1.0, L + 1).view(L, 1),
    "times a tensor of one number": lambda x, y: x * torch.tensor(2.5),
    "over a number": lambda x, y: x / 4,
    "over a weight of each position": lambda x, y: x / torch.linspace(1, 2, B * L).view(B, L, 1),
    "negated": lambda x, y: -x,
    "plus": lambda x, y: x + y,
    "plus a multiple": lambda x, y: torch.add(x, y, alpha=0.3),
    "minus": lambda x, y: x - y,
    "minus a multiple": lambda x, y: torch.sub(x, y, alpha=0.3),
    "with itself": lambda x, y: x + x - 0.5 * x,
    "some rows": lambda x, y: x[1:],
    "some columns": lambda x, y: x[:, 1:3],
    "every other column": lambda x, y: x[:, ::2],
    "rows in another order": lambda x, y: x[torch.tensor([2, 0, 0])],
    "rows by a mask": lambda x, y: x[torch.tensor([True, False, True])],
    "places by row and column": lambda x, y: x[torch.tensor([[2], [0]]), torch.tensor([[1, 1, 3], [0, 2, 2]])],
    "after one another": lambda x, y: torch.cat([x, x.flip(0) if not isinstance(x, WideState) else x[ORDER]]),
    "beside one another": lambda x, y: torch.cat([x[:, 2:], x[:, :1]], 1),
    "detached": lambda x, y: x.detach(),
    "to its own type": lambda x, y: x.to(torch.float32).to("cpu").float(),
    "interpolated": lambda x, y: Cosine().interpolate(x, y, torch.rand(B, L)),
    "as a slope": lambda x, y: Linear().velocity(x, y, torch.rand(B, L) * 0.9),
    "as a slope of the general formula": lambda x, y: Cosine().velocity(x, y, torch.rand(B, L) * 0.9),
}
ORDER = torch.tensor([2, 1, 0])


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_kept_small_equals_the_same_in_full(name):
    x, y = mixture(), simplex(2)
    with torch.random.fork_rng():
        found = LINEAR[name](x, y)
    assert isinstance(found, WideState), "it was made dense"
    assert len(found.parts) <= len(x.parts) + len(y.parts)
    wanted = LINEAR[name](x.dense(), y.dense())
    assert found.shape == wanted.shape
    close(found, wanted)


OTHER = {
    "softmax": lambda x, y: x.softmax(-1),
    "a product of states": lambda x, y: x * y,
    "a quotient of states": lambda x, y: x / (x * x + 1),
    "a number over": lambda x, y: 1 / (x.square() + 1),
    "a number added": lambda x, y: x + 1.0,
    "a number minus": lambda x, y: 1.0 - x,
    "a tensor added": lambda x, y: x + torch.ones(B, L, D),
    "a tensor added to by it": lambda x, y: torch.ones(D) - x,
    "a weight of each number": lambda x, y: x * torch.arange(1.0, D + 1),
    "more rows by a weight": lambda x, y: x[:1] * torch.ones(B, L, 1),
    "one more dimension by a weight": lambda x, y: x * torch.ones(2, 1, 1, 1),
    "where": lambda x, y: torch.where(torch.arange(B)[:, None, None] > 0, x, y),
    "a matrix product": lambda x, y: x @ torch.ones(D, 2),
    "some numbers": lambda x, y: x[..., 1:3],
    "one row": lambda x, y: x[1],
    "one column": lambda x, y: x[:, 1],
    "positions by a mask": lambda x, y: x[torch.rand(B, L) > 0.5],
    "beside in the last dimension": lambda x, y: torch.cat([x, y], -1),
    "dense and not": lambda x, y: torch.cat([x, torch.zeros(1, L, D)]),
    "states of unlike parts": lambda x, y: torch.cat([x, y]),
    "stacked": lambda x, y: torch.stack([x, y]),
    "in another shape": lambda x, y: x.reshape(-1, D),
    "in float64": lambda x, y: x.double(),
    "elsewhere": lambda x, y: x.to("meta").to("meta"),
    "copied": lambda x, y: x.clone(),
    "zeros of its shape": lambda x, y: torch.zeros_like(x),
    "the sum": lambda x, y: x.sum(),
    "into another tensor": lambda x, y: torch.zeros(B, L, D).add_(x),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_kept_small_is_right(name):
    x, y = mixture(), simplex(2)
    with torch.random.fork_rng():
        found = OTHER[name](x, y)
    wanted = OTHER[name](x.dense(), y.dense())
    assert type(found) is torch.Tensor
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    if found.device == CPU:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.zero_(), lambda x: x[:1].add_(x[1:2])])
def test_it_is_never_changed_in_place_without_a_word(change):
    with pytest.raises(TypeError, match="cannot be changed in place"):
        change(mixture())


def test_augmented_assignment_makes_a_new_one():
    x = mixture()
    full, y = x.dense(), x
    y *= 2
    y += x
    close(y, 3 * full)
    assert torch.equal(x.dense(), full)


def test_writing_into_places_of_it_is_refused():
    x = mixture()
    with pytest.raises(TypeError, match="in place"):
        x[torch.tensor([0])] = 1.0


def test_a_position_has_the_same_noise_alone_and_among_others():
    together = noise().dense()
    for row in range(B):
        for place in range(L):
            alone = noise(SEEDS[row : row + 1, place : place + 1])
            assert torch.equal(alone.dense()[0, 0], together[row, place])
            assert torch.equal(noise()[row : row + 1, place : place + 1].dense()[0, 0], together[row, place])


@pytest.mark.parametrize("limit", [1, 5 * 700, 10**6])
def test_numbers_are_the_same_in_whatever_pieces_they_are_made(monkeypatch, limit):
    state = 3 * WideState.normal(SEEDS, 700, CPU) - 2 * WideState.simplex(torch.arange(B * L).view(B, L), 5.0, 700)
    full, shares = state.dense(), state.softmax(-1)
    torch.testing.assert_close(shares, full.softmax(-1))
    monkeypatch.setattr(chunks, "_CACHED", limit)
    assert torch.equal(state.dense(), full)
    torch.testing.assert_close(state.softmax(-1), shares)


def test_noise_of_no_weight_is_not_drawn(monkeypatch):
    drawn, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *given, **options: drawn.append(1) or normal(*given, **options))
    weight = torch.ones(B, L, 1)
    weight[0, 1:] = 0
    found, wanted = (weight * noise()).dense(), noise().dense()
    assert len(drawn) == (B * L - (L - 1)) + B * L
    assert torch.equal(found, weight * wanted)


def test_positions_with_seeds_of_their_own_have_noise_of_their_own():
    flat = noise().dense().flatten(0, 1)
    assert len(flat.unique(dim=0)) == B * L
    same = noise(torch.full((1, 2), 5)).dense()
    assert torch.equal(same[0, 0], same[0, 1])


def test_the_global_generator_has_no_say():
    torch.manual_seed(1)
    first = noise().dense()
    before = torch.get_rng_state()
    assert torch.equal(noise().dense(), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize("reread", [lambda x: x, lambda x: x.detach(), lambda x: x.to(torch.float32)])
def test_parts_do_not_multiply_along_a_solve(schedule, reread):
    steps = 20
    times = [i / (steps + 1) for i in range(steps + 1)]
    x = 5.0 * noise()
    full = x.dense()
    for number, (t, s) in enumerate(pairwise(times)):
        clean, now = simplex(number), torch.full((B, L), t)
        x = x + (s - t) * schedule.velocity(reread(x), clean, now)
        full = full + (s - t) * schedule.velocity(full, clean.dense(), now)
    assert len(x.parts) == steps + 1
    torch.testing.assert_close(x.dense(), full, rtol=0, atol=1e-4)


def test_a_state_is_printed_without_its_numbers():
    assert repr(mixture()) == "WideState(shape=(3, 4, 7), parts=4)"


@pytest.mark.parametrize(("rows", "length", "width"), [(1, 10, 3), (2, 7, 5), (3, 1, 4), (2, 5, 100), (1, 0, 3)])
@pytest.mark.parametrize("chunk", [1, 12, 30, 10**6])
def test_pieces_cover_all_positions_in_order_and_are_small_where_that_is_possible(
    monkeypatch, rows, length, width, chunk
):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    found = list(pieces(rows, length, width))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(length))
    for part in found:
        count = part.stop - part.start
        assert count == 1 or rows * width * count <= chunk
