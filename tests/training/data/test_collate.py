import pytest
import torch

from l2d_framework.errors import ConfigError
from l2d_framework.training.data.collate import IGNORED, Collator, number_blocks


def row(flags, *, start=10, class_id=-1, index=0):
    supervised = [flag == "x" for flag in flags]
    return {
        "input_ids": list(range(start, start + len(flags))),
        "supervised": supervised,
        "class_id": class_id,
        "index": index,
    }


def numbers(flags, size):
    return number_blocks(torch.tensor([[flag == "x" for flag in flags]]), size)[0].tolist()


def test_blocks_are_runs_cut_into_pieces_numbered_along_the_row():
    assert numbers("..xxx.xx", 1) == [0, 0, 1, 2, 3, 0, 4, 5]
    assert numbers("..xxx.xx", 2) == [0, 0, 1, 1, 2, 0, 3, 3]
    assert numbers("..xxx.xx", 4) == [0, 0, 1, 1, 1, 0, 2, 2]
    assert numbers("..xxx.xx", None) == [0, 0, 1, 1, 1, 0, 1, 1]
    assert numbers("x.x", 2) == [1, 0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_block_is_too_long_torn_or_numbered_out_of_order(size):
    supervised = torch.rand(16, 40) < 0.7
    blocks = number_blocks(supervised, size)
    assert torch.equal(blocks > 0, supervised)
    for line in blocks:
        used = line[line > 0]
        assert torch.equal(used.unique(), torch.arange(1, int(used.max()) + 1))
        assert (used.diff() >= 0).all()
        for k in used.unique():
            (places,) = torch.where(line == k)
            assert len(places) <= size
            assert len(places) == 1 or (places.diff() == 1).all()
            border = int(places[-1]) + 1
            # A short block ends where its run ends.
            assert len(places) == size or border == len(line) or line[border] == 0


def test_padding_is_on_the_right_and_marked():
    batch = Collator(pad_id=7)([row("..xx", class_id=2, index=5), row(".x", start=50, index=3)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [50, 51, 7, 7]]
    assert batch["blocks"].tolist() == [[0, 0, 1, 2], [0, 1, -1, -1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 12, 13], [IGNORED, 51, IGNORED, IGNORED]]
    assert batch["class_id"].tolist() == [2, -1]
    assert batch["index"].tolist() == [5, 3]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("size", [1, 3, None])
def test_a_row_is_the_same_whatever_its_batch_mates(size):
    rows = [row("..xxxx.x"), row(".xxx", start=60), row("." * 9 + "x", start=90)]
    together = Collator(pad_id=0, block_size=size)(rows)
    for i, single in enumerate(rows):
        alone = Collator(pad_id=0, block_size=size)([single])
        n = len(single["input_ids"])
        for name in ("input_ids", "blocks", "labels"):
            assert torch.equal(together[name][i, :n], alone[name][0])


@pytest.mark.parametrize(("size", "last"), [(1, [4, 5]), (2, [2, 3]), (None, [1, 1])])
def test_padding_is_denoised_in_blocks_like_the_answer_and_counted_only_as_a_target(size, last):
    rows = [row("..xx.x", class_id=2, index=5), row(".x", start=50, index=3)]
    plain, target, context = (
        Collator(7, size, padding=padding, max_length=8)(rows) for padding in ("none", "target", "context")
    )
    for filled in (target, context):
        assert filled["input_ids"][0].tolist() == [10, 11, 12, 13, 14, 15, 7, 7]
        assert filled["input_ids"][1].tolist() == [50, 51, *[7] * 6]
        assert torch.equal(filled["blocks"][0, :6], plain["blocks"][0])
        assert filled["blocks"][0, 6:].tolist() == last
        assert filled["blocks"][1].tolist() == [0, *(1 + place // (size or 7) for place in range(7))]
        assert torch.equal(filled["labels"][0, :6], plain["labels"][0])
    assert target["labels"][:, 6:].tolist() == [[7, 7], [7, 7]]
    assert context["labels"][:, 6:].tolist() == [[IGNORED] * 2] * 2
    assert plain["blocks"].shape == (2, 6)


def test_no_padding_is_the_default():
    rows = [row("..xx"), row(".x", start=50)]
    for name, tensor in Collator(7)(rows).items():
        assert torch.equal(tensor, Collator(7, padding="none", max_length=64)(rows)[name])


def test_filling_up_needs_a_length():
    with pytest.raises(ConfigError, match="padding 'target' fills rows up to max_length; got None"):
        Collator(0, padding="target")


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_length_is_rounded_up(multiple, length):
    batch = Collator(pad_id=0, pad_to_multiple_of=multiple)([row("...xx")])
    assert batch["input_ids"].shape == (1, length)


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"pad_to_multiple_of": 0}])
def test_sizes_below_one_are_refused(bad):
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        Collator(pad_id=0, **bad)
