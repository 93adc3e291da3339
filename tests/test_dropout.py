"""Dropout masks follow (seed, step, sample, module, position), as law 1 says, and nothing else."""

import itertools

import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch, Segment
from mmtrain.model.dropout import DropoutContext, SampleDropout

LENGTH = 40


def batch_of(samples: tuple[int, ...], packed: bool = True) -> Batch:
    """Samples of `LENGTH` tokens, in one row or in a row each."""
    places = [(0, n * LENGTH) if packed else (n, 0) for n in range(len(samples))]
    segments = tuple(
        Segment(sample, row, start, LENGTH, 0, 0) for sample, (row, start) in zip(samples, places, strict=True)
    )
    shape = (1, LENGTH * len(samples)) if packed else (len(samples), LENGTH)
    return Batch(torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), segments, packed, {})


def masks(
    seed: int = 0, step: int = 1, samples: tuple[int, ...] = (5,), module: str = "a", packed: bool = True
) -> list[Tensor]:
    """(LENGTH, 8) bool: where each sample's values are dropped."""
    context, batch = DropoutContext(seed), batch_of(samples, packed)
    dropout = SampleDropout(0.5, module, "language", None, context)
    with context.at(step, batch):
        out = dropout(torch.ones(*batch.input_ids.shape, 8))
    return list((out == 0).reshape(len(samples), LENGTH, 8))


def test_the_mask_follows_the_seed_the_step_the_sample_and_the_module() -> None:
    (expected,) = masks()
    assert torch.equal(masks()[0], expected)
    others = [masks(seed=1), masks(step=2), masks(samples=(6,)), masks(module="b")]
    for one, other in itertools.combinations([expected, *(mask for (mask,) in others)], 2):
        assert 0.4 < float((one != other).float().mean()) < 0.6  # unrelated masks differ in half of their values


def test_each_position_has_its_own_mask() -> None:
    (mask,) = masks()
    assert len({tuple(row.tolist()) for row in mask}) > LENGTH / 2


def test_the_mask_of_a_sample_is_the_same_in_every_cut() -> None:
    (alone,) = masks(samples=(5,))
    for samples, packed in itertools.product([(5, 6, 9), (9, 5, 6), (6, 9, 5)], [True, False]):
        assert torch.equal(masks(samples=samples, packed=packed)[samples.index(5)], alone)


def test_dropout_is_off_again_after_a_micro_batch_that_fails() -> None:
    context, ones = DropoutContext(0), torch.ones(1, LENGTH, 8)
    dropout = SampleDropout(0.5, "a", "language", None, context)
    try:
        with context.at(1, batch_of((5,))):
            assert not torch.equal(dropout(ones), ones)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(dropout(ones), ones)
