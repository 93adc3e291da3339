"""A kernel is kept where values and gradients agree; otherwise its module is left exactly as it was."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.kernels.trial import Kernel, Trials


class Double(Kernel):
    """Twice the values and the gradients."""

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return 2 * self.plain(module, x)  # type: ignore[no-any-return]


class WrongGradient(Kernel):
    """The values, with half of the input's gradient."""

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return self.plain(module, x / 2 + x.detach() / 2)  # type: ignore[no-any-return]


class NoGradientOfTheWeight(Kernel):
    def compute(self, module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.detach(), module.bias)


class HalfOfTheRows(Kernel):
    """Right but for one row."""

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return self.plain(module, x) * (torch.arange(len(x)) != 7)[:, None]  # type: ignore[no-any-return]


class Wider(Kernel):
    def compute(self, module: Any, x: Tensor) -> Tensor:
        return self.plain(module, x).double()  # type: ignore[no-any-return]


class Failing(Kernel):
    def compute(self, module: Any, x: Tensor) -> Tensor:
        raise RuntimeError("not on this machine")


class Same(Kernel):
    def compute(self, module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias)


WRONG = [Double(), WrongGradient(), NoGradientOfTheWeight(), HalfOfTheRows(), Wider(), Failing()]


@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("before", [None, Same()], ids=["plain", "with a kernel"])
def test_a_kernel_that_fails_its_trial_leaves_everything_as_it_was(kernel: Kernel, before: Kernel | None) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(12, 6)
    trials = Trials()
    assert before is None or trials.install(layer, {"": before}, (x,))
    attributes = dict(vars(layer))
    assert not trials.install(layer, {"": kernel}, (x,))
    assert vars(layer) == attributes
    assert trials.install(layer, {"": Same()}, (x,))


def test_nothing_is_proven_by_zeros() -> None:
    layer = nn.Linear(6, 5, bias=False)
    nn.init.zeros_(layer.weight)
    assert not Trials().install(layer.requires_grad_(False), {"": Double()}, (torch.randn(3, 6),))
