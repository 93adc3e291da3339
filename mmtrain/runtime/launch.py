"""Processes and nodes: whether this process is one of many already, and if not, starting them."""

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtrain.errors import FINAL_CODES, STOP_SIGNALS, PeerError, UserError
from mmtrain.parent_death import end_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec

_OURS = "MMTRAIN_LAUNCHED"
SHUTDOWN_SECONDS = 600
"""What the launcher gives its workers to finish a step and save before it kills them."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How many processes there are to be, and where the nodes meet."""

    processes: int | None
    """On this node; None: one for each GPU, or one."""
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    """host:port on the node of rank 0, free there and reachable from the others."""
    max_restarts: int = 3

    def check(self) -> None:
        """Raises UserError where the options do not go together."""
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"--node-rank {self.node_rank}: expected 0 to {self.nodes - 1} with --nodes {self.nodes}")
        match = re.fullmatch(r"[!-~]+:([0-9]{1,5})", self.rendezvous or "")
        if self.nodes > 1 and match is None:
            raise UserError("--nodes: give --rendezvous HOST:PORT too, the same on every node, HOST being node 0's")
        if match is not None and not 0 < int(match[1]) < 2**16:
            raise UserError(f"--rendezvous: expected a port from 1 to 65,535, not {match[1]}")


def takes_part() -> bool:
    """Whether somebody has started this process as one of several: torchrun, accelerate, our launcher or srun.

    For srun, whose variables torch does not know, torch's own are set.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _end_with_launcher()
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in os.environ:
        return False  # a batch script has most of srun's variables, but it is one process
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0],
        "MASTER_ADDR": _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(20_000 + job % 40_000),
    }
    for key, value in found.items():
        os.environ.setdefault(key, value)
    return True


def quiet() -> None:
    """Silence what torch's native code prints of a connection that broke. To be called before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def may_write(node_rank: int) -> bool:
    """Whether this process is the one that takes the lock: the first, unless its launcher has the lock already."""
    return node_rank == 0 and _OURS not in os.environ and os.environ.get("RANK", "0") == "0"


def is_restart() -> bool:
    """Whether a launcher has started this process again after a fault."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def ignores_hangup() -> bool:
    """Whether this process was started to survive its terminal, as `nohup` does."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def num_local_gpus(device: str) -> int:
    """GPUs of this machine that a run on `device` (`run.device`) uses."""
    import torch

    is_used = device == "cuda" or (device == "auto" and torch.version.hip is None)
    return torch.cuda.device_count() if is_used else 0


def launch(options: LaunchOptions, processes: int, words: Sequence[str]) -> int:
    """Run `mmtrain words…` in `processes` processes on this node through torch's elastic agent; gives the exit code.

    Workers that die are started again, at most `max_restarts` times, and resume from the newest checkpoint; exits
    that another start would not help (`FINAL_CODES`) are final.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException

    logging.disable(logging.CRITICAL)  # our own lines report what the agent logs of its workers
    address = _own_address(options.rendezvous)
    os.environ |= {
        _OURS: str(os.getpid()),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT,SIGUSR1" + ("" if ignores_hangup() else ",SIGHUP"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a shared one still has what an earlier start left
    }
    interface = _interface(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    spec = WorkerSpec(
        role="mmtrain",
        local_world_size=processes,
        rdzv_handler=_rendezvous(options, address),
        entrypoint=sys.executable,
        args=("-m", "mmtrain", *words),
        max_restarts=options.max_restarts,
        local_addr=address,
    )
    try:
        result = _agent(spec).run()
    except SignalException as error:
        return 128 + int(error.sigval)
    return _cause(result) if result.is_failed() else 0


def _rendezvous(options: LaunchOptions, address: str) -> Any:
    """Where the agents of all nodes meet."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=options.rendezvous or "localhost:0",
        run_id="mmtrain",
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        local_addr=address,
        is_host=options.node_rank == 0,
        join_timeout=900,
    )
    return get_rendezvous_handler(parameters)


def _agent(spec: "WorkerSpec") -> Any:
    """torch's agent of this node, which does not start workers again after exits that are final."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: "WorkerGroup") -> "RunResult":
            result: RunResult = super()._monitor_workers(worker_group)
            if result.is_failed():
                code = _cause(result)
                if code in FINAL_CODES:
                    self._remaining_restarts = 0
                elif self._remaining_restarts:
                    _say(f"a process ended (exit code {code}): starting again from the newest checkpoint")
            return result

    return Agent(spec, DefaultLogsSpecs(), exit_barrier_timeout=30, shutdown_timeout=SHUTDOWN_SECONDS)


def launch_again(processes: int) -> None:
    """Run this very command in so many processes, and exit with their code. Returns where the work is this process's
    own: it is to be the only one, or is one of several already."""
    if not takes_part() and processes > 1:
        quiet()
        sys.exit(launch(LaunchOptions(processes, max_restarts=0), processes, sys.argv[1:]))


def _cause(result: "RunResult") -> int:
    """The exit code that says why the workers ended, as a shell gives it: 128 + n where signal n ended one.

    Once one has ended the agent ends the others with SIGTERM, and they find a peer gone: neither is a cause.
    """
    codes = {failure.exitcode for failure in result.failures.values()}
    codes = {code if code > 0 else 128 - code for code in codes}
    consequences = {PeerError.exit_code, *(128 + signum for signum in STOP_SIGNALS)}
    causes = codes - consequences or codes - {PeerError.exit_code} or codes
    return min(causes & FINAL_CODES or causes)


def _say(line: str) -> None:
    print(f"mmtrain: {line}", file=sys.stderr, flush=True)


def _own_address(rendezvous: str | None) -> str:
    """This machine's address on the way to the rendezvous; on one node the loopback, which nobody else can reach."""
    if rendezvous is None:
        return "127.0.0.1"
    host, _, port = rendezvous.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: it only picks the route
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--rendezvous {rendezvous}: there is no way to that host ({error.strerror})") from None


def _interface(address: str) -> str | None:
    """The network interface that has `address`: gloo would take the host name's, which may be another."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def _first_host(nodes: str) -> str:
    """The first of SLURM's node list, such as `gpu[03-06,09],big1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return "localhost" if match is None else match[1] + (match[2] or "")


def _end_with_launcher() -> None:
    """Have this process end with the launcher that started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.environ.get(_OURS)
        if not end_with_parent(None if launcher is None else int(launcher)):
            sys.exit(PeerError.exit_code)
