"""How a step is cut into micro-batches: it decides how the step is computed and how long, never what comes out."""

import bisect
import heapq
import math
from collections.abc import Sequence

Cut = list[list[int]]
"""Micro-batches: lists of places in the step."""


def cut_step(
    lengths: Sequence[int],
    max_tokens: int,
    packing: bool,
    multiple: int = 1,
    costs: Sequence[float] | None = None,
) -> Cut:
    """Cut a step into the fewest micro-batches that fit, their number a multiple of `multiple`, of nearly equal cost.

    `lengths`: tokens of each sample; `costs`: what each costs, its length if not given. A micro-batch holds at most
    `max_tokens` (packed: the sum of its lengths; padded: rows times the longest), or is one longer sample alone. Where
    there are fewer samples than `multiple` some are empty. Any run of consecutive micro-batches that is a share of
    `multiple` costs nearly the same as the others: a process computes one such run.
    """
    if not lengths:
        return []
    costs = lengths if costs is None else costs
    divide = _pack if packing else _pad
    fewest = len(divide(lengths, costs, max_tokens, 1))
    count = math.ceil(fewest / multiple) * multiple
    cuts = divide(lengths, costs, max_tokens, count)
    cuts += [[] for _ in range(count - len(cuts))]
    cost_of = [sum(costs[i] for i in cut) for cut in cuts]
    order = _deal(sorted(range(count), key=lambda n: (-cost_of[n], n)), cost_of, multiple)
    return [sorted(cuts[n]) for n in order]


def _pack(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, count: int) -> Cut:
    """At least `count` micro-batches if there are as many samples: the dearest sample first, into the cheapest one
    with room; by best fit, longest first, which needs near the fewest there can be, where that does not go in."""
    fitted = _best_fit(lengths, max_tokens)
    count = max(count, len(fitted))
    cuts: Cut = [[] for _ in range(count)]
    heap = [(0.0, n, 0) for n in range(count)]  # cost, micro-batch, tokens
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and heap[0][2] and heap[0][2] + lengths[i] > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return _split(fitted, costs, count)
        cost, n, tokens = heapq.heappop(heap)
        cuts[n].append(i)
        for entry in [*full, (cost + costs[i], n, tokens + lengths[i])]:
            heapq.heappush(heap, entry)
    return cuts


def _best_fit(lengths: Sequence[int], max_tokens: int) -> Cut:
    """Longest first, each into the fullest micro-batch that has room."""
    cuts: Cut = []
    rooms: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(rooms, (lengths[i], 0))
        room, n = rooms.pop(at) if at < len(rooms) else (max_tokens, len(cuts))
        if n == len(cuts):
            cuts.append([])
        cuts[n].append(i)
        bisect.insort(rooms, (max(0, room - lengths[i]), n))
    return cuts


def _pad(lengths: Sequence[int], costs: Sequence[float], max_tokens: int, count: int) -> Cut:
    """Neighbours in length together, so that little is padded; the dearest is as cheap as `count` of them allow."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cuts = _neighbours(order, lengths, costs, max_tokens, math.inf)
    low, high = max(costs), sum(costs)
    for _ in range(40 if len(cuts) < count else 0):  # halving a bound 40 times leaves nothing of it
        middle = (low + high) / 2
        tried = _neighbours(order, lengths, costs, max_tokens, middle)
        low, high = (low, middle) if len(tried) <= count else (middle, high)
        cuts = tried if len(tried) <= count else cuts
    return _split(cuts, costs, count)


def _neighbours(order: list[int], lengths: Sequence[int], costs: Sequence[float], max_tokens: int, bound: float) -> Cut:
    cuts: Cut = []
    cost = 0.0
    for i in order:
        fits = cuts and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] <= max_tokens and cost + costs[i] <= bound
        if not fits:
            cuts.append([])
            cost = 0.0
        cuts[-1].append(i)
        cost += costs[i]
    return cuts


def _split(cuts: Cut, costs: Sequence[float], count: int) -> Cut:
    """Halve the dearest that can be halved until there are `count`, or nothing is left to halve."""
    heap = [(-sum(costs[i] for i in cut), cut) for cut in cuts if len(cut) > 1]
    done = [cut for cut in cuts if len(cut) == 1]
    heapq.heapify(heap)
    while heap and len(heap) + len(done) < count:
        _, cut = heapq.heappop(heap)
        for part in (cut[::2], cut[1::2]):
            if len(part) > 1:
                heapq.heappush(heap, (-sum(costs[i] for i in part), part))
            else:
                done.append(part)
    return [cut for _, cut in heap] + done


def _deal(order: list[int], cost_of: Sequence[float], multiple: int) -> list[int]:
    """Order micro-batches, given dearest first, so that each of `multiple` consecutive runs costs nearly the same.

    Dealt to the smallest prime's groups and again within each, so the halves, quarters and so on are equal as well:
    the same order serves every number of processes that divides `multiple`.
    """
    if multiple == 1:
        return order
    ways = next(n for n in range(2, multiple + 1) if multiple % n == 0)
    size = len(order) // ways
    groups: list[list[int]] = [[] for _ in range(ways)]
    heap = [(0.0, 0, g) for g in range(ways)]  # cost, micro-batches, group
    for n in order:
        cost, held, g = heapq.heappop(heap)
        groups[g].append(n)
        if held + 1 < size:
            heapq.heappush(heap, (cost + cost_of[n], held + 1, g))
    return [n for group in groups for n in _deal(group, cost_of, multiple // ways)]
