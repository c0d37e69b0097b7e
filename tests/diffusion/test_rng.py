import numpy as np
import pytest
import torch

from l2d_framework.diffusion.rng import TokenStreams, categorical, keyed_generator, request_keys, stream_key

CPU = torch.device("cpu")


def streams(rows, width=3):
    return TokenStreams([[(row, column) for column in range(width)] for row in rows], CPU)


def test_different_parts_name_different_streams():
    parts = [(1, 2), (2, 1), (12,), (1, 2, ""), ("1", "2", "x"), (1, 22), (11, 2), (-1, 2)]
    assert len({stream_key(*p) for p in parts}) == len(parts)


def test_a_stream_depends_on_its_parts_alone():
    torch.manual_seed(3)
    first = keyed_generator("a", 1).random(5)
    torch.manual_seed(4)
    keyed_generator("b", 1).random(100)
    np.random.seed(5)
    assert (keyed_generator("a", 1).random(5) == first).all()


def test_a_stream_is_numpys_philox_under_its_key():
    for number in range(50):
        wanted = np.random.Generator(np.random.Philox(key=int.from_bytes(stream_key("a", number), "little")))
        found = keyed_generator("a", number)
        for draw in (
            lambda g: g.random(7, dtype=np.float32),
            lambda g: g.standard_normal(9, dtype=np.float32),
            lambda g: g.integers(2**63, size=3),
        ):
            assert (draw(found) == draw(wanted)).all()


def test_drawing_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    streams([0, 1]).uniform()
    streams([0, 1]).normal(4)
    keyed_generator(0).random()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_a_request_is_named_by_its_tokens_and_its_occurrence():
    names = request_keys([[1, 2], [3], [1, 2], [1, 2, 3], [1, 2]])
    assert len(set(names)) == 5
    assert [name.partition(".")[2] for name in names] == ["0", "0", "1", "0", "2"]
    assert len({names[i].partition(".")[0] for i in (0, 2, 4)}) == 1


def test_reordering_different_prompts_reorders_their_names():
    prompts = [[1, 2], [3], [1, 2, 3]]
    names = request_keys(prompts)
    assert request_keys(prompts[::-1]) == names[::-1]


@pytest.mark.parametrize("method", [lambda s: s.uniform(), lambda s: s.normal(5)])
def test_numbers_of_a_token_do_not_depend_on_its_batch_mates(method):
    together, alone = method(streams([0, 1, 2])), method(streams([1]))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_only_active_streams_advance():
    some, reference = streams([0, 1]), streams([0, 1])
    wanted = torch.stack([reference.uniform() for _ in range(80)])
    for number in wanted[:5]:
        assert torch.equal(some.uniform(), number)
    taken = torch.full((2, 3), 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(75):
        active = torch.rand(2, 3, generator=generator) < 0.5
        numbers = some.uniform(active)
        expected = wanted.gather(0, taken[None])[0]
        assert torch.equal(numbers[active], expected[active])
        taken += active


def test_rewinding_brings_the_same_numbers_again():
    stream = streams([0])
    first = [stream.uniform() for _ in range(40)]
    kept = [number.clone() for number in first]
    for number in first:
        number.zero_()  # whoever draws may change what they got
    stream.rewind()
    assert all(torch.equal(stream.uniform(), number) for number in kept)


def test_branches_are_independent_streams_that_rewind_together():
    stream = streams([0, 1])
    assert stream.branch(0) is stream
    first, second = stream.uniform(), stream.branch(1).uniform()
    assert not (first == second).any()
    assert torch.equal(streams([0, 1]).branch(1).uniform(), second)
    assert not (stream.branch(2).uniform() == second).any()
    stream.rewind()
    assert torch.equal(stream.branch(1).uniform(), second)


def test_numbers_are_uniform_and_normal():
    uniform = torch.stack([s.uniform() for s in [streams(range(50))] for _ in range(40)])
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    normal = streams(range(50)).normal(40)
    assert normal.dtype == torch.float32
    assert float(normal.mean()) == pytest.approx(0, abs=0.06)
    assert float(normal.std()) == pytest.approx(1, abs=0.05)


def test_a_draw_is_the_interval_of_the_distribution_that_holds_the_number():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.99999994])
    found = categorical(probabilities.expand(len(numbers), -1), numbers)
    assert found.tolist() == [1, 1, 3, 3, 4, 4]


def test_weights_need_not_sum_to_one():
    u = torch.rand(100)
    weights = torch.rand(100, 7)
    assert torch.equal(categorical(weights, u), categorical(weights * 64, u))


def test_a_token_of_weight_zero_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(20_000, 9, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.7] = 0
    weights[:, 4] += 1e-6
    numbers = torch.rand(len(weights), generator=generator)
    numbers[::2] = 1 - 2**-24
    drawn = categorical(weights, numbers)
    assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_draws_follow_the_weights():
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0])
    numbers = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(categorical(weights.expand(8000, -1), numbers), minlength=4)
    assert counts.tolist() == [1000, 0, 3000, 4000]
