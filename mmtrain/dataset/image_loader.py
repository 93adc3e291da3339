"""Decodes images in threads, or in as many processes as keep the device busy."""

import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from mmtrain.dataset.image_process import ImageProcess, ImageSamples, Loaded, load_images
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError

_NUM_THREADS = 2
_START_SECONDS = 5.0
"""About what it takes to start a process: it is started once as much has been lost without it."""
_RECENT = 64
"""The number is chosen by what so many micro-batches took."""
_MARGIN = 1.25
_MIN_WAITING = 0.1
"""On a CPU processes take cores from the computation: for so large a share of the time it has waited for images."""


class Taken(NamedTuple):
    """Seconds around one micro-batch."""

    loading: float
    """That images took to load since the one before was taken."""
    using: float
    """For which the one before was used."""
    waiting: float


class ImageLoader:
    """Makes the tensors for images, in the threads that call it or in processes that it starts.

    `max_processes`: 0 for none. `on_gpu`: the device does not use the cores itself, and tensors are page-locked for it.
    `raw`: pixels of 8 bits. `say` reports why there are no processes where there should be.
    """

    def __init__(
        self,
        processor: ChatProcessor,
        max_processes: int = 0,
        on_gpu: bool = False,
        raw: bool = False,
        say: Callable[[str], None] = lambda line: None,
        start_seconds: float = _START_SECONDS,
    ) -> None:
        self._processor, self._raw, self.on_gpu, self._say = processor, raw, on_gpu, say
        self._limit = max_processes if max_processes and processor.origin and processor.images else 0
        self._idle: queue.SimpleQueue[ImageProcess | None] = queue.SimpleQueue()
        """Who can take the next images: a process, or None for the thread itself."""
        for _ in range(_NUM_THREADS):
            self._idle.put(None)
        self._starting: list[ImageProcess] = []
        self._ready: list[ImageProcess] = []
        self._seconds, self._lock = 0.0, threading.Lock()
        self._recent: deque[Taken] = deque(maxlen=_RECENT)
        self._lost, self._start_seconds = 0.0, start_seconds
        weakref.finalize(self, _end, self._starting, self._ready)

    def __call__(self, samples: ImageSamples, ids: Sequence[int] | None = None) -> Loaded:
        """See `ImageProcessor.inputs`. Threads can share it. Raises SampleError where an image does not decode, and
        UserError where the process that decodes it has ended."""
        worker = self._idle.get()
        while worker is None and self._ready:  # threads no longer decode
            worker = self._idle.get()
        begun = time.perf_counter()
        try:
            if worker is None:
                return load_images(self._processor, samples, ids, self._raw)
            return worker.load(samples, ids)
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - begun
            self._idle.put(worker)

    @property
    def max_threads(self) -> int:
        return max(_NUM_THREADS, self._limit)

    @property
    def ahead(self) -> int:
        """Micro-batches made ahead: two for each that are made at a time."""
        return 2 * max(_NUM_THREADS, len(self._ready))

    def taken(self, waited: float, used: float) -> None:
        """Called in the thread that uses the micro-batches, for each: how long it was waited for, and how long the one
        before it was used."""
        if len(self._starting) + len(self._ready) >= self._limit:
            self._welcome()
            return
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        self._recent.append(Taken(seconds, used, waited))
        self._lost += seconds if self.on_gpu else waited
        if self._lost >= self._start_seconds and (self.on_gpu or is_waiting(self._recent)):
            self._start(num_processes(self._recent, self._limit))
        self._welcome()

    def _start(self, wanted: int) -> None:
        try:
            while len(self._starting) + len(self._ready) < wanted:
                assert self._processor.origin is not None  # see `_limit`
                self._starting.append(ImageProcess(self._processor.origin, self._raw, self.on_gpu))
        except OSError as error:
            self._stay(str(error))

    def _welcome(self) -> None:
        """Give work to the processes that have become ready."""
        try:
            for process in [one for one in self._starting if one.is_ready()]:
                self._starting.remove(process)
                self._ready.append(process)
                self._idle.put(process)
        except UserError as error:
            self._stay(str(error))

    def _stay(self, reason: str) -> None:
        """Start no more."""
        _end(self._starting)
        self._starting.clear()
        self._limit = len(self._ready)
        self._say(f"images: decoded by {self._limit or 'no'} other processes, because {reason}")


def num_processes(recent: Collection[Taken], limit: int) -> int:
    """How many processes, at least 1, keep up with the device."""
    loading, using = sum(one.loading for one in recent), sum(one.using for one in recent)
    return max(1, min(limit, math.ceil(_MARGIN * loading / using) if using else limit))


def is_waiting(recent: Collection[Taken]) -> bool:
    """Whether the device waits for a share of its time that is worth a process."""
    using, waiting = sum(one.using for one in recent), sum(one.waiting for one in recent)
    return waiting > _MIN_WAITING * (using + waiting)


def _end(*processes: list[ImageProcess]) -> None:
    for process in [one for each in processes for one in each]:
        process.end()
