"""The device, precision and processes of a run, as the environment gives them."""

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mmtrain.dataset.workers import num_cores
from mmtrain.errors import STOP_SIGNALS, PeerError, UserError
from mmtrain.runtime.activity import Activity
from mmtrain.runtime.device import check_exchange, find_device, make_deterministic
from mmtrain.runtime.host_memory import keep_freed_memory
from mmtrain.runtime.peers import Peers
from mmtrain.runtime.supervisor import Supervisor
from mmtrain.safe_text import one_line

Result = TypeVar("Result")
_TIMEOUT_SECONDS = 1800.0


class Runtime:
    """One process among `num_processes`, its device, and the sums over all of them.

    `timeout`: seconds without progress after which a run that is supervised counts as hung; collectives give up later.
    `threads`: of the CPU, for this process; None leaves them to torch, shared among the processes of the machine.
    """

    def __init__(
        self, dtype: str, timeout: float = _TIMEOUT_SECONDS, threads: int | None = None, device: str = "auto"
    ) -> None:
        self._store: Any = None
        self._dtype = dtype
        self._timeout = timeout
        self.activity = Activity()
        self._supervisor: Supervisor | None = None
        local, local_index = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        self.device: torch.device = find_device(device, dtype, local_index)
        self.num_processes, self.index = 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._meet()
            self.num_processes, self.index = dist.get_world_size(), dist.get_rank()
        if threads is None and local > 1 and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, (os.cpu_count() or 1) // local)
        if threads is not None:
            torch.set_num_threads(threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.is_main: bool = self.index == 0
        first = self.index - local_index
        self._neighbours = range(first, min(first + local, self.num_processes))

    def _meet(self) -> None:
        """Join the other processes. Raises PeerError where they do not come: another start may find them."""
        seconds = datetime.timedelta(seconds=self._timeout + 60)
        on_gpus = self.device.type == "cuda"
        if on_gpus:
            check_exchange(self.device, os.environ)
        try:
            self._store, rank, world_size = next(iter(rendezvous("env://", timeout=seconds)))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # the agent's store outlives a restart, and what the last start left in it is not for this one
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self._store = PrefixStore(f"mmtrain/{attempt}", self._store)
            dist.init_process_group(
                "nccl" if on_gpus else "gloo",
                store=self._store,
                rank=rank,
                world_size=world_size,
                timeout=seconds,
                device_id=self.device if on_gpus else None,
            )
        except dist.DistError as error:
            raise PeerError(f"the processes of the run did not meet: {one_line(error)}") from None
        except ValueError as error:  # an address or a port is missing among the variables
            raise UserError(f"this process cannot join others: {one_line(error)}") from None

    def make_deterministic(self) -> None:
        """Have the device give the same bits for the same input."""
        make_deterministic(self.device, os.environ)

    @property
    def num_cores(self) -> int:
        """Cores of this machine for each of the run's processes on it."""
        return num_cores() // len(self._neighbours)

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    @property
    def kernels(self) -> dict[str, str]:
        """What decides, besides the program, which bits come out."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {"torch": torch.__version__, "device": device}

    @contextmanager
    def supervised(self, stacks: Path) -> Iterator[None]:
        """Answer signals, and end the run by name where a process is dead or stands still.

        An error that leaves the block is first reported to the other processes.
        """
        store = None if self._store is None else self._store.clone()
        peers = Peers(store, self.index, self.num_processes, self._neighbours, self._timeout)
        alone = self.num_processes == 1
        self._supervisor = Supervisor(self.activity, peers, self.index, alone, self._timeout, stacks)
        self._supervisor.start()
        try:
            yield
            self.wait()
        except UserError as error:
            error.already_reported = self._supervisor.report(error)
            raise
        except Exception as error:
            failed = UserError(f"process {self.index} failed: {type(error).__name__}: {error}")
            failed.exit_code = 1
            self._supervisor.report(failed)
            raise
        finally:
            self._supervisor.stop()
            self._supervisor = None

    @property
    def stop_signal(self) -> int | None:
        """The signal that this process knows of; another may not know of it yet."""
        return None if self._supervisor is None else self._supervisor.stop_signal

    def agree(self, values: Tensor) -> tuple[Tensor, int | None]:
        """`values` (float64, 1-d) summed over all processes, on the CPU where there are several, and the signal by
        which all of them stop, if any."""
        if self.num_processes == 1:
            return values, self.stop_signal
        flags = torch.tensor([float(self.stop_signal == signum) for signum in STOP_SIGNALS], dtype=torch.float64)
        total = self.sum(torch.cat([values.to(self.device), flags.to(self.device)])).cpu()
        signum = next(
            (int(n) for n, count in zip(STOP_SIGNALS, total[-len(STOP_SIGNALS) :], strict=True) if count), None
        )
        return total[: -len(STOP_SIGNALS)], signum

    def agreed_stop_signal(self) -> int | None:
        """The signal by which all processes stop, if any. All of them must call this."""
        return self.agree(torch.zeros(0, dtype=torch.float64))[1]

    def should_break(self, together: bool) -> bool:
        """Whether to leave a long loop because of a signal; `together`: all processes leave at the same turn."""
        if together and self._supervisor is not None:
            return self.agreed_stop_signal() is not None
        return self.stop_signal is not None

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for matrix products where the config says so; the float32 adapters stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype == "bfloat16")

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes."""
        total = values.clone()
        if self.num_processes > 1:
            with self._together():
                dist.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """(num_processes, *values.shape) `values` of every process, in their order."""
        found = [torch.empty_like(values) for _ in range(self.num_processes)]
        with self._together():
            dist.all_gather(found, values)
        return torch.stack(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.num_processes > 1:
            with self._together():
                dist.barrier()

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, as JSON keeps it, with paths as text; the others wait at the store,
        which a collective's timeout spares."""
        if self.is_main:
            found = json.dumps(make(), default=str)
            if self.num_processes > 1:
                self._store.set(key, found)
            return json.loads(found)
        doing = self.activity.phase
        self.activity.set("waiting")
        with self._together():  # the first process may serve the store, which then ends with it
            while not self._store.check([key]):
                time.sleep(0.05)
            found = self._store.get(key)
        self.activity.set(doing)
        return json.loads(found)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A collective: where it breaks because a process is gone, say which."""
        if self.num_processes == 1:
            yield
            return
        self.activity.waiting = True
        try:
            yield
        except RuntimeError as error:
            if self._supervisor is None:
                raise
            raise self._supervisor.lost() from error
        finally:
            self.activity.waiting = False

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
