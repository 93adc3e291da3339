"""What the processes of a run exchange besides the collectives, through the store they met at.

Each publishes what it does; the first reads all of them, judges, and publishes the board that everyone reads: so the
work of all but the first does not grow with their number.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import psutil

from mmtrain.runtime.activity import WAITING, Activity

HANG_CODE = 5
STOP_SECONDS = 20.0
"""After a signal nothing may stand still for longer: schedulers send SIGKILL about 30 seconds after the signal."""

_SPEAKS_SECONDS = 3.0
"""A process on another machine that was heard of within this time reports to the user."""


class Store(Protocol):
    """What is used of torch's store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why all processes end, and with which exit code."""

    code: int
    reason: str


@dataclass(slots=True)
class Seen:
    """What was last heard of a process, and when that changed, by the clock of the one who heard it."""

    beat: dict[str, Any]
    alive_at: float
    moved_at: float

    def hear(self, beat: dict[str, Any], now: float) -> None:
        if beat["number"] != self.beat["number"]:
            self.alive_at = now
        if any(beat[key] != self.beat[key] for key in ("ticks", "stop_signal")):
            self.moved_at = now
        self.beat = beat

    @property
    def name(self) -> str:
        return f"process {self.beat['index']} (pid {self.beat['pid']} on {self.beat['host']})"


def judge(seen: list[Seen], timeout: float, now: float, stop_signal: int | None = None) -> Verdict | None:
    """Which process the run waits for: silent for `timeout` seconds, or alive and not moving. None while all is well.

    After a signal (`stop_signal`; a process that stands still may not have heard of it) the time is at most
    `STOP_SECONDS`, except while a checkpoint is written.
    """

    def limit(one: Seen) -> float:
        known = stop_signal if stop_signal is not None else one.beat["stop_signal"]
        return timeout if known is None or one.beat["phase"] == "saving" else min(timeout, STOP_SECONDS)

    for one in seen:
        if now - one.alive_at > limit(one):
            return _hang([one], stop_signal, f"has not been heard of for {limit(one):.0f} s")
    stuck = [one for one in seen if now - one.moved_at > limit(one)]
    busy = [one for one in stuck if not one.beat["waiting"]]
    if busy:
        return _hang(busy, stop_signal, f"has not moved for {limit(busy[0]):.0f} s")
    if stuck and len(stuck) == len(seen):
        return _hang(stuck, stop_signal, f"has waited for the others for {limit(stuck[0]):.0f} s")
    return None


def _hang(culprits: list[Seen], stop_signal: int | None, what: str) -> Verdict:
    reason = "; ".join(f"{one.name} {what}: {one.beat['doing']}" for one in culprits[:8])
    more = f"; and {len(culprits) - 8} more" if len(culprits) > 8 else ""
    stop_signal = stop_signal if stop_signal is not None else culprits[0].beat["stop_signal"]
    return Verdict(HANG_CODE if stop_signal is None else 128 + stop_signal, reason + more)


class Peers:
    """One process's share in the exchange. `neighbours`: the processes on its machine."""

    def __init__(self, store: Store | None, index: int, num_processes: int, neighbours: range, timeout: float) -> None:
        self._store, self._index, self._num_processes = store, index, num_processes
        self._neighbours = [number for number in neighbours if number != index]
        self._timeout = timeout
        self._seen: dict[int, Seen] = {}
        self._number = 0
        self._stop_signal: int | None = None
        self._board: dict[str, Any] = {"number": 0, "stop_signal": None, "verdict": None}
        self._board_at = time.monotonic()

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked any process to end."""
        stop_signal: int | None = self._board["stop_signal"]
        return stop_signal

    @property
    def verdict(self) -> Verdict | None:
        found = self._board["verdict"]
        return None if found is None else Verdict(**found)

    def exchange(self, activity: Activity, stop_signal: int | None, reported: Verdict | None) -> None:
        """Publish what this process does, the signal it got and why it ends; hear what the others say.

        Raises RuntimeError (torch's store errors) where the store is gone.
        """
        self._number += 1
        self._stop_signal = stop_signal
        beat = {
            "index": self._index,
            "number": self._number,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "phase": activity.phase,
            "doing": str(activity),
            "ticks": activity.ticks,
            "waiting": activity.waiting or activity.phase in WAITING,
            "stop_signal": stop_signal,
            "reported": None if reported is None else asdict(reported),
        }
        self._hear(beat)
        if self._store is not None:
            self._store.set(f"beat/{self._index}", json.dumps(beat))
        if self._index == 0:
            self._lead()
        else:
            self._follow()

    def gone(self) -> Verdict | None:
        """A process of this machine that is dead without having said why."""
        for number in self._neighbours:
            one = self._seen.get(number)
            if (
                one is not None
                and one.beat["phase"] != "leaving"
                and one.beat["reported"] is None
                and not _lives(one.beat)
            ):
                return Verdict(7, f"{one.name} is dead: {one.beat['doing']}")
        return None

    @property
    def speaks(self) -> bool:
        """Whether this process reports to the user: the first does, or else the lowest one that is left."""
        lower = [number for number in {0, *self._neighbours} if number < self._index]
        return not any(number in self._seen and _can_speak(self._seen[number]) for number in lower)

    def _lead(self) -> None:
        for number in range(1, self._num_processes):
            self._fetch(number)
        for one in self._seen.values():
            self._board["stop_signal"] = self._board["stop_signal"] or one.beat["stop_signal"]
            self._board["verdict"] = self._board["verdict"] or one.beat["reported"]
        present = [one for one in self._seen.values() if one.beat["phase"] != "leaving"]
        stuck = judge(present, self._timeout, time.monotonic(), self._board["stop_signal"])
        if stuck is not None and self._board["verdict"] is None:
            self._board["verdict"] = asdict(stuck)
        self._board["number"] = self._number
        if self._store is not None:
            self._store.set("board", json.dumps(self._board))

    def _follow(self) -> None:
        assert self._store is not None
        for number in {0, *self._neighbours}:
            self._fetch(number)
        if self._store.check(["board"]):
            board = json.loads(self._store.get("board"))
            if board["number"] != self._board["number"]:
                self._board_at = time.monotonic()
            self._board = board
        silence, stop_signal = time.monotonic() - self._board_at, self._stop_signal
        limit = self._timeout if stop_signal is None else min(self._timeout, STOP_SECONDS)
        if silence > limit and self._board["verdict"] is None:
            self._board["verdict"] = asdict(self.silent(silence, stop_signal))

    def silent(self, seconds: float, stop_signal: int | None) -> Verdict:
        """The first process has not answered for so long."""
        first = self._seen.get(0)
        name = "process 0" if first is None else first.name
        doing = "starting" if first is None else first.beat["doing"]
        code = HANG_CODE if stop_signal is None else 128 + stop_signal
        return Verdict(code, f"{name} has not been heard of for {seconds:.0f} s: {doing}")

    def _fetch(self, number: int) -> None:
        assert self._store is not None
        if self._store.check([f"beat/{number}"]):
            self._hear(json.loads(self._store.get(f"beat/{number}")))

    def _hear(self, beat: dict[str, Any]) -> None:
        now = time.monotonic()
        self._seen.setdefault(beat["index"], Seen(beat, now, now)).hear(beat, now)


def _lives(beat: dict[str, Any]) -> bool:
    """Whether a process runs, as far as can be seen from this machine; one that waits to be reaped does not."""
    return _status(beat) not in (None, psutil.STATUS_ZOMBIE)


def _can_speak(one: Seen) -> bool:
    """Whether a process is neither dead nor stopped, as far as can be seen from this machine."""
    if one.beat["host"] != socket.gethostname():
        return time.monotonic() - one.alive_at < _SPEAKS_SECONDS
    return _status(one.beat) not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)


def _status(beat: dict[str, Any]) -> str | None:
    if beat["host"] != socket.gethostname():
        return str(psutil.STATUS_RUNNING)
    try:
        return str(psutil.Process(beat["pid"]).status())
    except psutil.NoSuchProcess:
        return None
