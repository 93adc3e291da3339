"""The numbers that turn cosines into similarities: found in a model by trial, or given by the config."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Form = Literal["exponent", "factor", "divisor"]
"""How a parameter gives the scale: exp(p), p, or 1 / p."""
_BUMP = 0.5
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Multiplier:
    """A scale or a bias: a parameter of the model, or a constant."""

    parameter: nn.Parameter | None
    form: Form
    constant: float = 0.0

    @property
    def value(self) -> Tensor:
        """() float32, or float64 where the parameter is, without a graph"""
        if self.parameter is None:
            return torch.tensor(self.constant)
        raw = self.parameter.detach().to(torch.promote_types(self.parameter.dtype, torch.float32)).reshape(())
        return raw.exp() if self.form == "exponent" else raw.reciprocal() if self.form == "divisor" else raw

    def put_gradient(self, gradient: Tensor) -> None:
        """Make `gradient`, () of the value, that of the parameter, if it is trained."""
        if self.parameter is None or not self.parameter.requires_grad:
            return
        value = self.value.double()
        slope = {"exponent": value, "factor": torch.ones_like(value), "divisor": -(value**2)}[self.form]
        self.parameter.grad = (gradient * slope.to(gradient)).to(self.parameter.dtype).reshape(self.parameter.shape)

    def set(self, value: float) -> None:
        """Have the parameter give `value`."""
        assert self.parameter is not None
        with torch.no_grad():
            raw = math.log(value) if self.form == "exponent" else 1 / value if self.form == "divisor" else value
            self.parameter.fill_(raw)

    @torch.no_grad()
    def limit(self, highest: float) -> None:
        """Keep the value of a trained parameter at or below `highest`, as CLIP does after every step."""
        if self.parameter is None or not self.parameter.requires_grad:
            return
        if self.form == "divisor":
            self.parameter.clamp_(min=1 / highest)
        else:
            self.parameter.clamp_(max=math.log(highest) if self.form == "exponent" else highest)


def constant(value: float) -> Multiplier:
    """A number that is not a weight of the model."""
    return Multiplier(None, "factor", value)


@torch.no_grad()
def find_multipliers(model: Any, logits: Callable[[], Tensor], cosines: Tensor) -> tuple[Multiplier, Multiplier]:
    """The scale and the bias of a model whose own similarities of a few items are `logits()`, the items' cosines being
    `cosines`, both (n, m).

    Each number of the model itself is changed: a bias moves all similarities by as much, a scale multiplies them.
    """
    scale, bias, before = constant(1.0), constant(0.0), logits().double()
    changed: dict[nn.Parameter, Tensor] = {}
    for number in (value for _, value in model.named_parameters(recurse=False) if value.numel() == 1):
        kept = number.detach().clone()
        number += _BUMP
        after = logits().double()
        number.copy_(kept)
        if (after - before - _BUMP).abs().max() < _TOLERANCE * _BUMP:
            bias = Multiplier(number, "factor")
        elif not torch.equal(after, before):
            changed[number] = after
    for number, after in changed.items():
        scale = Multiplier(number, _form(number, cosines.double(), before - bias.value, after - bias.value))
    return scale, bias


def _form(number: nn.Parameter, cosines: Tensor, before: Tensor, after: Tensor) -> Form:
    """The form by which the parameter gives the factor of `cosines` in the similarities before and after it changed."""
    errors: dict[Form, float] = {}
    for form in get_args(Form):
        own = [Multiplier(nn.Parameter(number.detach() + bump), form).value for bump in (0.0, _BUMP)]
        both = zip(own, (before, after), strict=True)
        errors[form] = sum(float((value * cosines - found).norm() / found.norm()) for value, found in both)
    return min(errors, key=lambda form: errors[form] if math.isfinite(errors[form]) else math.inf)
