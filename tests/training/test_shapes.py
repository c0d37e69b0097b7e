"""A computation on shapes makes the same shapes, types and saved tensors as the real one."""

import pytest
import torch
from torch import nn

from l2d_framework.training.shapes import NoValueError, Shape, Watch, to_shapes


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))


def on_shapes(module):
    module = module.to("meta")
    to_shapes(module, torch.device("cpu"))
    return module, Watch(module.parameters(), module.buffers(), vocab_size=8)


def described(x):
    return tuple(x.shape), x.stride(), x.dtype, x.device


@pytest.mark.parametrize("half", [False, True])
def test_shapes_strides_and_types_are_those_of_numbers_under_autocast_too(half):
    def compute(module, x, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = module(x)
            attention = nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])
            picked = y[mask]
            z = y.clone()
            z[:, 0].add_(1)
            return [y, attention, picked, z, y.transpose(1, 2).softmax(-1), y.unbind(1)[0], torch.cat([picked, picked])]

    x, mask = torch.randn(2, 5, 8), torch.tensor([[True, False, True, True, False]] * 2)
    module, watch = on_shapes(network())
    with watch:
        found = compute(module, x, mask)
    assert all(isinstance(y, Shape) for y in found)
    assert [described(y) for y in found] == [described(y) for y in compute(network(), x, mask)]


def test_gradients_have_the_shapes_of_their_parameters_and_are_told_from_all_else():
    module, watch = on_shapes(network())
    with watch:
        module(torch.randn(3, 8)).sum().backward()
    assert all(described(p.grad) == described(p) for p in module.parameters())
    assert watch.now.gradients == sum(p.numel() * 4 for p in module.parameters())
    watch.close()


def test_what_is_held_goes_when_nothing_refers_to_it_any_more():
    module, watch = on_shapes(network())
    with watch:
        y = module(torch.randn(3, 8))
        kept = watch.now
        del y
    assert kept.others > 0
    assert watch.now.others < kept.others
    watch.close()


def test_the_saved_tensors_of_a_forward_pass_are_what_autograd_really_saves():
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    real, x = network(), torch.randn(30, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = real(x)
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    wanted = {**saved, y.data_ptr(): y.numel() * 4}
    module, watch = on_shapes(network())
    with watch:
        y = module(x)
    assert watch.now.others == sum(size for where, size in wanted.items() if where not in own)
    watch.close()


def test_tied_weights_stay_one():
    module = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)).to("meta")
    module[1].weight = module[0].weight
    module, watch = on_shapes(module)
    watch.close()
    assert module[1].weight is module[0].weight


def test_a_number_that_only_a_run_has_is_refused():
    module, watch = on_shapes(network())
    with watch, pytest.raises(NoValueError, match=r"shape \(\).*which only a run has"):
        float(module(torch.randn(3, 8)).sum())
    with watch, pytest.raises(NoValueError, match="depends on numbers"):
        module(torch.randn(3, 8)).nonzero()
    watch.close()
