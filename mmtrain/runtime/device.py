"""The device that a process computes on: chosen, and checked for what the program needs of it."""

import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import torch
import torch.utils.deterministic

from mmtrain.dataset.batch import Batch
from mmtrain.errors import DeviceMemoryError, UserError
from mmtrain.progress import Progress
from mmtrain.safe_text import one_line

_AMPERE = (8, 0)
"""The first compute capability whose multipliers take bfloat16; older cards convert every value to float32 and back."""
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_DIRECT_DRIVER = 550
"""The first NVIDIA driver that reports correctly that cards of the RTX 40 series cannot copy to each other."""
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "'out of memory'")
"""In errors of torch's allocator on the CPU, of CUDA, of cuBLAS and cuDNN, and of NCCL."""


def find_device(wanted: str, dtype: str, local_index: int = 0) -> torch.device:
    """The device of the process with `local_index` on its machine, for `run.device` and `model.dtype`.

    `auto`: an NVIDIA GPU if torch finds one, else the CPU; a GPU that is then not used is one line on standard error.
    Raises UserError, in one line, where the device is missing or cannot do what is asked of it.
    """
    if wanted == "auto":
        wanted, reason = _automatic()
        if reason and local_index == 0:
            Progress().say(f"device: cpu, because {reason}")
    if wanted == "cuda":
        return _check_gpu(dtype, local_index)
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("run.device: mps: torch finds no such device; set run.device to auto or cpu")
    return torch.device(wanted)


def _automatic() -> tuple[str, str]:
    """What `auto` means on this machine, and why it is not the GPU that the machine has."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        is_missed = _DRIVER_VERSION.is_file()
        return "cpu", "torch finds no GPU although there is an NVIDIA driver: run nvidia-smi" if is_missed else ""
    if found.type == "cuda" and torch.version.hip is None:
        return "cuda", ""
    if found.type not in ("cuda", "mps"):
        return "cpu", f"mmtrain does not support devices of kind {found.type}"
    name = "ROCm" if found.type == "cuda" else "MPS"
    return "cpu", f"mmtrain is not tested on {name}; run.device={found.type} tries it"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 without converting every value."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _AMPERE


def _check_gpu(dtype: str, local_index: int) -> torch.device:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no GPU or no driver" if built else "this build of torch has no CUDA"
        raise UserError(f"run.device: cuda: {why}; set run.device to auto or cpu, or install what is missing")
    count = torch.cuda.device_count()
    if local_index >= count:
        raise UserError(f"process {local_index} of this machine has no GPU: there are {count}; start fewer processes")
    device = torch.device("cuda", local_index)
    try:
        _compute_on(device)
    except RuntimeError as error:  # a card that this build has no code for, or that others have filled or reserved
        raise UserError(
            f"run.device: {torch.cuda.get_device_name(device)} cannot be used: {one_line(error, 160)}: free it, "
            "install a build of torch for it, or set run.device to cpu"
        ) from None
    if dtype == "bfloat16" and not has_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"model.dtype: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and bfloat16 "
            "needs 8.0 or higher: set model.dtype (without a config: --dtype) to float32"
        )
    return device


def _compute_on(device: torch.device) -> None:
    """The first operation on a GPU, which is from now on the one of this process. Raises RuntimeError."""
    torch.cuda.set_device(device)
    torch.ones(1, device=device).item()


def check_exchange(device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Raises UserError where GPUs would exchange data in a way that their driver reports as possible and is not.

    `environment`: the variables that NCCL reads.
    """
    version = re.search(r"\s(\d{3})\.\d", _DRIVER_VERSION.read_text()) if _DRIVER_VERSION.is_file() else None
    name = torch.cuda.get_device_name(device)
    is_old = version is not None and int(version[1]) < _DIRECT_DRIVER
    if "RTX 40" in name and is_old and environment.get("NCCL_P2P_DISABLE") != "1":
        raise UserError(
            f"{name} with a driver older than {_DIRECT_DRIVER} hangs with several processes: "
            "install a newer driver, or set the environment variables NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1"
        )


def wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64, on the CPU where their device has no such type."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def make_deterministic(device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Have a GPU give the same bits for the same input; `environment`: the variables that cuBLAS reads.

    The CPU does so by itself. To be called before the first product on the device.
    """
    if device.type == "cuda":
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # nothing reads what it has not written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def device_faults(doing: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn what the device refuses inside into an error of one line, that says what was being done (`doing`).

    Raises DeviceMemoryError, with `remedy`, where its memory is full, and UserError where an operator has no
    deterministic kernel and one is needed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeviceMemoryError(f"{doing()}: out of memory{_peak()}: {remedy}") from None
    except RuntimeError as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise DeviceMemoryError(f"{doing()}: out of memory: {remedy}") from None
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = one_line(error).split(" does not have")[0]
        raise UserError(
            f"run.microbatches: a number promises the same bits, and on this device {operator} has no deterministic "
            "kernel: set run.microbatches to auto"
        ) from None


def microbatch_faults(where: str, batch: Batch) -> AbstractContextManager[None]:
    """`device_faults` of a micro-batch in `where`, such as a step."""

    def doing() -> str:
        images = sum(segment.num_images for segment in batch.segments)
        return f"{where}, a micro-batch of {batch.num_tokens:,} tokens and {images:,} images"

    lower = "run.microbatch_tokens" if len(batch.segments) > 1 else "data.max_length"
    return device_faults(doing, f"lower {lower}, or set run.activation_checkpointing to true")


def loading_faults() -> AbstractContextManager[None]:
    """`device_faults` of loading a model."""
    return device_faults(lambda: "loading the model", "set run.weights to shard and use more GPUs, or a smaller model")


def _peak() -> str:
    """What was allocated at most, and what the device has."""
    if not torch.cuda.is_available():
        return ""
    peak, (_, total) = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()
    return f" at {peak / 2**30:,.1f} of {total / 2**30:,.1f} GiB"


def used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated so far, elsewhere the memory of this process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
