"""How a step is cut into micro-batches: whole, within budget, as few as can be, and of equal cost for processes."""

import itertools
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmtrain.dataset.microbatches import Cut, cut_step

FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=300)
SAMPLES = st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 100)), min_size=1, max_size=40)


def size(cut: list[int], lengths: list[int], packing: bool) -> int:
    kept = [lengths[place] for place in cut]
    return sum(kept) if packing else len(kept) * max(kept, default=0)


def fewest(lengths: list[int], max_tokens: int, packing: bool) -> int:
    """Micro-batches by the plainest way: longest first; packed into the fullest with room, padded into the last."""
    cuts: Cut = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        with_room = [cut for cut in cuts if size([*cut, place], lengths, packing) <= max_tokens]
        if not packing:
            with_room = [cut for cut in cuts[-1:] if cut in with_room]
        if with_room:
            max(with_room, key=lambda cut: size(cut, lengths, packing)).append(place)
        else:
            cuts.append([place])
    return len(cuts)


def run_costs(cuts: Cut, costs: list[float], runs: int) -> list[float]:
    share = len(cuts) // runs
    return [sum(costs[place] for cut in cuts[n : n + share] for place in cut) for n in range(0, len(cuts), share)]


def nested(multiple: int) -> list[int]:
    """1, 2, 4, 8 for 8; 1, 2, 6, 30 for 30: each the last one times the smallest prime left."""
    numbers = [1]
    while numbers[-1] < multiple:
        rest = multiple // numbers[-1]
        numbers.append(numbers[-1] * next(n for n in range(2, rest + 1) if rest % n == 0))
    return numbers


@settings(FUZZ, max_examples=500)
@given(
    samples=st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 100)), max_size=24),
    max_tokens=st.integers(1, 120),
    packing=st.booleans(),
    multiple=st.integers(1, 9),
    with_costs=st.booleans(),
)
def test_a_cut_holds_every_sample_once_within_its_budget(
    samples: list[tuple[int, float]], max_tokens: int, packing: bool, multiple: int, with_costs: bool
) -> None:
    lengths, costs = [length for length, _ in samples], [cost for _, cost in samples]
    cuts = cut_step(lengths, max_tokens, packing, multiple, costs if with_costs else None)
    assert sorted(itertools.chain(*cuts)) == list(range(len(lengths)))
    assert len(cuts) % multiple == 0
    assert all(len(cut) <= 1 or size(cut, lengths, packing) <= max_tokens for cut in cuts)
    assert all(cut == sorted(cut) for cut in cuts)
    assert sum(map(bool, cuts)) == min(len(lengths), len(cuts))  # empty only where there are too few samples
    assert cuts == cut_step(lengths, max_tokens, packing, multiple, costs if with_costs else None)


@pytest.mark.slow("thousands of cuts")
@settings(FUZZ, max_examples=500)
@given(samples=SAMPLES, max_tokens=st.integers(1, 200), packing=st.booleans(), multiple=st.integers(1, 9))
def test_there_are_no_more_micro_batches_than_fit_asks_for(
    samples: list[tuple[int, float]], max_tokens: int, packing: bool, multiple: int
) -> None:
    lengths = [length for length, _ in samples]
    cuts = cut_step(lengths, max_tokens, packing, multiple, [cost for _, cost in samples])
    assert len(cuts) <= math.ceil(fewest(lengths, max_tokens, packing) / multiple) * multiple


@pytest.mark.slow("thousands of cuts")
@settings(FUZZ)
@given(samples=SAMPLES, multiple=st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12, 16, 30]))
def test_every_number_of_processes_that_divides_the_runs_has_equal_work(
    samples: list[tuple[int, float]], multiple: int
) -> None:
    """Where there is room, no process has more than the mean and one sample; where its runs are not nested, two."""
    lengths, costs = [length for length, _ in samples], [cost for _, cost in samples]
    cuts = cut_step(lengths, sum(lengths), True, multiple, costs)
    for runs in (n for n in range(1, multiple + 1) if multiple % n == 0):
        samples_more = 1 if runs in nested(multiple) else 2
        assert max(run_costs(cuts, costs, runs)) <= sum(costs) / runs + samples_more * max(costs) + 1e-6


@settings(FUZZ)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=8, max_size=80),
    share=st.integers(2, 5),
    multiple=st.sampled_from([2, 3, 4, 6, 8]),
)
def test_work_is_equal_where_several_micro_batches_are_a_run(lengths: list[int], share: int, multiple: int) -> None:
    max_tokens = max(max(lengths), math.ceil(1.2 * sum(lengths) / (share * multiple)))
    costs = [float(length) for length in lengths]
    cuts = cut_step(lengths, max_tokens, True, multiple)
    for runs in nested(multiple):
        assert max(run_costs(cuts, costs, runs)) <= sum(costs) / runs + max(lengths)


def mixed(number: int, seed: int) -> tuple[list[int], list[float]]:
    """Words of some length, images of some size with few words, a few large images; images cost more a token."""
    generator = np.random.Generator(np.random.Philox(seed))
    kind = generator.random(number)
    words = np.minimum(generator.lognormal(4.5, 0.8, number), 1200).astype(int) + 20
    num_images = np.where(kind < 0.3, 0, np.where(kind < 0.9, generator.integers(16, 300, number), 1000))
    lengths = words + num_images
    return lengths.tolist(), (lengths + lengths**2 / 40_000 + 0.6 * num_images).tolist()


@pytest.mark.parametrize("processes", [8, 64, 256])
@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192])
def test_processes_hardly_wait_for_each_other(processes: int, max_tokens: int) -> None:
    slowest = mean = 0.0
    for seed in range(4):
        lengths, costs = mixed(16 * processes, seed)
        times = run_costs(cut_step(lengths, max_tokens, True, processes, costs), costs, processes)
        slowest, mean = slowest + max(times), mean + sum(times) / processes
    assert 1 - mean / slowest < 0.05


@pytest.mark.parametrize("processes", [8, 64, 256])
@pytest.mark.parametrize("max_tokens", [4096, 8192])
def test_processes_wait_little_where_rows_are_padded(processes: int, max_tokens: int) -> None:
    lengths, _ = mixed(16 * processes, 0)
    cuts = cut_step(lengths, max_tokens, False, processes)
    share = len(cuts) // processes
    times = [sum(size(cut, lengths, False) for cut in cuts[n : n + share]) for n in range(0, len(cuts), share)]
    assert 1 - sum(times) / processes / max(times) < 0.12
    assert sum(times) < 1.25 * sum(lengths)


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of python `work` runs, each round of a loop counted."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [1200, 8192])
def test_the_work_of_a_cut_grows_with_the_samples_and_not_with_their_square(packing: bool, max_tokens: int) -> None:
    few, many = mixed(16 * 16, 0), mixed(16 * 256, 0)
    small = lines_run(lambda: cut_step(few[0], max_tokens, packing, 16, few[1]))
    large = lines_run(lambda: cut_step(many[0], max_tokens, packing, 256, many[1]))
    assert large < 2 * 16 * small  # measured: 17 to 18 times; work that grows with the square would be 256 times


@settings(FUZZ)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=24), max_tokens=st.integers(1, 120))
def test_no_two_packed_micro_batches_could_be_one(lengths: list[int], max_tokens: int) -> None:
    assume(fewest(lengths, max_tokens, True) > 1)
    loads = [size(cut, lengths, True) for cut in cut_step(lengths, max_tokens, True)]
    assert all(a + b > max_tokens for a, b in itertools.combinations(loads, 2))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "packing", "multiple", "expected"),
    [
        ([2, 2, 2, 2], 8, True, 1, [{0, 1, 2, 3}]),
        ([1, 2, 4, 1], 8, True, 1, [{0, 1, 2, 3}]),
        ([1, 1, 4, 4], 8, False, 1, [{0, 1}, {2, 3}]),  # padded, 4 rows of 4 would cost 16
        ([9, 1, 1], 8, True, 1, [{0}, {1, 2}]),
        ([9, 1, 1], 8, False, 1, [{0}, {1, 2}]),
        ([1, 1, 1, 1], 8, True, 4, [{0}, {1}, {2}, {3}]),
        ([1, 1], 8, True, 4, [set(), set(), {0}, {1}]),
        ([4, 3, 2, 1], 8, True, 2, [{0, 3}, {1, 2}]),
        ([5, 5, 4, 3, 3], 10, True, 2, [{0, 1}, {2, 3, 4}]),  # the cheapest with room leaves no room for the last
        ([], 8, True, 4, []),
    ],
)
def test_small_cuts_worked_out_by_hand(
    lengths: list[int], max_tokens: int, packing: bool, multiple: int, expected: list[set[int]]
) -> None:
    cuts = cut_step(lengths, max_tokens, packing, multiple)
    assert sorted(map(sorted, cuts)) == sorted(map(sorted, expected))


def test_costs_and_not_lengths_are_made_equal() -> None:
    cuts = cut_step([4, 4, 4, 4], 16, True, 2, [9.0, 1.0, 5.0, 5.0])
    assert sorted(map(sorted, cuts)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("packing", "processes", "max_tokens", "runs", "by_cost", "most"),
    [
        (True, 8, 2048, 8, True, 0.0125),  # in all rows, `most` is a little more than what was measured
        (True, 8, 4096, 8, True, 0.0011),
        (True, 64, 2048, 64, True, 0.004),
        (True, 64, 8192, 64, True, 0.0025),
        (True, 8, 2048, 2, True, 0.0015),  # fewer processes than runs: each computes several of them
        (True, 8, 2048, 4, True, 0.0028),
        (True, 64, 2048, 8, True, 0.0008),
        (False, 8, 2048, 8, False, 0.015),
        (False, 8, 2048, 8, True, 0.035),
        (False, 8, 4096, 8, False, 0.053),
        (False, 64, 4096, 64, False, 0.063),
        (False, 64, 4096, 64, True, 0.02),
    ],
)
def test_processes_wait_no_longer_than_measured(
    packing: bool, processes: int, max_tokens: int, runs: int, by_cost: bool, most: float
) -> None:
    """1 - mean / max of what the processes compute, as `scripts/bench balance` has it, over four steps of 16 samples a
    process. A place of padding costs what a token costs on average."""
    slowest = mean = 0.0
    for seed in range(4):
        lengths, costs = mixed(16 * processes, seed)
        costs = costs if by_cost else [float(length) for length in lengths]
        cuts = cut_step(lengths, max_tokens, packing, processes, costs)
        price = sum(costs) / sum(lengths)
        padding = [price * (size(cut, lengths, packing) - sum(lengths[i] for i in cut)) for cut in cuts]
        share = len(cuts) // runs
        times = [sum(costs[i] for cut in cuts[n : n + share] for i in cut) for n in range(0, len(cuts), share)]
        times = [time + sum(padding[n * share : (n + 1) * share]) for n, time in enumerate(times)]
        slowest, mean = slowest + max(times), mean + sum(times) / runs
    assert 1 - mean / slowest < most


@pytest.mark.parametrize(
    ("lengths", "costs", "max_tokens", "packing", "multiple", "expected"),
    [
        # equal ones go to the runs in their order: 0 to the first, 1 to the second, 2 to the first
        ([4, 4, 4, 4], None, 4, True, 2, [[0], [2], [1], [3]]),
        # the most expensive first: 2 to a run, 1 to another, 3 to the cheaper, 0 to the first; the runs cost 7 and 9
        ([4, 4, 4, 4], [1.0, 5.0, 6.0, 4.0], 4, True, 2, [[1], [3], [2], [0]]),
        # longest first, and of equal lengths the most expensive: 1 with 2, 0 with 3
        ([4, 4, 2, 2], [3.0, 7.0, 1.0, 5.0], 6, True, 1, [[1, 2], [0, 3]]),
        # padded, neighbours in length are together, the more expensive of equal ones first
        ([2, 2, 2, 2], [1.0, 4.0, 3.0, 2.0], 4, False, 1, [[1, 2], [0, 3]]),
        # one micro-batch would fit; of the cuts in two, 0 1 | 2 3 costs 6 and 2, and 0 | 1 2 3 costs 3 and 9
        ([3, 3, 1, 1], None, 12, False, 2, [[0, 1], [2, 3]]),
        # no cut in two costs less than 10, so 0 | 1 2 3 4; for three the second is halved, every other sample of it
        ([1, 1, 1, 1, 1], [10.0, 1.0, 1.0, 1.0, 1.0], 5, False, 3, [[0], [1, 3], [2, 4]]),
        # halved twice: 1 3 | 2, then 1 | 3; the halves of the four runs cost the same as far as they can: 0 3 and 2 1
        ([6, 1, 1, 1], None, 6, False, 4, [[0], [3], [2], [1]]),
        # 1 3 5 | 2 4, then the more expensive of these: 1 5 | 3
        ([6, 1, 1, 1, 1, 1], None, 6, False, 4, [[0], [3], [1, 5], [2, 4]]),
        # the cheaper one has no room for 2, and just enough for 3
        ([8, 5, 3, 2], [1.0, 5.0, 3.0, 2.0], 10, True, 1, [[1, 2], [0, 3]]),
    ],
)
def test_the_order_of_micro_batches_worked_out_by_hand(
    lengths: list[int],
    costs: list[float] | None,
    max_tokens: int,
    packing: bool,
    multiple: int,
    expected: list[list[int]],
) -> None:
    """The order decides which process computes what, and so the bits of a run that is resumed by a later version."""
    assert cut_step(lengths, max_tokens, packing, multiple, costs) == expected
