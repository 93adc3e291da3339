"""Kills a process when the process that started it exits, however that happens."""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl(2)."""


def end_with_parent(parent: int | None = None) -> bool:
    """Make the kernel kill this process when its parent exits, if the kernel supports it (Linux).

    Returns False if `parent`, the id of the process that started this one, has already exited.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return parent is None or os.getppid() == parent
