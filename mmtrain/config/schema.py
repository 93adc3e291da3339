"""Every key of a config: its type, range, default and meaning."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from mmtrain.config.data_section import Data
from mmtrain.config.objective_section import Objective
from mmtrain.config.run_section import Run
from mmtrain.config.section import Count, GivenPath, Marker, Rate, Section, WatchedMetric
from mmtrain.config.tune_section import ComponentModules, Full, Lora, Tune


class Model(Section):
    path: GivenPath
    """A directory in the transformers format, or the id of a model already in the local hub cache."""
    chat_template: GivenPath | None = None
    """A file with the chat template, in Jinja, for a model that has none or in place of its own. It is saved with what
    the run trains."""
    image_processor: dict[str, Any] = Field(default={})
    """Settings of the model's image processor in place of those of its preprocessor_config.json, under the same names:
    `{max_pixels: 1003520}` makes large images smaller for Qwen2-VL and its successors, `{do_image_splitting: false}`
    leaves out the tiles of Idefics3. They are saved with what the run trains."""
    adapter: GivenPath | None = None
    """The directory of an earlier run, or of an adapter for the same model. `mmtrain train` starts from its trained
    weights, all of which must be trainable here, with a fresh optimizer; other commands do not use it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The type of the frozen weights. Trainable weights are always float32."""
    quantization: Literal["nf4"] | None = None
    """`nf4`: store the language model's linear layers in 4 bits (QLoRA: NF4 with double quantization), a quarter of
    bfloat16's memory. Vision, projector and head are not quantized. Products are computed in `dtype`. Needs
    `pip install "mmtrain[qlora]"`, LoRA in at least one component, and a language model that is not trained in full."""


class Labels(Section):
    train_on: Literal["assistant", "last"] = "assistant"
    """Every assistant turn, or the last one of each conversation."""
    end_of_turn: bool = True
    """Train on the token that ends a turn, so that the model stops."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Train on the reasoning of a reply (`<think>...</think>` at its beginning), or read replies without it."""


class EarlyStopping(Section):
    metric: WatchedMetric
    """The figure that has to improve, such as `eval/perplexity`, `answers/exact_match` or `retrieval/recall@1`; see
    `run.keep_best`."""
    patience: Count = 3
    """Evaluations in a row without a better value, after which the run ends. The one before the first step does not
    count."""


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

    early_stopping: EarlyStopping | None = None
    """End the run before its last step when a figure of its evaluations no longer improves. Then `data.eval`,
    `run.eval_every` and `run.eval_answers` decide the result, so they may not change on resume. The learning rate
    falls as if all steps were taken. null: never."""

    @model_validator(mode="after")
    def steps_or_epochs(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: keep one, or set one to null")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class Config(Section):
    model: Model
    """The model to start from."""
    tune: Tune = Tune(language=Lora(mode="lora"))
    """Which components are trainable. A component that is not named is frozen; without the section the language
    model gets LoRA."""
    data: Data
    """The samples that are trained on and evaluated."""
    objective: Objective = Objective()
    """What training minimises."""
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
        if not any(isinstance(mode, Lora) for mode in self.tune.trainable.values()):
            raise ValueError(f"{key} needs an adapter to save, and no component has mode: lora; set one to lora")
        if self.run.weights == "shard":
            raise ValueError(f"{key} does not work with run.weights: shard; set it to replicate")
        return self

    @model_validator(mode="after")
    def answers_can_be_evaluated(self) -> "Config":
        if self.run.eval_answers is not None and not self.data.eval:
            raise ValueError("run.eval_answers: there is nothing to ask: give data.eval, or remove it")
        return self

    @model_validator(mode="after")
    def streaming_fits(self) -> "Config":
        if self.data.streaming is None:
            return self
        if self.train.steps is None:
            raise ValueError("data.streaming needs train.steps: how long an epoch is is not known before its end")
        if self.run.weights == "shard":
            raise ValueError("data.streaming does not work with run.weights: shard; set it to replicate")
        return self

    @model_validator(mode="after")
    def objective_fits(self) -> "Config":
        sources = (*self.data.train, *self.data.eval)
        of_chats = {
            "labels": self.labels != Labels(),
            "model.chat_template": self.model.chat_template is not None,
            "model.quantization": self.model.quantization is not None,
            "tune.components": self.tune.components != ComponentModules(),
            "run.weights: shard": self.run.weights == "shard",
            "run.compile": self.run.compile,
            "run.eval_answers": self.run.eval_answers is not None,
            "metric of a source of data.eval": any(source.metric for source in self.data.eval),
            "data.dedup": self.data.dedup,
            "data.streaming": self.data.streaming is not None,
            "max_samples of a source": any(source.max_samples for source in sources),
            "format of a source": any(source.format != "auto" for source in sources),
        }
        has_group = any(source.group for source in sources)
        of_pairs = {"run.graph_memory_gib": self.run.graph_memory_gib != 2.0, "group of a source": has_group}
        self.objective.check_others(of_chats, of_pairs, any(isinstance(m, Lora) for m in self.tune.trainable.values()))
        return self


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors that complete and check."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
