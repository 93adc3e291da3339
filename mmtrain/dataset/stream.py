"""The training samples of `data.streaming`: read, checked and encoded window by window, ahead of the steps.

Every process reads the whole stream and encodes all of it, but decodes into tensors only the images of its own
micro-batches. So all of them know the samples and the lengths of every step without asking each other.

The samples that are used are numbered in the order of the stream, from 0: those of step s are (s - 1) * batch_size and
the ones after it. Within a window they are in random order.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mmtrain.config import Config
from mmtrain.dataset.encode_all import ChunkEncoder
from mmtrain.dataset.encoded_chunk import EncodedChunk, join_chunks
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.plan import Indices, permutation
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.shard_order import Position, ShardOrder, Window
from mmtrain.dataset.store_file import EncodedStore, temporary_store
from mmtrain.dataset.validate import CheckedSamples, FaultPolicy, LengthLimit, SampleSizes, check_stored
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.records.sources.place import Place
from mmtrain.safe_text import counted

_CHUNK = 64
"""Records that are encoded at once: their images may be in memory."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream continues, and what it has read before."""

    position: Position = field(default_factory=Position)
    num_used: int = 0
    num_skipped: int = 0
    num_dropped: int = 0

    @property
    def num_read(self) -> int:
        """All samples that were read; what is in none of the three numbers does not exist."""
        return self.num_used + self.num_skipped + self.num_dropped

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> "StreamState":
        """From JSON."""
        return cls(**row | {"position": Position(**row["position"])})


@dataclass(frozen=True, slots=True)
class StreamedWindow:
    """The samples of a window, encoded."""

    start: StreamState
    end: StreamState
    samples: StoredSamples
    checked: CheckedSamples
    order: Indices
    """The samples that are used, in the order of the stream, by their index in `samples`."""

    @property
    def checked_samples(self) -> tuple[StoredSamples, CheckedSamples]:
        """As `check_samples` gives them."""
        return self.samples, self.checked

    def __contains__(self, sample: int) -> bool:
        """Whether the sample of this number in the stream is one of them."""
        return self.start.num_used <= sample < self.end.num_used

    @property
    def num_used(self) -> int:
        return len(self.order)

    @property
    def checksum(self) -> int:
        """The same in every process that read the same."""
        return zlib.crc32(self.checked.num_tokens.tobytes(), zlib.crc32(self.order.tobytes()))

    def left_out(self) -> list[tuple[Place, str]]:
        """Where each sample is that is not used, and why."""
        return [(self.samples.place(index), reason) for index, reason in self.checked.left_out]


class Stream:
    """The samples of `data.train`, by their number in the stream. One thread calls `step`, `sizes` and `begin`; any
    thread may call `encoded` and `place` for the samples of steps that `step` has given."""

    def __init__(
        self, config: Config, processor: ChatProcessor, limit: LengthLimit, tick: Callable[[], None] = lambda: None
    ) -> None:
        """`processor`: used by another thread, so by nothing else. `tick` is called for every few samples.

        Raises UserError where the first window cannot be used.
        """
        assert config.data.streaming is not None
        self.order = ShardOrder(config.data.train, config.train.seed, config.data.streaming.window)
        self.window = config.data.streaming.window
        self._spec, self._processor = EncodingSpec.of(config, config.data.train), processor
        self._limit, self._policy, self._tick = limit, FaultPolicy.of(config.data), tick
        self._seed, self._batch_size = config.train.seed, config.train.batch_size
        self._is_closed = False
        self._pool = ThreadPoolExecutor(1, "mmtrain-stream")
        self._windows: tuple[StreamedWindow, ...] = ()
        self._reader = self._read(StreamState())
        self._next = self._read_next()
        self.head = self._first_used()
        """The first window of which samples are used."""

    def _first_used(self) -> StreamedWindow:
        self.step(1)
        return next(window for window in self._windows if window.num_used)

    def start(self, state: StreamState) -> None:
        """Continue from `state`."""
        if state != StreamState():
            self._windows = ()
            self._reader = self._read(state)
            self._next = self._read_next()

    def close(self) -> None:
        """Stop reading ahead."""
        self._is_closed = True
        self._pool.shutdown(cancel_futures=True)

    @property
    def train(self) -> "Stream":
        """The samples."""
        return self

    @property
    def steps_per_epoch(self) -> None:
        """Not known before the end of the first epoch."""
        return None

    def step(self, number: int) -> list[int]:
        """The samples of step `number`, counted from 1. Raises UserError where one of their window cannot be used."""
        last = number * self._batch_size
        while not self._windows or self._windows[-1].end.num_used < last:
            window = self._next.result()
            self._windows = (*self._windows, window)  # a new one: threads may be looking for a sample
            self._next = self._read_next()
        return list(range(last - self._batch_size, last))

    def begin(self, number: int) -> list[StreamedWindow]:
        """The windows whose first sample is in step `number`. Those that only steps before it needed are freed."""
        first, *_ = self.step(number)
        self._windows = tuple(window for window in self._windows if window.end.num_used >= first)
        return [window for window in self._windows if window.start.num_used // self._batch_size == number - 1]

    def state(self, step: int) -> StreamState:
        """Where a stream that resumes after `step` starts: with the window of the next sample."""
        first = step * self._batch_size
        for window in self._windows:
            if window.start.num_used == first or window.end.num_used > first:
                return window.start
        return self._windows[-1].end

    def sizes(self, samples: Sequence[int]) -> SampleSizes:
        """Of these samples, which are in ascending order."""
        return SampleSizes.joined(
            [
                window.checked.sizes(window.order[[sample - window.start.num_used for sample in own]])
                for window in self._windows
                if (own := [sample for sample in samples if sample in window])
            ]
        )

    def encoded(self, index: int) -> Encoded:
        """Raises SampleError where an image is no longer there."""
        window, own = self._find(index)
        return window.samples.encoded(own)

    def place(self, index: int) -> Place:
        """The file and line of a sample."""
        window, own = self._find(index)
        return window.samples.place(own)

    def summary(self, step: int) -> str:
        """What was read up to `step`, in one line."""
        found = self._windows[-1].end if self._windows else StreamState()
        used = step * self._batch_size
        numbers = {
            "trained on": used,
            "skipped because of faults": found.num_skipped,
            "dropped as too long": found.num_dropped,
            "read ahead": found.num_used - used,
        }
        return f"streaming: {counted(found.num_read, 'sample')} read: " + ", ".join(
            f"{number:,} {what}" for what, number in numbers.items() if number
        )

    def _find(self, sample: int) -> tuple[StreamedWindow, int]:
        window = next(one for one in self._windows if sample in one)
        return window, int(window.order[sample - window.start.num_used])

    def _read_next(self) -> Future[StreamedWindow]:
        return self._pool.submit(next, self._reader)

    def _read(self, state: StreamState) -> Iterator[StreamedWindow]:
        """The windows from `state` on. Raises UserError where one cannot be used, or none of a whole epoch."""
        at_epoch, reasons = None, list[str]()
        for window in self.order.windows(state.position):
            if window.start == Position(window.start.epoch):
                if at_epoch is not None and at_epoch.num_used == state.num_used:
                    num_read = state.num_read - at_epoch.num_read
                    raise UserError(f"{reasons[-1]}; it is the last of {num_read:,} samples, and none can be used")
                at_epoch = state
            found = self._checked(window, state)
            yield found
            state, reasons = found.end, [f"{place}: {reason}" for place, reason in found.left_out()]

    def _checked(self, window: Window, before: StreamState) -> StreamedWindow:
        records = self._spec.records(window.files)
        store = self._encoded(ChunkEncoder(self._spec, records, self._processor), window.records)
        samples = StoredSamples.of(records, store)
        policy = replace(
            self._policy, read_before=before.num_read, skipped_before=before.num_skipped, epochs=1 + window.start.epoch
        )
        checked = check_stored(samples, self._limit, policy)
        order = permutation(len(samples), self._seed, window.start.epoch, 1 + window.start.window)
        used = order[checked.num_tokens[order] > 0]
        state = StreamState(
            window.end,
            before.num_used + len(used),
            before.num_skipped + len(checked.skipped),
            before.num_dropped + len(checked.dropped),
        )
        return StreamedWindow(before, state, samples, checked, used)

    def _encoded(self, encoder: ChunkEncoder, records: Indices) -> EncodedStore:
        def chunks() -> Iterator[EncodedChunk]:
            for start in range(0, len(records), _CHUNK):
                if self._is_closed:
                    raise CancelledError
                self._tick()
                yield encoder.encode(records[start : start + _CHUNK].tolist())

        return temporary_store(join_chunks(list(chunks())))
