"""Every key of a config: its type, range, default and meaning."""

import string
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Strict,
    field_validator,
    model_validator,
)


class Marker(Enum):
    """The effect of changing a key. If neither the key nor its section has SAME_RESULT, the key decides the result: a
    run does not resume with another value."""

    SAME_RESULT = "a change does not change the result beyond rounding"
    AFFECTS_BITS = "a change may change the bits of the result, within rounding"


Rate = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(gt=0, le=10**9)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    path: Annotated[str, Field(min_length=1)]
    """A directory in the transformers format, or the id of a model already in the local hub cache."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """A file with the chat template, in Jinja, for a model that has none or in place of its own. It is saved with what
    the run trains."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of the frozen weights. Trainable weights are always float32."""
    quantization: Literal["nf4"] | None = None
    """`nf4`: store the language model's linear layers in 4 bits (QLoRA: NF4 with double quantization), a quarter of
    bfloat16's memory. Vision, projector and head are not quantized. Products are computed in `dtype`. Needs
    `pip install "mmtrain[qlora]"`, LoRA in at least one component, and a language model that is not trained in full."""


class Frozen(Section):
    mode: Literal["frozen"] = "frozen"
    """The component is not trained."""


class Full(Section):
    mode: Literal["full"]
    """Every weight of the component is trained."""
    learning_rate: Rate | None = None
    """The component's own learning rate; without it `train.learning_rate`."""


class Lora(Section):
    mode: Literal["lora"]
    """Low-rank adapters are trained; the component's own weights stay frozen."""
    learning_rate: Rate | None = None
    """The component's own learning rate; without it `train.learning_rate`."""
    rank: Annotated[int, Field(gt=0, le=16_384)] = 16
    """The rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapters' inputs dropped in training."""
    targets: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] | None = None
    """Names of the linear layers that get an adapter, such as `q_proj` or `self_attn.q_proj`; without it
    every linear layer of the component."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The kind of adapter."""


ComponentMode = Annotated[Frozen | Lora | Full, Field(discriminator="mode")]


class Tune(Section):
    vision: ComponentMode = Frozen()
    """The image encoder."""
    projector: ComponentMode = Frozen()
    """The layers that map image features to embeddings of the language model."""
    language: ComponentMode = Frozen()
    """The language model with its head."""

    @model_validator(mode="after")
    def something_is_trainable(self) -> "Tune":
        if not self.trainable:
            raise ValueError("nothing is trainable: set the mode of vision, projector or language to lora or full")
        variants = {mode.variant for mode in self.trainable.values() if isinstance(mode, Lora)}
        if len(variants) > 1:
            raise ValueError(f"one adapter is of one variant, not {' and '.join(sorted(variants))}")
        return self

    @property
    def components(self) -> dict[str, Frozen | Lora | Full]:
        return {"vision": self.vision, "projector": self.projector, "language": self.language}

    @property
    def trainable(self) -> dict[str, Lora | Full]:
        return {name: mode for name, mode in self.components.items() if not isinstance(mode, Frozen)}


RecordFormat = Literal[
    "auto",
    "openai",
    "messages",
    "conversations",
    "conversation",
    "gemini",
    "alpaca",
    "query",
    "question",
    "prompt",
    "input",
]


class Source(Section):
    path: Annotated[str, Field(min_length=1)]
    """A file of records (.json, .jsonl, .parquet, .arrow, .csv, .tsv, .tar and so on), a folder of them, or a glob."""
    root: str | None = None
    """The folder that image paths are relative to and may not leave; without it the data file's own."""
    format: RecordFormat = "auto"
    """The shape of the records, as docs/data.md lists them, or `auto`: detected for each record by its keys."""
    fields: dict[str, str] = {}
    """Which column of the data is which key of a record: `{image: img, question: q, answer: a}`. A value with braces
    is a template of several columns: `{prompt: "{context}\\n{question}"}`."""
    image_mark: Annotated[str, Field(min_length=1)] | None = None
    """The text that stands for an image in the records; without it `<image>`, or another mark that docs/data.md lists
    and that a record with images has instead."""

    @field_validator("fields")
    @classmethod
    def _check_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        for source in fields.values():
            pieces = list(string.Formatter().parse(source))  # raises ValueError on a brace without its other
            if not source or any(name == "" or spec or conversion for _, name, spec, conversion in pieces):
                raise ValueError('expected the name of a column, or a template such as "{context} {question}"')
        return fields


class TrainSource(Source):
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Passes over the source in one epoch: 2.5 is two whole passes and a random half."""


MetricName = Literal[
    "exact_match",
    "vqa_match",
    "anls",
    "relaxed_accuracy",
    "multiple_choice",
    "token_f1",
    "chrf",
    "json_accuracy",
    "box_iou",
    "box_accuracy",
]


class EvalSource(Source):
    name: str | None = None
    """The name of the source in reports; without it the file's name."""
    metric: MetricName | None = None
    """How `mmtrain eval answers` scores a generated answer (see docs/answers.md); without it a metric that suits the
    source's reference answers is chosen and named."""


def in_full(sources: Any) -> Any:
    """Sources as sections: a path alone, or among others, is the section that has only this path."""
    listed = [sources] if isinstance(sources, str) else sources
    if not isinstance(listed, list | tuple):
        return listed
    return [{"path": source} if isinstance(source, str) else source for source in listed]


class Data(Section):
    train: Annotated[
        tuple[TrainSource, ...],
        Strict(False),
        Field(min_length=1),
        BeforeValidator(in_full, str | Annotated[list[str | TrainSource], Field(min_length=1)]),
    ]
    """What is trained on: a path, or a list of paths and sections."""
    eval: Annotated[
        tuple[EvalSource, ...],
        Strict(False),
        Marker.SAME_RESULT,
        BeforeValidator(in_full, str | list[str | EvalSource]),
    ] = ()
    """What is evaluated during training and never trained on: a path, or a list of paths and sections."""
    max_length: Count = 4096
    """The longest allowed sample, in tokens, image placeholders included."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a longer sample: refuse it before the first step, or leave it out and list it in
    dropped.jsonl. It is never truncated."""
    on_fault: Literal["error", "skip"] = "error"
    """What to do with a sample that cannot be used, such as one with a broken image: refuse it before the first step,
    or leave it out and list it with its reason in dropped.jsonl. One that is too long follows `too_long`."""
    max_skipped: Annotated[int, Field(ge=0, le=10**9)] | Annotated[float, Field(gt=0, lt=1)] = 0.01
    """How many samples of a set `on_fault: skip` leaves out at most: a number of them, or below 1 a share. With more
    the run is refused."""
    decode_images: Annotated[bool, Marker.SAME_RESULT] = True
    """Decode every image once before the first step, and remember those that are sound. Without it a damaged image
    stops the run at the step that uses it."""
    ignore_fields: Annotated[tuple[str, ...], Strict(False)] = ()
    """Keys of records, turns and content parts to ignore. Any other key that is neither understood nor plainly
    metadata (`id`, `source`, `timestamp` and the like) is refused by line and name."""


class Labels(Section):
    train_on: Literal["assistant", "last"] = "assistant"
    """Every assistant turn, or the last one of each conversation."""
    end_of_turn: bool = True
    """Train on the token that ends a turn, so that the model stops."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Train on the reasoning of a reply (`<think>...</think>` at its beginning), or read replies without it."""


class Train(Section):
    steps: Count | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Passes over the training data, 1 if neither is given. Give this or `steps`."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 16
    """Samples in one optimizer step, over all processes."""
    learning_rate: Rate = 1e-4
    """The highest learning rate, for every component without its own."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up: to zero along a cosine or a line, or not at all."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Steps in which the rate rises from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger norm are scaled down to this norm. null: never."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of the samples, the initial adapter weights and dropout."""

    @model_validator(mode="after")
    def steps_or_epochs(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: keep one")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class ImageCache(Section):
    memory_gib: Annotated[float, Field(ge=0, le=10**6)] = 2.0
    """GiB of memory in each process for the cached features."""
    disk_gib: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """GiB on disk, in the user's cache, for the cached features: for later runs and for the other processes."""


class Run(Section):
    output_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
    """The directory for everything that the run writes."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Marker.AFFECTS_BITS] = "auto"
    """What the run computes on. `auto`: the GPU if torch finds one, else the CPU. `cuda`: NVIDIA GPUs with any dtype
    from compute capability 8.0, with float32 below it. `mps` and, with `cuda`, ROCm are not tested, so they must be
    named."""
    microbatch_tokens: Annotated[Count, Marker.AFFECTS_BITS] = 2048
    """Tokens that go through the model at once. Lower it when memory runs out, raise it where a large GPU has memory
    to spare."""
    microbatches: Annotated[Literal["auto"] | Annotated[int, Field(gt=0, le=65_536)], Marker.AFFECTS_BITS] = "auto"
    """The number of micro-batches of a step. `auto`: the fewest that fit into `microbatch_tokens`, a multiple of the
    number of processes. A number, which the number of processes must divide: a step is divided the same way however
    many processes there are, so 1, 2, 4 and so on of them give the same bits."""
    weights: Annotated[Literal["replicate", "shard"], Marker.AFFECTS_BITS] = "replicate"
    """Every process stores all weights, or the weights are sharded over the processes (FSDP2): for models larger than
    one device, and for full fine-tuning."""
    packing: Annotated[Literal["auto"] | bool, Marker.AFFECTS_BITS] = "auto"
    """Put the samples of a micro-batch end to end in one row, without padding (true), or one row each, padded (false).
    `auto`: packed, except where a trial at the start shows that the samples of a row change each other's logits in
    this model. With true such a model is refused."""
    threads: Annotated[Annotated[int, Field(gt=0, le=1024)] | None, Marker.AFFECTS_BITS] = None
    """CPU threads of a process. Without it: one where `microbatches` is a number (bits depend on it), else torch's
    choice, the cores shared among the processes."""
    hang_timeout: Annotated[float, Field(ge=1, le=10**6)] = 600.0
    """Seconds without any progress after which the run fails and names the process that hangs."""
    activation_checkpointing: Annotated[bool, Marker.AFFECTS_BITS] = False
    """Compute the layers' activations again in the backward pass instead of storing them: less memory for the time of
    one more forward pass."""
    compile: Annotated[bool, Marker.AFFECTS_BITS] = False
    """Compile the layers of the language model with torch.compile: fewer passes over memory, after a minute or more
    before the first step. Needs a C++ compiler on the CPU."""
    kernels: Annotated[Literal["auto", "off"], Marker.AFFECTS_BITS] = "auto"
    """Replace modules of the model by faster equivalents, each one where a trial at the start shows that it computes
    the same (`auto`), or compute everything with the model's own modules (`off`). On CUDA some are compiled at the
    start."""
    image_cache: Annotated[ImageCache, Marker.AFFECTS_BITS] = ImageCache()
    """Where vision and projector are frozen, each image goes through them once and their outputs are cached. 0 for
    both sizes: no cache."""
    checkpoint_every: Count = 500
    """Steps between checkpoints. The last step always has one."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2
    """How many checkpoints are kept. Older ones are deleted."""
    eval_every: Count = 500
    """Steps between evaluations on `data.eval`. There is also one before the first step and one after the last."""

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a process, None where torch may choose."""
        return 1 if self.threads is None and self.microbatches != "auto" else self.threads


class Config(Section):
    model: Model
    """The model to start from."""
    tune: Tune = Tune(language=Lora(mode="lora"))
    """Which components are trainable. A component that is not named is frozen; without the section the language
    model gets LoRA."""
    data: Data
    """The samples that are trained on and evaluated."""
    labels: Labels = Labels()
    """Which tokens are trained on."""
    train: Train = Train()
    """What decides the result: steps, batch size, learning rate, seed."""
    run: Annotated[Run, Marker.SAME_RESULT]
    """How the run is executed. Nothing here changes the result beyond rounding, and all of it may change on resume."""

    @model_validator(mode="after")
    def quantization_fits(self) -> "Config":
        if self.model.quantization is None:
            return self
        key = f"model.quantization: {self.model.quantization}"
        if isinstance(self.tune.language, Full):
            raise ValueError(f"{key} is for a frozen language model, and tune.language is full: set it to lora")
        if not any(isinstance(part, Lora) for part in self.tune.trainable.values()):
            raise ValueError(f"{key} needs an adapter to save, and no component has mode: lora; set one to lora")
        if self.run.weights == "shard":
            raise ValueError(f"{key} does not work with run.weights: shard; set it to replicate")
        return self


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors that complete and check."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
