"""Memory of a training step by devices and sharding, from shapes."""

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from l2d_framework.config import parse_run
from l2d_framework.training.data.collate import Collator
from l2d_framework.training.dry_run import trial_of
from l2d_framework.training.memory import SHARDS

CONFIG = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**CONFIG, num_attention_heads=4, num_key_value_heads=2)


def made(config, method="tess", **training):
    run = parse_run({"method": method, "model": {"base": "shapes"}, "training": training})
    return trial_of(run, config), run.block_size


def batch(block_size, rows, length=32):
    row = {"input_ids": [1] * length, "supervised": [False] * 8 + [True] * (length - 8), "class_id": -1, "epoch": 0}
    return Collator(0, block_size)([{**row, "index": place} for place in range(rows)])


@pytest.fixture(scope="module")
def tess(config):
    trial, size = made(config)
    return trial, {rows: trial.trace(batch(size, rows), accumulates=False) for rows in (2, 8)}


def test_activations_grow_in_proportion_to_the_rows(tess):
    _, traces = tess
    assert traces[8].kept == pytest.approx(4 * traces[2].kept, rel=0.02)
    assert traces[2].times(4).kept == pytest.approx(traces[8].kept, rel=0.02)


def test_one_device_divides_nothing_whatever_it_is_asked(tess):
    trial, traces = tess
    assert len({trial.memory(traces[2], devices=1, shard=shard) for shard in SHARDS}) == 1


def test_adam_over_float32_holds_sixteen_bytes_a_parameter(tess):
    trial, traces = tess
    held = trial.memory(traces[2])
    count = sum(part.trained for part in trial.parts().values())
    assert held.trained + held.gradients + held.optimizer == pytest.approx(16 * count, rel=0.001)


def test_shares_divide_what_is_kept_and_gather_all_weights_or_two_layers(tess):
    trial, traces = tess
    none, keep, full = (trial.memory(traces[2], devices=4, shard=shard) for shard in SHARDS)
    one = trial.memory(traces[2])
    assert none.optimizer == 4 * keep.optimizer == 4 * full.optimizer
    assert none.gradients == 2 * one.gradients  # DDP's buckets
    assert keep.gradients == full.gradients < one.gradients
    assert keep.trained == full.trained == one.trained // 4
    assert keep.gathered == one.trained >= full.gathered > 0  # of two layers both are gathered at a time
    assert keep.peak - full.peak == keep.gathered - full.gathered
    assert none.activations == keep.activations == full.activations


def test_in_shares_weights_are_gathered_as_they_are_kept_and_copies_for_the_backward_pass_are_whole(config):
    held = {}
    for bf16 in (False, True):
        trial, size = made(config, bf16=bf16)
        trace = trial.trace(batch(size, 2), accumulates=False, shard="full")
        held[bf16] = trial.memory(trace, devices=4, shard="full")
    assert (held[True].gathered, held[True].gradients) == (held[False].gathered, held[False].gradients)
    assert trace.copied > 0
    assert held[True].activations == trace.kept + trace.copied


def test_in_shares_autocast_keeps_no_copy_of_what_is_computed_again(config):
    trial, size = made(config, bf16=True, gradient_checkpointing=True)
    kept, anew = (trial.trace(batch(size, 2), accumulates=False, shard=shard) for shard in ("none", "full"))
    layers = sum(part.trained for name, part in trial.parts().items() if "layers.*" in name)
    assert kept.held[:, 1].max() >= 2 * layers
    assert anew.held[:, 1].max() < 2 * layers


def test_gradients_of_earlier_micro_batches_take_room(tess):
    trial, traces = tess
    more = trial.trace(batch(None, 8), accumulates=True)
    assert more.held[:, 3].max() == traces[8].held[:, 3].max()
    assert trial.memory(more).peak > trial.memory(traces[8]).peak


@pytest.fixture(scope="module")
def l2d(config):
    return made(config, "l2d")[0]


def test_recomputing_keeps_less(config, l2d):
    again, size = made(config, "l2d", gradient_checkpointing=True)
    kept, less = (trial.trace(batch(size, 4), accumulates=False).kept for trial in (l2d, again))
    assert less < 0.7 * kept


def test_parts_add_up_to_the_model(config, l2d):
    trial = l2d
    parts = trial.parts()
    layers = [name for name in parts if name.endswith("layers.*") and ".lm." in name]
    assert len(layers) == 1
    assert parts[layers[0]].trained == 0
    assert parts[layers[0]].size == 4 * parts[layers[0]].total
    frozen = sum(part.total - part.trained for part in parts.values())
    assert frozen == AutoModelForCausalLM.from_config(config).num_parameters()
