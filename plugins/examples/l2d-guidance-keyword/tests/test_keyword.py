from itertools import pairwise

import pytest
import torch
from l2d_keyword import Keyword

from l2d_framework.testing import parametrize_with_checks
from l2d_framework.testing.toys import ToyPredict, ToySpace
from l2d_framework.types import Query


@parametrize_with_checks([Keyword(), Keyword(token_ids=[2, 5], scale=3.0)])
def test_conformance(component, check):
    check(component)


def share(guidance):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 6, generator=generator), torch.full((1, 4), 0.5)
    answer = guidance(ToyPredict(11, 6, 0), Query(x, t, torch.arange(4)[None], None), ToySpace(11, 6))
    return answer.logits.softmax(-1)[..., guidance.token_ids].sum(-1)


def test_a_larger_scale_makes_the_keywords_likelier_everywhere():
    shares = [share(Keyword(token_ids=[2, 5], scale=scale)) for scale in (0.0, 1.0, 4.0, 50.0)]
    assert all((more > less).all() for less, more in pairwise(shares))
    assert (shares[-1] > 0.99).all()


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="index 11 is out of bounds"):
        share(Keyword(token_ids=[11]))
