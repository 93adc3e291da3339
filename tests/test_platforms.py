"""What only Linux has is not needed: each use has a fallback, tried here without the thing itself."""

import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmtrain.dataset.workers import map_in_processes, num_cores
from mmtrain.encoding import template_trial
from mmtrain.encoding.template_trial import try_template
from mmtrain.errors import UserError
from mmtrain.runtime.host_memory import keep_freed_memory


def test_cores_are_counted_without_affinities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert num_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_freed_memory_is_kept_only_by_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, int]] = []

    class Glibc:
        def mallopt(self, parameter: int, value: int) -> None:
            called.append((parameter, value))

    for library in (object(), Glibc()):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        keep_freed_memory()
    assert len(called) == 2


WORKER = """
import sys, time
sys.platform = {platform!r}
import mmtrain.parent_death
mmtrain.parent_death._SECONDS_BETWEEN_LOOKS = 0.05
mmtrain.parent_death.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_process_dies_with_the_one_that_started_it(platform: str) -> None:
    words = [sys.executable, "-c", PARENT, WORKER.format(platform=platform)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    for _ in range(400):
        if not is_alive(child):
            break
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has waited for does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def doubled(number: int) -> int:
    return 2 * number


def nothing() -> None:
    """Nothing to prepare."""


@pytest.mark.slow("starts processes that import torch")
def test_workers_start_where_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert list(map_in_processes(doubled, range(5), 1, nothing, (), __name__)) == [0, 2, 4, 6, 8]


def test_a_template_is_tried_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The memory is not limited then; time is."""
    monkeypatch.setattr(template_trial, "SECONDS", 0.3)
    monkeypatch.setattr(template_trial, "_STATM", tmp_path / "nothing")

    def endless(*given: Any) -> str:
        while True:
            time.sleep(1)

    try_template("", lambda *given: "text")
    with pytest.raises(UserError, match=r"takes longer than 0\.3 seconds"):
        try_template("", endless)


def test_a_template_is_tried_within_the_limit_that_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting a higher limit than the hard one would fail."""
    own = 2**62
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, own))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    template_trial._limit_memory()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, own))
    template_trial._limit_memory()
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (none, none))
    template_trial._limit_memory()
    (limit, hard), again, (unlimited, unset) = asked
    assert template_trial.MEMORY < limit < own == hard
    assert again == (1000, own)
    assert unlimited == pytest.approx(limit, rel=0.1)
    assert unset == none


def test_a_fault_of_the_trial_itself_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError

    monkeypatch.setattr(template_trial, "_limit_memory", broken)
    with pytest.raises(UserError, match=r"ended the process that tried it \(exit code 1\)"):
        try_template("", lambda *given: "text")
