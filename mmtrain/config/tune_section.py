"""The section `tune`: which components are trainable, and how."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, Strict, model_validator

from mmtrain.config.section import Rate, Section


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
    """Names of the linear layers and weights of experts that get an adapter, such as `q_proj` or
    `self_attn.q_proj`; without it all of the component, except the head and routers."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The kind of adapter."""


ComponentMode = Annotated[Frozen | Lora | Full, Field(discriminator="mode")]


Names = Annotated[tuple[str, ...], Strict(False)]


class ComponentModules(Section):
    """Which modules or parameters, by their full names, belong to a component, with what is inside them."""

    vision: Names = ()
    """Names of what belongs to the image encoder."""
    projector: Names = ()
    """Names of what belongs to the projector."""
    language: Names = ()
    """Names of what belongs to the language model."""

    @model_validator(mode="after")
    def each_is_named_once(self) -> "ComponentModules":
        names = [*self.vision, *self.projector, *self.language]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: named twice; each belongs to one component")
        return self


class Tune(Section):
    vision: ComponentMode = Frozen()
    """The image encoder."""
    projector: ComponentMode = Frozen()
    """The layers that map image features to embeddings of the language model."""
    language: ComponentMode = Frozen()
    """The language model with its head."""
    components: ComponentModules = ComponentModules()
    """What belongs to another component than the one it is found in, such as `{projector: [model.resampler]}`: full
    names of modules and parameters. What is inside a named module belongs to it too."""

    @model_validator(mode="after")
    def something_is_trainable(self) -> "Tune":
        if not self.trainable:
            raise ValueError("nothing is trainable: set the mode of vision, projector or language to lora or full")
        variants = {mode.variant for mode in self.trainable.values() if isinstance(mode, Lora)}
        if len(variants) > 1:
            raise ValueError(f"one adapter is of one variant, not {' and '.join(sorted(variants))}")
        return self

    @property
    def modes(self) -> dict[str, Frozen | Lora | Full]:
        return {"vision": self.vision, "projector": self.projector, "language": self.language}

    @property
    def trainable(self) -> dict[str, Lora | Full]:
        return {name: mode for name, mode in self.modes.items() if not isinstance(mode, Frozen)}
