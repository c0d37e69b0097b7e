"""The class of the task files: what a protocol fixes and a plain task of lm_eval leaves to options or cannot say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import yaml
from lm_eval.api.task import ConfigurableTask

from l2d_framework.errors import ConfigError

_LOGGER = logging.getLogger(__name__)

CONVERSATION, ONE_TURN, OPEN_TURN = "conversation", "one_turn", "open_turn"


class ProtocolTask(ConfigurableTask):  # type: ignore[misc]
    """A task whose `metadata` fixes more of the protocol.

    `turns` says how a prompt is laid out under a chat template, whatever `--fewshot_as_multiturn` says:
    "conversation", each example a turn of the past; "one_turn", examples and question in one turn of the user;
    "open_turn", the same and no turn of the assistant begun. `opening` stands before the examples of one turn.
    `exemplars` takes examples, and the opening where none is given, from a task file of lm_eval, so that their text is
    not copied here. `prompt_tokens` leaves out items whose whole prompt is longer; how many, the results say.
    `where` keeps rows by column and value. `configurations` joins several of a data set.

    Args:
        config: of the task file.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._kept: Any = None
        self._opening: str | None = None
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def _rule(self, name: str, default: Any = None) -> Any:
        return self.config.metadata.get(name, default)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the data set.

        Args:
            dataset_kwargs: as in lm_eval.
            **kwargs: as in lm_eval.
        """
        if names := self._rule("configurations"):
            parts = [datasets.load_dataset(self.config.dataset_path, name, **(dataset_kwargs or {})) for name in names]
            joined = {split: datasets.concatenate_datasets([part[split] for part in parts]) for split in parts[0]}
            self.dataset = datasets.DatasetDict(joined)
        else:
            super().download(dataset_kwargs, **kwargs)
        for column, wanted in self._rule("where", {}).items():
            self.dataset = datasets.DatasetDict(
                {
                    split: rows.select([number for number, value in enumerate(rows[column]) if value == wanted])
                    for split, rows in self.dataset.items()
                }
            )

    def fewshot_docs(self) -> Any:
        """Rows that examples come from.

        Returns:
            Those of the task file of lm_eval that `exemplars` names, else those of the data set.
        """
        if (name := self._rule("exemplars")) is None:
            return super().fewshot_docs() if self.config.num_fewshot else None
        file = Path(lm_eval.tasks.__file__).parent / name
        upstream = yaml.safe_load(file.read_text(encoding="utf-8"))
        self._opening = upstream.get("description")
        return upstream["fewshot_config"]["samples"]

    def test_docs(self) -> Any:
        """The items.

        Returns:
            Rows of the data set without those whose prompt was found too long.
        """
        return super().test_docs() if self._kept is None else self._kept

    def build_all_requests(self, **options: Any) -> None:
        """Build the requests of the items that the protocol keeps.

        Args:
            **options: as in lm_eval.

        Raises:
            ConfigError: if it keeps none.
        """
        template = options.get("chat_template")
        if template is None:
            _LOGGER.warning("%s: the protocol wants a chat template; pass --apply_chat_template.", self.config.task)
        if (most := self._rule("prompt_tokens")) is not None:
            # The harness gives a task no tokenizer, but the template is a method of the model.
            encode = getattr(getattr(template, "__self__", None), "tok_encode", None)
            if encode is None or options.get("samples") is not None:
                reason = "without a chat template there is no tokenizer" if encode is None else "--samples picks items"
                _LOGGER.warning("%s: items over %d tokens are kept: %s.", self.config.task, most, reason)
            else:
                self._drop(lambda prompt: len(encode(prompt)) > most, options)
        super().build_all_requests(**options)

    def _drop(self, is_too_long: Any, options: Mapping[str, Any]) -> None:
        names = ("system_instruction", "apply_chat_template", "chat_template")
        asked = {name: options[name] for name in names if name in options}
        self._kept = None  # of an earlier build
        rows = self.eval_docs
        limit = options.get("limit") or len(rows)
        kept: list[int] = []
        number = 0
        while number < len(rows) and len(kept) < limit:
            row = rows[number]
            prompt = self.fewshot_context(
                row, self.config.num_fewshot or 0, gen_prefix=self.doc_to_prefix(row), **asked
            )
            if not is_too_long(prompt):
                kept.append(number)
            number += 1
        if not kept:
            raise ConfigError(
                f"{self.config.task}: every prompt exceeds the {self._rule('prompt_tokens')} tokens of the protocol. "
                "Lower --num_fewshot, or use a model whose tokenizer needs fewer tokens."
            )
        dropped = number - len(kept)
        self.config.metadata["dropped"] = dropped
        if dropped:
            _LOGGER.warning(
                "%s: left out %d of the first %d items: their prompts exceed %d tokens.",
                self.config.task,
                dropped,
                number,
                self._rule("prompt_tokens"),
            )
            self._kept = rows.select([*kept, *range(number, len(rows))])

    def fewshot_context(self, doc: Mapping[str, Any], num_fewshot: int, **options: Any) -> str:
        """Prompt of an item.

        Args:
            doc: the item.
            num_fewshot: examples before it.
            **options: as in lm_eval.

        Returns:
            The prompt.
        """
        turns = self._rule("turns")
        if turns == CONVERSATION:
            return str(super().fewshot_context(doc, num_fewshot, **{**options, "fewshot_as_multiturn": True}))
        text, prefix = self._one_turn(doc, num_fewshot), options.get("gen_prefix") or ""
        template = options.get("chat_template") if options.get("apply_chat_template") else None
        system = options.get("system_instruction")
        if template is None:
            return "\n".join(part for part in (system, text, prefix) if part)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        return str(template(messages, add_generation_prompt=turns == ONE_TURN and not prefix))

    def _one_turn(self, doc: Mapping[str, Any], count: int) -> str:
        few = self.fewshot_cfg
        examples = []
        own = doc if few.split is not None and few.split == self.config.test_split else None
        for shot in self.sampler.sample(count, eval_doc=own) if count else []:
            question, answer = self.doc_to_text(shot, few.doc_to_text), self.doc_to_target(shot, few.doc_to_target)
            examples.append(f"{question}{few.target_delimiter}{answer}")
        opening = (self._rule("opening") or self._opening or "").strip()
        parts = ([opening] if opening else []) + examples + [self.doc_to_text(doc)]
        return str(self.config.fewshot_delimiter.join(parts))
