"""The environment variables of the whole process, set before any library reads them."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",  # huggingface_hub, and through it transformers and peft, then refuses every request
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "DO_NOT_TRACK": "1",
}


def set_environment() -> None:
    """Switch every access to the network off, whatever the user's environment says, and set up memory on the CPU.

    To be called before torch, transformers or huggingface_hub is imported: each reads its variables once.
    """
    os.environ |= _OFFLINE
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of transformers too, which shows one even where it saves weights
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for large tensors
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # micro-batches of many lengths leave gaps in segments of fixed size
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # oneDNN keeps what it made for each shape of a product, 1,024 of them by default. They lie between the tensors, so
    # that these could not be put where others had been: a bfloat16 run of 40 steps grew by half
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # peft imports bitsandbytes where it is installed, which then asks for a package of kernels that training cannot use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _LossyStderr:
    """Standard error, of which a line that cannot be written is lost: the terminal or the reader of a pipe is gone, or
    the disk of a log is full."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def ignore_lost_stderr() -> None:
    """Let no command fail because its lines on standard error cannot be written, least of all a run that has to save
    its last step: Ctrl-C also stops the `tee` that reads them."""
    if sys.stderr is not None:
        sys.stderr = cast("TextIO", _LossyStderr(sys.stderr))


def keep_trackers_in(folder: Path) -> None:
    """Have the experiment trackers write into `folder` and nowhere else. To be called before they are imported."""
    os.environ |= {
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):  # where to send figures
        os.environ.pop(name, None)
