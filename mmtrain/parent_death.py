"""Processes that end with the process that started them, however that ends."""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl(2)."""


def end_with_parent(parent: int | None = None) -> bool:
    """Have the kernel kill this process when its parent ends, where the kernel can (Linux).

    False where `parent`, the process id that started this one, had ended before this was asked for.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return parent is None or os.getppid() == parent
