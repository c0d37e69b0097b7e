"""What `l2d generate` does: read prompts, check everything without weights, load, answer in batches, write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import torch
import typer
from fsspec.utils import infer_compression
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from typing_extensions import override

from l2d_framework.cli.common import check_device, check_dtype, check_file, quieten
from l2d_framework.cli.meter import Meter
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.errors import ConfigError, DataError, OutputError
from l2d_framework.generation.arguments import decoding_options, request
from l2d_framework.generation.chat_template import check_conversation
from l2d_framework.generation.infill import check_infilling, read_gaps
from l2d_framework.generation.prompts import Prompt, check_length, encode_prompts, pad_left
from l2d_framework.generation.speculation import Guesses
from l2d_framework.lines import read_lines, read_objects
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import CLASS, SCALE, UnloadedModel
from l2d_framework.types import Query
from l2d_framework.writing import write_whole

_REFRESH = 0.5
"""Seconds between two looks at a count that lies on the device."""


def read_prompts(texts: Sequence[str], file: Path | None, *, chat: bool) -> dict[str, Prompt]:
    """Prompts of the command line and of a file (text or JSONL), in order, by what messages call them."""
    prompts: dict[str, Prompt] = {f"Prompt {number}": text for number, text in enumerate(texts)}
    if file is not None:
        if not file.is_file():
            raise DataError(f"There is no file {str(file)!r}. Give a text file with one prompt a line, or JSONL.")
        is_json = Path(file.stem if infer_compression(str(file)) else file).suffix in (".jsonl", ".json")
        read: Iterable[tuple[int, Any]] = read_objects(file) if is_json else read_lines(file)
        rows = {f"{file}:{number}": value for number, value in read}
        if not rows:
            raise DataError(f"{str(file)!r} holds no prompt.")
        prompts |= {where: _json_prompt(row, where) if is_json else row for where, row in rows.items()}
    return {
        where: [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
        for where, prompt in prompts.items()
    }


def _json_prompt(row: dict[str, Any], where: str) -> Prompt:
    prompt = next((row[name] for name in ("prompt", "messages") if row.get(name) is not None), None)
    if not isinstance(prompt, (str, list)):
        raise DataError(f"{where} has neither `prompt` nor `messages`; it has {list(row)}.")
    try:
        return prompt if isinstance(prompt, str) else check_conversation(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def check_output(output: Path | None) -> None:
    """Refuse a file that is there or cannot be written."""
    check_file(output, "--output")
    if output is not None and (part := _part(output)).exists():
        raise ConfigError(
            f"{str(part)!r} holds the answers of a generation that goes on or was interrupted. Move it elsewhere, or "
            "name another --output."
        )


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


class AnswerFile:
    """A JSONL file, if one is named, under the name of a part until the last row is in it.

    Rows are in the file as soon as they are known, so an interruption loses none.
    """

    def __init__(self, output: Path | None) -> None:
        self._output = output

    def __enter__(self) -> Self:
        if self._output is not None:
            check_output(self._output)
            with suppress(FileExistsError):
                self._file = _part(self._output).open("x", encoding="utf-8")
                return self
            check_output(self._output)  # whoever made it meanwhile has it
        return self

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows."""
        if self._output is None:
            return
        try:
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{str(self._output)!r} could not be written: {error.strerror}. Earlier answers are in "
                f"{str(_part(self._output))!r}."
            ) from error

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write all rows anew, in their order and with all that is known of them now."""
        if self._output is not None:
            write_whole(_part(self._output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def __exit__(self, kind: object, *_: object) -> None:
        if self._output is None:
            return
        part = _part(self._output)
        with suppress(OSError):  # what could not be written before cannot now
            self._file.close()
        if kind is None:
            self._publish(part, self._output)
        elif part.stat().st_size:
            typer.echo(f"The answers so far are in {part}.", err=True)
        else:
            part.unlink()

    @staticmethod
    def _publish(part: Path, output: Path) -> None:
        """Give the file its name, unless somebody else has taken it meanwhile."""
        try:
            os.link(part, output)
        except FileExistsError as error:
            raise OutputError(
                f"{str(output)!r} was made by somebody else meanwhile. The answers are in {str(part)!r}."
            ) from error
        except OSError:  # a file system without links
            os.replace(part, output)
        else:
            part.unlink()


class Drafts:
    """An observer that shows the likeliest tokens of every evaluation in the place of the last, on a terminal only."""

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ends = {tokenizer.eos_token_id, *ends}
        self._before: dict[int, list[int]] = {}
        self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, evaluation: Evaluation) -> None:
        """Show one draft."""
        if not self._live.console.is_terminal:
            return
        # Blocks that are finished stay in front of the one that is being denoised.
        self._before[int(evaluation.positions[0, 0])] = evaluation.logits[0].argmax(-1).tolist()
        tokens = [token for start in sorted(self._before) for token in self._before[start]]
        tokens = list(takewhile(lambda token: token not in self._ends, tokens))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self._live.update(Text(f"t = {float(evaluation.t[0, 0]):.2f}  {text}"), refresh=True)


class Watch(StoppingCriteria):
    """A criterion that ends nothing and counts tokens for a meter; evaluations, too, where a block has many tokens.

    Where tokens are guessed ahead, those that were wrong count, too.
    """

    def __init__(self, meter: Meter, lm: DiffusionLM, *, counts_evaluations: bool) -> None:
        self._meter, self._lm, self._counts = meter, lm, counts_evaluations
        pad = lm.backbone.lm.generation_config.pad_token_id
        self._pad = -1 if pad is None else pad
        self._evaluations = 0
        self._tokens: Tensor | int = 0
        self._told = 0.0

    def __enter__(self) -> Self:
        if self._counts:
            features = self._lm.features

            def counted(query: Query) -> Tensor:
                self._evaluations += 1
                self._tell()
                return features(query)

            # The one way to the network; an observer would have all logits made.
            self._lm.features = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            del self._lm.features

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, -1]
        # Rows that have ended go on with padding. The sum stays on the device until it is shown.
        self._tokens = self._tokens + (new != self._pad).sum()
        self._tell()
        return torch.zeros_like(new, dtype=torch.bool)

    def finish(self, prompts: int) -> None:
        """So many more prompts are answered."""
        self._told = 0.0
        self._tell()
        self._meter.advance(prompts)

    def _tell(self) -> None:
        now = self._meter.seconds
        if now - self._told < _REFRESH and self._told:
            return
        self._told = now
        tokens = int(self._tokens)
        facts = [f"{tokens:,} tokens", f"{tokens / now:,.1f} tokens/s"] if tokens else []
        self._meter.facts = "  ".join(facts + [f"{self._evaluations:,} evaluations"] * self._counts)


class Session:
    """One model and one set of options; everything but `load` and what follows it needs no weights."""

    def __init__(
        self,
        path: str,
        *,
        base: str | None,
        dtype: str | None,
        sampling: dict[str, Any],
        options: dict[str, Any],
        guidance_scale: float | None,
        class_name: str | None,
        stop: Sequence[str],
        samples: int,
        running: dict[str, Any],
        is_watched: bool,
    ) -> None:
        check_dtype(dtype)
        if options.get("temperature", 1.0) <= 0:
            raise ConfigError(
                f"--temperature must be above 0, got {options['temperature']}. Leave --do-sample out for the likeliest "
                "tokens."
            )
        decoding_options(options | ({"stop_strings": list(stop)} if stop else {}))
        self.options, self.class_name, self.stop, self.samples = options, class_name, list(stop), samples
        self.model = model = UnloadedModel(path, base=base, dtype=dtype)
        settings = model.sampling({**sampling, CLASS: class_name, SCALE: guidance_scale})
        model.check_class(settings, is_named=class_name is not None, where="Add --class NAME.")
        self.sampling, self.scale, self.running = sampling, guidance_scale, running
        self.tokenizer = model.tokenizer
        guesses = request(**running).guesses
        Guesses.of(model.empty, guesses, settings, block_size=model.parts.block_size, has_observer=is_watched)
        self.is_whole = (settings.block_size or model.parts.block_size) != 1
        self.lm: DiffusionLM | None = None

    def encode(self, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of prompts, refused when an answer would not fit."""
        batch = encode_prompts(self.tokenizer, prompts, self.model.origin.chat_template, names=names)
        config = GenerationConfig(max_new_tokens=self.options["max_new_tokens"])
        check_length([len(tokens) for tokens in batch], config, self.model.lm_config, names=names)
        return batch

    def load(self, device: str | None) -> None:
        """Load the weights."""
        quieten()
        with Meter(f"loading {self.model.path}"):
            self.lm = self.model.load(check_device(device))

    def check_infilling(self, texts: Sequence[str]) -> None:
        """Refuse texts with gaps that this model cannot fill; needs no weights."""
        read_gaps(self.tokenizer, texts, self.model.lm_config)
        check_infilling(self.model.empty)

    def infill(self, texts: Sequence[str], *, output: Path | None) -> None:
        """Fill gaps in texts, print and write the results."""
        assert self.lm is not None
        answers = []
        with AnswerFile(output) as rows, self._watch(len(texts)) as watch:
            for text in texts:
                answers += self.lm.infill(text, **self.sampling).texts(self.tokenizer)
                rows.write([{"infill": text, "answers": [{"text": answers[-1]}]}])
                watch.finish(1)
        for answer in answers:
            typer.echo(answer)

    def trace(self, prompt: Prompt, path: Path, *, output: Path | None) -> None:
        """Answer one prompt, print and write the answer, and write how it took shape."""
        from l2d_framework.tracing import Recorder, write_trace

        recorder = Recorder()
        batch = self.encode([prompt])
        with self._watch(1):
            answer = self.answer([prompt], batch, request_keys(batch), observer=recorder)[0]
        title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        trace = recorder.finish([*batch[0], *answer.pop("ids")])
        write_trace(trace, self.tokenizer, path, title=title)
        typer.echo(answer["text"])
        with AnswerFile(output) as rows:
            rows.write([{"prompt": prompt, "answers": [answer]}])

    def answer(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[Sequence[int]],
        keys: Sequence[str],
        *,
        watch: Watch | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Per answer to an encoded prompt its text, token ids, number of tokens and mean evaluations."""
        assert self.lm is not None
        stop = {"stop_strings": self.stop} if self.stop else {}
        output = self.lm.generate(
            pad_left(batch, keys, chats=[not isinstance(prompt, str) for prompt in prompts]),
            classes=None if self.class_name is None else [self.class_name] * len(batch),
            guidance_scale=self.scale,
            num_return_sequences=self.samples,
            stopping_criteria=None if watch is None else StoppingCriteriaList([watch]),
            **options,
            **self.running,
            **{**self.sampling, **self.options, **stop},
        )
        rows = zip(output.answers.tolist(), output.evaluations.tolist(), output.lengths.tolist(), strict=True)
        answers = [
            self._described(tokens[:count], cost[:count]) | {"ids": tokens[:count]} for tokens, cost, count in rows
        ]
        for name, values in output.metrics.items():
            for row, answer in zip(values.tolist(), answers, strict=True):
                answer[name] = [round(value, 4) for value in row if value == value]
        return answers

    def _described(self, tokens: list[int], evaluations: list[int]) -> dict[str, Any]:
        tokenizer: Any = self.tokenizer
        return {
            "text": self._cut(tokenizer.decode(tokens, skip_special_tokens=True)),
            "tokens": len(tokens),
            "evaluations_per_token": round(sum(evaluations) / len(evaluations), 2),
        }

    def _cut(self, text: str) -> str:
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=len(text))]

    def stream(self, prompt: Prompt) -> str:
        """Answer one prompt, printing tokens as they come."""
        batch = self.encode([prompt])
        keys = request_keys(batch)
        if self.is_whole:
            assert self.lm is not None
            with Drafts(self.tokenizer, self.lm.ends(is_chat=not isinstance(prompt, str))) as drafts:
                text = str(self.answer([prompt], batch, keys, observer=drafts)[0]["text"])
            typer.echo(text)
            return text
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return str(self.answer([prompt], batch, keys, streamer=streamer)[0]["text"])

    def answer_all(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[Sequence[int]],
        *,
        batch_size: int,
        stream: bool,
        output: Path | None,
    ) -> None:
        """Answer all prompts, print and write the answers."""
        if stream:
            with AnswerFile(output) as file:
                file.write([{"prompt": prompts[0], "answers": [{"text": self.stream(prompts[0])}]}])
            return
        with AnswerFile(output) as file, self._watch(len(encoded)) as watch:
            left = [self.samples] * len(encoded)

            def keep(number: int, tokens: list[int], evaluations: list[int]) -> None:
                prompt = number // self.samples
                left[prompt] -= 1
                file.write([{"prompt": prompts[prompt], "answers": [self._described(tokens, evaluations)]}])
                watch.finish(int(not left[prompt]))

            size = batch_size * self.samples
            answers = self.answer(prompts, encoded, request_keys(encoded), watch=watch, batch_size=size, on_answer=keep)
            for answer in answers:
                del answer["ids"]
            grouped = (answers[i : i + self.samples] for i in range(0, len(answers), self.samples))
            pairs = zip(prompts, grouped, strict=True)
            file.replace({"prompt": prompt, "answers": group} for prompt, group in pairs)
        for answer in answers:
            typer.echo(answer["text"])

    @contextmanager
    def _watch(self, prompts: int) -> Iterator[Watch]:
        assert self.lm is not None
        with (
            Meter("generating", "prompts", prompts) as meter,
            Watch(meter, self.lm, counts_evaluations=self.is_whole) as watch,
        ):
            yield watch

    def talk(self) -> None:
        """A conversation on the terminal, ended by an empty line or the end of input."""
        messages: list[dict[str, str]] = []
        with suppress(EOFError):
            while line := input("> ").strip():
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": self.stream(messages)})
