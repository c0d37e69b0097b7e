"""What `l2d generate` does: read prompts, check everything without weights, load, answer in batches, write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from fsspec.utils import infer_compression
from transformers import GenerationConfig, StoppingCriteriaList

from l2d_framework.cli.answer_file import AnswerFile
from l2d_framework.cli.common import check_device, check_dtype, naming_options, place, quieten
from l2d_framework.cli.meter import Meter
from l2d_framework.cli.watching import Drafts, Printer, Watch, cut
from l2d_framework.config.files import parse_json, read_text
from l2d_framework.diffusion.ode import Evaluation, Observer
from l2d_framework.diffusion.rng import request_keys
from l2d_framework.errors import ConfigError, DataError, L2DError
from l2d_framework.generation.arguments import decoding_options
from l2d_framework.generation.chat_template import check_conversation
from l2d_framework.generation.infill import check_infilling, read_gaps
from l2d_framework.generation.prompts import Prompt, check_length, encode_prompts, pad_left
from l2d_framework.lines import read_lines, read_objects
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.placement import Placement
from l2d_framework.models.unloaded import CLASS, SCALE, UnloadedModel, asks_to_guide

if TYPE_CHECKING:
    from l2d_framework.tracing import Recorder

_naming = partial(
    naming_options,
    *("num_inference_steps", "guidance_scale", "seed", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"),
    *("merge", "graph", "compile", "speculate", "drafter"),
    stop_strings="stop",
)


class Answer(NamedTuple):
    """Tokens, the evaluations spent on each, and what guidance recorded."""

    tokens: list[int]
    evaluations: list[int]
    recorded: dict[str, list[float]]


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
        placing: dict[str, Any],
        device: str | None,
    ) -> None:
        check_dtype(dtype)
        if options.get("temperature", 1.0) <= 0:
            raise ConfigError(
                f"--temperature must be above 0, got {options['temperature']}. Leave --do-sample out for the likeliest "
                "tokens."
            )
        with _naming():
            decoding_options(options | ({"stop_strings": list(stop)} if stop else {}))
        self.options, self.class_name, self.stop, self.samples = options, class_name, list(stop), samples
        placement = Placement.of(**placing)
        # A map may name the device.
        self.device = None if device is None and placement is not None else check_device(device)
        self.model = model = UnloadedModel(path, base=base, dtype=dtype, placement=placement)
        wanted = {**sampling, CLASS: class_name, SCALE: guidance_scale}
        with _naming():
            self.settings = settings = model.sampling(wanted)
        is_asked = asks_to_guide(wanted)
        model.check_class(settings, is_named=class_name is not None, where="Add --class NAME.", is_asked=is_asked)
        self.sampling, self.scale, self.running = sampling, guidance_scale, running
        self.tokenizer = model.tokenizer
        with _naming():
            model.check_running(running, settings, device=self.device, is_watched=is_watched)
        self.is_whole = (settings.block_size or model.parts.block_size) != 1
        self.lm: DiffusionLM | None = None

    def encode(self, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of prompts, refused when an answer would not fit."""
        batch = encode_prompts(self.tokenizer, prompts, self.model.origin.chat_template, names=names)
        config = GenerationConfig(max_new_tokens=self.options["max_new_tokens"])
        with _naming():
            check_length([len(tokens) for tokens in batch], config, self.model.lm_config, names=names)
        return batch

    def warn_of_chats(self) -> None:
        """Say of a model that is to chat, where its folder tells, that it was trained on other texts."""
        with suppress(OSError, ValueError, LookupError, TypeError, L2DError):
            record = parse_json(read_text(Path(self.model.path) / "run.json"), "run.json")
            formats = {str(source["format"]) for source in record["data"]["sources"]["train"]}
            if formats and "messages" not in formats:
                typer.echo(
                    f"--chat: {self.model.path} was not trained on conversations, but on data of the format "
                    f"{', '.join(sorted(formats))}. Expect better answers without --chat.",
                    err=True,
                )

    def load(self) -> None:
        """Load the weights."""
        quieten()
        with Meter(f"loading {self.model.path}"):
            self.lm = self.model.load(self.device)

    def check_infilling(self, texts: Sequence[str]) -> None:
        """Refuse texts with gaps that this model cannot fill; needs no weights."""
        read_gaps(self.tokenizer, texts, self.model.lm_config)
        check_infilling(self.model.empty)

    def file(self, output: Path | None, asked: Sequence[dict[str, Any]]) -> AnswerFile:
        """The file for answers to what was asked; one that was begun knows by the session whether it may go on."""
        chosen = {"options": self.options, "class": self.class_name, "stop": self.stop, "samples": self.samples}
        settings = self.settings.model_dump(mode="json")
        identity = {} if output is None else {**self.model.identity(), **chosen, **settings}
        return AnswerFile(output, asked, identity, place=place())

    def infill(
        self, texts: Sequence[str], file: AnswerFile, *, stream: bool = False, trace: Path | None = None
    ) -> None:
        """Fill the gaps of the texts that are missing in a file; drafts of them are shown and traced if asked for."""
        assert self.lm is not None
        numbers = range(len(texts)) if trace is not None else file.missing
        with ExitStack() as shown:
            watch = None if stream else shown.enter_context(self._watch(len(numbers)))
            for number in numbers:
                gapped = read_gaps(self.tokenizer, [texts[number]], self.model.lm_config)
                slots = zip(gapped.tokens[0].tolist(), gapped.blocks[0].tolist(), strict=True)
                known = {place: token for place, (token, block) in enumerate(slots) if block == 0}
                with self._looking_on(stream, trace, ends=(), known=known) as (observer, recorder):
                    found = self.lm.infill(gapped, observer=observer, **self.sampling)
                if trace is not None:
                    self._write_trace(recorder, found.sequences[0].tolist(), trace, title=texts[number])
                file.write(number, [{"text": found.texts()[0]}])
                if watch is not None:
                    watch.finish(1)

    def answer_one(self, prompt: Prompt, *, stream: bool, trace: Path | None = None) -> dict[str, Any]:
        """The answer to one prompt; it is printed if it is to be streamed, as it comes or after drafts of it."""
        assert self.lm is not None
        batch = self.encode([prompt])
        ends = {self.tokenizer.eos_token_id, *self.lm.ends(is_chat=not isinstance(prompt, str))}
        printer = Printer(self.tokenizer, self.stop) if stream and not self.is_whole else None
        with ExitStack() as shown:
            if not stream:
                shown.enter_context(self._watch(1))
            is_drafted = stream and self.is_whole
            observer, recorder = shown.enter_context(self._looking_on(is_drafted, trace, ends=ends))
            keys = request_keys(batch)
            try:
                (answer,) = self._generate([prompt], batch, keys, streamer=printer, observer=observer)
            except KeyboardInterrupt:
                if printer is not None:
                    printer.end()  # with what it holds back
                raise
        described = self._described(answer)
        if stream and self.is_whole:
            typer.echo(described["text"])
        if stream and not described["text"].strip():
            typer.echo("The answer is empty.", err=True)
        if trace is not None:
            title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
            self._write_trace(recorder, [*batch[0], *answer.tokens], trace, title=title)
        return described

    def answer_all(
        self, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], file: AnswerFile, *, batch_size: int
    ) -> None:
        """Answer the prompts that are missing in a file."""
        missing, keys = file.missing, request_keys(encoded)  # they have the noise that they have among all
        answers: list[dict[int, Any]] = [{} for _ in missing]
        with self._watch(len(missing)) as watch:

            def keep(number: int, *answer: Any) -> None:
                place, sample = divmod(number, self.samples)
                answers[place][sample] = self._described(Answer(*answer))
                is_last = len(answers[place]) == self.samples
                if is_last:
                    file.write(missing[place], [answers[place][sample] for sample in range(self.samples)])
                watch.finish(int(is_last))

            self._generate(
                [prompts[number] for number in missing],
                [encoded[number] for number in missing],
                [keys[number] for number in missing],
                stopping_criteria=StoppingCriteriaList([watch]),
                batch_size=batch_size * self.samples,
                on_answer=keep,
            )

    def talk(self) -> None:
        """A conversation on the terminal, ended by the end of input."""
        messages: list[dict[str, str]] = []
        typer.echo(f"A conversation with {self.model.path}. Ctrl-D ends it.", err=True)
        with suppress(EOFError):
            while True:
                if line := input("> ").strip():
                    messages.append({"role": "user", "content": line})
                    messages.append({"role": "assistant", "content": self.answer_one(messages, stream=True)["text"]})
        typer.echo()

    def _generate(
        self, prompts: Sequence[Prompt], batch: Sequence[Sequence[int]], keys: Sequence[str], **options: Any
    ) -> list[Answer]:
        assert self.lm is not None
        stop = {"stop_strings": self.stop} if self.stop else {}
        answers: dict[int, Answer] = {}
        heard = options.pop("on_answer", lambda number, *answer: answers.__setitem__(number, Answer(*answer)))
        self.lm.generate(
            pad_left(batch, keys, chats=[not isinstance(prompt, str) for prompt in prompts]),
            classes=None if self.class_name is None else [self.class_name] * len(batch),
            guidance_scale=self.scale,
            num_return_sequences=self.samples,
            on_answer=heard,
            **options,
            **self.running,
            **{**self.sampling, **self.options, **stop},
        )
        return [answers[number] for number in sorted(answers)]

    def _described(self, answer: Answer) -> dict[str, Any]:
        """Its row in a file: text, number of tokens, their mean evaluations and what guidance recorded."""
        tokenizer: Any = self.tokenizer
        recorded = {name: [round(value, 4) for value in row if value == value] for name, row in answer.recorded.items()}
        return {
            "text": cut(tokenizer.decode(answer.tokens, skip_special_tokens=True), self.stop),
            "tokens": len(answer.tokens),
            "evaluations_per_token": round(sum(answer.evaluations) / len(answer.evaluations), 2),
            **recorded,
        }

    @contextmanager
    def _watch(self, prompts: int) -> Iterator[Watch]:
        assert self.lm is not None
        with (
            Meter("generating", "prompts", prompts) as meter,
            Watch(meter, self.lm, counts_evaluations=self.is_whole) as watch,
        ):
            yield watch

    @contextmanager
    def _looking_on(
        self, is_drafted: bool, trace: Path | None, *, ends: Iterable[int], known: Mapping[int, int] | None = None
    ) -> Iterator[tuple[Observer | None, Recorder | None]]:
        """An observer for all that is to be seen of the evaluations, and the recorder of a trace among it."""
        recorder = None
        if trace is not None:
            from l2d_framework.tracing import Recorder

            recorder = Recorder()
        with ExitStack() as shown:
            drafts = shown.enter_context(Drafts(self.tokenizer, ends, known)) if is_drafted else None
            observers = [one for one in (drafts, recorder) if one is not None]

            def observe(evaluation: Evaluation) -> None:
                for observer in observers:
                    observer(evaluation)

            yield observe if observers else None, recorder

    def _write_trace(self, recorder: Recorder | None, sequence: Sequence[int], path: Path, *, title: str) -> None:
        assert recorder is not None
        from l2d_framework.tracing import write_trace

        write_trace(recorder.finish(sequence), self.tokenizer, path, title=title)
