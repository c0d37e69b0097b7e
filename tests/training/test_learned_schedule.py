"""A schedule that hears the losses of training: once an update, in checkpoints, for both methods."""

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from l2d_framework import load
from l2d_framework.config import parse_run
from l2d_framework.models import checkpoint
from l2d_framework.training.run import train_runs
from l2d_plugins.schedules import information

METHODS = {"l2d": tiny_runs.diffusion_run, "tess": tiny_runs.tess_run}
FAMILY = {"l2d": "piecewise", "tess": "gumbel"}


@pytest.fixture(scope="module", autouse=True)
def _credulous():
    # These runs are too short for a fall beyond noise, and what is learned must move the times to be felt.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(information, "_CAUTION", 0)
        yield


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    tiny_runs.write_base(folder / "base")
    tiny_runs.write_sums(folder / "sums.jsonl", 14)
    return folder


def fields(folder, method, name, **training):
    run = METHODS[method](folder / "base", folder / "sums.jsonl", folder / f"{method}-{name}", **training)
    # Few knots, so that a few updates are trusted and a small difference in them is felt.
    schedule = {"name": "information", "base": run["schedule"], "family": FAMILY[method], "knots": 8}
    return run | {"schedule": schedule}


def statistics(folder, method, name):
    return load_file(folder / f"{method}-{name}" / "diffusion.safetensors")["schedule._extra_state"]


@pytest.fixture(scope="module")
def whole(folder, method):
    train_runs([parse_run(fields(folder, method, "whole"))])
    return tiny_runs.losses(folder / f"{method}-whole")


def test_training_tells_the_schedule_every_draw_once(folder, method, whole):
    found = statistics(folder, method, "whole")
    assert (found >= 0).all()
    assert found[1].any()
    model = load(folder / f"{method}-whole")
    assert torch.equal(model.schedule.statistics, found)
    times = model.schedule.grid(5, 1.0)
    assert times != pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-3)


def test_a_resumed_run_is_the_whole_run_to_the_bit(folder, method, whole):
    with pytest.raises(KeyboardInterrupt):
        train_runs([parse_run(fields(folder, method, "resumed"))], callbacks=lambda _: [tiny_runs.Stop(5)])
    train_runs([parse_run(fields(folder, method, "resumed"))])
    assert tiny_runs.losses(folder / f"{method}-resumed") == whole
    assert torch.equal(statistics(folder, method, "resumed"), statistics(folder, method, "whole"))


def test_micro_batches_do_not_change_what_is_heard(folder, method, whole):
    train_runs([parse_run(fields(folder, method, "micro", micro_batch_size=1))])
    found, wanted = (statistics(folder, method, name) for name in ("micro", "whole"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for step, expected in tiny_runs.losses(folder / f"{method}-micro").items():
        assert whole[step] == pytest.approx(expected, abs=1e-4), step


def test_another_run_may_go_on_with_another_schedule(folder, whole, method):
    if method == "l2d":
        pytest.skip("only a model that holds its language model can be gone on from")
    run = fields(folder, method, "next")
    run["model"] = {"base": str(folder / "tess-whole")}
    same = checkpoint.build_model(parse_run(run))
    assert torch.equal(same.schedule.statistics, statistics(folder, method, "whole"))
    assert not checkpoint.build_model(
        parse_run(run | {"schedule": {**run["schedule"], "knots": 4}})
    ).schedule.statistics.any()
    checkpoint.build_model(parse_run(run | {"schedule": {"name": "cosine"}}))
