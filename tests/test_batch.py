"""The tensors of a micro-batch: where each sample is, and the order in which the loader gives them."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.dataset.ahead import Pace, SteadyPace, in_order
from mmtrain.dataset.batch import Batch, Loader, Segment, make_batch
from mmtrain.dataset.image_inputs import Features
from mmtrain.encoding.encode import Encoded, ImageSpan
from mmtrain.encoding.images import FoundImage
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
    assert (batch.input_ids.dtype, batch.supervised.dtype) == (torch.int64, torch.bool)
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


@pytest.mark.parametrize(("multiple", "length"), [(1, 10), (4, 12), (5, 10), (32, 32)])
def test_a_packed_row_is_filled_up_to_a_multiple(multiple: int, length: int) -> None:
    batch = make_batch([40, 41, 42], SAMPLES, PROCESSOR, packing=True, row_multiple=multiple)
    assert batch.input_ids.shape == batch.supervised.shape == (1, length)
    assert batch.input_ids[0, 10:].tolist() == [PAD] * (length - 10)
    padded = make_batch([40, 41, 42], SAMPLES, PROCESSOR, packing=False, row_multiple=multiple)
    assert padded.input_ids.shape == (3, 5)


def test_every_supervised_token_has_the_weight_of_its_turn() -> None:
    """The second sample has none of its own: its tokens count 1."""
    weighted = replace(SAMPLES[2], weights=(0.25,))
    batch = make_batch([40, 41], [weighted, SAMPLES[1]], PROCESSOR, packing=True)
    assert batch.weights is not None
    assert (batch.weights.dtype, batch.weights.tolist()) == (torch.float32, [0.25, 0.25, 0.25, 1.0])
    assert batch.weighted(torch.full((4,), 2.0)).tolist() == [0.5, 0.5, 0.5, 2.0]
    plain = make_batch([40, 41], SAMPLES[:2], PROCESSOR, packing=True)
    assert plain.weights is None
    assert plain.weighted(torch.full((3,), 2.0)).tolist() == [2.0, 2.0, 2.0]


class ImageProcessor:
    """Makes an input for each image, and the ids of their spans: 60 and 61 for each."""

    tokenizer = PROCESSOR.tokenizer

    def __init__(self, together: bool = True, most: int = 9) -> None:
        self.lays_out_together = together
        self.most = most
        """More images than these get a token more."""
        self.given: list[Any] = []

    def image_inputs(self, samples: Any, alone: Any = None, raw: bool = False) -> Any:
        self.given.append((samples, alone))
        images = [image for own in samples for image in own]
        inputs = {"pixel_values": torch.tensor(images), "grid": torch.tensor(images) + 100}
        return inputs, [60, 61] * len(images) + [61] * (len(images) > self.most)


def with_images(*images: int) -> Encoded:
    """An id, two for each image, and a supervised one."""
    spans = [ImageSpan(FoundImage(f"{n}.png", bytes([n]), (8, 8)), 1 + 2 * i, 2, 2) for i, n in enumerate(images)]
    ids = [1, *[60, 61] * len(images), 2]
    return Encoded(np.array(ids, np.int32), np.array([id_ == 2 for id_ in ids]), tuple(spans))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image decodes to its only byte."""
    monkeypatch.setattr("mmtrain.dataset.image_process.decode", lambda image: image.source[0])


def test_images_are_those_of_the_samples_in_order(decoded: None) -> None:
    samples, processor = [with_images(7, 8), SAMPLES[0], with_images(9)], ImageProcessor()
    batch = make_batch([40, 41, 42], samples, processor, packing=True)  # type: ignore[arg-type]
    assert [(s.first_image, s.num_images) for s in batch.segments] == [(0, 2), (2, 0), (2, 1)]
    assert {name: value.tolist() for name, value in batch.image_inputs.items()} == {
        "pixel_values": [7, 8, 9],
        "grid": [107, 108, 109],
    }
    assert processor.given == [([[7, 8], [9]], None)]
    assert batch.images == ()


def test_a_processor_that_takes_one_sample_at_a_time_gets_its_ids(decoded: None) -> None:
    processor: Any = ImageProcessor(together=False)
    make_batch([40], [with_images(7)], processor, packing=False)
    assert processor.given == [([[7]], [1, 60, 61, 2])]
    with pytest.raises(SampleError, match="are laid out for one sample at a time, and here are several"):
        make_batch([40, 41], [with_images(7), with_images(8)], processor, packing=False)
    make_batch([40, 41], SAMPLES[:2], processor, packing=False)  # without images it does not matter


def test_images_of_another_size_than_encoded_are_refused(decoded: None) -> None:
    processor: Any = ImageProcessor(most=1)
    with pytest.raises(SampleError, match=r"^4 tokens were laid out for 7\.png, 8\.png and .* makes 5$"):
        make_batch([40, 41], [with_images(7), with_images(8)], processor, packing=True)


def test_images_with_cached_features_are_not_decoded(decoded: None) -> None:
    """The others are; inputs besides pixels are those of all images, in order."""
    features = Features({"image_features": torch.zeros(2, 3)}, {"grid": torch.tensor([5])}, 2)
    found = iter([None, features])
    cache: Any = SimpleNamespace(find=lambda key: next(found))
    processor: Any = ImageProcessor()
    batch = make_batch([40], [with_images(7, 8)], processor, packing=True, image_cache=cache)
    assert processor.given == [([[7]], None)]
    assert {name: value.tolist() for name, value in batch.image_inputs.items()} == {"grid": [107, 5]}
    assert [image.features for image in batch.images] == [None, features]
    none: Any = SimpleNamespace(find=lambda key: None)
    assert make_batch([40], SAMPLES[:1], processor, packing=True, image_cache=none).image_inputs == {}
    longer = replace(with_images(7).images[0], length=3)
    with pytest.raises(SampleError, match=r"^3 tokens were laid out for 7\.png and .* makes 2$"):
        make_batch([40], [replace(with_images(7), images=(longer,))], processor, packing=True, image_cache=none)


def test_a_fault_of_the_batch_names_the_sample_or_else_all_of_them(decoded: None) -> None:
    few: Any = SimpleNamespace(encoded=lambda index: with_images(*range(index)), place=lambda index: f"a.jsonl:{index}")
    loader = Loader(few, ImageProcessor(most=2), packing=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^a\.jsonl:3: 6 tokens were laid out"):
        loader.load([1, 3, 4])
    with pytest.raises(UserError, match=r"^a\.jsonl:1, a\.jsonl:2: the samples cannot be laid out together: 6 tokens"):
        loader.load([1, 2])


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


def batches_at(pace: Pace, samples: Samples, cuts: Sequence[Sequence[int]]) -> Iterator[Batch]:
    loader = Loader(samples, PROCESSOR, packing=True)
    return in_order(loader.load, cuts, lambda batch: batch.num_bytes, pace)


def test_batches_come_in_order_whichever_is_ready_first() -> None:
    batches = batches_at(SteadyPace(max_threads=2), Samples(), [[0], [1], [2], [0, 2]])
    assert [[segment.sample for segment in batch.segments] for batch in batches] == [[0], [1], [2], [0, 2]]


def test_no_more_are_read_ahead_than_asked() -> None:
    samples = Samples()
    batches = batches_at(SteadyPace(max_threads=1, ahead=2), samples, [[0]] * 50)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert 1 <= len(samples.asked) <= 3
    assert len(list(batches_at(SteadyPace(ahead=2), samples, [[0]] * 5))) == 5


def test_a_sample_that_cannot_be_read_is_named_by_its_place() -> None:
    batches = Loader(Samples(), PROCESSOR, packing=True).batches([[0], [2, 7]])
    assert next(batches).segments[0].sample == 0
    with pytest.raises(UserError, match=r"data\.jsonl:8: it is gone"):
        next(batches)
