"""What `l2d generate` does: check everything without weights, load, answer in batches, write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, TextStreamer

from l2d_framework.cli.drafts import Drafts
from l2d_framework.cli.loading import check_device, check_dtype
from l2d_framework.cli.rows import write_rows
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.errors import ConfigError
from l2d_framework.generation.arguments import picking
from l2d_framework.generation.infill import check_infilling, read_gaps
from l2d_framework.generation.prompts import Prompt, check_length, encode_prompts, pad_left
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.unloaded import CLASS, SCALE, UnloadedModel


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
    ) -> None:
        check_dtype(dtype)
        if options.get("temperature", 1.0) <= 0:
            raise ConfigError(
                f"--temperature must be above 0, got {options['temperature']}. Leave --do-sample out for the likeliest "
                "tokens."
            )
        picking(options | ({"stop_strings": list(stop)} if stop else {}))
        self.options, self.class_name, self.stop, self.samples = options, class_name, list(stop), samples
        self.model = model = UnloadedModel(path, base=base, dtype=dtype)
        settings = model.sampling({**sampling, CLASS: class_name, SCALE: guidance_scale})
        model.check_class(settings, is_named=class_name is not None, where="Add --class NAME.")
        self.sampling, self.scale = sampling, guidance_scale
        self.tokenizer = model.tokenizer
        self.is_whole = (settings.block_size or model.parts.block_size) != 1
        self.lm: DiffusionLM | None = None

    def encode(self, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of prompts, refused when an answer would not fit."""
        batch = encode_prompts(self.tokenizer, prompts, self.model.origin.chat_template, names=names)
        config = GenerationConfig(max_new_tokens=self.options["max_new_tokens"])
        check_length([len(tokens) for tokens in batch], config, self.model.lm_config, names=names)
        return batch

    def check_output(self, output: Path | None) -> None:
        """Refuse a file that cannot be written."""
        if output is None:
            return
        if output.exists():
            raise ConfigError(f"{str(output)!r} exists. Name another --output, so that nothing is lost.")
        if not os.access(output.resolve().parent, os.W_OK):
            raise ConfigError(
                f"{str(output.resolve().parent)!r} is missing or cannot be written. Name another --output."
            )

    def load(self, device: str | None, *, merge: bool) -> None:
        """Load the weights."""
        self.lm = self.model.load(check_device(device))
        if merge:
            self.lm.backbone.merge()

    def check_infilling(self, texts: Sequence[str]) -> None:
        """Refuse texts with gaps that this model cannot fill; needs no weights."""
        read_gaps(self.tokenizer, texts, self.model.lm_config)
        check_infilling(self.model.empty)

    def infill(self, texts: Sequence[str], *, output: Path | None) -> None:
        """Fill gaps in texts, print and write the results."""
        assert self.lm is not None
        filled = [self.lm.infill(text, **self.sampling) for text in texts]
        found = [one.texts(self.tokenizer)[0] for one in filled]
        for text in found:
            typer.echo(text)
        pairs = zip(texts, found, strict=True)
        write_rows(output, [{"infill": text, "answers": [{"text": new}]} for text, new in pairs])

    def trace(self, prompt: Prompt, path: Path, *, output: Path | None) -> None:
        """Answer one prompt, print and write the answer, and write how it took shape."""
        from l2d_framework.tracing import Recorder, write_trace

        recorder = Recorder()
        batch = self.encode([prompt])
        found = self.answer([prompt], batch, request_keys(batch), observer=recorder)[0]
        title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        trace = recorder.finish([*batch[0], *found.pop("ids")])
        write_trace(trace, self.tokenizer, path, title=title)
        typer.echo(found["text"])
        write_rows(output, [{"prompt": prompt, "answers": [found]}])

    def answer(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[Sequence[int]],
        keys: Sequence[str],
        *,
        streamer: Any = None,
        observer: Any = None,
    ) -> list[dict[str, Any]]:
        """Per answer to an encoded prompt its text, token ids, number of tokens and mean evaluations."""
        assert self.lm is not None
        tokenizer: Any = self.tokenizer
        options: dict[str, Any] = {**self.sampling, **self.options}
        if self.stop:
            options["stop_strings"] = self.stop
        output = self.lm.generate(
            pad_left(batch, keys, chats=[not isinstance(prompt, str) for prompt in prompts]),
            classes=None if self.class_name is None else [self.class_name] * len(batch),
            guidance_scale=self.scale,
            num_return_sequences=self.samples,
            streamer=streamer,
            observer=observer,
            **options,
        )
        found = [
            {
                "text": self._cut(tokenizer.decode(tokens[: int(count)], skip_special_tokens=True)),
                "ids": tokens[: int(count)].tolist(),
                "tokens": int(count),
                "evaluations_per_token": round(float(cost[: int(count)].float().mean()), 2),
            }
            for tokens, cost, count in zip(output.answers, output.evaluations, output.lengths, strict=True)
        ]
        for name, values in output.metrics.items():
            for row, answer in zip(values.tolist(), found, strict=True):
                answer[name] = [round(value, 4) for value in row if value == value]
        return found

    def _cut(self, text: str) -> str:
        found = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(found)] if found else text

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
            rows = []
            keys = request_keys(encoded)
            # Answers alone go to standard output, which may be a pipe.
            console = Console(stderr=True)
            with Progress(console=console, transient=True, disable=len(encoded) <= batch_size) as progress:
                for start in progress.track(range(0, len(encoded), batch_size), description="generating"):
                    part = slice(start, start + batch_size)
                    found = self.answer(prompts[part], encoded[part], keys[part])
                    rows += [found[i : i + self.samples] for i in range(0, len(found), self.samples)]
            for answers in rows:
                for answer in answers:
                    typer.echo(answer["text"])
        for answer in (answer for answers in rows for answer in answers):
            answer.pop("ids", None)
        write_rows(output, [{"prompt": p, "answers": a} for p, a in zip(prompts, rows, strict=True)])
