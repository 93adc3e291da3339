"""The charts of one or several runs."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mmtrain.report.chart import Chart, bar_chart, line_chart
from mmtrain.report.read import Row, RunRecord
from mmtrain.report.series import Series, Values, column, num_averaged, smoothed
from mmtrain.safe_text import counted


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Loss, evaluations, answers, retrieval, learning rate, gradient norm and speed; without those that no run has.

    Of one run the figures of every step are drawn faintly under their average; of several only the averages.
    """
    found = [
        line_chart("Loss", _of_steps(runs, "loss"), _unit(runs), allow_log=True),
        line_chart("Perplexity", _of_evals(runs, "perplexity"), "evaluation", allow_log=True),
        line_chart("Token accuracy", _of_evals(runs, "token_accuracy"), "evaluation"),
        line_chart("Answers", _of_answers(runs), "share that is right; dashed: best blind answer"),
        line_chart("Recall@1", _of_retrieval(runs), "share of searches"),
        line_chart("Gradient norm", _of_steps(runs, "grad_norm"), "before clipping", allow_log=True),
        line_chart("Learning rate", [_plain(run, number, "learning_rate") for number, run in enumerate(runs)]),
        line_chart("Tokens per second", _of_steps(runs, "speed")),
        line_chart("Share of the device's matrix rate", _of_steps(runs, "mfu")),
    ]
    return [chart for chart in found if chart is not None]


def length_chart(lengths: Row) -> Chart:
    """How long the samples of a set are."""
    ranges = [(low, high - 1) for low, high in pairwise(lengths["edges"])]
    return bar_chart("Lengths of samples", "tokens", ranges, lengths["counts"])


def _of_steps(runs: Sequence[RunRecord], key: str) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        steps, values = _speed(run) if key == "speed" else column(run.steps, key)
        if len(runs) == 1:
            found.append(Series("each step", steps, values, "faint", run=number))
        title = _named(run, runs, f"average of {counted(num_averaged(len(values)), 'step')}")
        found.append(Series(title, steps, smoothed(values), run=number))
    return found


def _speed(run: RunRecord) -> tuple[Values, Values]:
    steps, tokens = column(run.steps, "num_tokens")
    _, seconds = column(run.steps, "seconds")
    return steps, tokens / np.maximum(seconds, 1e-9)


def _plain(run: RunRecord, number: int, key: str) -> Series:
    return Series(run.name, *column(run.steps, key), run=number)


def _of_evals(runs: Sequence[RunRecord], key: str) -> list[Series]:
    return [
        Series(_named(run, runs, name), *column(rows, key), marked=True, run=_color(runs, number, place))
        for number, run in enumerate(runs)
        for place, (name, rows) in enumerate(run.evals.items())
    ]


def _of_answers(runs: Sequence[RunRecord]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        for place, (name, rows) in enumerate(run.answers.items()):
            title, color = _named(run, runs, f"{name} ({rows[-1]['metric']})"), _color(runs, number, place)
            found.append(Series(title, *_scores(rows, "metrics"), marked=True, run=color))
            found.append(Series(f"{title}, blind", *_scores(rows, "blind"), "dashed", run=color))
    return found


def _of_retrieval(runs: Sequence[RunRecord]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        lines = [(name, rows, key) for name, rows in run.retrieval.items() for key in rows[-1] if "_to_" in key]
        for place, (name, rows, direction) in enumerate(lines):
            figures = [{"step": row["step"], "value": row[direction]["recall@1"]} for row in rows if direction in row]
            title = _named(run, runs, f"{name}, {direction.replace('_', ' ')}")
            found.append(Series(title, *column(figures, "value"), marked=True, run=_color(runs, number, place)))
    return found


def _unit(runs: Sequence[RunRecord]) -> str:
    """Of the loss."""
    kinds = {run.config.get("objective", {}).get("kind", "chat") for run in runs}
    return "nats a token" if kinds == {"chat"} else "nats"


def _scores(rows: Sequence[Row], kind: str) -> tuple[Values, Values]:
    """The metric of the set: of the model's answers (`metrics`) or of the best blind ones (`blind`)."""
    return column([{"step": row["step"], "value": row[kind].get(row["metric"])} for row in rows], "value")


def _color(runs: Sequence[RunRecord], number: int, place: int) -> int:
    """Several runs differ in colour; of one run its evaluation sets do."""
    return number if len(runs) > 1 else place


def _named(run: RunRecord, runs: Sequence[RunRecord], name: str) -> str:
    return name if len(runs) == 1 else f"{run.name}, {name}"
