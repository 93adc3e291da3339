"""Groups of mmtrain processes, forked from one that has imported everything: importing takes longer than the runs.

Run as a program this is that server. A process is given what to patch in itself, so that a phase of a run is
stopped until it is released and a fault comes exactly where it is wanted, without guessing how long anything takes.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOLD_SECONDS = 90.0
PRELOADED = (
    "mmtrain.cli",
    "mmtrain.train.run",
    "peft.utils.transformers_weight_conversion",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
)
Patch = dict[str, Any]


def patch(target: str, do: str, flag: Path, step: int | None = None, nth: int = 1) -> Patch:
    """At the `nth` call of `target` (in step `step`): touch `flag` and then `do` one of

    mark: nothing; hold: wait for `flag` + ".go"; hang: wait for ever; raise: a RuntimeError; refuse: a SampleError;
    nan: spoil what it gives; break: cut the file of the image it is called with in its middle.
    """
    return {"target": target, "do": do, "flag": str(flag), "step": step, "nth": nth}


class Server:
    """The process that forks. To be closed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        words: Sequence[str],
        processes: int = 1,
        patches: dict[int, list[Patch]] | None = None,
        stdin: Path = Path(os.devnull),
    ) -> "Group":
        """`mmtrain words…` in so many processes that take part in one run; `patches` by the process's number."""
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        jobs: list[dict[str, Any]] = []
        for rank in range(processes):
            env = {"HOME": str(folder.parent), "COLUMNS": "120"}
            if processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            log = str(folder / f"log-{rank}.txt")
            own = {"log": log, "stdin": str(stdin), "patches": (patches or {}).get(rank, [])}
            jobs.append({"env": env, "words": list(words), **own})
        return Group(self, self.ask(start=jobs), [Path(job["log"]) for job in jobs])

    def run(self, folder: Path, words: Sequence[str], processes: int = 1) -> "Group":
        """The same, once all of them have ended well."""
        group = self.start(folder, words, processes)
        codes = group.wait(240)
        group.end()
        assert codes == [0] * processes, group.text
        return group

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Group:
    """The processes of one run."""

    server: Server
    pids: list[int]
    logs: list[Path]

    def send(self, rank: int, signum: int) -> None:
        os.kill(self.pids[rank], signum)

    def wait(self, seconds: float = 60.0, ranks: Sequence[int] | None = None) -> list[int | None]:
        """The exit codes, as python gives them (-9: killed); None: it still runs after `seconds`."""
        end = time.monotonic() + seconds
        pids = [self.pids[rank] for rank in ranks] if ranks is not None else self.pids
        return [self.server.ask(wait=pid, seconds=max(0.0, end - time.monotonic())) for pid in pids]

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.pids:
            if self.server.ask(wait=pid, seconds=0) is None:
                os.kill(pid, signal.SIGKILL)
        self.wait(10)

    @property
    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)


def until(flag: Path, seconds: float = 60.0) -> None:
    """Wait for `flag`, and a moment more: whoever touched it now goes into what it marks."""
    end = time.monotonic() + seconds
    while not flag.exists():
        if time.monotonic() > end:
            raise AssertionError(f"{flag}: nobody came there")
        time.sleep(0.02)
    time.sleep(0.15)


def release(flag: Path) -> None:
    flag.with_name(flag.name + ".go").touch()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the server, and what its children become


def _serve() -> dict[str, Any] | None:
    """Answer requests; in a child gives the job to become."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if "start" in request:
            answer = []
            for job in request["start"]:
                pid = os.fork()
                if not pid:
                    return dict(job)
                answer.append(pid)
        else:
            answer = _code(request["wait"], request["seconds"], codes)
        print(json.dumps(answer), flush=True)
    return None


def _code(pid: int, seconds: float, codes: dict[int, int]) -> int | None:
    end = time.monotonic() + seconds
    while pid not in codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.01)
    return codes[pid]


def _become(job: dict[str, Any]) -> None:
    os.environ.update(job["env"])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for one in job["patches"]:
        _install(**one)
    sys.argv = ["mmtrain", *job["words"]]
    from mmtrain.cli import main

    main()


_now: dict[str, int] = {"step": 0}


def _install(target: str, do: str, flag: str, step: int | None, nth: int) -> None:
    from mmtrain.runtime.activity import Activity

    def watch_step(self: Activity, phase: str, step: int | None = None, _set: Any = Activity.set) -> None:
        _set(self, phase, step)
        _now["step"] = self.step

    setattr(Activity, "set", watch_step)  # noqa: B010 - mypy will not have a method assigned
    owner, name = _find(target)
    real = getattr(owner, name)
    count = 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += step is None or _now["step"] == step
        if count == nth and (step is None or _now["step"] == step):
            count += 1
            if do == "break":
                args[0].source.write_bytes(args[0].source.read_bytes()[: args[0].source.stat().st_size // 2])
            return _fault(do, Path(flag), lambda: real(*args, **kwargs))
        return real(*args, **kwargs)

    setattr(owner, name, patched)


def _find(target: str) -> tuple[Any, str]:
    """The module or class that holds what the dotted name `target` means."""
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ValueError(target)


def _fault(do: str, flag: Path, real: Callable[[], Any]) -> Any:
    from mmtrain.records.chat import SampleError

    flag.touch()
    if do in ("hold", "hang"):
        end = time.monotonic() + (HOLD_SECONDS if do == "hold" else 1e6)
        go = flag.with_name(flag.name + ".go")
        while not (do == "hold" and go.exists()) and time.monotonic() < end:
            time.sleep(0.02)
    if do == "raise":
        raise RuntimeError("as the test wants it")
    if do == "refuse":
        raise SampleError("as the test wants it")
    found = real()
    if do == "nan":
        return tuple(part * float("nan") for part in found) if isinstance(found, tuple) else found * float("nan")
    return found


if __name__ == "__main__":
    from mmtrain.runtime import launch

    launch.quiet()
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.freeze()  # a collection in a forked process would copy the memory that they share
    gc.enable()
    mine = _serve()
    if mine is not None:
        _become(mine)
