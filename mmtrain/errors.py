"""The errors that are shown to the user without a traceback, each with the exit code of its kind."""

import errno
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_faults(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn what the file system refuses inside into a StorageError that says `what` was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            remedy = "make room and run the same command again"
        elif error.errno in _FORBIDDEN:
            remedy = "allow writing there, or name another folder"
        elif error.errno == errno.EIO:
            remedy = "check the disk and run the same command again"
        else:
            raise
        reported = what if isinstance(what, str) else what()
        raise StorageError(f"{reported}: {error.strerror}; {remedy}") from None


def system_error(error: Exception) -> OSError | None:
    """The error of the system that safetensors gives as text, `… (os error 28)`; None where it is another error."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


MAX_ALIKE = 3
"""So many faults that are alike are printed one by one; more become one line."""
_PLACE = re.compile(r"(?P<file>(?:(?!: ).)+?):(?P<line>\d+)(?: item \d+)?: (?P<reason>.*)", re.DOTALL)
_QUOTED_PATH = re.compile(r"'[^']*[/.][^']*'|\"[^\"]*[/.][^\"]*\"")
_NUMBER = re.compile(r"\d[\d,]*")


def grouped(faults: Sequence[str]) -> list[str]:
    """The lines to print: faults that differ only in their place, numbers and quoted paths are one line.

    That line is the one with the largest first number in its reason (the worst), and says how many others there are
    and where the first of them are.
    """
    groups: dict[str, list[str]] = {}
    for fault in faults:
        reason = _NUMBER.sub("#", _QUOTED_PATH.sub("''", _split(fault)[1]))
        groups.setdefault(reason, []).append(fault)
    return [line for group in groups.values() for line in (_as_one(group) if len(group) > MAX_ALIKE else group)]


def _split(fault: str) -> tuple[re.Match[str] | None, str]:
    """The place that a fault begins with, if any, and its reason."""
    match = _PLACE.fullmatch(fault)
    return match, fault if match is None else match["reason"]


def _as_one(group: Sequence[str]) -> list[str]:
    worst = max(group, key=_first_number)
    place, reason = _split(worst)
    if place is None:
        return [f"{group[0]} (and {len(group) - 1:,} more like it)"]
    others = [other for fault in group if fault != worst and (other := _split(fault)[0]) is not None]
    if all(other["file"] == place["file"] for other in others):
        lines = ", ".join(other["line"] for other in others[:MAX_ALIKE])
        more = f"lines: {lines}"
    else:
        more = f"places: {', '.join(other['file'] + ':' + other['line'] for other in others[:MAX_ALIKE])}"
    at = worst.removesuffix(f": {reason}")
    return [f"{at} (and {len(group) - 1:,} more {more}{' …' if len(others) > MAX_ALIKE else ''}): {reason}"]


def _first_number(fault: str) -> int:
    place, reason = _split(fault)
    found = _NUMBER.search(_QUOTED_PATH.sub("''", reason)) if place is not None else None
    return int(found[0].replace(",", "")[:300]) if found is not None else 0
