"""Images decoded in other processes: the same bits, faults by name, and as many processes as keep up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mmtrain.config.schema import Config
from mmtrain.dataset import image_loader
from mmtrain.dataset.ahead import SteadyPace, in_order
from mmtrain.dataset.batch import Loader
from mmtrain.dataset.image_loader import ImageLoader, Taken, is_waiting, num_processes
from mmtrain.dataset.image_process import ImageProcess, load_images
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.images import FoundImage
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.record_set import RecordSet
from support.fresh_samples import FreshSamples

STARTS = pytest.mark.slow("starts a process that imports transformers")


@pytest.fixture(scope="module")
def processor(model_dirs: dict[str, Path]) -> ChatProcessor:
    return load_processor(str(model_dirs["qwen2_5_vl"]))


@pytest.fixture(scope="module")
def process(processor: ChatProcessor) -> Iterator[ImageProcess]:
    assert processor.origin is not None
    found = ImageProcess(processor.origin, raw=False, pinned=False)
    wait_until(found.is_ready)
    yield found
    found.end()


def wait_until(happens: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def image_files(folder: Path, *sizes: tuple[int, int]) -> list[FoundImage]:
    noise, found = np.random.default_rng(0), []
    for width, height in sizes:
        path = folder / f"{width}x{height}.png"
        PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        found.append(FoundImage(path.name, path, (width, height)))
    return found


def taken(load: ImageLoader) -> bool:
    load.taken(waited=1.0, used=1.0)
    return True


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_process_makes_the_same_tensors(
    processor: ChatProcessor, process: ImageProcess, tmp_path: Path
) -> None:
    first, second = image_files(tmp_path, (280, 196), (84, 168))
    in_memory = FoundImage("bytes", first.source.read_bytes(), first.size)  # type: ignore[union-attr]
    for samples in ([[first], [second, in_memory]], [[second]]):
        inputs, ids = load_images(processor, samples, None, raw=False)
        found, found_ids = process.load(samples, None)
        assert list(found) == list(inputs)
        assert all(torch.equal(found[name], value) for name, value in inputs.items())
        assert found_ids == ids


def test_an_image_that_does_not_decode_is_refused_and_the_process_continues(
    process: ImageProcess, tmp_path: Path
) -> None:
    (good,) = image_files(tmp_path, (84, 84))
    broken = FoundImage("broken.png", b"no image", (84, 84))
    with pytest.raises(SampleError, match=r"broken\.png' does not decode"):
        process.load([[broken]], None)
    assert process.load([[good]], None)[0]["pixel_values"].shape[0]


def test_signals_do_not_end_it(process: ImageProcess, tmp_path: Path) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process._server.process.send_signal(signum)
    assert process.load([image_files(tmp_path, (84, 84))], None)[1]


@STARTS
def test_the_loader_starts_a_process_and_gives_it_the_work(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("qwen2_5_vl")
    processor = load_processor(config.model.path)
    samples = FreshSamples(RecordSet(config.data.train), Encoder(processor))
    expected = Loader(samples, processor, packing=True).load([0, 2])
    load = ImageLoader(processor, max_processes=1, start_seconds=0.0)
    loader = Loader(samples, processor, packing=True, load_images=load)
    load.taken(1.0, 1.0)
    (process,) = load._starting
    wait_until(lambda: taken(load) and load._ready)
    monkeypatch.setattr(image_loader, "load_images", lambda *_: pytest.fail("a thread decodes"))
    found = loader.load([0, 2])
    assert torch.equal(found.image_inputs["pixel_values"], expected.image_inputs["pixel_values"])

    process._server.process.kill()
    with pytest.raises(UserError, match=r"mixed\.jsonl:1, .*mixed\.jsonl:3: .*was killed by SIGKILL: free memory"):
        loader.load([0, 2])
    assert not alive(process._server.process.pid)


def test_without_a_reason_no_process_is_started(processor: ChatProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loader, "ImageProcess", lambda *_: pytest.fail("a process was started"))
    on_cpu = ImageLoader(processor, max_processes=4, start_seconds=5.0)
    for _ in range(200):  # 8 seconds of 200
        on_cpu.taken(waited=0.04, used=1.0)
    ImageLoader(processor, max_processes=0, start_seconds=0.0).taken(waited=100.0, used=1.0)
    of_text = ImageLoader(replace(processor, images=None), max_processes=4, start_seconds=0.0)
    of_text.taken(waited=100.0, used=1.0)


@STARTS
def test_a_process_that_fails_is_reported_and_threads_decode(processor: ChatProcessor, tmp_path: Path) -> None:
    said: list[str] = []
    lost = replace(processor, origin=(str(tmp_path / "gone"), ProcessorSettings()))
    load = ImageLoader(lost, max_processes=1, say=said.append, start_seconds=0.0)
    wait_until(lambda: taken(load) and said)
    assert said == [
        "images: decoded by no other processes, because a process that decodes images ended with exit code 1"
    ]
    assert load([image_files(tmp_path, (84, 84))])[1]


@pytest.mark.parametrize(
    ("loading", "using", "expected"), [(0.0, 1.0, 1), (1.0, 2.0, 1), (2.0, 1.0, 3), (100.0, 1.0, 8), (1.0, 0.0, 8)]
)
def test_the_number_follows_from_the_seconds_of_loading_and_of_use(loading: float, using: float, expected: int) -> None:
    assert num_processes([Taken(loading / 2, using / 2, 0.0)] * 2, limit=8) == expected


@pytest.mark.slow("waits for processes")
def test_waiting_counts_from_a_tenth_of_the_time() -> None:
    assert not is_waiting([Taken(loading=9.0, using=9.0, waiting=0.9)] * 2)
    assert is_waiting([Taken(loading=9.0, using=9.0, waiting=1.1)] * 2)


@STARTS
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it with its parent on Linux")
def test_it_ends_with_the_process_that_started_it(model_dirs: dict[str, Path]) -> None:
    code = (
        "import sys, time; from mmtrain.dataset.image_process import ImageProcess\n"
        "from mmtrain.encoding.processor_settings import ProcessorSettings\n"
        "made = ImageProcess((sys.argv[1], ProcessorSettings()), False, False)\n"
        "print(made._server.process.pid, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(model_dirs["qwen2_5_vl"])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))


@pytest.mark.slow("waits for threads")
@pytest.mark.parametrize(("size", "ahead"), [(1, 50), (100, 3), (200, 1), (500, 0)])
def test_what_is_made_ahead_is_bounded_in_bytes(size: int, ahead: int) -> None:
    wanted: list[int] = []

    def each() -> Iterator[int]:
        for number in range(1000):
            wanted.append(number)
            yield number

    made = in_order(lambda number: number, each(), lambda _: size, SteadyPace(ahead=50), max_bytes=400)
    assert [next(made) for _ in range(20)] == list(range(20))
    assert len(wanted) == 20 + ahead
    made.close()  # type: ignore[attr-defined]


@pytest.mark.slow("waits for processes")
@pytest.mark.skipif(sys.platform != "linux", reason="the children of a process are found in /proc")
def test_workers_end_with_the_process_that_they_work_for() -> None:
    words = "import time; from mmtrain.dataset.workers import map_in_processes; "
    words += "list(map_in_processes(time.sleep, [600] * 4, 2, time.sleep, (0,), 'time'))"
    with subprocess.Popen([sys.executable, "-c", words]) as main:
        found: list[int] = []
        until = time.monotonic() + 120
        while len(found) < 3 and time.monotonic() < until:  # the fork server and two workers
            time.sleep(0.2)
            found = [pid for pid in descendants(main.pid) if "forkserver" in command_of(pid)]
        os.kill(main.pid, signal.SIGKILL)
    assert len(found) == 3
    until = time.monotonic() + 120
    while any(command_of(pid) for pid in found) and time.monotonic() < until:
        time.sleep(0.2)
    assert [command_of(pid) for pid in found] == [""] * 3


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


def command_of(pid: int) -> str:
    """Empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
