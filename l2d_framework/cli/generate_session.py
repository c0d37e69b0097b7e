"""What `l2d generate` does: check everything without weights, load, answer in batches, write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, TextStreamer

from l2d_framework.base_model import empty_language_model, fetch, load_config, load_tokenizer
from l2d_framework.cli.drafts import Drafts
from l2d_framework.cli.rows import write_rows
from l2d_framework.config import default_sampling, parse_sampling
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.diffusion.sampling import check_sampling
from l2d_framework.errors import ConfigError, suggest
from l2d_framework.generation.arguments import picking
from l2d_framework.generation.infill import check_infilling, read_gaps
from l2d_framework.generation.prompts import Prompt, check_length, encode_prompts, pad_left
from l2d_framework.models.checkpoint import load
from l2d_framework.models.diffusion_lm import DiffusionLM, rescaled
from l2d_framework.models.manifest import base_reference, read_manifest
from l2d_framework.registry import registry


class Session:
    """One model and one set of options; everything but `load` and what follows it needs no weights.

    Args:
        model: checkpoint folder or hub id.
        base: where the base model lies now.
        dtype: of the weights.
        sampling: fields of the sampling section.
        options: fields of transformers' generation configuration.
        guidance_scale: scale of the guidance.
        class_name: class label of every prompt.
        stop: strings that end an answer.
        samples: answers per prompt.
    """

    def __init__(
        self,
        model: str,
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
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")
        if options.get("temperature", 1.0) <= 0:
            raise ConfigError(
                f"--temperature must be above 0, got {options['temperature']}. Leave --do-sample out for the likeliest "
                "tokens."
            )
        picking(options | ({"stop_strings": list(stop)} if stop else {}))
        self.path, self.base, self.dtype = model, base, dtype
        self.sampling, self.options = sampling, options
        self.class_name, self.stop, self.samples = class_name, list(stop), samples
        folder = fetch(model)
        manifest = read_manifest(folder)
        self.reference = base_reference(folder, manifest, base=base, dtype=dtype)
        parametrization: Any = registry().create("parametrization", manifest["parametrization"])
        backbone: Any = registry().create("backbone", manifest["backbone"])
        section = manifest["sampling"] and parse_sampling(manifest["sampling"])
        resolved = (section or default_sampling(parametrization)).resolve(parametrization, sampling)
        if guidance_scale is not None:
            resolved = rescaled(resolved, guidance_scale)
            self.sampling = {**sampling, "guidance": [entry.to_json() for entry in resolved.guidance]}
        check_sampling(
            resolved,
            num_classes=backbone.num_classes,
            has_condition=class_name is not None,
        )
        self.resolved, self.backbone, self.block_size = resolved, backbone, manifest["block_size"]
        known = manifest["classes"]
        if class_name is not None and class_name not in known:
            hint = suggest(class_name, known) or "."
            raise ConfigError(f"Unknown class {class_name!r}{hint} This model knows {known}.")
        self.chat_template = manifest["chat_template"]
        self.lm_config = load_config(self.reference)
        if resolved.block_size is not None and manifest["block_size"] is not None:
            backbone.check(self.lm_config, resolved.block_size)
        self.tokenizer = load_tokenizer(self.reference)
        for guidance in resolved.guidance:
            guidance.check(self.tokenizer)
        if resolved.num_inference_steps == 0 and not self._empty_backbone().identity_at_zero:
            raise ConfigError(
                "--num-inference-steps 0 means the plain language model, which backbone "
                f"{backbone.component_name()!r} does not contain. Use at least 1."
            )
        self.is_whole = (resolved.block_size or manifest["block_size"]) != 1
        self.lm: DiffusionLM | None = None

    def encode(self, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of prompts, refused when an answer would not fit.

        Args:
            prompts: texts or conversations.
            names: what messages call each of them.

        Returns:
            Ids of each prompt.
        """
        batch = encode_prompts(self.tokenizer, prompts, self.chat_template, names=names)
        config = GenerationConfig(max_new_tokens=self.options["max_new_tokens"])
        check_length([len(tokens) for tokens in batch], config, self.lm_config, names=names)
        return batch

    def check_output(self, output: Path | None) -> None:
        """Refuse a file that cannot be written.

        Args:
            output: the file, or None.

        Raises:
            ConfigError: if its folder is missing or read-only, or the file exists.
        """
        if output is None:
            return
        if output.exists():
            raise ConfigError(f"{str(output)!r} exists. Name another --output, so that nothing is lost.")
        if not os.access(output.resolve().parent, os.W_OK):
            raise ConfigError(
                f"{str(output.resolve().parent)!r} is missing or cannot be written. Name another --output."
            )

    def load(self, device: str | None, *, merge: bool) -> None:
        """Load the weights.

        Args:
            device: where to run; the GPU when there is one.
            merge: fold the adapter into weights of its own.

        Raises:
            ConfigError: if there is no such device.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"--device {device!r} cannot be used here ({error}). Try cpu, or leave it out."
            ) from error
        self.lm = load(self.path, base=self.base, dtype=self.dtype, device=device)
        if merge:
            self.lm.backbone.merge()

    def check_infilling(self, texts: Sequence[str]) -> None:
        """Refuse texts with gaps that this model cannot fill; needs no weights.

        Args:
            texts: with gaps.

        Raises:
            ConfigError: if a text has no gap, or the backbone sees no later tokens.
        """
        read_gaps(self.tokenizer, texts, self.lm_config)
        check_infilling(self._empty_backbone())

    def _empty_backbone(self) -> Any:
        empty = self.backbone.build(empty_language_model(self.lm_config, self.reference.attn_implementation))
        return empty.in_blocks(self.block_size)

    def infill(self, texts: Sequence[str], *, output: Path | None) -> None:
        """Fill gaps in texts, print and write the results.

        Args:
            texts: with gaps.
            output: JSONL file, written in one piece at the end.
        """
        assert self.lm is not None
        filled = [self.lm.infill(text, **self.sampling) for text in texts]
        found = [one.texts(self.tokenizer)[0] for one in filled]  # type: ignore[arg-type]
        for text in found:
            typer.echo(text)
        pairs = zip(texts, found, strict=True)
        write_rows(output, [{"infill": text, "answers": [{"text": new}]} for text, new in pairs])

    def trace(self, prompt: Prompt, path: Path, *, output: Path | None) -> None:
        """Answer one prompt, print and write the answer, and write how it took shape.

        Args:
            prompt: text or conversation.
            path: page (.html) or picture (.png) to write.
            output: JSONL file for the answer.
        """
        from l2d_framework.tracing import Recorder, write_trace

        recorder = Recorder()
        batch = self.encode([prompt])
        found = self.answer([prompt], batch, request_keys(batch), observer=recorder)[0]
        title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        trace = recorder.finish([*batch[0], *found.pop("ids")])
        write_trace(trace, self.tokenizer, path, title=title)  # type: ignore[arg-type]
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
        """Answers to encoded prompts.

        Args:
            prompts: as given.
            batch: ids of each prompt.
            keys: name of each request for its noise.
            streamer: transformers' streamer, or None.
            observer: called after every network evaluation, or None.

        Returns:
            Per answer its text, token ids, number of tokens and mean evaluations.
        """
        assert self.lm is not None
        tokenizer: Any = self.tokenizer
        options: dict[str, Any] = {**self.sampling, **self.options}
        if self.stop:
            options["stop_strings"] = self.stop
        output = self.lm.generate(
            pad_left(batch, keys, chats=[not isinstance(prompt, str) for prompt in prompts]),
            classes=None if self.class_name is None else [self.class_name] * len(batch),
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
        """Answer one prompt, printing tokens as they come.

        Args:
            prompt: text or conversation.

        Returns:
            The answer.
        """
        batch = self.encode([prompt])
        keys = request_keys(batch)
        if self.is_whole:
            assert self.lm is not None
            with Drafts(self.tokenizer, self.lm.ends(is_chat=not isinstance(prompt, str))) as drafts:
                text = str(self.answer([prompt], batch, keys, observer=drafts)[0]["text"])
            typer.echo(text)
            return text
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
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
        """Answer all prompts, print and write the answers.

        Args:
            prompts: as given.
            encoded: their ids.
            batch_size: prompts at a time.
            stream: print tokens as they come.
            output: JSONL file, written in one piece at the end.
        """
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
