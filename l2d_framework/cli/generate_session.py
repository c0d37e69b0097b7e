"""What `l2d generate` does: read prompts, check everything without weights, load, answer in batches, write."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import typer
from fsspec.utils import infer_compression
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import GenerationConfig, TextStreamer

from l2d_framework.cli.common import bar, check_device, check_dtype
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.errors import ConfigError, DataError
from l2d_framework.evaluation.tables import write_whole
from l2d_framework.generation.arguments import decoding_options, request
from l2d_framework.generation.chat_template import check_conversation
from l2d_framework.generation.infill import check_infilling, read_gaps
from l2d_framework.generation.prompts import Prompt, check_length, encode_prompts, pad_left
from l2d_framework.generation.speculation import Guesses
from l2d_framework.lines import read_lines, read_objects
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import CLASS, SCALE, UnloadedModel


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
    """Refuse a file that cannot be written."""
    if output is None:
        return
    if output.exists():
        raise ConfigError(f"{str(output)!r} exists. Name another --output, so that nothing is lost.")
    if not os.access(output.resolve().parent, os.W_OK):
        raise ConfigError(f"{str(output.resolve().parent)!r} is missing or cannot be written. Name another --output.")


def write_rows(output: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file, if one is named, in one piece."""
    if output is None:
        return
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
        self.lm = self.model.load(check_device(device))

    def check_infilling(self, texts: Sequence[str]) -> None:
        """Refuse texts with gaps that this model cannot fill; needs no weights."""
        read_gaps(self.tokenizer, texts, self.model.lm_config)
        check_infilling(self.model.empty)

    def infill(self, texts: Sequence[str], *, output: Path | None) -> None:
        """Fill gaps in texts, print and write the results."""
        assert self.lm is not None
        answers = [self.lm.infill(text, **self.sampling).texts(self.tokenizer)[0] for text in texts]
        for answer in answers:
            typer.echo(answer)
        pairs = zip(texts, answers, strict=True)
        write_rows(output, [{"infill": text, "answers": [{"text": new}]} for text, new in pairs])

    def trace(self, prompt: Prompt, path: Path, *, output: Path | None) -> None:
        """Answer one prompt, print and write the answer, and write how it took shape."""
        from l2d_framework.tracing import Recorder, write_trace

        recorder = Recorder()
        batch = self.encode([prompt])
        answer = self.answer([prompt], batch, request_keys(batch), observer=recorder)[0]
        title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        trace = recorder.finish([*batch[0], *answer.pop("ids")])
        write_trace(trace, self.tokenizer, path, title=title)
        typer.echo(answer["text"])
        write_rows(output, [{"prompt": prompt, "answers": [answer]}])

    def answer(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[Sequence[int]],
        keys: Sequence[str],
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Per answer to an encoded prompt its text, token ids, number of tokens and mean evaluations."""
        assert self.lm is not None
        tokenizer: Any = self.tokenizer
        stop = {"stop_strings": self.stop} if self.stop else {}
        output = self.lm.generate(
            pad_left(batch, keys, chats=[not isinstance(prompt, str) for prompt in prompts]),
            classes=None if self.class_name is None else [self.class_name] * len(batch),
            guidance_scale=self.scale,
            num_return_sequences=self.samples,
            **options,
            **self.running,
            **{**self.sampling, **self.options, **stop},
        )
        answers = [
            {
                "text": self._cut(tokenizer.decode(tokens[:count], skip_special_tokens=True)),
                "ids": tokens[:count].tolist(),
                "tokens": count,
                "evaluations_per_token": round(float(cost[:count].float().mean()), 2),
            }
            for tokens, cost, count in zip(output.answers, output.evaluations, output.lengths.tolist(), strict=True)
        ]
        for name, values in output.metrics.items():
            for row, answer in zip(values.tolist(), answers, strict=True):
                answer[name] = [round(value, 4) for value in row if value == value]
        return answers

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
            rows = [[{"text": self.stream(prompts[0])}]]
        else:
            with bar(is_shown=len(encoded) > batch_size) as progress:
                task = progress.add_task("generating", total=len(encoded) * self.samples)
                answers = self.answer(
                    prompts,
                    encoded,
                    request_keys(encoded),
                    batch_size=batch_size * self.samples,
                    on_answer=lambda *_: progress.advance(task),
                )
            rows = [answers[i : i + self.samples] for i in range(0, len(answers), self.samples)]
            for answer in itertools.chain(*rows):
                typer.echo(answer["text"])
                del answer["ids"]
        write_rows(output, [{"prompt": p, "answers": a} for p, a in zip(prompts, rows, strict=True)])

    def talk(self) -> None:
        """A conversation on the terminal, ended by an empty line or the end of input."""
        messages: list[dict[str, str]] = []
        with suppress(EOFError):
            while line := input("> ").strip():
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": self.stream(messages)})
