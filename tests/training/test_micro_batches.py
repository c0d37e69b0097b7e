from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from transformers import TrainerCallback

from l2d_framework.config import parse_run
from l2d_framework.models import checkpoint
from l2d_framework.training.learner import Denoiser
from l2d_framework.training.micro_batches import MicroBatches, average_gradients
from l2d_framework.training.run import train_runs

SLOW = {"learning_rate": 1e-3}
"""Adam moves weights whose gradients are mere rounding as far as any other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl")
    return folder


def train(folder: Path, name: str, *callbacks: TrainerCallback, **training: Any) -> dict[str, Any]:
    run = tiny_runs.diffusion_run(folder / "base", folder / "sums.jsonl", folder / name, **training)
    return train_runs([parse_run(run)], callbacks=lambda _: callbacks)[0]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder / name).own_parameters())


def test_what_has_no_gradient_in_any_process_is_left_as_it_is_by_an_optimizer() -> None:
    here, there, nowhere = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    here.grad = torch.full((2,), 4.0)
    # Of a second process, which has a gradient for the second parameter alone.
    other = iter([torch.tensor([0, 1, 0]), torch.zeros(2), torch.full((2,), 2.0)])

    def reduce(value: torch.Tensor, how: str) -> torch.Tensor:
        return (value + next(other)) / (2 if how == "mean" else 1)

    average_gradients([here, there, nowhere], reduce)
    torch.optim.AdamW([here, there, nowhere], lr=0.1, weight_decay=0.5).step()
    assert [p.grad is None or p.grad[0].item() for p in (here, there, nowhere)] == [2.0, 1.0, True]
    assert nowhere.tolist() == [1.0, 1.0]
    assert max(here.max(), there.max()) < 1


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets memory be out in training for more than some rows from a number of micro-batches on."""

    def limit(rows: int, start: int = 0) -> list[int]:
        forward, sizes, hooks = Denoiser.forward, list[int](), list[Any]()

        def limited(self: Denoiser, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
            while hooks:
                hooks.pop().remove()
            if self.training:
                sizes.append(len(batch["index"]))
                if sizes[-1] > rows and len(sizes) > start:
                    # In the backward pass, when the gradients of the layers are there already.
                    hooks.append(self.model.backbone.conditioning.time[0].weight.register_hook(out_of_memory))
            return forward(self, **batch)

        monkeypatch.setattr(Denoiser, "forward", limited)
        return sizes

    return limit


def out_of_memory(_: torch.Tensor) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")


def test_running_out_of_memory_in_the_middle_of_a_run_changes_no_weight(
    folder: Path, memory: Callable[..., list[int]]
) -> None:
    train(folder, "whole", **SLOW)
    sizes = memory(2, start=4)
    card = train(folder, "short", micro_batch_size="auto", **SLOW)
    assert sizes == [4] * 4 + [4] + [2] * 10  # the fifth update is tried again
    assert card["result"]["micro_batch_size"] == 2
    found, wanted = tiny_runs.losses(folder / "short"), tiny_runs.losses(folder / "whole")
    for step, losses in wanted.items():
        assert found[step] == pytest.approx(losses, abs=2e-5)
    torch.testing.assert_close(weights(folder, "short"), weights(folder, "whole"), rtol=0, atol=1e-5)


def test_a_size_that_was_found_gives_the_very_weights_of_the_size_given(
    folder: Path, memory: Callable[..., list[int]]
) -> None:
    train(folder, "given", micro_batch_size=1)
    memory(1)
    train(folder, "found", micro_batch_size="auto")
    torch.testing.assert_close(weights(folder, "found"), weights(folder, "given"), rtol=0, atol=0)


def test_a_resumed_run_starts_with_the_size_it_found(folder: Path, memory: Callable[..., list[int]]) -> None:
    sizes = memory(2)
    with pytest.raises(KeyboardInterrupt):
        train(folder, "resumed", tiny_runs.Stop(4), micro_batch_size="auto")
    assert sizes[:3] == [4, 2, 2]
    sizes.clear()
    train(folder, "resumed", micro_batch_size="auto")
    assert set(sizes) == {2}


def test_the_size_is_said_once_and_not_at_all_where_it_was_given(folder: Path) -> None:
    said: dict[Any, list[int]] = {}

    class Hear(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            said[size].extend(logs[name] for name in logs if name == "micro_batch_size")

    for size in ("auto", 2):
        said[size] = []
        train(folder, f"said_{size}", Hear(), micro_batch_size=size, max_steps=3)
    assert said == {"auto": [4], 2: []}


def test_one_sequence_that_does_not_fit_is_an_error_and_so_is_any_other_fault(
    folder: Path, memory: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(folder, "none", micro_batch_size="auto")
    monkeypatch.setattr(Denoiser, "forward", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        train(folder, "fault", micro_batch_size="auto")


def test_evaluation_takes_smaller_batches_where_memory_is_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(folder, "roomy", max_steps=3)
    forward = Denoiser.forward

    def limited(self: Denoiser, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training and len(batch["index"]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")
        return forward(self, **batch)

    monkeypatch.setattr(Denoiser, "forward", limited)
    train(folder, "narrow", micro_batch_size="auto", max_steps=3)
    found, wanted = (tiny_runs.losses(folder / name)[3] for name in ("narrow", "roomy"))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_sequences_of_like_length_share_micro_batches_and_no_result_changes(folder: Path) -> None:
    plain = train(folder, "mixed", micro_batch_size=2, **SLOW)
    like = train(folder, "like", micro_batch_size=2, group_by_length=True, **SLOW)
    assert 0 < like["result"]["padding"] < plain["result"]["padding"] < 1
    found, wanted = tiny_runs.losses(folder / "like"), tiny_runs.losses(folder / "mixed")
    for step, losses in wanted.items():
        assert found[step] == pytest.approx(losses, abs=2e-5)
    torch.testing.assert_close(weights(folder, "like"), weights(folder, "mixed"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_length", [False, True])
def test_parts_hold_every_row_once_without_common_padding(by_length: bool) -> None:
    lengths = torch.tensor([3, 9, 4, 1, 9, 2, 5])
    blocks = torch.where(torch.arange(9) < lengths[:, None], 0, -1)
    micro = MicroBatches(3, halves=False, by_length=by_length)
    parts = micro.run({"blocks": blocks, "index": torch.arange(7)}, lambda part, _: part)
    assert parts is not None
    index = torch.cat([part["index"] for part in parts])
    assert index.sort().values.tolist() == list(range(7))
    assert by_length or index.tolist() == list(range(7))
    for part in parts:
        assert part["blocks"].shape[1] == lengths[part["index"]].max()
        assert torch.equal((part["blocks"] >= 0).sum(1), lengths[part["index"]])
    assert micro.slots == (9 * 3 + 4 * 3 + 1 if by_length else 9 * 3 + 9 * 3 + 5)
