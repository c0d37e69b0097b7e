import pytest
import torch
from pydantic import ValidationError

from l2d_framework.types import Prediction, Query
from l2d_plugins.guidance import l2d_components
from l2d_plugins.guidance.classifier_free import ClassifierFree
from l2d_plugins.schedules.linear import Linear

B, L, D, V = 2, 3, 4, 7


class Network:
    """Logits that depend on the state and on the class; remembers how it was asked."""

    def __init__(self, *, clean: bool = False) -> None:
        self.clean = clean
        self.passes: list[int] = []
        self.weight = torch.randn(D, V)
        self.classes = torch.randn(4, V)

    def answer(self, query):
        label = torch.full((B, L), -1) if query.condition is None else query.condition
        logits = query.x @ self.weight + self.classes[label]
        return Prediction(logits, logits[..., :D] if self.clean else None)

    def __call__(self, query):
        self.passes.append(1)
        return self.answer(query)

    def together(self, queries):
        self.passes.append(len(queries))
        return [self.answer(query) for query in queries]


class Drawing:
    """A space whose estimate is the logits plus the next number of a stream."""

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    def estimate(self, logits):
        self.asked.append(logits)
        return logits[..., :D] + len(self.asked)


def query(**changes):
    condition = torch.tensor([[0, 1, 2], [2, 0, 1]])
    x, t = torch.randn(B, L, D), torch.full((B, L), 0.4)
    asked = Query(x=x, t=t, positions=torch.zeros(B, L, dtype=torch.int64), context=None, condition=condition)
    return asked.replace(**changes)


def branches(network, asked):
    return network.answer(asked), network.answer(asked.replace(condition=None))


def test_guidances_are_offered_under_their_names():
    assert [c.component_name() for c in l2d_components()] == ["classifier_free", "reward_gradient"]
    assert ClassifierFree.needs_classes
    assert ClassifierFree().scale == ClassifierFree.neutral_scale == 1.0


@pytest.mark.parametrize(("scale", "condition"), [(1.0, "kept"), (2.0, None)])
def test_one_branch_is_asked_when_guidance_can_change_nothing(scale, condition):
    network, asked = Network(), query()
    asked = asked if condition == "kept" else asked.replace(condition=None)
    prediction = ClassifierFree(scale=scale)(network, asked, Drawing())
    assert network.passes == [1]
    assert torch.equal(prediction.logits, network.answer(asked).logits)
    assert prediction.clean is None


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, -1.0])
def test_clean_states_are_mixed_with_weights_that_sum_to_one(scale):
    network, asked, space = Network(clean=True), query(), Drawing()
    with_class, without = branches(network, asked)
    prediction = ClassifierFree(scale=scale)(network, asked, space)
    torch.testing.assert_close(prediction.clean, scale * with_class.clean + (1 - scale) * without.clean)


def test_mixing_clean_states_mixes_velocities():
    network, asked = Network(clean=True), query()
    with_class, without = branches(network, asked)
    guided = ClassifierFree(scale=1.5)(network, asked, Drawing())
    v, v_class, v_null = (Linear().velocity(asked.x, p.clean, asked.t) for p in (guided, with_class, without))
    torch.testing.assert_close(v, 1.5 * v_class - 0.5 * v_null)


def test_both_branches_take_one_pass_and_draw_independently_the_class_first():
    network, asked, space = Network(), query(), Drawing()
    with_class, without = branches(network, asked)
    prediction = ClassifierFree(scale=2.0)(network, asked, space)
    assert network.passes == [2]
    assert [torch.equal(*pair) for pair in zip(space.asked, (with_class.logits, without.logits), strict=True)] == [
        True
    ] * 2
    expected = 2 * (with_class.logits[..., :D] + 1) - (without.logits[..., :D] + 2)
    torch.testing.assert_close(prediction.clean, expected)


def test_the_logits_stay_those_of_the_class():
    network, asked = Network(), query()
    prediction = ClassifierFree(scale=3.0)(network, asked, Drawing())
    assert torch.equal(prediction.logits, network.answer(asked).logits)


def test_a_scale_per_request_guides_each_position_by_its_own():
    network = Network(clean=True)
    scales = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 1.5]])
    asked = query(guidance_scale=scales)
    prediction = ClassifierFree(scale=7.0)(network, asked, Drawing())
    for row in range(B):
        for position in range(L):
            alone = ClassifierFree(scale=float(scales[row, position]))(
                network, asked.replace(guidance_scale=None), Drawing()
            )
            expected = network.answer(asked).clean if alone.clean is None else alone.clean
            torch.testing.assert_close(prediction.clean[row, position], expected[row, position])


def test_positions_of_scale_one_are_exactly_those_of_the_class():
    network, space = Network(), Drawing()
    network.classes[-1] = torch.nan
    asked = query(guidance_scale=torch.tensor([[1.0, 2.0, 1.0], [2.0, 2.0, 1.0]]))
    prediction = ClassifierFree()(network, asked, space)
    exact = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(prediction.clean[exact], (network.answer(asked).logits[..., :D] + 1)[exact])
    assert prediction.clean[~exact].isnan().all()


def test_positions_without_a_class_are_not_guided():
    network, asked = Network(), query(condition=torch.tensor([[0, -1, 2], [-1, -1, 1]]))
    without = asked.condition < 0
    prediction = ClassifierFree(scale=2.0)(network, asked, Drawing())
    assert torch.equal(prediction.clean[without], (network.answer(asked).logits[..., :D] + 1)[without])


@pytest.mark.parametrize("wrong", [{"scale": float("nan")}, {"scale": "2"}, {"scales": 2.0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ClassifierFree(**wrong)
