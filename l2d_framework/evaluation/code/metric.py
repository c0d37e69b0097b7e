"""The metric `code_eval`: which share of programs passes its tests."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.code.sandbox import CONSENT, Limits, Sandbox

NAME = "code_eval"
SANDBOX = Sandbox()


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of `k` programs passes (arXiv:2107.03374, Eq. 1)."""
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"Needs 0 <= passed <= samples and 1 <= k <= samples, got {passed=}, {samples=}, {k=}.")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


class CodeEval:
    """Stands where tasks expect `evaluate.load("code_eval")`; runs programs in the sandbox."""

    name = NAME

    def compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        *,
        k: Sequence[int] = (1, 10, 100),
        num_workers: int | None = None,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run candidates with their problem's tests: "pass@k", if all have so many, and what became of each."""
        if os.environ.get(CONSENT) != "1":
            raise ConfigError(
                "This task runs programs that the model writes. They run in a sandbox, which stops accidents but is no "
                f"security boundary. If you agree, pass --confirm_run_unsafe_code; from Python, also set {CONSENT}=1 "
                "in the environment."
            )
        pairs = list(zip(predictions, references, strict=True))
        programs = [(candidate, tests) for candidates, tests in pairs for candidate in candidates]
        sandbox = SANDBOX if timeout == SANDBOX.limits.seconds else Sandbox(Limits(seconds=timeout))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            outcomes = sandbox.run_all(programs, workers=num_workers or _processors(), bar=_progress())
        else:  # of processes that evaluate together, only the first one's scores count
            outcomes = ["not run"] * len(programs)
        answers = iter(outcomes)
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {
            task: [
                (number, {"task_id": task, "passed": answer == "passed", "result": answer, "completion_id": number})
                for number, answer in enumerate(islice(answers, len(candidates)))
            ]
            for task, (candidates, _) in enumerate(pairs)
        }
        counts = [(len(entries), sum(entry["passed"] for _, entry in entries)) for entries in results.values()]
        scores = {
            f"pass@{tries}": sum(pass_at_k(samples, passed, tries) for samples, passed in counts) / len(counts)
            for tries in k
            if counts and all(samples >= tries for samples, _ in counts)
        }
        return scores, results


def _processors() -> int:
    """Those that this process may use; more programs at a time would run into timeouts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _progress() -> tqdm:
    # Tasks call once per document, so one bar counts over all calls.
    return tqdm(desc="Running programs", unit=" programs", delay=1)


def passes(program: str, timeout: float = 3.0) -> bool:
    """Whether a program runs to its end."""
    _, results = CodeEval().compute([[program]], [""], k=[1], timeout=timeout)
    return bool(results[0][0][1]["passed"])


def serve() -> None:
    """Let `evaluate.load("code_eval")` give this metric instead of fetching one; all other names are untouched."""
    import evaluate  # type: ignore[import-untyped]

    upstream = evaluate.load
    if getattr(upstream, "gives_code_eval", False):
        return

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == NAME else upstream(path, *arguments, **options)

    load.gives_code_eval = True  # type: ignore[attr-defined]
    evaluate.load = load
