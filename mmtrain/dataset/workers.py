"""Worker processes. They end with the process that started them, however it ends."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from mmtrain.parent_death import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

_RUN = (
    "import gc, json, sys; gc.disable(); sys.path[:] = json.loads(sys.argv[1]); "
    "from mmtrain.dataset.workers import _serve; _serve()"
)
"""Without the garbage collector while modules are imported."""
_END_SECONDS = 5.0


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    call: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    module: str,
) -> Iterator[Result]:
    """`call` of each task, in order, a few tasks ahead. Every worker begins with `start(*arguments)`. `module` defines
    both functions and is imported once for all workers."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload([module])
    with ProcessPoolExecutor(workers, context, _start, (start, arguments)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(call, task))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    if (main := multiprocessing.parent_process()) is not None:  # the parent may be the fork server, which lives longer
        threading.Thread(target=_end_after, args=(main,), daemon=True).start()
    torch.set_num_threads(1)  # each worker has a core of its own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start(*arguments)


def _end_after(main: Any) -> None:
    main.join()
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers messages, one after another."""

    connection: Connection
    process: subprocess.Popen[bytes]

    def exit_code(self) -> int:
        """How it ended, after its connection broke: its exit code, or minus the number of the signal that ended it."""
        try:
            return self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return self.end()

    def end(self) -> int:
        """End it at once; gives what `exit_code` gives."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


def start_server(serve: Callable[..., None], *arguments: Any) -> Server:
    """A process that runs `serve(connection, *arguments)`. To be called in a thread that lives as long as the server is
    needed: Linux ends the server with that thread.

    It is no child of `multiprocessing`, which would import the user's main program again. Raises OSError.
    """
    own, other = multiprocessing.Pipe()
    with other:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, json.dumps(sys.path), str(other.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,  # what is typed at the terminal is for its parent
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    own.send((serve, arguments))
    return Server(own, process)


def _serve() -> None:
    if end_with_parent(int(sys.argv[3])):
        connection = Connection(int(sys.argv[2]))
        serve, arguments = connection.recv()
        gc.enable()
        _start(serve, (connection, *arguments))
