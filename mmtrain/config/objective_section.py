"""The section `objective` of a config: what training minimises."""

from typing import Annotated, Literal

from pydantic import PositiveFloat, Strict, model_validator

from mmtrain.config.section import Count, Section
from mmtrain.errors import UserError


class Objective(Section):
    kind: Literal["chat", "contrastive"] = "chat"
    """`chat`: the cross-entropy of the replies of conversations. `contrastive`: embeddings of pairs, where a query is
    to be closer to its positives than to all other items of the step; see docs/contrastive.md. The other keys of the
    section are for `contrastive`."""
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """`infonce`: the cross-entropy of the positive among all items (CLIP). `sigmoid`: each pair of items on its own
    (SigLIP)."""
    symmetric: Literal["auto"] | bool = "auto"
    """For `infonce`: whether documents also choose among the queries. `auto`: for a dual
    encoder yes, for a vision-language model no."""
    scale: Literal["trained", "fixed"] | PositiveFloat = "trained"
    """What multiplies cosines, 1 / temperature: the model's own scale, trained or fixed, or a fixed number."""
    bias: Literal["trained", "fixed"] | float | None = None
    """For `sigmoid`: what is added to all similarities: the model's own bias, trained (as without the key) or fixed, or
    a fixed number."""
    pooling: Literal["family", "last", "mean"] = "family"
    """How a vision-language model makes one vector of its last hidden states: from the `last` token of the prompt, or
    the `mean` of all. `family`: a dual encoder pools in its own way."""
    temperature_max: PositiveFloat = 100.0
    """The largest value of a trained scale."""
    dims: Annotated[tuple[Count, ...], Strict(False)] = ()
    """Widths to which embeddings can be cut afterwards, such as [256, 512]: the mean of the losses at each width is
    minimised (Matryoshka). Without it the whole width alone."""

    @model_validator(mode="after")
    def fits_its_kind(self) -> "Objective":
        given = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if self.kind == "chat" and given:
            raise ValueError(f"objective.{given[0]} is for `kind: contrastive`: remove it, or set objective.kind")
        if self.loss == "sigmoid" and self.symmetric != "auto":
            raise ValueError("objective.symmetric is for `loss: infonce`: sigmoid has no direction; remove it")
        if self.loss == "infonce" and self.bias is not None:
            raise ValueError("objective.bias is for `loss: sigmoid`: a bias does not change infonce; remove it")
        return self

    def check_command(self, command: str, kind: str, instead: str) -> None:
        """Raise UserError where `command`, which is for the objective `kind`, is used with another."""
        if self.kind != kind:
            raise UserError(f"{command}: it is for objective.kind: {kind}, the config has {self.kind}; use {instead}")

    def check_others(self, of_chats: dict[str, bool], of_pairs: dict[str, bool], has_adapter: bool) -> None:
        """Raise ValueError where a key of another section is given (true) and is not for this kind."""
        for key, is_given in (of_pairs if self.kind == "chat" else of_chats).items():
            if is_given:
                raise ValueError(f"{key} does not work with objective.kind: {self.kind}: remove it")
        if self.kind == "contrastive" and has_adapter and self.trains_numbers:
            keys = "objective.scale" + (" and objective.bias" if self.loss == "sigmoid" else "")
            raise ValueError(f"{keys}: an adapter cannot store trained numbers: set to fixed, or to a number")

    @property
    def trains_numbers(self) -> bool:
        """Whether the model's own scale or bias is trained."""
        return self.scale == "trained" or (self.loss == "sigmoid" and self.bias in (None, "trained"))
