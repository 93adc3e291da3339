"""The most the machine can do: the rate of a large matrix product, measured at the start of a run."""

import time

import torch

from mmtrain.model.kernels.products import product

_SIDE = {"cpu": 1024, "cuda": 8192}
_REPEATS, _SECONDS = 6, 0.05


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (2 n³ for n x n matrices) of the fastest of a few products in `dtype`, after a warm-up:
    as many as begin within `_SECONDS`, at most `_REPEATS`.

    Computed by the library that training uses: the rate of a slower one would make its share look larger. With this
    process's number of threads; on a machine that others use too it is what they leave.
    """
    side = _SIDE.get(device.type, 4096)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product(a, b)
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        product(a, b)
        _synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(taken)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
