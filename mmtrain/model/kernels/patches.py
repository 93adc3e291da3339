"""Convolutions whose windows do not overlap, such as those over the patches of an image."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.kernels.trial import Kernel, example_for


@dataclass(frozen=True)
class OneWindow(Kernel):
    """If each input is one window, (n, channels, *kernel size), the convolution is a linear layer and much faster."""

    while_compiling: ClassVar[bool] = True

    def compute(self, module: Any, x: Tensor) -> Tensor:
        if x.shape[2:] != module.kernel_size:
            return self.plain(module, x)  # type: ignore[no-any-return]
        rows = F.linear(x.flatten(1), module.weight.flatten(1), module.bias)
        return rows[(..., *(None for _ in module.kernel_size))]

    def example(self, module: Any) -> Tensor:
        return example_for(module, 4, module.in_channels, *module.kernel_size)


def patch_kernel(module: nn.Module) -> OneWindow | None:
    """The kernel to try on `module`; None if it is not a convolution, or its windows overlap or leave gaps."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return None
    is_dense = module.groups == 1 and set(module.dilation) == {1}
    return OneWindow() if is_dense and module.kernel_size == module.stride and set(module.padding) == {0} else None
