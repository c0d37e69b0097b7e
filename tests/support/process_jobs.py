"""What several processes do in one launch, since each takes seconds to start: `torchrun process_jobs.py JOBS.json`.

Jobs are, in this order: `answers`, arguments of `l2d generate` and of an evaluation; `faults`, runs of which one
process spoils something; `short`, runs of which one process is short of memory; `plain`, runs whose weights are whole
in each process; `mixed`, a run in shares that ends before its fourth update; `shares`, a run file in shares, by the
command.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_runs
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from l2d_framework import cli
from l2d_framework.config import parse_run
from l2d_framework.training.data import sources, stream
from l2d_framework.training.learner import Denoiser
from l2d_framework.training.run import train_runs

_FORWARD, _READ = Denoiser.forward, sources.read_objects


class Fault(TrainerCallback):
    """In the second process the third update goes wrong."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        here = args.process_index == 1 and state.global_step == 2
        Denoiser.forward = _spoilt if here and self.name in ("skip", "stop") else _FORWARD  # type: ignore[method-assign]
        if here and self.name == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if here and self.name == "lost":
            stream.WAITS, sources.read_objects = (0.0,), _lost


def _lost(*_: Any) -> Any:
    raise ConnectionError("the network is down")


def _spoilt(self: Denoiser, **batch: Any) -> Any:
    outputs = _FORWARD(self, **batch)
    # The loss of one process only, and no gradient of any.
    outputs["loss"] = outputs["loss"] + outputs["loss"].detach() * float("inf") if self.training else outputs["loss"]
    return outputs


def _limited(self: Denoiser, **batch: Any) -> Any:
    if self.training and os.environ["RANK"] == "1" and len(batch["index"]) > 1:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")
    return _FORWARD(self, **batch)


class Shares(TrainerCallback):
    """Counts what a process has of weights and optimizer states, and how many units are gathered while one runs."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.gathered: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        learner = kwargs["model"]
        parameters = list(learner.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        self.found["own"] = sum(parameter.to_local().numel() for parameter in parameters)
        self.found["all"] = sum(parameter.numel() for parameter in parameters)
        units = [unit for unit in learner.units() if len(unit) > 1]

        def count(*_: Any) -> None:
            firsts = [next(iter(unit[0].parameters())) for unit in units]
            self.gathered.append(sum(not isinstance(first, DTensor) for first in firsts))

        for unit in units:
            for module in unit:
                module.register_forward_pre_hook(count)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        moments = [known["exp_avg"] for known in optimizer.state.values()]
        assert moments and all(isinstance(moment, DTensor) for moment in moments)
        self.found["most gathered"] = max(self.gathered)


class Moments(TrainerCallback):
    """Writes how many numbers a process has of the running means of gradients."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        means = [known["exp_avg"].numel() for known in kwargs["optimizer"].state.values()]
        self.file.write_text(str(sum(means)))


def evaluated(tasks: str, model: str) -> tuple[Any, int]:
    """Results and answers of all tasks in a folder, None but in the first process; the tokens that this one wrote."""
    import lm_eval.tasks

    from l2d_framework.evaluation.harness.model import L2DLM

    manager = lm_eval.tasks.TaskManager(include_path=tasks, include_defaults=False)
    lm = L2DLM(model, num_inference_steps=3, noise_samples=1, device="cpu", batch_size=1)
    found = lm_eval.simple_evaluate(lm, tasks=manager.all_tasks, task_manager=manager)
    written = lm.meters["generation"].evaluations.total()
    if found is None:
        return None, written
    answers = [[one["arguments"], one["resps"]] for rows in found["samples"].values() for one in rows]
    return json.loads(json.dumps([found["results"], answers])), written


def main() -> None:
    file = Path(sys.argv[1])
    jobs, rank = json.loads(file.read_text(encoding="utf-8")), os.environ["RANK"]
    if "answers" in jobs:
        asked, evaluation = jobs["answers"]
        cli.app(["generate", *asked], standalone_mode=False)
        if evaluation is not None:
            (file.parent / f"evaluated_{rank}.json").write_text(json.dumps(evaluated(**evaluation)))
    for name, run in jobs.get("faults", {}).items():
        try:
            train_runs([parse_run(run)], callbacks=lambda _, name=name: [Fault(name)])
            ended = 0
        except (Exception, KeyboardInterrupt) as error:
            ended = error.exit_code  # type: ignore[union-attr]
        (file.parent / f"{name}_{rank}").write_text(str(ended))
    sources.read_objects = _READ
    Denoiser.forward = _limited  # type: ignore[method-assign]
    for run in jobs.get("short", []):
        train_runs([parse_run(run)])
    Denoiser.forward = _FORWARD  # type: ignore[method-assign]
    for run in jobs.get("plain", []):
        train_runs([parse_run(run)], callbacks=lambda _: [Moments(file.parent / f"moments_{rank}")])
    # From here on as if accelerate's launcher had been told to use FSDP2.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    if "mixed" in jobs:
        shares = Shares()
        try:
            train_runs([parse_run(jobs["mixed"])], callbacks=lambda _: [shares, tiny_runs.Stop(3)])
        except KeyboardInterrupt:
            (file.parent / f"shares_{rank}.json").write_text(json.dumps(shares.found))
    if "shares" in jobs:
        sys.argv = ["l2d", "train", jobs["shares"]]
        cli.main()


if __name__ == "__main__":
    main()
