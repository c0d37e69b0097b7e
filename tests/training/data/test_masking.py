import json

import numpy as np
import pytest
import torch

from l2d_framework.training.data.collate import IGNORED, Collator
from l2d_framework.training.data.masking import Masker, prefix_mask, span_mask
from l2d_framework.training.samplers import HeldOut, RunOrder

OBJECTIVES = ("t5", "aggressive_t5", "prefix")
LENGTH, ROWS, BATCH, TOTAL = 256, 10, 4, 48


class LegacyRandom:
    """numpy's global generator behind the one method that prefixes need."""

    def __init__(self, seed):
        self.integers = np.random.RandomState(seed).randint


def runs(mask):
    """Lengths of the runs of masked tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return np.diff(borders)[::2].tolist()


def drawn(case):
    if case["kind"] == "span":
        random = np.random.default_rng(case["numpy_default_rng_seed"])
        return span_mask(case["length"], case["ratio"], case["mean_span"], random)
    if case["kind"] == "prefix_train":
        return prefix_mask(case["length"], LegacyRandom(case["numpy_global_seed"]))
    return prefix_mask(case["length"], None)


def test_masks_are_those_of_the_reference(golden_file):
    cases = json.loads(golden_file("tess/masks.json").read_text())
    assert {case["kind"] for case in cases} == {"span", "prefix_train", "prefix_eval"}
    for case in cases:
        mask = drawn(case)
        assert "".join(map(str, mask.astype(int))) == case["mask"], case
        if case["kind"] == "span":
            assert (mask.sum(), len(runs(mask))) == (case["n_masked"], case["n_spans"])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 2048])
@pytest.mark.parametrize(("ratio", "mean"), [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.5, 48), (0.9, 1)])
def test_spans_start_behind_the_first_token_end_with_the_last_and_fill_the_ratio(exact, length, ratio, mean):
    mask = span_mask(length, ratio, mean, np.random.default_rng(0), exact_lengths=exact)
    assert mask.shape == (length,)
    assert not mask[0]
    assert mask[-1]
    assert mask.sum() == min(max(int(length * ratio), 1), length - 1)


@pytest.mark.parametrize(("ratio", "mean"), [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.5, 48)])
def test_exact_spans_have_the_mean_length_and_the_last_one_the_remainder(ratio, mean):
    mask = span_mask(2048, ratio, mean, np.random.default_rng(0), exact_lengths=True)
    *spans, last = runs(mask)
    assert set(spans) == {mean}
    assert mean <= last < 2 * mean


def test_random_spans_have_the_mean_length_in_the_mean():
    lengths = [n for seed in range(50) for n in runs(span_mask(2048, 0.5, 8, np.random.default_rng(seed)))]
    assert len(set(lengths)) > 8
    assert np.mean(lengths) == pytest.approx(8)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 17, 512])
def test_prefixes_are_visible_and_at_most_half_of_the_text(length):
    random = np.random.default_rng(0)
    for mask in [prefix_mask(length, None)] + [prefix_mask(length, random) for _ in range(200)]:
        assert runs(mask) == [mask.sum()]
        assert mask[-1]
        assert 1 <= (~mask).sum() <= max(1 + (length - 1) // 2, 2)
    assert (~prefix_mask(length, None)).sum() == min(1 + (length - 1) // 2, length - 1)


def rows(count=ROWS):
    return [
        {"input_ids": [100 + i] * LENGTH, "supervised": [False] + [True] * (LENGTH - 1), "class_id": -1, "index": i}
        for i in range(count)
    ]


def masker(**changes):
    return Masker(**{"objectives": OBJECTIVES, "batch_size": BATCH, "seed": 3, **changes})


def masks(order, micro, processes=1, collate=None):
    """What each (epoch, index) gets, with micro-batches dealt to processes as the trainer deals them."""
    collate = collate or Collator(0, None, masker=masker())
    found = {}
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    for process in range(processes):
        for batch in batches[process::processes]:
            made = collate(batch)
            for row, blocks, labels in zip(batch, made["blocks"], made["labels"], strict=True):
                assert torch.equal(blocks > 0, labels != IGNORED)
                assert not blocks[0]
                found[row["epoch"], row["index"]] = tuple(blocks.tolist())
    return found


def in_order(total=TOTAL):
    order = RunOrder(rows(), 3, total)
    return [order[i] for i in range(total)]


def test_masks_depend_on_neither_micro_batches_nor_processes():
    order = in_order()
    whole = masks(order, BATCH)
    assert len(whole) == TOTAL
    assert len(set(whole.values())) > TOTAL // 2
    for micro, processes in [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]:
        assert masks(order, micro, processes) == whole


def test_a_resumed_order_masks_its_rest_as_the_whole_one():
    order = in_order()
    whole, rest = masks(order, BATCH), masks(order[20:], 2)
    assert rest == {key: whole[key] for key in rest}


def test_an_update_has_one_objective_and_all_come_up_equally_often():
    order = in_order()
    for update in range(TOTAL // BATCH):
        chosen = masker().objective(update)
        alone = Collator(0, None, masker=masker(objectives=(chosen,)))
        here = order[update * BATCH : (update + 1) * BATCH]
        assert masks(here, 1) == masks(here, 1, collate=alone)
    counts = np.unique([masker().objective(update) for update in range(3000)], return_counts=True)[1]
    # Five standard errors of a count of 3000 with probability 1/3.
    assert counts.tolist() == pytest.approx([1000] * 3, abs=130)


def test_masks_change_with_the_epoch_and_the_seed():
    collate = Collator(0, None, masker=masker(objectives=("aggressive_t5",)))
    found = masks(in_order(), 4, collate=collate)
    other = masks(in_order(), 4, collate=Collator(0, None, masker=masker(objectives=("aggressive_t5",), seed=4)))
    assert all(found[0, i] != found[1, i] for i in range(ROWS))
    assert all(found[key] != other[key] for key in found)


def test_held_out_rows_get_the_evaluation_mask_whatever_the_objectives():
    held = HeldOut(rows(3), 2)
    made = Collator(0, None, masker=masker(objectives=("t5",)))([held[i] for i in range(len(held))])
    expected = torch.as_tensor(prefix_mask(LENGTH, None)).long()
    assert torch.equal(made["blocks"], expected.expand(4, -1))


def test_blocks_cut_the_spans_to_generate():
    row = {**in_order()[0]}
    made = Collator(0, 3, masker=masker())([row])["blocks"][0]
    mask = masker()(row)
    assert ((made > 0).numpy() == mask).all()
    assert made.bincount()[1:].max() <= 3
