"""The tensors of a micro-batch: where each sample lies, and the order in which the loader gives them."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmtrain.dataset.ahead import SteadyPace
from mmtrain.dataset.batch import Loader, Segment, make_batch
from mmtrain.encoding.encode import Encoded
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError

PAD = 9


def sample(*ids: int) -> Encoded:
    """The even ids are supervised."""
    return Encoded(np.array(ids, np.int32), np.array([id_ % 2 == 0 for id_ in ids]), ())


SAMPLES = [sample(1, 2, 4), sample(3, 6), sample(5, 7, 8, 10, 12)]
PROCESSOR: Any = SimpleNamespace(tokenizer=SimpleNamespace(traits=SimpleNamespace(pad_id=PAD)))


def test_a_packed_row_holds_the_samples_one_after_the_other_and_padding_of_none() -> None:
    batch = make_batch([40, 41, 42], SAMPLES, PROCESSOR, packing=True)
    ids = [1, 2, 4, 3, 6, 5, 7, 8, 10, 12]
    assert batch.segments == (
        Segment(40, row=0, start=0, length=3, first_image=0, num_images=0),
        Segment(41, row=0, start=3, length=2, first_image=0, num_images=0),
        Segment(42, row=0, start=5, length=5, first_image=0, num_images=0),
    )
    assert (batch.num_tokens, batch.packed, batch.image_inputs) == (10, True, {})
    (row,) = batch.input_ids.tolist()
    assert row == ids + [PAD] * (len(row) - 10)
    assert batch.supervised.tolist() == [[id_ % 2 == 0 for id_ in ids] + [False] * (len(row) - 10)]


def test_padded_rows_are_filled_up_on_the_right_to_the_longest() -> None:
    batch = make_batch([40, 41, 42], SAMPLES, PROCESSOR, packing=False)
    assert batch.input_ids.tolist() == [[1, 2, 4, PAD, PAD], [3, 6, PAD, PAD, PAD], [5, 7, 8, 10, 12]]
    assert batch.supervised.tolist() == [
        [False, True, True, False, False],
        [False, True, False, False, False],
        [False, False, True, True, True],
    ]
    assert [(s.sample, s.row, s.start, s.length) for s in batch.segments] == [
        (40, 0, 0, 3),
        (41, 1, 0, 2),
        (42, 2, 0, 5),
    ]
    assert (batch.num_tokens, batch.packed) == (10, False)


class Samples:
    """Three samples; number 1 is read last, whenever it is asked for, and number 7 cannot be read."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.others_read = threading.Event()

    def encoded(self, index: int) -> Encoded:
        self.asked.append(index)
        if index == 7:
            raise SampleError("it is gone")
        if index == 1:
            assert self.others_read.wait(20)
        if index == 2:
            self.others_read.set()
        return SAMPLES[index]

    def place(self, index: int) -> Any:
        return f"data.jsonl:{index + 1}"


def test_batches_come_in_order_whichever_is_ready_first() -> None:
    batches = Loader(Samples(), PROCESSOR, packing=True, pace=SteadyPace(max_threads=2)).batches(
        [[0], [1], [2], [0, 2]]
    )
    assert [[segment.sample for segment in batch.segments] for batch in batches] == [[0], [1], [2], [0, 2]]


def test_no_more_are_read_ahead_than_asked() -> None:
    samples = Samples()
    batches = Loader(samples, PROCESSOR, packing=True, pace=SteadyPace(max_threads=1, ahead=2)).batches([[0]] * 50)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert 1 <= len(samples.asked) <= 3
    assert len(list(Loader(samples, PROCESSOR, packing=True, pace=SteadyPace(ahead=2)).batches([[0]] * 5))) == 5


def test_a_sample_that_cannot_be_read_is_named_by_its_place() -> None:
    batches = Loader(Samples(), PROCESSOR, packing=True).batches([[0], [2, 7]])
    assert next(batches).segments[0].sample == 0
    with pytest.raises(UserError, match=r"data\.jsonl:8: it is gone"):
        next(batches)
