"""TRL's reward trainer with exact held-out numbers, checkpoints that survive a kill, and inputs as guidance has them.

The only module that imports TRL.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer
from typing_extensions import override

from l2d_framework.config import RewardRun
from l2d_framework.config.reward import RewardTraining
from l2d_framework.training.arguments import arguments_of, divide_batch
from l2d_framework.training.reward.data import Pairs
from l2d_framework.training.reward.inputs import as_guided
from l2d_framework.training.trainer import Boundaries, ResumableTrainer


def make_reward_arguments(run: RewardRun, output: Path) -> RewardConfig:
    """TRL's arguments for a reward run."""
    training = run.training
    with warnings.catch_warnings():
        # TRL still sets the older name, and transformers before 5.23 knows no other.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        arguments = arguments_of(
            RewardConfig,
            training,
            output,
            run.seed,
            max_length=None,  # pairs that are too long are gone already, and counted
            max_steps=training.max_steps or -1,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            adam_beta1=training.betas[0],
            adam_beta2=training.betas[1],
            weight_decay=training.weight_decay,
            gradient_checkpointing=training.gradient_checkpointing,
            save_strategy="steps",
            save_steps=training.save_steps or sys.maxsize,  # and at the end
            eval_strategy="steps" if training.eval_steps else "no",
            eval_steps=training.eval_steps,
            ddp_find_unused_parameters=False,
        )
    divide_batch(arguments, training)
    return arguments


class PairTrainer(ResumableTrainer, RewardTrainer):
    """TRL's trainer on prepared pairs, with a model of one output in float32."""

    training: RewardTraining

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: RewardConfig,
        *,
        run: RewardRun,
        pairs: Pairs,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.run, self.training, self.output = run, run.training, Path(str(arguments.output_dir))
        super().__init__(
            model,
            arguments,
            data_collator=DataCollatorForPreference(int(tokenizer.pad_token_id), run.data.pad_to),
            train_dataset=pairs.train,
            eval_dataset=pairs.eval,
            processing_class=tokenizer,
            callbacks=[Boundaries(lambda: self.ended_by), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if run.data.pad_to is not None:
            model.register_forward_pre_hook(self._as_guided, with_kwargs=True)

    def _send_telemetry(self) -> None:
        """Nobody is told: a run file asks for trackers, and for nothing else that leaves the machine."""

    @override
    def _share_of_rate(self, step: int, steps: int) -> float:
        """Linear warm-up from zero, then a straight line to the final fraction."""
        warmup = math.ceil(self.training.warmup_ratio * steps)
        if step < warmup:
            return step / warmup
        return 1 - (1 - self.training.final_fraction) * (step - warmup) / max(steps - warmup, 1)

    def _as_guided(self, model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Padding in full sight and, as transformers does for embeddings, the reward read at its end.

        It is a hook of the model, for weights in shares are whole, and their gradients complete, inside of it only.
        """
        return args, as_guided(inputs, self.run, model, self._generator)

    def _generator(self) -> torch.Generator:
        # Keyed by update and micro-batch, so that a resumed run draws the same noise.
        if self._drawn[0] != self.state.global_step:
            self._drawn = (self.state.global_step, 0)
        self._drawn = (self._drawn[0], self._drawn[1] + 1)
        seed = hash((self.run.seed, *self._drawn, self.args.process_index)) % 2**63
        return torch.Generator(self.args.device).manual_seed(seed)

    _drawn = (-1, 0)

    @override
    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and mean lead of the chosen reward, each over all held-out pairs."""
        start = time.perf_counter()
        model: Any = self.model
        model.eval()
        leads, losses = [], []
        for batch in self.get_eval_dataloader(eval_dataset):
            with self.accelerator.autocast():
                rewards = model(**{k: v for k, v in batch.items() if k != "margin"}).logits
            chosen, rejected = rewards.float().squeeze(-1).chunk(2)
            lead = chosen - rejected
            loss = -nn.functional.logsigmoid(lead - batch.get("margin", 0.0))
            losses.append(self.accelerator.gather_for_metrics(loss))
            leads.append(self.accelerator.gather_for_metrics(lead))
        lead = torch.cat(leads)
        means = {"loss": torch.cat(losses).mean(), "accuracy": (lead > 0).float().mean(), "margin": lead.mean()}
        return self._report({name: float(value) for name, value in means.items()}, metric_key_prefix, start)
