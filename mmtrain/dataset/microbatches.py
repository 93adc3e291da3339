"""How a step is divided into micro-batches: this affects how long the step takes, never its result."""

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Cut = list[list[int]]
"""Micro-batches: lists of positions in the step."""
Cost = Callable[[list[int]], float]
"""The cost of a micro-batch."""


def cut_step(
    lengths: Sequence[int], max_tokens: int, packing: bool, multiple: int = 1, costs: Sequence[float] | None = None
) -> Cut:
    """Divide a step into micro-batches of nearly equal cost: the fewest that fit, in a multiple of `multiple`.

    `lengths`: tokens of each sample; `costs`: the cost of each, its length if not given. A micro-batch has at most
    `max_tokens` (packed: the sum of its lengths; padded: rows times the longest), or is one longer sample alone. Where
    there are fewer samples than `multiple`, some are empty. A process computes a run of consecutive micro-batches; the
    runs of all processes cost nearly the same.
    """
    if not lengths:
        return []
    costs = lengths if costs is None else costs
    cuts, cost = (_pack if packing else _pad)(lengths, costs, max_tokens, multiple)
    cuts += [[] for _ in range(-len(cuts) % multiple)]
    cost_of = [cost(cut) for cut in cuts]
    runs = _deal(range(len(cuts)), cost_of, multiple)
    order = _nested(range(multiple), [sum(cost_of[n] for n in run) for run in runs])
    return [sorted(cuts[n]) for run in order for n in runs[run]]


def _longest_first(lengths: Sequence[int], costs: Sequence[float]) -> list[int]:
    order: list[int] = np.lexsort((-np.asarray(costs), -np.asarray(lengths))).tolist()
    return order


def _multiple_of(multiple: int, at_least: int) -> int:
    return math.ceil(at_least / multiple) * multiple


def _pack(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, multiple: int) -> tuple[Cut, Cost]:
    def cost(cut: list[int]) -> float:
        return sum([costs[i] for i in cut])

    order = _longest_first(lengths, costs)
    fewest = math.ceil(sum(min(length, max_tokens) for length in lengths) / max_tokens)
    cuts = _cheapest_fit(order, lengths, costs, max_tokens, _multiple_of(multiple, fewest))
    if cuts is None:
        fitted = _best_fit(order, lengths, max_tokens)
        count = _multiple_of(multiple, len(fitted))
        cuts = _cheapest_fit(order, lengths, costs, max_tokens, count) or _split(fitted, cost, count)
    return cuts, cost


def _best_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> Cut:
    """Best fit decreasing: each sample, longest first, into the fullest micro-batch that has room."""
    cuts: Cut = []
    rooms: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for i in order:
        at = bisect.bisect_left(rooms, (lengths[i], 0))
        room, n = rooms.pop(at) if at < len(rooms) else (max_tokens, len(cuts))
        if n == len(cuts):
            cuts.append([])
        cuts[n].append(i)
        bisect.insort(rooms, (max(0, room - lengths[i]), n))
    return cuts


def _cheapest_fit(
    order: list[int], lengths: Sequence[int], costs: Sequence[float], max_tokens: int, count: int
) -> Cut | None:
    """Each sample, longest first, into the cheapest of `count` micro-batches with room; None where one fits none."""
    cuts: Cut = [[] for _ in range(count)]
    room = [max_tokens] * count
    cheapest = [(0.0, n) for n in range(count)]
    full: list[tuple[int, float, int]] = []  # (-tokens left, cost, micro-batch): too full for the last ones
    for i in order:
        length = lengths[i]
        while full and -full[0][0] >= length:
            heapq.heappush(cheapest, heapq.heappop(full)[1:])
        while cheapest and room[n := cheapest[0][1]] < length and cuts[n]:
            heapq.heappush(full, (-room[n], *heapq.heappop(cheapest)))
        if not cheapest:
            return None
        cost, n = cheapest[0]
        cuts[n].append(i)
        room[n] -= length
        heapq.heapreplace(cheapest, (cost + costs[i], n))
    return cuts


def _pad(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, multiple: int) -> tuple[Cut, Cost]:
    """Samples of similar length together, so that there is little padding. By bisection, the most expensive micro-batch
    is as cheap as their number allows."""
    padding = sum(costs) / sum(lengths)  # the cost of a padding token: that of an average token

    def cost(cut: list[int]) -> float:
        own = [lengths[i] for i in cut]
        return sum([costs[i] for i in cut]) + padding * (len(cut) * max(own, default=0) - sum(own))

    order = _longest_first(lengths, costs)
    widths, unpadded = [lengths[i] for i in order], [costs[i] - padding * lengths[i] for i in order]

    def bounded(bound: float) -> Cut:
        """Begin a micro-batch where the last one would be too large or cost more than `bound`."""
        starts = [0]
        total, start, row = 0.0, 0, padding * widths[0]
        most = max_tokens // widths[0]
        for at, own in enumerate(unpadded):
            total += own + row
            if (total > bound or at - start >= most) and at > start:
                starts.append(at)
                start, row, most = at, padding * widths[at], max_tokens // widths[at]
                total = own + row
        return [order[a:b] for a, b in itertools.pairwise([*starts, len(order)])]

    cuts = bounded(math.inf)
    count = _multiple_of(multiple, len(cuts))
    low, high = max(max(costs), sum(costs) / count), max(map(cost, cuts))
    while high > low * 1.005:
        middle = math.sqrt(low * high)
        tried = bounded(middle)
        low, high, cuts = (low, middle, tried) if len(tried) <= count else (middle, high, cuts)
    return _split(cuts, cost, count), cost


def _split(cuts: Cut, cost: Cost, count: int) -> Cut:
    """Halve the most expensive that has several samples until there are `count`, or none has several."""
    if len(cuts) >= count:
        return cuts
    heap = [(-cost(cut), cut) for cut in cuts if len(cut) > 1]
    done = [cut for cut in cuts if len(cut) == 1]
    heapq.heapify(heap)
    while heap and len(heap) + len(done) < count:
        _, cut = heapq.heappop(heap)
        for half in (cut[::2], cut[1::2]):
            if len(half) > 1:
                heapq.heappush(heap, (-cost(half), half))
            else:
                done.append(half)
    return [cut for _, cut in heap] + done


def _deal(items: Sequence[int], cost_of: Sequence[float], ways: int) -> list[list[int]]:
    """Equally many items to each of `ways` groups of nearly the same cost: the most expensive first, to the cheapest
    group."""
    groups: list[list[int]] = [[] for _ in range(ways)]
    heap = [(0.0, 0, g) for g in range(ways)]  # cost, items, group
    for n in sorted(items, key=lambda n: (-cost_of[n], n)):
        cost, num_items, g = heapq.heappop(heap)
        groups[g].append(n)
        if num_items + 1 < len(items) // ways:
            heapq.heappush(heap, (cost + cost_of[n], num_items + 1, g))
    return groups


def _nested(runs: Sequence[int], cost_of: Sequence[float]) -> list[int]:
    """Order runs so that halves, quarters and so on cost the same as well: one order for any number of processes.

    They are divided into as many groups as the smallest prime factor of their number, and each group again.
    """
    ways = next((n for n in range(2, len(runs) + 1) if len(runs) % n == 0), 1)
    if ways == 1:
        return list(runs)
    return [run for group in _deal(runs, cost_of, ways) for run in _nested(group, cost_of)]
