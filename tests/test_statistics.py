"""The figures of `eval perplexity` against hand values and a bootstrap written out in plain Python."""

import json
import math
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mmtrain.errors import NonFiniteError, UserError
from mmtrain.evaluate.report import image_verdict, print_comparison, print_report
from mmtrain.scoring.scores import Scores
from mmtrain.scoring.statistics import (
    NUM_RESAMPLES,
    _resampled,
    by_answer,
    by_image,
    by_length,
    by_source,
    difference,
    extremes,
    mean_by_sample,
    per_token,
    summary,
)

Row = tuple[int, int, int, bool, float, int, int, int]
"""sample, source, answer, has_image, nll, num_supervised, num_right, num_bytes"""

BY_HAND: list[Row] = [
    (3, 0, 1, False, 2.0, 4, 3, 10),
    (3, 0, 2, False, 1.0, 1, 1, 2),
    (5, 1, 1, True, 12.0, 5, 0, 20),
    (8, 1, 1, True, 5.0, 10, 9, 8),
]


def scores_of(rows: list[Row]) -> Scores:
    columns: list[Any] = list(zip(*rows, strict=True)) if rows else [()] * 8
    kinds = (np.int64, np.int64, np.int64, np.bool_, np.float64, np.int64, np.int64, np.int64)
    columns.append((1.0,) * len(rows))
    return Scores(*(np.array(column, kind) for column, kind in zip(columns, (*kinds, np.float64), strict=True)))


def uneven(num_samples: int, seed: int) -> Scores:
    """Samples of one to three answers: long ones are likelier per token, and the answers of one hang together."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for sample in range(num_samples):
        hardness = rng.gamma(2.0)
        for answer in range(1, int(rng.integers(1, 4)) + 1):
            tokens = int(rng.integers(1, 80))
            nll = hardness * math.sqrt(tokens) * rng.uniform(0.9, 1.1)
            rows.append((sample, sample % 3, answer, sample % 2 == 0, nll, tokens, tokens // 2, 4 * tokens))
    return scores_of(rows)


def reordered(scores: Scores, order: Any) -> Scores:
    return Scores(**{field.name: getattr(scores, field.name)[order] for field in fields(scores)})


def plain_bootstrap(groups: list[list[Any]], figure: Callable[[list[Any]], float]) -> tuple[float, float, float]:
    """Low, high and standard error of `figure` over 6,000 draws of as many groups as there are."""
    draw = random.Random(12345)
    found = sorted(figure([row for group in draw.choices(groups, k=len(groups)) for row in group]) for _ in range(6000))
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / len(found))
    return found[149], found[5849], spread


def assert_agrees(interval: list[float], expected: tuple[float, float, float]) -> None:
    """A percentile of 1,000 draws is within 0.09 standard errors of the true one, a 90 % interval off by 0.31."""
    low, high, spread = expected
    assert interval == pytest.approx([low, high], abs=0.25 * spread)


def grouped(scores: Scores, *columns: Any) -> list[list[Any]]:
    groups: dict[int, list[Any]] = {}
    for sample, *values in zip(scores.sample.tolist(), *(column.tolist() for column in columns), strict=True):
        groups.setdefault(sample, []).append(values)
    return list(groups.values())


def test_summary_by_hand() -> None:
    found = summary(scores_of(BY_HAND))
    assert found["nll"] == 20.0 / 20
    assert found["perplexity"] == pytest.approx(2.718281828459045)
    assert found["sample_nll"] == pytest.approx((3 / 5 + 12 / 5 + 5 / 10) / 3)
    assert found["token_accuracy"] == 13 / 20
    assert found["bits_per_byte"] == pytest.approx(28.853900817779268 / 40)
    assert (found["num_supervised"], found["num_samples"]) == (20, 3)
    low, high = found["interval"]["nll"]
    assert 5 / 10 <= low < 1 < high <= 12 / 5
    assert found["interval"]["perplexity"] == pytest.approx([math.exp(low), math.exp(high)])


def test_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    found = summary(scores_of([(n, 0, 1, False, n * math.log(151936), n, 0, n) for n in (3, 17, 250, 1)]))
    assert found["perplexity"] == pytest.approx(151936, rel=1e-10)
    assert found["interval"]["perplexity"] == pytest.approx([151936, 151936], rel=1e-10)


def test_interval_is_that_of_a_plain_bootstrap_over_samples() -> None:
    scores = uneven(40, seed=1)

    def nll(rows: list[Any]) -> float:
        return math.fsum(row[0] for row in rows) / math.fsum(row[1] for row in rows)

    found = summary(scores)["interval"]
    expected = plain_bootstrap(grouped(scores, scores.nll, scores.num_supervised), nll)
    assert_agrees(found["nll"], expected)
    assert found["perplexity"] == pytest.approx([math.exp(value) for value in found["nll"]])
    assert summary(scores)["interval"] == found


def test_interval_covers_the_truth() -> None:
    """The true nll per token is E[nll] / E[tokens]; of 300 sets of 60 samples about 95 % must have it within."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        tokens = rng.integers(1, 21, 60)
        nll = tokens * 0.5 + rng.normal(3.0, 1.0, 60)
        rows = [(i, 0, 1, False, float(nll[i]), int(tokens[i]), 0, 1) for i in range(60)]
        low, high = summary(scores_of(rows))["interval"]["nll"]
        covered += low <= (10.5 * 0.5 + 3.0) / 10.5 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_one_sample_has_its_value_for_an_interval() -> None:
    found = summary(scores_of(BY_HAND[:2]))
    assert found["interval"] == {name: [found[name]] * 2 for name in ("perplexity", "nll")}


def test_order_of_the_rows_does_not_matter() -> None:
    scores, other = uneven(30, seed=2), uneven(30, seed=2)
    other = replace(other, nll=other.nll * 1.5 + 0.1)
    order = np.random.default_rng(0).permutation(len(scores.sample))
    mixed = reordered(scores, order)
    for figures in (summary, extremes, by_length):
        assert figures(mixed) == figures(scores)
    assert by_source(mixed, "abc") == by_source(scores, "abc")
    assert difference(mixed, other) == difference(scores, other)


def test_groups_by_hand() -> None:
    scores = scores_of(BY_HAND)

    def group(nll: float, tokens: int, right: int, samples: int) -> Any:
        figures = {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "token_accuracy": right / tokens}
        return pytest.approx({**figures, "num_supervised": tokens, "num_samples": samples})

    first, rest = group(3.0, 5, 4, 1), group(17.0, 15, 9, 2)
    assert by_source(scores, ["a", "b", "unused"]) == {"a": first, "b": rest}
    assert by_source(scores, ["a", "a"]) == {"a": group(20.0, 20, 13, 3)}
    assert by_image(scores) == {"text-only": first, "with image": rest}
    assert by_answer(scores) == {"1": group(19.0, 19, 12, 3), "2": group(1.0, 1, 1, 1)}
    assert by_length(scores) == {"1-4": group(3.0, 5, 4, 1), "5-16": rest}


def test_bounds_of_the_lengths() -> None:
    names = {1: "1-4", 4: "1-4", 5: "5-16", 16: "5-16", 17: "17-64", 64: "17-64", 65: "65-256", 256: "65-256"}
    for tokens, name in {**names, 257: "over 256", 9999: "over 256"}.items():
        assert list(by_length(scores_of([(0, 0, 1, False, 1.0, tokens, 0, 1)]))) == [name]


def test_extremes_by_hand() -> None:
    least, most = extremes(scores_of(BY_HAND), num=2)
    assert least == [(5, 2.4), (3, 0.6)]
    assert most == [(8, 0.5), (3, 0.6)]
    even = scores_of([(i, 0, 1, False, 2.0, 2, 0, 1) for i in range(30)])
    assert extremes(even) == ([(i, 1.0) for i in range(10)],) * 2


def test_of_equal_samples_the_earlier_one_comes_first() -> None:
    worst, best = extremes(scores_of([(n, 0, 1, False, 1.0 + n % 2, 1, 0, 1) for n in range(200)]), 80)
    assert [index for index, _ in worst] == list(range(1, 160, 2))
    assert [index for index, _ in best] == list(range(0, 160, 2))


def test_bits_per_byte_are_of_the_loss_not_of_the_tokens() -> None:
    found = summary(scores_of([(0, 0, 1, False, 3.0, 7, 1, 4), (1, 0, 1, False, 5.0, 9, 1, 12)]))
    assert found["bits_per_byte"] == pytest.approx(8 / 16 * math.log2(math.e))


def test_the_mean_of_values_is_resampled_by_their_samples() -> None:
    """Three samples with one, two and four values: a draw takes all values of a sample."""
    samples, values = np.array([4, 9, 9, 2, 2, 2, 2]), np.array([1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0])
    mean, (low, high) = mean_by_sample(samples, values)
    assert mean == pytest.approx(2.5 / 7)
    groups = [values[samples == sample].tolist() for sample in (4, 9, 2)]
    expected_low, expected_high, _ = plain_bootstrap(groups, lambda drawn: sum(drawn) / len(drawn))
    assert (low, high) == pytest.approx((expected_low, expected_high))


def test_the_mean_per_token_is_a_ratio_of_sums_that_are_drawn_together() -> None:
    """Sample 4 has two answers; the values are per answer, and so are the numbers of tokens."""
    samples, sums, num_tokens = np.array([4, 9, 4, 2]), np.array([3.0, 8.0, 1.0, 0.5]), np.array([2.0, 1.0, 6.0, 5.0])
    found = per_token(samples, sums, num_tokens)
    assert found.keys() == {"mean", "interval"}
    assert found["mean"] == 12.5 / 14
    groups = [[[4.0, 8.0]], [[8.0, 1.0]], [[0.5, 5.0]]]
    low, high, _ = plain_bootstrap(groups, lambda drawn: sum(row[0] for row in drawn) / sum(row[1] for row in drawn))
    assert found["interval"] == pytest.approx([low, high])


def test_every_draw_is_made() -> None:
    """One sample alone gives the same sums in every draw, whatever was in the memory before."""
    drawn = _resampled(np.array([[2.0, 3.0]]))
    assert drawn.shape == (NUM_RESAMPLES, 2)
    assert (drawn == [2.0, 3.0]).all()


def test_difference_is_that_of_a_plain_paired_bootstrap() -> None:
    a = uneven(40, seed=3)
    rng = np.random.default_rng(4)
    b = replace(a, nll=a.nll * 1.1 + rng.uniform(0, 1, len(a.nll)))
    groups = grouped(a, a.nll, b.nll, a.num_supervised)

    def sums(rows: list[Any]) -> list[float]:
        return [math.fsum(row[column] for row in rows) for column in range(3)]

    def nats(rows: list[Any]) -> float:
        nll_a, nll_b, tokens = sums(rows)
        return (nll_b - nll_a) / tokens

    def share(rows: list[Any]) -> float:
        nll_a, nll_b, _ = sums(rows)
        return nll_b / nll_a - 1

    found = difference(a, b)
    everything = [row for group in groups for row in group]
    assert found["nats_per_token"] == pytest.approx(nats(everything))
    assert found["share"] == pytest.approx(share(everything))
    assert found["nll"] == pytest.approx(summary(b)["nll"])
    assert found["num_samples"] == 40
    assert_agrees(found["interval"], plain_bootstrap(groups, nats))
    assert_agrees(found["share_interval"], plain_bootstrap(groups, share))


def test_difference_changes_its_sign_with_the_order() -> None:
    a = uneven(20, seed=5)
    b = replace(a, nll=a.nll + 0.25 * a.num_supervised)
    for found, nats in ((difference(a, b), 0.25), (difference(b, a), -0.25)):
        assert [found["nats_per_token"], *found["interval"]] == pytest.approx([nats] * 3)


def test_difference_of_the_same_scores_is_exactly_zero() -> None:
    found = difference(uneven(25, seed=6), uneven(25, seed=6))
    assert (found["nats_per_token"], found["interval"]) == (0.0, [0.0, 0.0])
    assert (found["share"], found["share_interval"]) == (0.0, [0.0, 0.0])


def test_the_share_of_a_small_loss_is_given_as_well() -> None:
    a = scores_of([(0, 0, 1, False, 0.2, 4, 4, 1), (1, 0, 1, False, 0.2, 4, 4, 1)])
    found = difference(a, replace(a, nll=np.array([0.3, 0.3])))
    assert found["share"] == pytest.approx(0.5)
    assert found["share_interval"] == pytest.approx([0.5, 0.5])


def test_no_share_of_nothing() -> None:
    a = scores_of([(0, 0, 1, False, 0.0, 2, 2, 1), (1, 0, 1, False, 0.0, 2, 2, 1)])
    found = difference(a, replace(a, nll=np.array([1.0, 3.0])))
    assert (found["nats_per_token"], found["share"], found["share_interval"]) == (1.0, None, None)
    found = difference(replace(a, nll=np.array([0.0, 2.0])), replace(a, nll=np.array([1.0, 2.0])))
    assert (found["share"], found["share_interval"]) == (0.5, None)


@pytest.mark.parametrize("name", ["sample", "answer", "num_supervised"])
def test_difference_refuses_other_answers(name: str) -> None:
    a = scores_of(BY_HAND)
    changed = getattr(a, name).copy()
    changed[-1] += 1
    with pytest.raises(ValueError, match="not of the same answers"):
        difference(a, replace(a, **{name: changed}))
    with pytest.raises(ValueError, match="not of the same answers"):
        difference(a, reordered(a, slice(3)))


@pytest.mark.parametrize("rows", [[], [(0, 0, 1, False, 0.0, 0, 0, 7)]])
def test_nothing_supervised_is_an_error(rows: list[Row]) -> None:
    empty = scores_of(rows)
    wanted: list[Callable[[Scores], object]] = [summary, by_answer, by_image, by_length, extremes]
    wanted += [lambda scores: by_source(scores, ["a"]), lambda scores: difference(scores, scores)]
    for call in wanted:
        with pytest.raises(UserError, match="nothing is supervised"):
            call(empty)


def test_the_error_says_what_is_needed_and_what_to_do() -> None:
    with pytest.raises(UserError) as caught:
        summary(scores_of([]))
    assert str(caught.value) == (
        "eval: nothing is supervised: no sample has a supervised token, at least one is needed; see `mmtrain "
        "inspect-labels` for what is trained on"
    )


def test_an_answer_without_supervised_tokens_counts_for_nothing() -> None:
    scores = scores_of([*BY_HAND, (9, 1, 1, False, 0.0, 0, 0, 1000)])
    assert summary(scores) == summary(scores_of(BY_HAND))
    assert by_length(scores) == by_length(scores_of(BY_HAND))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(value: float) -> None:
    scores = scores_of(BY_HAND)
    nll = scores.nll.copy()
    nll[2] = value
    with pytest.raises(NonFiniteError, match="sample 5"):
        summary(replace(scores, nll=nll))


def test_figures_are_finite_at_the_edges() -> None:
    hopeless = summary(scores_of([(0, 0, 1, False, 1e6, 1, 0, 0)]))
    assert hopeless["bits_per_byte"] is None
    json.dumps(hopeless, allow_nan=False)


def test_many_samples_need_little_memory() -> None:
    num = 100_000
    ones, numbers = np.ones(num, np.int64), np.arange(num)
    nll = np.random.default_rng(0).gamma(2.0, size=num)
    scores = Scores(numbers, 0 * ones, ones, ones > 0, nll, ones, ones, ones, np.ones(num))
    tracemalloc.start()
    low, high = summary(scores)["interval"]["nll"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    error = nll.std() / math.sqrt(num)
    assert [low, high] == pytest.approx([nll.mean() - 1.96 * error, nll.mean() + 1.96 * error], abs=0.4 * error)


def printed(show: Callable[[Console], None]) -> list[str]:
    console = Console(width=80, color_system=None, highlight=False)
    with console.capture() as capture:
        show(console)
    return capture.get().splitlines()


def images(more: float) -> dict[str, Any]:
    a = uneven(40, seed=8)
    noise = np.random.default_rng(9).normal(0, 0.2, len(a.nll))
    found = difference(a, replace(a, nll=a.nll + more * a.num_supervised + noise))
    images: dict[str, Any] = {"swapped": found, "grey": found, "none": found}
    return {**images, "verdict": image_verdict(images)}


def report(**changed: Any) -> dict[str, Any]:
    scores = uneven(40, seed=8)
    least, most = extremes(scores)
    rows: dict[str, Any] = {**summary(scores), "sources": by_source(scores, ["a", "b/[red]\x1b" + 40 * "x", "c"])}
    rows |= {"turns": by_answer(scores), "modality": by_image(scores), "lengths": by_length(scores)}
    for key, found in (("least", least), ("most", most)):
        rows[f"{key}_likely"] = [
            {
                "place": f"{key}.jsonl:{number}",
                "nll": nll,
                "question": f"What is {number}?",
                "reference": 3 * f"\x1b{key} ",
            }
            for number, nll in found
        ]
    return rows | {"images": None} | changed


def test_the_verdict_names_what_the_images_are_worth() -> None:
    found = difference(uneven(40, seed=8), uneven(40, seed=8))
    swapped = {**found, "nats_per_token": 0.3, "interval": [0.2, 0.4], "share": 0.25}
    assert image_verdict({"swapped": swapped}) == (
        "the images are worth 0.3000 nats per token (95 % interval 0.2000 to 0.4000), "
        "25.0 % of the loss with the right images"
    )
    blind = {**found, "nats_per_token": -0.01, "interval": [-0.03, 0.01]}
    assert image_verdict({"swapped": blind}) == (
        "the model ignores the images: other images change nothing "
        "(-0.0100 nats per token, 95 % interval -0.0300 to 0.0100)"
    )
    below = image_verdict({"swapped": {**found, "nats_per_token": -0.2, "interval": [-0.3, -0.1]}})
    assert below.startswith("the model ignores the images: other images serve it no worse (-0.2000")
    rounding = image_verdict({"swapped": {**found, "nats_per_token": 1e-8, "interval": [1e-9, 2e-8]}})
    assert rounding.startswith("the model ignores the images: other images change nothing (0.0000")
    assert image_verdict({"swapped": {**swapped, "num_samples": 1}}).endswith("; only 1 sample: too few to be sure")
    assert "not known" in image_verdict({"swapped": None})


def test_report_says_everything_in_80_columns() -> None:
    row = report(images=images(0.5))
    lines = printed(lambda console: print_report(row, console))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    assert "…" not in text
    assert lines[0].split()[:2] == ["perplexity", f"{row['perplexity']:.3f}"]
    for name in (*row["turns"], *row["modality"], *row["lengths"], "b/[red]", "swapped", "grey", "left out"):
        assert any(line.startswith(name) for line in lines), name
    for entry in row["least_likely"] + row["most_likely"]:
        at = lines.index(f"{entry['nll']:>10.4f}  {entry['place']}")
        assert lines[at + 1].startswith(
            f"            {entry['question']} → \\u{{1b}}{entry['place'].partition('.')[0]} "
        )
    assert "Likelihood is not accuracy" in text
    assert "mmtrain eval answers" in " ".join(text.split())
    assert "the images are worth" in " ".join(text.lower().split())


def test_report_without_images() -> None:
    lines = printed(lambda console: print_report(report(bits_per_byte=None), console))
    assert not any("swapped" in line or "None" in line for line in lines)
    assert any(line.split()[:4] == ["bits", "per", "byte", "–"] for line in lines)


def test_comparison_names_every_model_and_its_difference() -> None:
    bins = [{"confidence": 0.75, "accuracy": 0.5, "range": (0.7, 0.8), "num_tokens": 4}]
    calibration = {"expected_accuracy": 0.75, "observed_accuracy": 0.5, "expected_calibration_error": 0.25}
    distributions = {"calibration": {**calibration, "bins": bins}, "divergence": None, "entropy": {"mean": 1.25}}
    first = {key: report()[key] for key in ("perplexity", "nll", "interval")} | distributions
    a = uneven(40, seed=8)
    more = difference(a, replace(a, nll=a.nll * 1.5))
    rows = [
        {"name": "base", **first, "difference": None},
        {"name": "runs/with/a/very/long/name/adapter", **first, "difference": more},
        {"name": "perfect", **first, "difference": {**more, "share": None, "share_interval": None}},
    ]
    lines = printed(lambda console: print_comparison(rows, console))
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("base") and line.split()[-2:] == ["–", "–"] for line in lines)
    assert sum(f"{more['nats_per_token']:+.4f}" in line for line in lines) == 2
    assert sum("+50.0 %" in line for line in lines) == 1
    assert sum(line.split()[-4:] == ["1.2500", "75.0%", "50.0%", "25.0%"] for line in lines) == 3
