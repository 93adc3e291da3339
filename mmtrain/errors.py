"""The errors that are shown to the user without a traceback, each with the exit code of its kind."""

import errno
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A fault that the user can mend: in the config, the data, the model directory or the command line.

    Each of `faults` is one line that says where, what is wrong, what was expected and what to do.
    The command line prints them all and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.told = False
        """Whether another process of the run tells it to the user."""
        super().__init__("\n".join(self.faults))


class NoCheckpointError(UserError):
    """There are checkpoints and every one of them is broken."""

    exit_code = 3


class StorageError(UserError):
    """What the run has to write cannot be written."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or the gradient is not a number any more: the run cannot go on, and nothing of it is saved."""

    exit_code = 6


class PeerError(UserError):
    """Another process of the run has ended: this one cannot go on without it. A launcher starts them again."""

    exit_code = 7


class Stopped(UserError):
    """A signal asked the run to end. The exit code is the one that schedulers expect, 128 + the signal's number."""

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {what}")
        self.exit_code = 128 + signum


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to end in good order."""
FINAL_CODES = frozenset({2, 3, 4, 6, *(128 + signum for signum in STOP_SIGNALS)})
"""Exit codes of runs that another start would not help: what the user must mend, and what was asked to end."""

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


@contextmanager
def storage_faults(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn what the file system refuses inside into a StorageError that says `what` was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        told = what if isinstance(what, str) else what()
        raise StorageError(f"{told}: {error.strerror}; make room and run the same command again") from None
