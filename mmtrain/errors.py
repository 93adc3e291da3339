"""Errors that are shown to the user without a traceback, each with its exit code."""

import errno
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """A fault that the user can correct: in the config, the data, the model directory or the command line.

    Each of `faults` is one line: where, what is wrong, what was expected and what to do. The command line prints them
    all and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.already_reported = False
        """Whether another process of the run has already reported it."""
        super().__init__("\n".join(self.faults))


class NoCheckpointError(UserError):
    """There are checkpoints, but all of them are broken."""

    exit_code = 3


class StorageError(UserError):
    """A file that the run needs to write cannot be written."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or the gradient is no longer finite: the run fails, and the step is not saved."""

    exit_code = 6


class LostGradientError(UserError):
    """The gradients of a step are incomplete although its loss looks normal: nothing of the step is saved."""

    exit_code = 9


class PeerError(UserError):
    """Another process of the run has exited, so this one cannot continue. A launcher starts them again."""

    exit_code = 7


class DeviceMemoryError(UserError):
    """The memory of the device is full. Nothing of the step is saved; the same step would fill it again."""

    exit_code = 8


class Stopped(UserError):
    """A signal stopped the run. The exit code is the one that schedulers expect: 128 + the signal's number."""

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {what}")
        self.exit_code = 128 + signum


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that request a clean stop of a run."""
FINAL_CODES = frozenset({2, 3, 4, 6, 8, 9, *(128 + signum for signum in STOP_SIGNALS)})
"""Exit codes after which a restart does not help: the user must correct something, or requested the stop."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a file system answers where a file does not fit."""
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP}
_MAX_SHOWN = 80
"""Characters of a path."""
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_faults(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors of the file system inside into a StorageError that begins with `what`, what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            remedy = "free space and run the same command again"
        elif error.errno in _FORBIDDEN:
            remedy = "allow writing there, or name another folder"
        elif error.errno == errno.EIO:
            remedy = "check the disk and run the same command again"
        else:
            raise
        reported = what if isinstance(what, str) else what()
        raise StorageError(f"{reported}: {error.strerror}; {remedy}") from None


@contextmanager
def collected(faults: list[str]) -> Iterator[None]:
    """Add the faults of a UserError raised inside to `faults`. A StorageError is no fault of the data and is raised."""
    try:
        yield
    except StorageError:
        raise
    except UserError as error:
        faults += error.faults


def refused_by_system(error: Exception) -> UserError | None:
    """What to say where the system refused room on a disk, a path or memory; None for any other error."""
    code, file = (error.errno or 0, error.filename) if isinstance(error, OSError) else (0, None)
    where = repr(str(file)[:_MAX_SHOWN]) if file else "standard output"
    if code in NO_ROOM:
        return StorageError(f"{where}: {os.strerror(code)}; free space and run the same command again")
    if code in _NO_PATH:
        return UserError(f"{where}: {os.strerror(code)}; name another path")
    if isinstance(error, MemoryError) or code == errno.ENOMEM or "failed to map segment" in str(error):
        return DeviceMemoryError(
            "the memory of this machine is full, or limited: see `free -m`, `ulimit -v` and cgroups"
        )
    return None


def system_error(error: Exception) -> OSError | None:
    """The OSError in the text of an error of safetensors, `… (os error 28)`; None for any other error."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


MAX_SIMILAR = 3
"""Up to this many similar faults are printed one by one; more become one line."""
_PLACE = re.compile(r"(?P<file>(?:(?!: ).)+?)(?P<line>:\d+|#[^:]+)(?: item \d+)?: (?P<reason>.*)", re.DOTALL)
_QUOTED_PATH = re.compile(r"'[^']*[/.][^']*'|\"[^\"]*[/.][^\"]*\"")
_NUMBER = re.compile(r"\d[\d,]*")


def grouped(faults: Sequence[str]) -> list[str]:
    """The lines to print. Many faults that differ only in their place, numbers and quoted paths become one line.

    That line is the fault with the largest first number in its reason (the worst), with the number of the others and
    the places of the first of them.
    """
    groups: dict[str, list[str]] = {}
    for fault in faults:
        reason = _NUMBER.sub("#", _QUOTED_PATH.sub("''", _split(fault)[1]))
        groups.setdefault(reason, []).append(fault)
    return [line for group in groups.values() for line in (_as_one(group) if len(group) > MAX_SIMILAR else group)]


def _split(fault: str) -> tuple[re.Match[str] | None, str]:
    """The place at the start of a fault, if any, and its reason."""
    match = _PLACE.fullmatch(fault)
    return match, fault if match is None else match["reason"]


def _as_one(group: Sequence[str]) -> list[str]:
    worst = max(group, key=_first_number)
    place, reason = _split(worst)
    if place is None:
        return [f"{group[0]} (and {len(group) - 1:,} more like it)"]
    others = [other for fault in group if fault != worst and (other := _split(fault)[0]) is not None]
    if all(other["file"] == place["file"] for other in others):
        lines = ", ".join(other["line"][1:] for other in others[:MAX_SIMILAR])
        more = f"{'lines' if place['line'].startswith(':') else 'rows'}: {lines}"
    else:
        more = f"places: {', '.join(other['file'] + other['line'] for other in others[:MAX_SIMILAR])}"
    at = worst.removesuffix(f": {reason}")
    return [f"{at} (and {len(group) - 1:,} more {more}{' …' if len(others) > MAX_SIMILAR else ''}): {reason}"]


def _first_number(fault: str) -> int:
    place, reason = _split(fault)
    found = _NUMBER.search(_QUOTED_PATH.sub("''", reason)) if place is not None else None
    return int(found[0].replace(",", "")[:300]) if found is not None else 0
