"""What is made ahead of its use, in threads: reading, decoding and resizing release the interpreter lock."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAX_BYTES = 2**30
"""Of what has been made and not been used, in each process."""

Wanted = TypeVar("Wanted")
Made = TypeVar("Made")


class Pace(Protocol):
    """How many are made at a time."""

    @property
    def max_threads(self) -> int: ...

    @property
    def ahead(self) -> int:
        """How many may be made ahead from now on."""

    def taken(self, waited: float, used: float) -> None:
        """Called when one is taken: for how many seconds it was waited for, and the one before it was used."""


@dataclass(frozen=True, slots=True)
class SteadyPace:
    """Always as many."""

    max_threads: int = 2
    ahead: int = 4

    def taken(self, waited: float, used: float) -> None:
        """Changes nothing."""


STEADY = SteadyPace()


def in_order(
    make: Callable[[Wanted], Made],
    each: Iterable[Wanted],
    num_bytes: Callable[[Made], int],
    pace: Pace = STEADY,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Made]:
    """What `make` gives for each, in order, made ahead of its use in threads.

    One is always made ahead, and once a size is known more, as long as they would fit into `max_bytes` if each were as
    large as the largest so far.
    """
    pending: deque[Future[Made]] = deque()
    wanted, largest = iter(each), 0
    with ThreadPoolExecutor(pace.max_threads, "mmtrain-loader") as pool:
        try:
            used_since = time.perf_counter()
            while True:
                while _has_room(len(pending), pace.ahead if largest else 1, largest, max_bytes):
                    one = next(wanted, None)
                    if one is None:
                        break
                    pending.append(pool.submit(make, one))
                if not pending:
                    return
                waiting_since = time.perf_counter()
                made = pending.popleft().result()
                taken = time.perf_counter()
                pace.taken(taken - waiting_since, waiting_since - used_since)
                largest, used_since = max(largest, num_bytes(made)), taken
                yield made
        finally:
            pool.shutdown(cancel_futures=True)


def _has_room(num_pending: int, ahead: int, largest: int, max_bytes: int) -> bool:
    return not num_pending or (num_pending <= ahead and (num_pending + 1) * largest <= max_bytes)
