"""Statistics of scores: perplexity with its interval, groups, extremes, and paired differences of two models.

A sample is what is drawn at random, not an answer or a token: answers of one conversation are not independent. Every
interval is the percentile bootstrap over samples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): draw as many samples as there are, with replacement, compute the figure, repeat this 1,000 times, and
take the 2.5th and the 97.5th percentile of the results. The seed is fixed, so the same scores give the same
interval. A figure per token is a ratio of two sums over samples, and both sums are drawn together.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.errors import NonFiniteError, UserError
from mmtrain.scoring.scores import Floats, Ints, Scores

NUM_RESAMPLES = 1000
_SEED = 0
_PERCENTILES = (2.5, 97.5)
_DRAWN_AT_ONCE = 1_000_000
"""Samples drawn in one go: bounds the memory, whatever the number of samples."""
_LENGTHS: tuple[tuple[str, int, float], ...] = (
    ("1-4", 1, 4),
    ("5-16", 5, 16),
    ("17-64", 17, 64),
    ("65-256", 65, 256),
    ("over 256", 257, math.inf),
)
_MAX_NLL = 700.0
"""Nats: exp of more than about 709 is no double."""

Groups = dict[str, dict[str, float]]


def summary(scores: Scores) -> dict[str, Any]:
    """The figures of a whole set. All sums are over supervised tokens, or over the answers that have some.

    - `nll`: sum of nll / sum of tokens, nats per token. `perplexity`: exp(nll) (Jelinek and others, 1977). Here and in
      all that is per token, a token of an answer with a weight counts as much as its weight, as in training.
    - `sample_nll`: the mean over samples of each sample's own sum of nll / its tokens, nats per token.
    - `token_accuracy`: the share of the tokens that were the most likely.
    - `bits_per_byte`: sum of nll / ln 2 / bytes of the answers in UTF-8, the same measure for every tokenizer
      (Gao and others, The Pile, 2020, section 3.1). None where the answers have no bytes.
    - `interval`: `nll` and `perplexity` as [low, high], 95 % by the bootstrap; that of the perplexity is exp of
      the other one. One sample alone has no spread: its interval is the value itself.
    """
    scores = _supervised(scores)
    samples = _per_sample(scores, *_weighted(scores))
    num_bytes = int(scores.num_bytes.sum())
    figures = _figures(scores)
    nll, tokens = _resampled(samples).T
    low, high = _interval(nll / tokens)
    return {
        **figures,
        "sample_nll": float((samples[:, 0] / samples[:, 1]).mean()),
        "bits_per_byte": _sum_of(scores, scores.nll) / math.log(2) / num_bytes if num_bytes else None,
        "interval": {"perplexity": [perplexity(low), perplexity(high)], "nll": [low, high]},
    }


def perplexity_text(value: float, decimals: int = 4) -> str:
    """A perplexity as it is printed: without decimals from 10,000 on, in powers of ten from 10 million on."""
    if value < 1e4:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3e}"


def by_source(scores: Scores, names: Sequence[str]) -> Groups:
    """The figures of each source by its name, in the order of `names`; sources of one name count as one."""
    scores = _supervised(scores)
    numbers = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    return _groups(scores, ((name, np.isin(scores.source, own)) for name, own in numbers.items()))


def by_answer(scores: Scores) -> Groups:
    """The figures of the first answers of all conversations ("1"), of the second ones ("2") and so on."""
    scores = _supervised(scores)
    return _groups(scores, ((str(turn), scores.answer == turn) for turn in np.unique(scores.answer)))


def by_image(scores: Scores) -> Groups:
    """The figures of the samples without an image, and of those with one."""
    scores = _supervised(scores)
    return _groups(scores, (("text-only", ~scores.has_image), ("with image", scores.has_image)))


def by_length(scores: Scores) -> Groups:
    """The figures of the answers of 1 to 4 supervised tokens, of 5 to 16 and so on."""
    scores = _supervised(scores)
    length = scores.num_supervised
    return _groups(scores, ((name, (low <= length) & (length <= high)) for name, low, high in _LENGTHS))


def extremes(scores: Scores, num: int = 10) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The `num` least likely samples, the worst first, and the `num` most likely, the best first.

    Each is the sample's index and its mean nll in nats per token; of equal ones the earlier sample comes first.
    """
    scores = _supervised(scores)
    nll, tokens = _per_sample(scores, *_weighted(scores)).T
    means, numbers = nll / tokens, np.unique(scores.sample)

    def first(order: npt.NDArray[np.intp]) -> list[tuple[int, float]]:
        return [(int(numbers[i]), float(means[i])) for i in order[:num]]

    return first(np.argsort(-means, kind="stable")), first(np.argsort(means, kind="stable"))


def difference(a: Scores, b: Scores) -> dict[str, Any]:
    """How much less likely the same answers are to `b` than to `a`: above 0, `a` is the better one.

    - `nats_per_token`: (sum of nll of b - sum of nll of a) / tokens, and its 95 % `interval`.
    - `share`: nats_per_token / the nll per token of `a`, and its `share_interval`, from the same draws. They are
      None where `a` gives all the tokens drawn a probability of 1, as there is no share of nothing.
    - `nll`: of `b`, nats per token. `num_samples`: the samples that both have.

    Paired: each draw takes the same samples of both, so what makes a sample hard for either cancels out.
    Raises ValueError when the two are not of the same answers with the same tokens.
    """
    a, b = _supervised(a), _supervised(b)
    if not all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("sample", "answer", "num_supervised")):
        raise ValueError("the two scores are not of the same answers with the same supervised tokens")
    (nll_of_a, num_tokens), (nll_of_b, _) = _weighted(a), _weighted(b)
    samples = _per_sample(a, nll_of_b - nll_of_a, nll_of_a, num_tokens)
    more, nll, tokens = samples.sum(axis=0).tolist()
    drawn_more, drawn_nll, drawn_tokens = _resampled(samples).T
    return {
        "nats_per_token": more / tokens,
        "interval": list(_interval(drawn_more / drawn_tokens)),
        "share": more / nll if nll > 0 else None,
        "share_interval": list(_interval(drawn_more / drawn_nll)) if (drawn_nll > 0).all() else None,
        "nll": float(nll_of_b.sum()) / tokens,
        "num_samples": len(samples),
    }


def per_token(samples: Ints, sums: Floats, num_tokens: Floats) -> dict[str, Any]:
    """The mean per token of what `sums` (num_answers,) are the sums of, as `mean`, and its 95 % `interval`.

    `samples`: the sample of each answer.
    """
    inverse = np.unique(samples, return_inverse=True)[1]
    columns = [np.bincount(inverse, weights=values) for values in (sums, num_tokens)]
    drawn_sum, drawn_tokens = _resampled(np.stack(columns, axis=1)).T
    return {"mean": float(sums.sum() / num_tokens.sum()), "interval": list(_interval(drawn_sum / drawn_tokens))}


def mean_by_sample(samples: Ints, values: Floats) -> tuple[float, tuple[float, float]]:
    """The mean of `values` (num_values,), of which several may be of one sample, and its 95 % interval.

    `samples`: the sample of each value. Where `values` are differences of two measurements the interval is paired.
    """
    found = per_token(samples, values, np.ones(len(values)))
    return found["mean"], tuple(found["interval"])


def _supervised(scores: Scores) -> Scores:
    """The answers that have supervised tokens, ordered by sample, then by answer.

    Raises UserError where there are none, and NonFiniteError where one has no finite nll.
    """
    order = np.lexsort((scores.answer, scores.sample))
    scores = scores.rows(order[scores.num_supervised[order] > 0])
    if not len(scores.sample):
        raise UserError(
            "eval: nothing is supervised: no sample has a supervised token, at least one is needed; "
            "see `mmtrain inspect-labels` for what is trained on"
        )
    if not np.isfinite(scores.nll).all():
        number = scores.sample[~np.isfinite(scores.nll)][0]
        raise NonFiniteError(f"eval: the loss of sample {number} is not a finite number; check the model's weights")
    return scores


def _per_sample(scores: Scores, *columns: Floats | Ints) -> Floats:
    """(num_samples, num_columns) each sample's sums, ordered by sample; `scores` as _supervised gives them."""
    starts = np.unique(scores.sample, return_index=True)[1]
    return np.stack([np.add.reduceat(column.astype(np.float64), starts) for column in columns], axis=1)


def _weighted(scores: Scores) -> tuple[Floats, Floats]:
    """The nll and the number of tokens of each answer, times its weight."""
    return scores.nll * scores.weight, scores.num_supervised * scores.weight


def _sum_of(scores: Scores, column: Floats) -> float:
    return float(_per_sample(scores, column).sum())


def _figures(scores: Scores) -> dict[str, float]:
    """`nll` in nats per token, `token_accuracy` a share of the tokens, the rest as in `summary`."""
    tokens = int(scores.num_supervised.sum())
    weighted_nll, weighted_tokens = _weighted(scores)
    nll = _sum_of(scores, weighted_nll) / float(weighted_tokens.sum())
    return {
        "nll": nll,
        "perplexity": perplexity(nll),
        "token_accuracy": int(scores.num_right.sum()) / tokens,
        "num_supervised": tokens,
        "num_samples": len(np.unique(scores.sample)),
    }


def _groups(scores: Scores, masks: Iterable[tuple[str, npt.NDArray[np.bool_]]]) -> Groups:
    """The figures of every group that has an answer."""
    return {name: _figures(scores.rows(mask)) for name, mask in masks if mask.any()}


def perplexity(nll: float) -> float:
    """exp(nll), from nats per token; finite for every nll."""
    return math.exp(min(nll, _MAX_NLL))


def _resampled(samples: Floats) -> Floats:
    """(NUM_RESAMPLES, num_columns) sums of `samples` (num_samples, num_columns), drawn with replacement."""
    rng = np.random.default_rng(_SEED)
    num_samples = len(samples)
    columns = np.ascontiguousarray(samples.T)
    sums = np.empty((NUM_RESAMPLES, len(columns)))
    at_once = max(1, _DRAWN_AT_ONCE // num_samples)
    for start in range(0, NUM_RESAMPLES, at_once):
        rows = sums[start : start + at_once]
        drawn = rng.integers(num_samples, size=(len(rows), num_samples))
        for number, column in enumerate(columns):
            rows[:, number] = column[drawn].sum(axis=1)
    return sums


def _interval(figures: Floats) -> tuple[float, float]:
    low, high = np.percentile(figures, _PERCENTILES).tolist()
    return low, high
