"""Kills a process when the process that started it exits, however that happens."""

import ctypes
import os
import signal
import sys
import threading
import time

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl(2)."""
_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_parent(parent: int | None = None) -> bool:
    """Have this process killed when its parent exits: by the kernel on Linux, elsewhere by a thread that looks once a
    second.

    Returns False if `parent`, the id of the process that started this one, has already exited.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    else:
        threading.Thread(target=_kill_without, args=(os.getppid(),), daemon=True).start()
    return parent is None or os.getppid() == parent


def _kill_without(parent: int) -> None:
    """Kill this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)
