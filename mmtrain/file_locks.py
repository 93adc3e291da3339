"""Locks on open files. A lock ends when the file is closed, which the system does for a process however it ends.

`flock` rather than the package filelock: that empties the file, and a run writes its name there.
"""

import fcntl
import time
from collections.abc import Callable
from typing import IO, Any

_SECONDS_BETWEEN_TRIES = 0.1


def try_lock(file: IO[Any]) -> bool:
    """Whether this process now has the lock of `file`. Raises OSError where the file system does not lock files."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[Any], tick: Callable[[], None]) -> None:
    """Return once this process has the lock of `file`; `tick` is called while it waits. Raises OSError as above."""
    while not try_lock(file):
        tick()
        time.sleep(_SECONDS_BETWEEN_TRIES)
