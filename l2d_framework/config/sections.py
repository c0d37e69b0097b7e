"""Sections of a run file that name no plugin: model, data, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def optional(*names: str) -> Callable[[dict[str, Any]], None]:
    """For the JSON schema of a section: a run file may leave to presets what a run cannot do without."""

    def relax(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema.get("required", []) if name not in names]

    return relax


UserPath = Annotated[str, AfterValidator(_expanded)]
"""A path in which `~` stands for the home folder, or a hub id."""
OutputFolder = Annotated[
    UserPath | None,
    Field(
        description="New folder for checkpoints, the model and `run.json`; needed to train. The same run goes on in "
        "it, another is refused."
    ),
]
Revision = Annotated[
    str | None,
    Field(
        description="Branch, tag or commit on the hub; the default branch when None. Name a commit for a run that "
        "others can repeat."
    ),
]


class Section(BaseModel):
    """A part of a run file: frozen, strict, without unknown fields or numbers that are not finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def specialised(section: type[S], **fields: Any) -> type[S]:
    """The same section with some of its fields replaced, such as components by unions over plugins."""
    return create_model(
        section.__name__, __base__=section, __doc__=section.__doc__, __module__=section.__module__, **fields
    )


class ModelSection(Section):
    """The language model to start from."""

    base: UserPath = Field(min_length=1)
    """Hub id or folder; a folder with a PEFT adapter stands for its base with the adapter merged, one with a diffusion
    model that is its own language model for that, and a diffusion run over it goes on from all of its weights."""
    revision: Revision = None
    adapter: UserPath | None = None
    """A PEFT folder merged into the base before anything else."""
    gguf_file: str | None = Field(default=None, min_length=1)
    """Name of the GGUF file in the base folder that holds its weights, which are unpacked."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; `auto` for the stored one. `bfloat16` halves the memory of float32; what is
    trained stays in float32."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention of transformers; `eager` only where a model does not support `sdpa`, for it is slower."""
    pad_token: str | None = None
    """Pad token to add, such as `[PAD]`, where the tokenizer has none; the vocabulary grows by one."""


class TokenizerSection(Section):
    """A byte-level BPE to train on the training data."""

    vocab_size: int = Field(ge=257)
    """Number of tokens: 256 bytes, merges and the special tokens; more for much text, fewer for a small model."""


class ScratchSection(Section):
    """A language model to train from nothing."""

    tokenizer: TokenizerSection
    """The tokenizer to train first."""
    config: dict[str, Any]
    """Fields of the model's transformers config, `model_type` among them; the vocabulary size is the tokenizer's."""

    @model_validator(mode="after")
    def _has_model_type(self) -> Self:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a `model_type` such as 'llama'")
        return self


class LoraSection(Section):
    """A plain LoRA; the defaults are the baseline of the L2D paper (arXiv:2501.15781, Table 3 and appendix)."""

    rank: int = Field(default=32, ge=1)
    """Rank of the update; parameters grow with it."""
    alpha: float = Field(default=64.0, gt=0)
    """The update counts alpha / rank times; change it along with `rank` to keep its size."""
    targets: list[str] | Literal["all-linear"] = ["q_proj", "v_proj"]
    """Last names of the adapted linear modules, or `all-linear` for all but the head, which learns more and costs
    more."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of the update that is dropped in training; raise it where the held-out loss rises."""


class RowSource(Section):
    """Rows of one data set, whatever they hold."""

    path: UserPath = Field(min_length=1)
    """Hub id, folder laid out like one or full of packed JSON lines, file, or pattern of files such as `texts/*.gz`."""
    name: str | None = None
    """Configuration of the data set, such as `main`; where it has several."""
    split: str = "train"
    """Split of the data set, such as `train` or `train[:10%]`; of files, which are one split, `train`."""
    exclude: dict[str, list[str]] = {}
    """Rows to leave out: values by column."""
    limit: int | None = Field(default=None, ge=1)
    """Largest number of rows to take, from the first on; all when None."""
    revision: Revision = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files of the folder or hub id to read, names or patterns, by split or not; all that `datasets` finds when
    None."""


class DataSource(RowSource):
    """One data set."""

    format: Literal["auto", "messages", "prompt_completion", "text"] = "auto"
    """What a row is: a conversation, a prompt with its completion, or plain text; found by the names of its columns
    when `auto`. Name it where a row could be read in two ways."""
    columns: dict[Literal["messages", "prompt", "completion", "text"], str] = {}
    """The source's column for each of our names that it spells differently."""
    class_column: str | None = None
    """Column with the class label of an example, for a run with `classes`."""
    class_name: str | None = None
    """Class of every example of this source, instead of a column."""
    weight: float = Field(default=1.0, gt=0)
    """Share in a mixture, relative to the other sources; equal ones are read once each, others drawn until all have
    been read."""

    @model_validator(mode="after")
    def _one_class(self) -> Self:
        if self.class_column is not None and self.class_name is not None:
            raise ValueError(f"class_column {self.class_column!r} and class_name {self.class_name!r}; keep one of them")
        return self


class MaskingSection(Section):
    """Which tokens of plain texts to generate: the UL2 mixture, as TESS 2 adapts language models (arXiv:2502.13917)."""

    objectives: list[Literal["t5", "aggressive_t5", "prefix"]] = Field(
        default=["t5", "aggressive_t5", "prefix"], min_length=1
    )
    """What each update draws from with equal probabilities: 15 % or 50 % in spans, or all but a prefix."""
    exact_lengths: bool = False
    """Spans of exactly 3, 8 or 48 tokens instead of random ones of these means."""


class DataSection(Section):
    """What to train and evaluate on."""

    train: list[DataSource] = Field(min_length=1)
    """Sources to learn from; several are joined, or mixed where their weights differ."""
    eval: list[DataSource] = []
    """Sources of held-out examples, measured every `training.eval_steps` updates; or use `eval_fraction`."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training examples held out when `eval` is empty, chosen by their content."""
    max_length: int = Field(default=2048, ge=2)
    """Longest sequence, in tokens; what lies beyond is cut off. Memory grows with it; at most the language model's
    context."""
    streaming: bool = False
    """Read rows as they are needed instead of preparing all before: for corpora beyond the disk. Needs
    `training.max_steps`."""
    supervise: Literal["response", "all"] = "response"
    """Tokens to learn: of answers alone, which of plain text are all, or `all`, prompts included."""
    chat_template: str | None = None
    """Name of a shipped template such as `tulu`, a jinja template or a file with one; the tokenizer's own when None."""
    turns: Literal["all", "first", "pairs", "accumulated", "sliding"] = "all"
    """Rows made of a conversation of n questions with answers: one with all answers supervised, or rows in which only
    the last answer is: the first question, each by itself (n), each with everything before it (n), or every
    stretch of neighbouring questions (n (n + 1) / 2)."""
    class_map: dict[str, str] = {}
    """Class name for each value of a class column that is not itself a class name."""
    drop_unsupervised: bool | Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of a source's examples that may be left out because no token of them is supervised, such as those
    whose question alone fills `max_length`; more of them stop the run. True for any share, false for none."""
    pack: bool = False
    """Join all texts and cut them into sequences of `max_length`; only the last one may be shorter."""
    masking: MaskingSection | None = None
    """Which tokens of plain texts to generate; all but the first when None."""
    padding: Literal["none", "target", "context"] = "none"
    """What stands behind a sequence: nothing; padding up to `max_length` that is generated like the answer and counts
    in the loss; or the same without counting. Left out of a diffusion run, it is the parametrization's."""
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Seed of the data order; the run's `seed` when None."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Examples held in memory to shuffle a stream; raise it where neighbouring rows are alike. Half of them are
    shuffled while the other half is read."""
    shards: int = Field(default=1, ge=1)
    """Parts in which a stream is read side by side, each for its share of every batch. With as many as there are
    processes, each reads and encodes nothing but its own; decides the result like a seed, whatever the processes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError(f"eval names data and eval_fraction is {self.eval_fraction}; keep one of them")
        if self.turns != "all" and self.supervise == "all":
            raise ValueError(f"turns {self.turns!r} supervises one answer and supervise 'all' every token; keep one")
        if self.masking is not None and self.supervise == "all":
            raise ValueError("masking decides what is supervised, so supervise 'all' has no meaning; remove one")
        if self.shards > 1 and not self.streaming:
            raise ValueError(f"shards {self.shards} divides a stream; set streaming: true, or leave it out")
        return self


class Updates(Section):
    """How to train, whatever is trained."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer updates; counted from `epochs` when None. Set it for streams, and for runs of a fixed budget."""
    epochs: float = Field(default=1.0, gt=0)
    """Times to go over the training data; may be a fraction. Without meaning where `max_steps` is set."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences, or pairs of them, per optimizer update over all processes; what decides the result. What fits into
    memory is `micro_batch_size`."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Sequences per forward pass of one process; as many as `batch_size` allows when None. `auto` begins with those and
    halves them whenever memory is out, which changes no result but rounding."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this, in the 2-norm over all parameters, are shortened to it; lower it where the loss
    jumps."""
    bf16: bool = False
    """Compute in bfloat16, faster on GPUs and half the memory of activations; trained weights stay in float32 until
    they are saved."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time. Same result but for
    rounding."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Updates between measurements of the held-out data; only at the end when None."""
    save_steps: int | None = Field(default=None, ge=1)
    """Updates between checkpoints, from which an interrupted run goes on; at the end alone when None, so set it for
    long runs."""
    save_total_limit: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; older ones are deleted."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do where a loss or a gradient is infinite or no number: stop, or leave that update out."""
    skip_limit: int = Field(default=10, ge=1)
    """Updates left out in a row after which the next one stops training."""
    logging_steps: int = Field(default=10, ge=1)
    """Updates between two lines of the log, each a mean over them."""
    report_to: list[str] = []
    """Trackers that get every log, losses by t included, such as `tensorboard`, `wandb` or `trackio`; each must be
    installed."""
    betas: tuple[float, float]
    """Decay per update of AdamW's means of gradients and of their squares, each in [0, 1)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}; change one"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class UnrollSection(Section):
    """Learn along the model's own trajectory instead of the true path.

    Every example is solved from noise by Euler's method, in a number of evaluations drawn for it, and each evaluation
    is learnt from; the logged loss is the mean over all of them, the first among them. A random number of loops keeps
    more of them from doing harm (STARS, arXiv:2605.26733), a loss at each makes an early end useful (LoopUS,
    arXiv:2605.11011).
    """

    fewest: int = Field(default=2, ge=2)
    """Least number of evaluations, the read-out included."""
    most: int = Field(default=8, ge=2)
    """Largest number; all in between are equally likely. Time and memory of an update grow with their mean."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"fewest {self.fewest} exceeds most {self.most}; lower it")
        return self


class TrainingSection(Updates):
    """How to train to predict tokens.

    The defaults are those of L2D: AdamW, peak learning rate 1e-4, final 1e-6, 100 steps of warm-up, linear decay,
    batches of 32 sequences, one epoch. Plain finetuning of the paper's baselines differs in its peak of 1e-5.

    Source: arXiv:2501.15781, Table 3; betas, weight decay, clipping and the logarithmic warm-up from the authors' code.
    """

    learning_rate: float = Field(default=1e-4, gt=0)
    """Highest rate of AdamW. 1e-4 for the diffusion path of L2D, 1e-5 where all weights of a language model learn;
    lower it where the loss jumps."""
    final_learning_rate: float = Field(default=1e-6, ge=0)
    """Rate at the end of `decay`, and from which the warm-up rises."""
    warmup_steps: int = Field(default=100, ge=0)
    """Updates in which the rate rises to `learning_rate`; fewer for short runs."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all updates to warm up for, rounded up, instead of `warmup_steps`."""
    warmup: Literal["linear", "log"] = "log"
    """How the rate rises in the warm-up: in a straight line, or fast at first and slower later."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up to `final_learning_rate`; `constant` does not."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    """What AdamW adds to the root of the mean square before it divides; hardly ever changed."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Share of each matrix that an update takes off, times the rate; raise it where the held-out loss rises."""
    draws_per_token: int = Field(default=1, ge=1)
    """Noisy copies of each supervised token in an update. More of them make gradients less noisy for the price of the
    diffusion path alone, since the context is read once: worth it where data are few."""
    group_by_length: bool = False
    """Let sequences of like length share a micro-batch, so that there is less padding; each update sees the same."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Positions whose logits are made at a time; lower it where the vocabulary is large and memory is short. No change
    of result but for rounding."""
    class_dropout: float = Field(default=0.2, ge=0, le=1)
    """Probability with which a class label is left out, so that classifier-free guidance has a prediction without
    class."""
    class_dropout_per: Literal["token", "example"] = "token"
    """Whether a label is left out for each token by itself or for a whole example."""
    time_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the backbone's time embedding, where it has one apart; that of everything else when None."""
    self_conditioning: float = Field(default=0.5, ge=0, le=1)
    """Probability with which an example is shown a first prediction, where the parametrization reads one; each such
    example costs a further pass of the network."""
    unroll: UnrollSection | None = None
    """Learn along the model's own trajectory, `{}` for 2 to 8 evaluations; on noised true tokens when None. The only
    way to teach a backbone that carries hidden states."""
    dataloader_workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside the training one; raise it where a GPU waits for data. No change of
    result."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate} exceeds learning_rate {self.learning_rate}; lower it"
            )
        return self
