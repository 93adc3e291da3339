"""Signals, faults and launchers, a few of each: tests/torture has them all. And what judges and sums, by hand."""

import functools
import itertools
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.runtime.activity import WAITING
from mmtrain.runtime.launch import LaunchOptions, _cause, _first_host, _own_address, takes_part
from mmtrain.runtime.peers import STOP_SECONDS, Seen, judge
from mmtrain.train.gradients import is_exact, sum_tree
from support.data_cases import loader_case, nan_case, refused_case, refused_sharded_case
from support.fault_cases import NLL, World, kill_case, second_signal_case, signal_case, stop_case, stop_then_signal_case
from support.forked import Server
from support.launch_cases import launched_signal_case

pytestmark = pytest.mark.slow("signals and faults in runs of several processes")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: Server) -> World:
    return World(tmp_path_factory.mktemp("signals"), server)


@pytest.mark.parametrize(
    ("phase", "signum", "rank"),
    [
        ("checking", signal.SIGINT, 0),
        ("gradients", signal.SIGTERM, 1),
        ("saving", signal.SIGUSR1, 0),
        ("evaluating", signal.SIGHUP, 1),
    ],
)
def test_a_signal_to_one_ends_all(phase: str, signum: signal.Signals, rank: int, world: World) -> None:
    assert signal_case(world, phase, signum, rank)[0] == []


def test_a_second_signal_ends_at_once(world: World) -> None:
    assert second_signal_case(world, "forward", signal.SIGTERM, 1)[0] == []


@pytest.mark.parametrize("rank", [0, 1], ids=["that_holds_the_store", "that_does_not"])
def test_a_dead_process_is_named(rank: int, world: World) -> None:
    assert kill_case(world, "forward", rank, going_on=rank == 0)[0] == []


@pytest.mark.parametrize("rank", [0, 1], ids=["that_holds_the_store", "that_does_not"])
def test_a_stopped_process_is_named(rank: int, world: World) -> None:
    assert stop_case(world, 2, rank, 1.2, timeout=2.0)[0] == []


def test_a_signal_is_answered_next_to_a_stopped_process(world: World) -> None:
    assert stop_then_signal_case(world, 1, grace=2.0)[0] == []


def test_a_loss_that_is_not_finite_stops_all(world: World) -> None:
    assert nan_case(world, NLL, 1, 2) == []


@pytest.mark.parametrize("do", ["break", "hang"])
def test_a_loader_that_fails_is_named(do: str, world: World) -> None:
    assert loader_case(world, do, 1)[0] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_the_data_in_the_middle_loses_no_complete_step(rank: int, world: World) -> None:
    assert refused_case(world, rank) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_the_data_ends_a_sharded_run_in_one_line(rank: int, world: World) -> None:
    assert refused_sharded_case(world, rank) == []


def test_a_signal_to_the_launcher(world: World) -> None:
    assert launched_signal_case(world, signal.SIGTERM, 143) == []


# --- the parts, by hand


def seen(index: int, phase: str, alive: float = 0.0, moved: float = 0.0, stop_signal: int | None = None) -> Seen:
    beat = {"index": index, "number": 1, "pid": 10 + index, "host": "here", "phase": phase, "stop_signal": stop_signal}
    beat["waiting"] = phase in WAITING
    return Seen({**beat, "doing": f"step 3, {phase}", "ticks": 1, "reported": None}, alive, moved)


def test_who_is_silent_holds_the_run_up() -> None:
    found = judge([seen(0, "gradients", alive=99), seen(1, "forward", alive=80)], 10, 100)
    assert found is not None
    assert (found.code, found.reason) == (
        5,
        "process 1 (pid 11 on here) has not been heard of for 10 s: step 3, forward",
    )


def test_who_waits_is_not_the_one_that_hangs() -> None:
    waiting, busy = seen(0, "gradients", 99, 70), seen(1, "forward", 99, 85)
    found = judge([waiting, busy], 10, 100)
    assert found is not None
    assert found.reason == "process 1 (pid 11 on here) has not moved for 10 s: step 3, forward"
    assert judge([waiting, seen(1, "forward", 99, 95)], 10, 100) is None  # it waits for one that moves


def test_all_wait_for_each_other() -> None:
    found = judge([seen(0, "gradients", 99, 80), seen(1, "waiting", 99, 80)], 10, 100)
    assert found is not None
    assert found.code == 5
    assert "process 0" in found.reason
    assert "process 1" in found.reason


def test_after_a_signal_the_time_is_short_but_for_saving() -> None:
    late = STOP_SECONDS + 1
    assert judge([seen(0, "forward", late, 0)], 600, late) is None
    found = judge([seen(0, "forward", late, 0, stop_signal=15)], 600, late)
    assert found is not None
    assert found.code == 143
    assert judge([seen(0, "saving", late, 0, stop_signal=15)], 600, late) is None


def test_who_was_stopped_before_a_signal_has_not_heard_of_it() -> None:
    late = STOP_SECONDS + 1
    found = judge([seen(0, "gradients", late, late, stop_signal=15), seen(1, "forward")], 600, late, stop_signal=15)
    assert found is not None
    assert found.code == 143
    assert "process 1" in found.reason


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([-9], 137),
        ([-9, -15, 7], 137),
        ([2, -15], 2),
        ([1, 7], 1),
        ([6, 1], 6),
        ([7, 7], 7),
        ([143, 7], 143),
        ([-15], 143),
    ],
)
def test_the_exit_code_says_why(codes: list[int], expected: int) -> None:
    failures: Any = {rank: SimpleNamespace(exitcode=code) for rank, code in enumerate(codes)}
    result: Any = SimpleNamespace(failures=failures)
    assert _cause(result) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-06,09],big1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("a1,b2", "a1"),
        ("n-1-[001-004]", "n-1-001"),
        ("", "localhost"),
    ],
)
def test_the_first_of_slurms_nodes(nodes: str, expected: str) -> None:
    assert _first_host(nodes) == expected


def test_the_own_address() -> None:
    assert _own_address(None) == "127.0.0.1"
    assert _own_address("127.0.0.1:29500") == "127.0.0.1"
    with pytest.raises(UserError, match="there is no way to that host"):
        _own_address("no-such-host.invalid:29500")


@pytest.mark.parametrize(
    "layout",
    [
        LaunchOptions(1, 2, 2, "h:1"),
        LaunchOptions(1, 2, 0),
        LaunchOptions(1, 2, 0, "h"),
        LaunchOptions(1, 1, 1),
        LaunchOptions(1, 2, 0, "é:80"),
    ],
)
def test_options_that_do_not_go_together(layout: LaunchOptions) -> None:
    with pytest.raises(UserError, match="--node"):
        layout.check()


@pytest.mark.parametrize("port", [0, 65_536, 99_999])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(UserError, match=f"--rendezvous: expected a port from 1 to 65,535, not {port}"):
        LaunchOptions(1, 2, 0, f"h:{port}").check()
    LaunchOptions(1, 2, 0, "h:65535").check()


def test_srun_is_taking_part_and_a_batch_script_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in ours:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert not takes_part()
    step = {"NUM_TASKS": "8", "NODELIST": "gpu[03-04]", "TASKS_PER_NODE": "4(x2)"}
    for name, value in {**{f"SLURM_STEP_{key}": value for key, value in step.items()}, "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert takes_part()
    import os

    assert [os.environ[name] for name in ours] == ["5", "8", "1", "4", "gpu03", "20077"]


class Meeting:
    """Processes that are threads, and meet to gather."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._barrier = threading.Barrier(num_processes, timeout=30)
        self._parts: list[Tensor] = [torch.empty(0)] * num_processes

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        """What sum_tree gives each process."""
        found: list[Tensor] = [torch.empty(0)] * self.num_processes
        share = len(leaves) // self.num_processes

        def work(index: int) -> None:
            own = iter(leaves[index * share : (index + 1) * share])
            gather = functools.partial(self._gather, index)
            member: Any = SimpleNamespace(num_processes=self.num_processes, gather=gather)
            found[index] = sum_tree(share, lambda: next(own).clone(), member)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _gather(self, index: int, part: Tensor) -> Tensor:
        self._parts[index] = part
        self._barrier.wait()
        found = torch.stack(self._parts)
        self._barrier.wait()
        return found


@pytest.mark.parametrize("num_leaves", [4, 8, 12])
def test_the_tree_gives_the_same_bits_on_1_2_and_4_processes(num_leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtrain.train.gradients.CHUNK", 300)  # several, and a last one that is not full
    generator = torch.Generator().manual_seed(num_leaves)
    scales = 10.0 ** torch.randint(-6, 7, (num_leaves, 1), generator=generator)
    leaves = list(torch.randn(num_leaves, 1000, generator=generator) * scales)
    expected = Meeting(1).run(leaves)[0]
    for processes in (2, 4):
        assert is_exact(num_leaves, processes)
        for found in Meeting(processes).run(leaves):
            assert torch.equal(found, expected)
    orders = itertools.islice(itertools.permutations(leaves), 1, 3)
    assert any(not torch.equal(sum(order[1:], order[0]), expected) for order in orders)  # the order does matter
    exact = torch.stack(leaves).double().sum(0)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=float(exact.abs().max()) * 1e-6)


def test_which_layouts_are_exact() -> None:
    assert [n for n in range(1, 9) if is_exact(8, n)] == [1, 2, 4, 8]
    assert [n for n in range(1, 9) if is_exact(12, n)] == [1, 2, 4]
