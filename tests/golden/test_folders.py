"""What a folder of golden numbers holds, and what is done where it holds less."""

import pytest
import shared_folders
import torch
from safetensors.torch import load_file

SMALL = shared_folders.REPOSITORY / "tests" / "golden" / "data"


def test_a_test_that_asks_for_a_file_which_the_folder_lacks_skips(tmp_path):
    with pytest.raises(pytest.skip.Exception, match=r"text_formats\.json"):
        shared_folders.existing(tmp_path, "tess/text_formats.json")
    (tmp_path / "tess").mkdir()
    (tmp_path / "tess" / "text_formats.json").touch()
    assert shared_folders.existing(tmp_path, "tess/text_formats.json").is_file()


def test_a_golden_folder_holds_cases(golden_dir):
    assert list(golden_dir.glob("l2d/*.io.safetensors")) or list(golden_dir.glob("tess/*/*_tensors.safetensors"))


def test_the_small_folder_holds_a_case_of_each_method_in_three_megabytes():
    assert list(SMALL.glob("l2d/*.io.safetensors"))
    assert list(SMALL.glob("tess/*/*_tensors.safetensors"))
    assert (SMALL / "README.md").is_file()
    assert sum(path.stat().st_size for path in SMALL.rglob("*") if path.is_file()) <= 3_000_000


def test_the_small_folder_holds_tensors_of_the_large_one(golden_dir):
    if golden_dir == SMALL:
        pytest.skip("there is no other folder of golden numbers")
    for path in SMALL.rglob("*.safetensors"):
        large, small = load_file(golden_dir / path.relative_to(SMALL)), load_file(path)
        assert small
        assert all(torch.equal(value, large[name]) for name, value in small.items()), path
