"""Which samples make up which step."""

import itertools
from collections import Counter
from collections.abc import Set
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.dataset.plan import Plan
from mmtrain.errors import UserError

FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def plan(
    sizes: list[int], weights: list[float], batch_size: int = 4, seed: int = 0, own: Set[int] = frozenset()
) -> Plan:
    """Sources of the given sizes, numbered through: 0, 1, … in the first, and so on."""
    ends = np.cumsum([0, *sizes])
    return Plan([np.arange(a, b) for a, b in itertools.pairwise(ends)], weights, batch_size, seed, own)


def epoch(made: Plan, number: int) -> list[list[int]]:
    first = number * made.steps_per_epoch + 1
    return [made.step(step) for step in range(first, first + made.steps_per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 100])
def test_an_epoch_has_every_sample_once_and_keeps_the_last_short_step(batch_size: int) -> None:
    made = plan([10], [1.0], batch_size)
    for number in range(3):
        steps = epoch(made, number)
        assert sorted(itertools.chain(*steps)) == list(range(10))
        assert all(len(step) == batch_size for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= batch_size


def test_short_steps_are_found_wherever_they_are() -> None:
    made = Plan([np.arange(10), np.arange(10, 17)], [1.0, 1.0], 4, 3, own={1})
    assert made.short_steps() == [n for n in range(1, 1 + made.steps_per_epoch) if len(made.step(n)) < 4]
    assert len(made.short_steps()) == 2
    assert Plan([np.arange(8)], [1.0], 4, 0).short_steps() == []


def test_the_last_step_has_what_is_left() -> None:
    made = plan([10], [1.0], 4)
    assert made.steps_per_epoch == 3
    assert [len(made.step(number)) for number in range(1, 8)] == [4, 4, 2, 4, 4, 2, 4]


@settings(FUZZ)
@given(
    sources=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=4),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 1000),
)
def test_every_sample_comes_weight_times_in_every_epoch(
    sources: list[tuple[int, int]], batch_size: int, seed: int, number: int
) -> None:
    """Weights in quarters: the whole passes, and a quarter, a half or three of four of the samples once more."""
    sizes = [size * 4 for size, _ in sources]
    weights = [quarters / 4 for _, quarters in sources]
    counts = Counter(itertools.chain(*epoch(plan(sizes, weights, batch_size, seed), number)))
    start = 0
    for size, (_, quarters) in zip(sizes, sources, strict=True):
        whole, rest = divmod(quarters, 4)
        times = [counts[sample] for sample in range(start, start + size)]
        assert times.count(whole + 1) == size // 4 * rest
        assert times.count(whole) == size - size // 4 * rest
        start += size
    assert sum(counts.values()) == sum(size * quarters for size, (_, quarters) in zip(sizes, sources, strict=True)) // 4


def test_the_part_of_a_pass_is_another_choice_in_every_epoch() -> None:
    made = plan([40], [0.5], 8)
    chosen = [frozenset(itertools.chain(*epoch(made, number))) for number in range(4)]
    assert all(len(samples) == 20 for samples in chosen)
    assert len(set(chosen)) == 4


def test_over_many_epochs_a_half_pass_favours_no_sample() -> None:
    made = plan([20], [0.5], 5)
    counts = Counter(itertools.chain(*(sample for number in range(200) for sample in epoch(made, number))))
    # 200 draws at a half: mean 100, deviation 7
    assert all(65 < counts[sample] < 135 for sample in range(20))


def test_sources_are_mixed() -> None:
    steps = epoch(plan([200, 200], [1.0, 1.0], 20), 0)
    assert all(0 < sum(sample < 200 for sample in step) < 20 for step in steps)


def test_an_own_source_shares_no_step() -> None:
    made = plan([10, 7, 13, 9], [1.0, 1.0, 2.0, 1.0], 4, own={0, 2})
    of_source = [{*range(10)}, {*range(10, 17)}, {*range(17, 30)}, {*range(30, 39)}]
    assert made.steps_per_epoch == 3 + 7 + 4
    for number in range(3):
        steps = epoch(made, number)
        assert Counter(itertools.chain(*steps)) == Counter([*range(39), *range(17, 30)])
        kinds = [[bool(set(step) & own) for own in of_source] for step in steps]
        assert sorted(kinds).count([True, False, False, False]) == 3
        assert sorted(kinds).count([False, False, True, False]) == 7
        assert all(sum(kind) == 1 or kind == [False, True, False, True] for kind in kinds)
        assert sorted(len(step) for step in steps) == [2, 2, *[4] * 12]


def test_the_steps_of_own_sources_are_in_random_order() -> None:
    """Not one source after the other, and another order in every epoch."""
    made = plan([40, 40], [1.0, 1.0], 4, own={0, 1})
    orders = [[step[0] < 40 for step in epoch(made, number)] for number in range(3)]
    assert all(order != sorted(order) and order != sorted(order, reverse=True) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_one_own_source_alone_is_as_a_mixed_one() -> None:
    assert epoch(plan([10], [1.5], own={0}), 1) == epoch(plan([10], [1.5]), 1)


def test_the_numbers_of_the_samples_are_those_given() -> None:
    made = Plan([np.array([3, 50]), np.array([7])], [1.0, 2.0], 8, 0)
    assert sorted(made.step(1)) == [3, 7, 7, 50]


def test_the_plan_of_a_config_has_its_sources_weights_and_seed() -> None:
    """Of the samples 0 to 9, of which 3 to 6 are the second source's, 1, 5 and 8 are left out."""
    used = np.array([0, 2, 3, 4, 6, 7, 9])
    source_of = np.array([0, 0, 1, 1, 1, 2, 2])
    records: Any = SimpleNamespace(sources_of=lambda indices: source_of[indices == used], num_sources=3)
    sources = [SimpleNamespace(batch=batch, weight=weight) for batch, weight in (("mixed", 1.0), ("own", 2.0))]
    settings = SimpleNamespace(batch_size=3, seed=5)
    config: Any = SimpleNamespace(data=SimpleNamespace(train=[*sources, sources[0]]), train=settings)
    expected = Plan([np.array([0, 2]), np.array([3, 4, 6]), np.array([7, 9])], [1.0, 2.0, 1.0], 3, 5, {1})
    assert epoch(Plan.of(config, records, used), 1) == epoch(expected, 1)


def test_the_same_seed_gives_the_same_steps_in_whatever_order_they_are_asked_for() -> None:
    numbers = list(range(1, 40))
    one = plan([10, 7], [1.0, 1.5], 4, seed=5)
    forward = {number: one.step(number) for number in numbers}
    other = plan([10, 7], [1.0, 1.5], 4, seed=5)
    assert {number: other.step(number) for number in [*numbers[::-3], *numbers[::2], *numbers]} == forward


def test_another_seed_and_another_epoch_give_another_order() -> None:
    orders = {
        tuple(itertools.chain(*epoch(plan([30], [1.0], 4, seed), number)))
        for seed in (0, 1, 2, 2**32 - 1)
        for number in range(4)
    }
    assert len(orders) == 16


def test_the_batch_size_cuts_the_same_order() -> None:
    orders = {tuple(itertools.chain(*epoch(plan([30], [1.0], size), 1))) for size in (1, 4, 7, 30)}
    assert len(orders) == 1


def test_changing_a_step_that_was_given_changes_no_later_answer() -> None:
    made = plan([8], [1.0], 4)
    first = list(made.step(1))
    made.step(1).clear()
    assert made.step(1) == first


def test_a_weight_too_small_for_a_single_sample_is_refused() -> None:
    with pytest.raises(UserError, match="weight"):
        plan([3], [0.1]).step(1)


def test_a_source_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="weight"):
        plan([10, 3], [1.0, 0.1]).step(1)


@pytest.mark.parametrize(
    ("seed", "number", "expected"),
    [
        (0, 0, [0, 2, 10, 6, 1, 8, 5, 4, 3, 11, 5, 6, 7]),
        (0, 1, [7, 10, 5, 3, 5, 4, 0, 2, 9, 7, 6, 1, 8]),
        (7, 0, [11, 9, 2, 5, 0, 3, 7, 5, 1, 7, 4, 6, 8]),
        (2**32 - 1, 3, [0, 6, 8, 8, 10, 2, 4, 5, 9, 7, 1, 6, 3]),
    ],
)
def test_the_order_is_that_of_every_earlier_version(seed: int, number: int, expected: list[int]) -> None:
    """Another order would be another run, and one that is resumed would see some samples twice and others never.

    The lists are from Philox's raw numbers under the key seed * 2**64 + epoch * 2**32 + place alone, a stable sort of
    them being the permutation: place n for what is left of source n (from 1), place 0 for all that was chosen.
    """
    found = epoch(plan([5, 4, 3], [1.0, 1.5, 0.6], 4, seed), number)
    assert list(itertools.chain(*found)) == expected
    assert [len(step) for step in found] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("sizes", "weights", "own", "number", "expected"),
    [
        (
            [5, 4, 3, 5],
            [1.0, 1.5, 1.0, 1.0],
            {1, 3},
            1,
            [[16], [5, 5, 6, 8], [3, 1, 11, 2], [4, 0, 9, 10], [6, 7], [12, 14, 15, 13]],
        ),
        (
            [5, 4, 3, 5],
            [1.0, 1.5, 1.0, 1.0],
            {1, 3},
            2,
            [[15], [6, 6, 7, 8], [11, 2, 1, 10], [12, 14, 13, 16], [8, 5], [0, 9, 4, 3]],
        ),
        ([5, 4], [1.0, 1.0], {0, 1}, 1, [[5, 6, 8, 7], [2], [4, 0, 3, 1]]),
    ],
)
def test_the_order_of_steps_of_own_sources_is_that_of_every_earlier_version(
    sizes: list[int], weights: list[float], own: set[int], number: int, expected: list[list[int]]
) -> None:
    """From the generator in tests/test_dropout.py: an own source n is in the order of place 2**31 + n, or of place 0
    where it comes first of all; the steps are in that of place 2**32 - 1. The seed is 3."""
    assert epoch(plan(sizes, weights, 4, 3, own), number) == expected


@pytest.mark.parametrize(
    ("size", "weight", "expected"),
    [
        (10, 0.29, 3),
        (10, 0.24, 2),
        (3, 0.6, 2),
        (100, 0.29, 29),  # 100 * 0.29 is 28.999999999999996
        (4, 1.7, 7),
        (3, 2.9, 9),
        (1, 0.51, 1),
        (5, 0.5, 2),  # halves go to the even number
        (7, 0.5, 4),
    ],
)
def test_a_part_of_a_pass_is_rounded_to_the_nearest(size: int, weight: float, expected: int) -> None:
    made = plan([size], [weight], 100)
    assert made.epoch_samples == expected
    assert len(made.step(1)) == expected
