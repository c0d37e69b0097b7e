"""What a drafter is worth on texts that copy and on others: `python bench/speed/drafters.py MODEL [--device cuda]`.

A pretrained language model goes on with a text that repeats itself and with one that does not, with L2D over it that is
not trained: its path moves the language model's states a little, so that some guesses are wrong. How often the language
model itself would guess right is the agreement of a question, counted over a longer answer. Every round measures every
case once, ratios are medians over rounds, and on a CPU seconds are those of the process.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import known_device, known_model, result_file, write_card
from gpu import Bench
from torch import Tensor
from transformers import AutoModelForCausalLM

from l2d_framework.cli import run_script
from l2d_framework.opening import open_model, open_tokenizer
from l2d_framework.training.run_record import environment

LIST = (
    "apples 12, pears 7, plums 31, grapes 5, lemons 18, cherries 44, oranges 9, figs 3, dates 27, melons 2, "
    "peaches 15, berries 60, kiwis 21, mangos 6"
)
TASKS = {
    "copy": f"Stock of the shop: {LIST}.\n\nThe same list once more, for the other shop: apples 12, pears 7,",
    "invent": "Once upon a time there was a fisherman who",
}
_LONGER = 4
"""How many times as long the answer is over which agreement is counted."""
CASES: dict[str, dict[str, Any]] = {
    "off": {"speculate": "off"},
    "main path, 4": {"speculate": 4},
    "prompt_lookup, 4": {"speculate": 4, "drafter": "prompt_lookup"},
}


class Pretrained(Bench):
    """A pretrained language model and one prompt for it; `size` is where it lies."""

    asked = ""
    assistants: Sequence[str] = ()

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """`CASES`, and one for each assistant."""
        assisted = {
            f"assistant {Path(model).name}, 4": {"speculate": 4, "drafter": {"name": "assistant", "model": model}}
            for model in self.assistants
        }
        return CASES | assisted

    @cached_property
    def lm(self) -> Any:
        """The language model."""
        lm: Any = open_model(AutoModelForCausalLM, self.size, dtype=self.dtype)[0]
        return lm.to(self.device).eval()

    def tokens(self, rows: int, length: int | None = None) -> Tensor:
        """The prompt, several times over.

        Args:
            rows: how often.
            length: without meaning here.

        Returns:
            Ids, (rows, S).
        """
        ids = open_tokenizer(self.size)(self.asked).input_ids
        return torch.tensor([ids] * rows, device=self.device)


def shortened(bench: Pretrained, layers: int, folder: Path) -> str:
    """The first layers of the language model, saved as one of their own, for want of a small one that is trained.

    Args:
        bench: what is measured.
        layers: how many.
        folder: where to save it.

    Returns:
        The folder.
    """
    lm = copy.deepcopy(bench.lm)
    lm.model.layers = lm.model.layers[:layers]
    lm.config.num_hidden_layers = layers
    lm.save_pretrained(folder)
    open_tokenizer(bench.size).save_pretrained(folder)
    return str(folder)


def compare(bench: Pretrained, task: str, scale: float, steps: int) -> None:
    """Every drafter on one task.

    Args:
        bench: what is measured.
        task: one of `TASKS`.
        scale: how far the diffusion path moves the language model's states.
        steps: evaluations of a token.
    """
    bench.asked = TASKS[task]
    bench.agree(scale)
    options = {"estimate": {"mode": "argmax"}, "num_inference_steps": steps}
    shares: dict[str, float] = {}
    answers: dict[str, list[int]] = {}

    bench.answer(1, **options, speculate=1, max_new_tokens=_LONGER * bench.new_tokens)
    made, right = bench.last.guesses
    agreement = right / max(made, 1)

    def run(name: str) -> int:
        made = bench.answer(1, **options, **bench.cases[name])
        guessed, right = bench.last.guesses
        shares[name], answers[name] = right / max(guessed, 1), bench.last.answers[0].tolist()
        return made

    title = f"{task}, scale {scale:g}, {steps} evaluations"
    cases = {name: partial(run, name) for name in bench.cases}
    bench.ask(title, cases, agreement=agreement, right=shares, evaluations=steps, scale=scale)
    bench.questions[title]["answers_are_equal"] = len(set(map(tuple, answers.values()))) == 1
    bench.keep()
    print(f"  agreement {agreement:.2f}; share of guesses that are right", shares)


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a language model.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every case.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    steps: Annotated[list[int] | None, typer.Option(help="Evaluations of a token; 3 and 15 if absent.")] = None,
    scales: Annotated[
        list[float] | None, typer.Option(help="Of the diffusion path; 0, 3,000 and 10,000 if absent.")
    ] = None,
    assistant: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a language model that guesses; none if absent.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Also let so many of its first layers guess.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; bench/results/drafters_DEVICE.json if absent.")] = None,
) -> None:
    """Measure, print, and write the result file after each question."""
    where = known_device(device)
    model, *assistants = map(known_model, (model, *(assistant or ())))
    out = result_file(out, f"drafters_{where.type}.json")
    torch.set_num_threads(1)
    bench = Pretrained(where, model, 0, new_tokens, rounds)
    bench.assistants = assistants
    settings = {"model": Path(model).name, "tasks": TASKS, "new_tokens": new_tokens, "rounds": rounds}
    unit = "cpu" if where.type == "cpu" else "wall"
    card = {"device": device, "seconds_are": unit, "settings": settings, **environment(1)}

    def keep() -> None:
        write_card(out, card | {"questions": bench.questions})

    bench.keep = keep
    with TemporaryDirectory() as temporary:
        if layers is not None:
            folder = Path(temporary) / f"of its first {layers} layers"
            bench.assistants = [*bench.assistants, shortened(bench, layers, folder)]
        for count in steps or (3, 15):
            for scale in scales or (0.0, 3000.0, 10000.0):
                for task in TASKS:
                    compare(bench, task, scale, count)


if __name__ == "__main__":
    run_script(main)
