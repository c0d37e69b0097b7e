"""The order of the arrays and the holes in them."""

import numpy as np
import pytest
import torch
from tracing_scenes import block, evaluation, record

from l2d_framework.tracing import maps


def test_a_canvas_fills_one_row_per_step_and_given_tokens_are_certain():
    evaluations = block(4, 6, 40)
    found = maps(record(evaluations))
    wanted = torch.stack([one.logits[0].softmax(-1).max(-1).values for one in evaluations])
    np.testing.assert_allclose(found.confidence[:, 3:], wanted, rtol=1e-5)
    assert (found.confidence[:, :3] == 1).all()
    for other in (found.final, found.entropy, found.gap, found.kl):
        assert other.shape == (4, 9)
        assert np.isnan(other[:, :3]).all()
    assert np.isnan(found.kl[0]).all() and not np.isnan(found.kl[1:, 3:]).any()


def test_positions_that_took_fewer_evaluations_leave_holes_below():
    evaluations = [*block(5, 1, 40), *block(2, 1, 40, start=4), *block(3, 2, 40, start=5)]
    found = maps(record(evaluations)).confidence
    assert (~np.isnan(found[:, 3:])).sum(0).tolist() == [5, 2, 3, 3]
    assert not np.isnan(found[:2, 3:]).any()


def test_a_position_left_out_of_an_evaluation_does_not_move_the_others():
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    trace = record([evaluation(logits[0]), evaluation(logits[1, :1]), evaluation(logits[2], is_read_out=True)])
    found, p = maps(trace).confidence, logits.softmax(-1).max(-1).values
    np.testing.assert_allclose(found[:, 3], p[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:2, 4], p[[0, 2], 1], rtol=1e-5)
    assert np.isnan(found[2, 4])


def test_the_gap_is_between_the_two_likeliest_and_the_mean_divergence_is_over_the_vocabulary():
    trace = record(block(4, 6, 40))
    found = maps(trace)
    assert (found.gap[:, 3:] >= 0).all() and (found.gap[:, 3:] <= found.confidence[:, 3:]).all()
    assert found.kl_mean[1:, 3:] * 40 == pytest.approx(found.kl[1:, 3:], rel=1e-6)
