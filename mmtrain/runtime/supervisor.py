"""A thread that watches: signals, the other processes, and whether anything moves.

It does not depend on the main thread, which may sit in a collective for as long as a peer is silent: there, python's
own signal handlers would run only when the collective returns.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from mmtrain.errors import STOP_SIGNALS, PeerError, Stopped, UserError, grouped
from mmtrain.runtime.activity import IN_STEPS, Activity
from mmtrain.runtime.launch import ignores_hangup
from mmtrain.runtime.peers import HANG_CODE, STOP_SECONDS, Peers, Verdict

_REPEAT_SECONDS = 1.0
"""The same signal within this time is one: a scheduler sends it to every process and a launcher forwards its own."""
_SILENCE_SECONDS = 3.0
"""The store may be out of reach for this long before the process that has it counts as gone."""
_BREAK_SECONDS = 10.0
"""A collective with a process that has ended breaks within this time, or hangs."""


class Supervisor:
    """Watches over one process of a run. `stacks`: the folder where a hang's stacks are written."""

    def __init__(self, activity: Activity, peers: Peers, index: int, alone: bool, timeout: float, stacks: Path) -> None:
        self._activity, self._peers, self._index, self._alone = activity, peers, index, alone
        self._timeout = timeout
        self._interval = min(0.25, timeout / 8)
        self._stacks = stacks
        self._stop_signal: int | None = None
        self._stop_signal_at = 0.0
        self._reported: Verdict | None = None
        self._verdict_at: float | None = None
        """When another process's reason to end the run was first heard here."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mmtrain-supervisor", daemon=True)
        self._talker = threading.Thread(target=self._talk, name="mmtrain-talker", daemon=True)
        self._rounds = threading.Condition()
        self._num_begun = self._num_wanted = self._num_done = 0
        self._reached = True

    def start(self) -> None:
        """Take the signals and begin to watch. Signals belong to the main thread: in another they are left alone."""
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            taken = [signum for signum in STOP_SIGNALS if signum != signal.SIGHUP or not ignores_hangup()]
            self._handlers = {signum: signal.signal(signum, _only_wake) for signum in taken}
            self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._talker.start()
        self._thread.start()

    def stop(self) -> None:
        """End the watch and give the signals back. From here on a process that ends is not missed."""
        self._activity.set("leaving")
        self._exchange()
        self._closing.set()
        with self._rounds:
            self._rounds.notify_all()
        self._thread.join(timeout=5)
        if self._handlers:
            signal.set_wakeup_fd(self._old_fd)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._read.close()
        self._write.close()

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked this process, or another one of the run, to end."""
        return self._stop_signal

    def report(self, error: UserError) -> bool:
        """Publish why this process ends, before it ends, so that the others name the reason and not the silence.

        Gives whether the user hears it from another process: what all of them find out, the first one says.
        """
        if self._alone:
            return False
        self._reported = Verdict(error.exit_code, "\n".join(grouped(error.faults)[:20]))
        end = time.monotonic() + _SILENCE_SECONDS
        while time.monotonic() < end:
            if not self._exchange():
                return not self._peers.speaks
            if self._index == 0 and time.monotonic() > end - _SILENCE_SECONDS + 3 * self._interval:
                return False  # it serves the store: the others have had the time to read
            if self._index and self._peers.verdict is not None:
                return not self._peers.speaks
            time.sleep(self._interval / 4)
        return False

    def lost(self) -> UserError:
        """What a broken collective means: which process is gone and where it was, or the signal that ended it."""
        end = time.monotonic() + _SILENCE_SECONDS
        while time.monotonic() < end:
            self._exchange()  # it may fail: the store is gone if the first process, which serves it, has ended
            verdict = self._peers.verdict or self._peers.gone()
            if verdict is not None:
                if verdict.code == HANG_CODE:
                    self._write_stacks()
                error = PeerError(verdict.reason)
                error.exit_code = verdict.code
                return error
            if self._stop_signal is not None:
                return Stopped(self._stop_signal, f"stopped in step {self._activity.step}, before it could be finished")
            time.sleep(self._interval / 4)
        return PeerError("another process of the run is gone")

    # --- the thread

    def _watch(self) -> None:
        answered_at = time.monotonic()
        while not self._closing.is_set():
            ready, _, _ = select.select([self._read], [], [], self._interval)
            for signum in self._read.recv(64) if ready else b"":
                self._on_signal(signum)
            if self._exchange():
                answered_at = time.monotonic()
                self._act()
            else:
                self._act_alone()
                silence = time.monotonic() - answered_at
                if self._num_begun > self._num_done:  # the store is there and does not answer
                    if silence > self._limit:
                        self._leave(self._peers.silent(silence, self._stop_signal))
                elif silence > _SILENCE_SECONDS:
                    reason = "the first process of the run is gone"
                    self._leave(self._peers.gone() or Verdict(PeerError.exit_code, reason))

    def _on_signal(self, signum: int) -> None:
        if signum not in STOP_SIGNALS:
            return
        name = signal.Signals(signum).name
        if self._stop_signal is not None:
            if time.monotonic() - self._stop_signal_at > _REPEAT_SECONDS:
                self._leave(Verdict(128 + signum, f"{name} again: left at once"))
            return
        self._set_stop_signal(signum)
        if self._activity.phase in IN_STEPS and self._index == 0 and self._peers.verdict is None:
            _say(f"{name}: finishing step {self._activity.step}, then saving; once more to leave at once")

    def _set_stop_signal(self, signum: int) -> None:
        self._stop_signal, self._stop_signal_at = signum, time.monotonic()

    @property
    def _limit(self) -> float:
        """Seconds without an answer after which the process that has the store counts as hung."""
        return self._timeout if self._stop_signal is None else min(self._timeout, STOP_SECONDS)

    def _exchange(self) -> bool:
        """Whether the store could be reached, with all that was known when this was called.

        Another thread asks it: torch's store waits without end for one whose process is stopped.
        """
        with self._rounds:
            wanted = self._num_wanted = self._num_begun + 1
            self._rounds.notify_all()
            return self._rounds.wait_for(lambda: self._num_done >= wanted, 2 * self._interval) and self._reached

    def _talk(self) -> None:
        while True:
            with self._rounds:
                self._rounds.wait_for(lambda: self._num_wanted > self._num_begun or self._closing.is_set())
                if self._num_wanted <= self._num_begun:
                    return
                self._num_begun += 1
            try:
                self._peers.exchange(self._activity, self._stop_signal, self._reported)
                reached = True
            except RuntimeError:
                reached = False
            with self._rounds:
                self._num_done, self._reached = self._num_begun, reached
                self._rounds.notify_all()

    def _act(self) -> None:
        """Do what has been heard."""
        if self._stop_signal is None and self._peers.stop_signal is not None:
            self._set_stop_signal(self._peers.stop_signal)
        if self._closing.is_set() or self._reported is not None:
            return
        if self._peers.verdict is not None and not self._has_time_to_save(self._peers.verdict):
            self._leave(self._peers.verdict)
        self._act_alone()
        # a main thread in a collective finds out now and ends in good order; and what the dead one said last is read
        if self._peers.gone() is not None and not self._closing.wait(1.0) and self._exchange():
            gone = self._peers.gone()
            if gone is not None and self._reported is None:
                self._leave(gone)

    def _has_time_to_save(self, verdict: Verdict) -> bool:
        """Whether the main thread may still save the last complete step: another process met a fault in its data. It
        finds out when the collective in which it waits breaks, as that process is gone."""
        is_of_data, in_steps = verdict.code == UserError.exit_code, self._activity.phase in IN_STEPS
        if not (is_of_data and in_steps and self._activity.saves_alone):
            return False
        self._verdict_at = self._verdict_at or time.monotonic()
        limit = self._timeout if self._activity.phase == "saving" else _BREAK_SECONDS
        return time.monotonic() - self._verdict_at < limit

    def _act_alone(self) -> None:
        """Do what asks for no other process: leave where a signal came and there is nothing to save."""
        if self._closing.is_set() or self._reported is not None:
            return
        if self._stop_signal is not None and self._activity.phase not in IN_STEPS and self._activity.phase != "leaving":
            name = signal.Signals(self._stop_signal).name
            self._leave(
                Verdict(128 + self._stop_signal, f"{name}: stopped while {self._activity}; there was nothing to save")
            )

    def _leave(self, verdict: Verdict) -> None:
        """End the process from here: the main thread may be where nothing reaches it."""
        if verdict.code == HANG_CODE:
            self._write_stacks()
        if self._peers.speaks:
            where = f"; where each process stood is in {self._stacks}" if verdict.code == HANG_CODE else ""
            _say(verdict.reason + where)
        self._reported = verdict
        linger = 3 * self._interval if self._index == 0 and not self._alone else 0.0
        end = time.monotonic() + linger
        while self._exchange() and time.monotonic() < end:  # the first serves the store: let the others read
            time.sleep(self._interval / 4)
        os._exit(verdict.code)

    def _write_stacks(self) -> None:
        self._stacks.mkdir(parents=True, exist_ok=True)
        with (self._stacks / f"process-{self._index}.txt").open("w") as file:
            faulthandler.dump_traceback(file)


def _only_wake(signum: int, frame: FrameType | None) -> None:
    """Signals are read from the wakeup descriptor; python writes there only for signals that have a handler."""


def _say(line: str) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"{show_cursor}mmtrain: {line}", file=sys.stderr, flush=True)
