"""The model `l2d` of lm_eval: its Hugging Face model with a diffusion model in its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lm_eval.models  # noqa: F401 -- the table of models fills itself only while it is empty, so before we are in it
import torch
from accelerate import PartialState, find_executable_batch_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from typing_extensions import override

from l2d_framework.config import SamplingSection
from l2d_framework.errors import ConfigError, DataError, L2DError
from l2d_framework.evaluation.code.metric import serve
from l2d_framework.evaluation.harness import scorer
from l2d_framework.evaluation.harness.cost import Meter, report
from l2d_framework.evaluation.harness.generator import Generator
from l2d_framework.evaluation.harness.options import PASSED, PLACING, RUNNING, check_model_options, diffusing
from l2d_framework.evaluation.harness.requests import PIECE, Answers, content
from l2d_framework.evaluation.harness.scorer import MAIN, METHODS, MIXTURE, PSEUDO
from l2d_framework.evaluation.harness.start_up import steps
from l2d_framework.evaluation.harness.tasks import check_sentence_data, data_sources, named_tasks, route
from l2d_framework.evaluation.search.search import check_search, split_options
from l2d_framework.generation.chat_template import TEMPLATE_DATE, render
from l2d_framework.generation.prompts import encode_text
from l2d_framework.models.diffusion_lm import DiffusionLM
from l2d_framework.models.placement import Placement
from l2d_framework.models.unloaded import CLASS, HINT, UnloadedModel, tokenizer_fingerprint
from l2d_framework.opening import open_tokenizer
from l2d_framework.training.peers import Peers, own_gpu

_LOGGER = logging.getLogger(__name__)
_PATIENCE = timedelta(weeks=52)
"""How long a process waits for the answers of others, as in HFLM; an error of theirs ends it at once."""
_AUTO_ON_CPU = 8
"""Batch size `auto` where memory that runs out ends the process instead of raising an error."""

_GOES_ON = "<|this turn goes on|> "

_HEADLINES = ("solver", "num_inference_steps", "guidance", "seed", CLASS)
"""Settings that results.json says first, as they were used; a list where tasks used several."""


class _Unloaded:
    """Stands for the language model until the first request; until then everything that can be refused is."""

    def to(self, device: Any) -> _Unloaded:
        return self


class L2DLM(HFLM):  # type: ignore[misc]
    """Diffusion checkpoints, and plain language models with `num_inference_steps=0`; weights load at the first request.

    Noise is named by a request's own words, never by its place in a batch, so neither batch size, order nor the number
    of processes changes an answer.

    Args:
        pretrained: checkpoint folder or hub id; `L2D_PRETRAINED` when None.
        **options: `base`, `dtype` and `revision` of the checkpoint; `device_map`, `max_memory` and `offload_folder`, as
            of `l2d.load`; `scoring` (mixture, main or pseudo),
            `noise_samples` and `pseudo_times` of log-likelihoods; fields of the `sampling` section, `class_name` and
            `guidance_scale`; `merge`, `speculate`, `drafter`, `graph` and `compile` of `generate`; those of token
            search, `search` and `search_*`; `batch_size`, `device`, `max_length` and others of lm_eval's `hf`.
    """

    def __init__(self, pretrained: str | None = None, **options: Any) -> None:
        check_model_options(options)
        serve()
        pretrained = pretrained or os.environ.get(steps.PRETRAINED)
        if not pretrained:
            raise ConfigError(steps.MISSING)
        placement = Placement.of(*(options.get(name) for name in PLACING))
        names = ("base", "dtype", "revision")
        self.source = UnloadedModel(str(pretrained), **{name: options.get(name) for name in names}, placement=placement)
        self.options = diffusing(options)
        self.settings = self.source.sampling(self.options)
        self.running = {name: options[name] for name in RUNNING if name in options}
        self.source.check_running(self.running, self.settings, device=options.get("device"))
        self.searching, _ = split_options(options)
        self.search = check_search(self.searching)
        if self.search and self.source.is_block:
            raise ConfigError("Search weighs next tokens, and this model denoises whole answers. Leave search out.")
        self.samples = _positive("noise_samples", options.get("noise_samples", 4))
        self.times = _positive("pseudo_times", options.get("pseudo_times", 4))
        self.scoring = self._scoring(options.get("scoring"))
        self.answers = Answers(None, {})
        self.meters = {"generation": Meter(), "scoring": Meter()}
        self._everywhere = {name: [meter] for name, meter in self.meters.items()}
        self.generator = Generator(self)
        self.used: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, dict[str, Any]] = {}
        self.is_chat = False
        self._diffusion: DiffusionLM | None = None
        passed = {name: options[name] for name in PASSED if name in options}
        passed["chat_template_args"] = {"date_string": TEMPLATE_DATE, **(passed.get("chat_template_args") or {})}
        if placement is not None:
            passed["device"] = str(self.source.plan(passed.get("device")).main)
        passed.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if "LOCAL_RANK" in os.environ:  # by which accelerate knows that it was launched
            if torch.cuda.is_available() and passed["device"] != "cpu":
                own_gpu()
            else:  # where accelerate would leave each alone, for its option --cpu starts one process only
                PartialState(cpu=True, timeout=_PATIENCE)
        super().__init__(str(pretrained), revision=options.get("revision") or "main", **passed)
        self.process, self.processes = 0, 1
        if hasattr(self, "accelerator"):
            self.process, self.processes = self.accelerator.process_index, self.accelerator.num_processes
            # lm_eval deals documents out by rank; the examples it draws for them, the order of scores and the errors it
            # draws from these then depend on the number of processes. So each gets all requests and answers a share, as
            # with tensor parallelism, where lm_eval has LOCAL_RANK 0 print: on several machines one process only.
            self._rank, self._world_size = 0, 1
            os.environ["LOCAL_RANK"] = str(self.process)

    def _scoring(self, wanted: Any) -> str | None:
        empty, steps = self.source.empty, self.settings.num_inference_steps
        possible = [MAIN] if empty.identity_at_zero else []
        possible += [MIXTURE] if empty.independent_positions else [PSEUDO]
        if wanted is None:
            return MAIN if steps == 0 else MIXTURE if MIXTURE in possible else None
        if wanted not in possible:
            raise ConfigError(f"scoring={wanted!r} does not fit this model. Choose from {possible}, or leave it out.")
        return str(wanted)

    def check_class(self, settings: SamplingSection, options: dict[str, Any]) -> None:
        """Refuse a guidance towards a class that neither options nor a task name."""
        self.source.check_class(
            settings,
            is_named=options.get(CLASS) is not None,
            where=f"Add {CLASS}=NAME to --gen_kwargs or --model_args. A task proposes a class as {HINT}.",
        )

    def _get_config(self, pretrained: str, **options: Any) -> None:
        self._config = self.source.lm_config

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        if isinstance(tokenizer, str):
            passed = {name: options.get(name) for name in ("revision", "subfolder", "add_bos_token")}
            self.tokenizer = open_tokenizer(tokenizer, **{k: v for k, v in passed.items() if v not in (None, "")})
        elif tokenizer:
            self.tokenizer = tokenizer
        else:
            self.tokenizer = self.source.tokenizer

    def _create_model(self, pretrained: str, **options: Any) -> None:
        self._model: Any = _Unloaded()

    @property
    def diffusion(self) -> DiffusionLM:
        """The diffusion model, loaded when first asked for; `model` is the language model inside it."""
        if self._diffusion is None:
            self._diffusion = self.source.load(self.device)
            self._model = self._diffusion.backbone.lm
        return self._diffusion

    @property
    @override
    def model(self) -> Any:
        return self._model  # of which no launcher's library has wrapped anything

    @property
    @override
    def max_length(self) -> int:
        return int(self._max_length or resolve_max_length(self.config, self.tokenizer))

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, encoded as in training: without special tokens beside the template's."""
        self.is_chat = True
        variables = {**self.tokenizer.special_tokens_map, **self.chat_template_args}
        template = str(self.tokenizer.get_chat_template())
        options = {"add_generation_prompt": add_generation_prompt}
        if not add_generation_prompt:
            # lm_eval asks for no generation prompt where the last turn is to go on.
            *before, last = chat_history
            chat_history = [*before, {**last, "content": last["content"] + _GOES_ON}]
        try:
            text, _ = render(template, chat_history, variables, **options)
        except DataError:
            # As lm_eval does, for templates that know no system messages.
            asked = [turn for turn in chat_history if turn["role"] != "system"]
            if asked == chat_history:
                raise
            _LOGGER.warning("The chat template refuses system messages, so they are left out.")
            text, _ = render(template, asked, variables, **options)
        if add_generation_prompt:
            return text
        begun, found, behind = text.rpartition(_GOES_ON.strip())
        if not found:
            raise DataError("the chat template does not print the last turn, which is to go on. Use another template.")
        # Where the template trims what it prints, blanks in front of an answer are of no meaning, either.
        return begun if behind.startswith(" ") else begun.rstrip()

    @override
    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template; asked for when one is going to be applied."""
        self.is_chat = self.is_chat or bool(chat_template)
        return super().chat_template(chat_template)  # type: ignore[no-any-return]

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a prompt; None: special tokens as `add_bos_token` says, else without a chat template only."""
        if add_special_tokens is None:
            add_special_tokens = not self.is_chat if self.add_bos_token is None else self.add_bos_token
        if not add_special_tokens:
            return list(super().tok_encode(string, add_special_tokens=False, **options))
        ids = encode_text(self.tokenizer, string)
        return ids[-(options.get("left_truncate_len") or 0) :]

    @override
    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use the harness's cache under this model's own rules."""
        self.answers = Answers(cache_hook.dbdict, self.identity())
        self.cache_hook = self.answers

    @override
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        self._notice(requests)
        with self._answering("generation"):
            return self.generator.answer_all(requests, quiet=disable_tqdm or self.process != 0)

    @override
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores of continuations: log-likelihoods, or what `scoring` names."""
        return self._scored("loglikelihood", requests, super().loglikelihood, disable_tqdm)

    @override
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        if self.scoring == PSEUDO:
            raise ConfigError("scoring='pseudo' compares answers to a question; whole texts need a likelihood.")
        return self._scored("loglikelihood_rolling", requests, super().loglikelihood_rolling, disable_tqdm)

    def _scored(self, kind: str, requests: Sequence[Any], compute: Any, quiet: bool) -> list[Any]:
        self._notice(requests)
        if self.scoring is None:
            tasks = sorted({str(request.task_name) for request in requests})
            raise ConfigError(
                f"The tasks {tasks} ask for log-likelihoods, which this model has none of: it denoises all tokens of "
                "an answer together. Choose tasks that generate, or add scoring=pseudo to --model_args for a "
                "pseudo-likelihood of multiple-choice answers."
            )
        if self.scoring != MAIN:
            self.check_class(self.settings, self.options)
        with self._answering("scoring"):
            return self._remembered(kind, requests, compute, quiet or self.process != 0)

    def _remembered(self, kind: str, requests: Sequence[Any], compute: Any, quiet: bool) -> list[Any]:
        by_name = {content(request.args): request for request in requests}
        found = {name: self.answers.find(kind, request.args) for name, request in by_name.items()}
        kept = self.pooled({name: answer for name, answer in found.items() if answer is not None})
        # Answers to one question are scored together; some tasks have nothing but answers.
        rest = {name: r.args[0] or r.args[-1] for name, r in by_name.items() if name not in kept}
        share = self.share(rest.values())
        mine = [name for name, question in rest.items() if question in share]
        answers = compute([by_name[name] for name in mine], disable_tqdm=quiet) if mine else []
        kept |= self.pooled(dict(zip(mine, answers, strict=True)))
        return [kept[content(request.args)] for request in requests]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Pieces of whole texts have no words by which to be kept, and lm_eval keeps texts when it has read all of them.
        found: list[Any] = [self.answers.find(PIECE, piece) if text is None else None for text, *piece in requests]
        rest = [request for request, known in zip(requests, found, strict=True) if known is None]
        scores = iter(self._score(rest, disable_tqdm or self.process != 0, override_bs) if rest else ())
        return [next(scores) if known is None else known for known in found]

    def _score(self, requests: Sequence[Any], quiet: bool, batch_size: int | None) -> list[tuple[float, bool]]:
        self.diffusion  # noqa: B018 -- loads the weights
        if self.scoring == MAIN:
            plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, quiet, batch_size)
            for (text, *piece), value in zip(requests, plain, strict=True):
                if text is None:
                    self.answers.keep(PIECE, piece, value)
            return plain
        return scorer.score(self, requests, quiet=quiet, batch_size=batch_size)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # HFLM asks before whole texts and before scoring by the language model alone.
        if self.device.type == "cpu":
            return self.largest_batch(lambda n: None)
        self.diffusion  # noqa: B018 -- loads the weights
        if self.scoring == MAIN:
            return int(super()._detect_batch_size(requests, pos))
        return scorer.largest_batch(self)

    def identity(self) -> dict[str, Any]:
        """What an answer depends on beside its question."""
        return self.source.identity() | {
            "sampling": self.settings.model_dump(mode="json"),
            "class_name": self.options.get(CLASS),
            "scoring": self.scoring,
            "noise_samples": self.samples,
            "pseudo_times": self.times,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token": self.prefix_token_id,
            "think_end_token": self.think_end_token,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **({"search": self.search} if self.search else {}),
        }

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, in the order of ranks."""
        if self.processes == 1:
            return [value]
        values = [None] * self.processes
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise L2DError(
                f"Another of the {self.processes} processes has ended, so process {self.process} ends, too. Start the "
                "same command again; with --use_cache it goes on from the answers so far."
            ) from error
        return values

    def pooled(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """Entries of this process and of all others."""
        return {name: value for part in self.gather(values) for name, value in part.items()}

    def share(self, questions: Iterable[str]) -> set[str]:
        """Those of the questions that this process answers; short and long ones are dealt out evenly."""
        ordered = sorted(set(questions), key=lambda question: (-len(question), question))
        return set(ordered[self.process :: self.processes])

    def _notice(self, requests: Sequence[Any]) -> None:
        names = {str(request.task_name) for request in requests} - self._tasks.keys()
        tasks = named_tasks(names) if names else []
        for task in tasks:
            route(task)
            check_sentence_data(task)
        sources = data_sources(tasks)
        self._tasks |= sources
        folders: dict[str, list[str]] = {}
        for name, source in sources.items():
            folders.setdefault(source["local_folder"], []).append(name)
        for folder, served in folders.items():
            if folder and self.process == 0:
                _LOGGER.warning("Data of %s come from %s, not from the hub.", ", ".join(served), folder)

    @contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        """Work with the other processes, end with them, and know what all have spent."""
        try:
            with Peers.of_this_run():
                yield
                self._everywhere[name] = self.gather(self.meters[name])
        except KeyboardInterrupt:
            if self.answers.file is not None:
                _LOGGER.warning("The answers so far are in %s. The same command goes on from them.", self.answers.file)
            raise

    def largest_batch(self, attempt: Callable[[int], Any]) -> int:
        """Largest batch for which memory is enough."""
        if self.device.type == "cpu":
            size = min(self.max_batch_size, _AUTO_ON_CPU)
        else:

            @find_executable_batch_size(starting_batch_size=self.max_batch_size)  # type: ignore[untyped-decorator]
            def fits(batch_size: int) -> int:
                attempt(batch_size)
                return batch_size

            size = fits()
        self.batch_sizes[len(self.batch_sizes)] = size
        return int(size)

    @override
    def get_model_info(self) -> dict[str, Any]:
        """HFLM's facts, and under `l2d` settings, costs, versions, fingerprints and where the data came from."""
        reads_main = self.source.empty.identity_at_zero
        costs = {name: report(meters, reads_main=reads_main) for name, meters in self._everywhere.items()}
        settings = self.settings.model_dump(mode="json")
        used = list(self.used.values())
        if not used or any(meter.evaluations for meter in self._everywhere["scoring"]):
            used.append(settings | {CLASS: self.options.get(CLASS)})
        return dict(super().get_model_info()) | {
            "l2d": self.source.identity()
            | {
                **{name: _only([one[name] for one in used]) for name in _HEADLINES},
                "sampling": settings,
                "sampling_of_generation": list(self.used.values()),
                "search": self.search,
                "scoring": None if self.scoring is None else {"name": self.scoring, "is": METHODS[self.scoring]},
                "noise_samples": self.samples,
                "pseudo_times": self.times,
                "cost": costs,
                "data": self._tasks,
            }
        }


def _only(values: list[Any]) -> Any:
    """What all values are, or a list of those that there are."""
    distinct = [value for number, value in enumerate(values) if value not in values[:number]]
    return distinct[0] if len(distinct) == 1 else distinct


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number above 0, got {value!r}.")
    return value
