"""All samples of a record set encoded and checked, chunk by chunk, by several processes where there are many."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtrain.checks.findings import IGNORED, REFUSED, UNCHECKED, UNDECODABLE, Finding
from mmtrain.checks.inference import Prompts
from mmtrain.dataset.decoded_images import images_that_fail
from mmtrain.dataset.encoded_chunk import EncodedChunk, Fault, Note, join_chunks, merge_notes, sorted_paths
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.workers import map_in_processes, num_cores
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.images import spellings
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.segments import Known
from mmtrain.records.chat import Conversation, SampleError
from mmtrain.records.record_set import RecordSet

_CHUNK = 256
_MANY = 16_000
"""Samples from which on other processes are worth the seconds that they take to start."""
_IMAGE_BYTES = 2**26
"""Bytes of images in records that are in memory at once, and one record more."""


class ChunkEncoder:
    """Encodes samples and checks the result, by checks that do not know the encoder."""

    def __init__(
        self, spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, num_threads: int | None = None
    ) -> None:
        """`num_threads`: for decoding images; None: as many as there are cores."""
        self._records = records
        self._encoder, self._checker = spec.encoder(processor), spec.checker(processor)
        self._decode, self._num_threads = spec.decode_images, num_threads or num_cores()

    def encode(self, records: Sequence[int]) -> EncodedChunk:
        """The samples that these records give."""
        return join_chunks([self._encode_rows(rows) for rows in self._read(records)])

    def _read(self, records: Sequence[int]) -> Iterator[list["_Row"]]:
        """The samples of the records, not yet encoded; where images are large, those of some records at a time."""
        rows: list[_Row] = []
        num_bytes = 0
        for record in records:
            try:
                conversation = self._records.conversation(record)
                rows += [_Row(record, turn, own) for turn, own in self._encoder.sequences(conversation)]
                num_bytes += sum(len(image.data) for image in conversation.images if image.data is not None)
            except SampleError as error:
                rows.append(_Row(record, None, None, error))
            if num_bytes >= _IMAGE_BYTES:
                yield rows
                rows, num_bytes = [], 0
        yield rows

    def _encode_rows(self, rows: Sequence["_Row"]) -> EncodedChunk:
        known: Known = {}
        found = self._encode_each(rows, known)
        encoded = [row.encoded for row in found if isinstance(row.encoded, Encoded)]
        failing = self._failing_images(encoded)
        asked = [row.conversation for row in found if row.conversation is not None]
        prompts = iter(self._checker.prompts(asked, known))
        findings = [
            (position, finding)
            for position, row in enumerate(found)
            for finding in self._findings(row, failing, {} if row.conversation is None else next(prompts))
        ]
        spans = [span for one in encoded for span in one.images]
        return EncodedChunk(
            **_arrays(found),
            image_files=sorted_paths(str(span.image.source) for span in spans if isinstance(span.image.source, Path)),
            sought_files=sorted_paths(path for row in found for path in self._sought(row)),
            faults=tuple(Fault(index, one.kind, one.reason) for index, one in findings if one.is_fault),
            notes=merge_notes(
                [(0, {one.kind: Note(1, index, one.reason)}) for index, one in findings if not one.is_fault]
            ),
        )

    def _encode_each(self, rows: Sequence["_Row"], known: Known) -> list["_Row"]:
        pairs = ((row.conversation, self._records.roots(row.record)) for row in rows if row.conversation is not None)
        encoded = iter(self._encoder.encode_many(pairs, known))
        return [
            row if row.conversation is None else _Row(row.record, row.turn, row.conversation, next(encoded))
            for row in rows
        ]

    def _sought(self, row: "_Row") -> Iterator[str]:
        """Where the images of a sample were looked for, if it is refused."""
        if row.conversation is None or isinstance(row.encoded, Encoded):
            return
        names = [image.name for image in row.conversation.images if image.data is None]
        for folder in self._records.folders(row.record):
            for path in (folder / name for name in names if "\0" not in name):  # no file has it in its name
                yield from map(str, (path, *spellings(path)))

    def _failing_images(self, encoded: Sequence[Encoded]) -> dict[Path | bytes, str]:
        if not self._decode:
            return {}
        return images_that_fail((span.image for one in encoded for span in one.images), self._num_threads)

    def _findings(self, row: "_Row", failing: dict[Path | bytes, str], prompts: Prompts) -> Iterator[Finding]:
        """What is wrong with a sample, or worth knowing."""
        one = row.encoded
        if row.conversation is None or not isinstance(one, Encoded):
            yield Finding.fault(REFUSED, str(one))
            return
        labels = np.where(one.supervised, one.ids, IGNORED)
        sizes = [span.image.size for span in one.images]
        try:
            yield from self._checker.check(one.ids, labels, row.conversation, sizes, prompts)
        except SampleError as error:
            yield Finding.fault(UNCHECKED, str(error))
        for span in one.images:
            if span.image.source in failing:
                yield Finding.fault(UNDECODABLE, failing[span.image.source])


class _Row(NamedTuple):
    """A sample of a chunk, or a record that is none."""

    record: int
    turn: int | None
    conversation: Conversation | None
    encoded: Encoded | SampleError | None = None


def _arrays(rows: Sequence[_Row]) -> dict[str, Any]:
    """The arrays of a chunk, by name."""
    encoded = [row.encoded for row in rows if isinstance(row.encoded, Encoded)]
    sizes = [
        (one.num_tokens, one.num_supervised, len(one.images), len(one.weights))
        if isinstance(one, Encoded)
        else (0, 0, 0, 0)
        for one in (row.encoded for row in rows)
    ]
    num_tokens, num_supervised, num_images, num_weights = np.array(sizes, np.int32).reshape(-1, 4).T
    sums = [
        one.token_weights.sum(dtype=np.float64) if isinstance(one, Encoded) and one.weights else num
        for one, num in zip((row.encoded for row in rows), num_supervised.tolist(), strict=True)
    ]
    spans = [(s.start, s.length, s.num_placeholders, *s.image.size) for one in encoded for s in one.images]
    return {
        "records": np.array([row.record for row in rows], np.int32),
        "turns": np.array([-1 if row.turn is None else row.turn for row in rows], np.int32),
        "num_tokens": num_tokens,
        "num_supervised": num_supervised,
        "num_images": num_images,
        "num_weights": num_weights,
        "sum_weights": np.array(sums, np.float64),
        "ids": np.concatenate([np.zeros(0, np.int32), *(one.ids for one in encoded)]),
        "supervised": np.concatenate([np.zeros(0, np.bool_), *(one.supervised for one in encoded)]),
        "spans": np.array(spans, np.int32).reshape(-1, 5),
        "weights": np.array([weight for one in encoded for weight in one.weights], np.float32),
    }


def encode_all(
    spec: EncodingSpec, records: RecordSet, processor: ChatProcessor, first: int = 0
) -> Iterator[EncodedChunk]:
    """The records from `first` on encoded as `spec` says, in order."""
    chunks = (range(len(records))[start : start + _CHUNK] for start in range(first, len(records), _CHUNK))
    workers = num_cores() if len(records) - first >= _MANY else 1
    if workers == 1:
        encoder = ChunkEncoder(spec, records, processor)
        return (encoder.encode(chunk) for chunk in chunks)
    return map_in_processes(_encode_in_worker, chunks, workers, _start_worker, (spec,), __name__)


_of_worker: list[ChunkEncoder] = []  # the one of this process, where it is a worker


def _start_worker(spec: EncodingSpec) -> None:
    processor = load_processor(spec.model_path, spec.settings, tried=True)
    _of_worker[:] = [ChunkEncoder(spec, spec.records_in_order(), processor, num_threads=1)]


def _encode_in_worker(indices: range) -> EncodedChunk:
    return _of_worker[0].encode(indices)
