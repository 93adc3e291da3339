"""Every key a config may have, its type, its range, its default and what it means."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, Strict, model_validator

Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(gt=0, le=10**9)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    path: Annotated[str, Field(min_length=1)]
    """A directory in the transformers format, or the id of a model already in the local hub cache."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type the frozen weights are held in. What learns is always held in float32."""


class Frozen(Section):
    mode: Literal["frozen"] = "frozen"
    """The part does not learn."""


class Full(Section):
    mode: Literal["full"]
    """Every weight of the part learns."""
    learning_rate: Rate | None = None
    """The part's own rate; without it `train.learning_rate`."""


class Lora(Section):
    mode: Literal["lora"]
    """Low-rank adapters learn beside the part's frozen weights."""
    learning_rate: Rate | None = None
    """The part's own rate; without it `train.learning_rate`."""
    rank: Annotated[int, Field(gt=0, le=16_384)] = 16
    """The adapters' rank."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapters' inputs dropped in training."""
    targets: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] | None = None
    """Names of the linear layers that get an adapter, such as `q_proj` or `self_attn.q_proj`; without it
    every linear layer of the part."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The kind of adapter."""


Part = Annotated[Frozen | Lora | Full, Field(discriminator="mode")]


class Tune(Section):
    vision: Part = Frozen()
    """The encoder of the pictures."""
    projector: Part = Frozen()
    """What turns the encoder's features into embeddings of the language model."""
    language: Part = Frozen()
    """The language model with its head."""

    @model_validator(mode="after")
    def something_learns(self) -> "Tune":
        if not self.learning:
            raise ValueError("nothing learns: set the mode of vision, projector or language to lora or full")
        variants = {part.variant for part in self.learning.values() if isinstance(part, Lora)}
        if len(variants) > 1:
            raise ValueError(f"one adapter is of one variant, not {' and '.join(sorted(variants))}")
        return self

    @property
    def parts(self) -> dict[str, Frozen | Lora | Full]:
        return {"vision": self.vision, "projector": self.projector, "language": self.language}

    @property
    def learning(self) -> dict[str, Lora | Full]:
        return {name: part for name, part in self.parts.items() if not isinstance(part, Frozen)}


RecordFormat = Literal["auto", "openai", "messages", "conversations"]


class Source(Section):
    path: Annotated[str, Field(min_length=1)]
    """A .json or .jsonl file, a folder of them, or a glob."""
    root: str | None = None
    """The folder that image paths start from and may not leave; without it the data file's own."""
    format: RecordFormat = "auto"
    """`openai` (messages whose content is a string or a list of parts), `messages` (`<image>` marks and an
    `images` list), `conversations` (LLaVA and ShareGPT: from / value), or `auto`: seen from each record."""


class TrainSource(Source):
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Passes over the source in one epoch: 2.5 is two whole passes and a random half."""


class EvalSource(Source):
    name: str | None = None
    """What the source is called in reports; without it the file's name."""


class Data(Section):
    train: Annotated[tuple[TrainSource, ...], Strict(False), Field(min_length=1)]
    """What is trained on."""
    eval: Annotated[tuple[EvalSource, ...], Strict(False)] = ()
    """What is measured during training and never trained on."""
    max_length: Count = 4096
    """The longest sample, in tokens, placeholders of pictures counted."""
    too_long: Literal["error", "drop"] = "error"
    """What becomes of a longer sample: the run stops before its first step, or the sample is left out and
    listed in dropped.jsonl. It is never cut."""
    decode_images: bool = True
    """Decode every image once before the first step, and remember those that are sound. Without it an image that is
    broken in the middle ends the run at its step."""
    ignore_fields: Annotated[tuple[str, ...], Strict(False)] = ()
    """Keys of records, turns and parts of content that may be ignored. Without it a key that is neither understood
    nor plainly metadata (`id`, `source`, `timestamp` and the like) is refused by line and name."""


class Labels(Section):
    train_on: Literal["assistant", "last"] = "assistant"
    """Every assistant turn, or the last one of each conversation."""
    end_of_turn: bool = True
    """Learn the token that ends a turn, so that the model stops."""


class Features(Section):
    memory_gib: Annotated[float, Field(ge=0, le=10**6)] = 2.0
    """GiB of memory in each process for what the frozen vision encoder and projector make of the pictures."""
    disk_gib: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """GiB on disk, in the user's cache, for the same: for later runs and for the other processes."""


class Train(Section):
    output_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
    """Where everything that the run makes is written."""
    steps: Count | None = None
    """Optimizer steps; or `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Passes over the training data, 1 if neither is given; or `steps`."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 16
    """Samples in one optimizer step, over all processes."""
    microbatch_tokens: Count = 2048
    """Tokens that go through the model at once. Lower it when memory runs out, raise it where a large GPU has memory
    to spare: it changes the speed, never the result."""
    microbatches: Literal["auto"] | Annotated[int, Field(gt=0, le=65_536)] = "auto"
    """Into how many micro-batches a step is cut. `auto`: the fewest that fit into `microbatch_tokens`, a multiple of
    the number of processes. A number, which the number of processes must divide: the cut is the same however many
    processes there are, and so is every bit of the result for 1, 2, 4 and so on of them."""
    weights: Literal["replicate", "shard"] = "replicate"
    """Every process holds all weights, or they are spread over the processes (FSDP2): for models larger than one
    device, and for full tuning."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of a process; without it one where `microbatches` is a number (bits depend on it), else torch's
    choice, the cores shared among the processes."""
    hang_timeout: Annotated[float, Field(ge=1, le=10**6)] = 600.0
    """Seconds without any progress after which the run ends, naming the process that stands still."""
    activation_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass in place of keeping them: less memory for the time of
    one more forward pass, the same result."""
    compile: bool = False
    """Compile the language model's layers with torch.compile: fewer passes over memory, for a minute or more before
    the first step. Needs a C++ compiler on the CPU."""
    features: Features = Features()
    """Where vision and projector are frozen, a picture goes through them once: what they make of it is kept in memory,
    and on disk beyond it. 0 in both: every time anew, the same result."""
    packing: Literal["auto"] | bool = "auto"
    """Lay the samples of a micro-batch end to end in one row, without padding (true), or one row each, padded (false).
    The result is the same. `auto`: packed, except where a trial at the start shows that the samples of a row change
    each other's logits in this model; with true such a model is refused."""
    learning_rate: Rate = 1e-4
    """The highest rate, for every part without its own."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up: to zero along a cosine or a line, or not at all."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Steps in which the rate rises from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat | None = 1.0
    """The gradient is scaled down to this norm; null: never."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of the samples, the adapters' first weights and dropout."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2
    """How many checkpoints are kept; older ones are deleted."""
    eval_every: Count = 500
    """Steps between evaluations on `data.eval`; there is one before the first step and one behind the last."""

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a process, None where torch may choose."""
        return 1 if self.threads is None and self.microbatches != "auto" else self.threads

    @model_validator(mode="after")
    def steps_or_epochs(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: keep one")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class Config(Section):
    model: Model
    """The model to start from."""
    tune: Tune = Tune(language=Lora(mode="lora"))
    """What learns. A part that is not named is frozen; without the section the language model gets LoRA."""
    data: Data
    """What it learns from."""
    labels: Labels = Labels()
    """Which tokens are learned."""
    train: Train
    """How it learns."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, by which editors complete and check."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
