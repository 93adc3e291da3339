"""What a run has done so far, from the files in its directory. Imports no torch, so that a list of runs is quick."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain.train.folder import finished_step, is_exported
from mmtrain.train.metrics import METRICS, is_step, rows_of


@dataclass(frozen=True, slots=True)
class SetSummary:
    """One figure of an evaluation set during the run."""

    name: str
    metric: str
    """`perplexity`, or that of the answers to its questions."""
    first: float
    last: float
    best: float
    best_step: int
    blind: float = 0.0
    """Of the best blind answers."""
    verdict: str | None = None
    """Whether the last answers beat blind guessing, in words; None for a perplexity."""


@dataclass(frozen=True, slots=True)
class RetrievalSummary:
    """How often what is searched for comes first, in one direction of one set."""

    name: str
    direction: str
    """Such as `image_to_text`."""
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """All steps in metrics.jsonl, also those before a resume."""

    num_steps: int
    loss: float | None
    """Of the last step."""
    num_tokens: int
    num_supervised: int
    """0 for a contrastive run."""
    seconds: float
    """The time that the steps took, without evaluations and saving."""
    evals: tuple[SetSummary, ...]
    is_finished: bool
    num_pairs: int = 0
    """0 for any other run."""
    answers: tuple[SetSummary, ...] = ()
    retrieval: tuple[RetrievalSummary, ...] = ()


def summarize(run: Path) -> RunSummary:
    """The figures of the run in the directory `run`; zeros and None where it has taken no step."""
    rows = list(rows_of(run / METRICS))
    steps = [row for row in rows if is_step(row)]
    evals, answers = rows_by_set(rows, "eval"), rows_by_set(rows, "answers")
    return RunSummary(
        num_steps=steps[-1]["step"] if steps else 0,
        loss=steps[-1]["loss"] if steps else None,
        num_tokens=sum(row["num_tokens"] for row in steps),
        num_supervised=sum(row.get("num_supervised", 0) for row in steps),
        seconds=sum(row["seconds"] for row in steps),
        evals=tuple(_eval_summary(name, own) for name, own in evals.items()),
        is_finished=is_exported(run) and finished_step(run) == (steps[-1]["step"] if steps else 0),
        num_pairs=sum(row.get("num_pairs", 0) for row in steps),
        answers=tuple(_answers_summary(name, own) for name, own in answers.items()),
        retrieval=tuple(one for name, own in rows_by_set(rows, "retrieval").items() for one in _directions(name, own)),
    )


def rows_by_set(rows: Iterable[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of the evaluations of a kind, by the name of the set."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if kind in row:
            found.setdefault(row[kind], []).append(row)
    return found


def _summary(name: str, metric: str, rows: list[dict[str, Any]], values: Sequence[float], sign: int) -> SetSummary:
    """`values`: of the metric in `rows`; the best is the lowest of them times `sign`."""
    best = min(range(len(rows)), key=lambda i: sign * values[i])
    return SetSummary(name, metric, values[0], values[-1], values[best], rows[best]["step"])


def _eval_summary(name: str, rows: list[dict[str, Any]]) -> SetSummary:
    return _summary(name, "perplexity", rows, [row["perplexity"] for row in rows], 1)


def _answers_summary(name: str, rows: list[dict[str, Any]]) -> SetSummary:
    metric, last = rows[-1]["metric"], rows[-1]
    found = _summary(name, metric, rows, [row["metrics"].get(metric, 0.0) for row in rows], -1)
    return replace(found, blind=last["blind"][metric], verdict=last["verdict"])


def _directions(name: str, rows: list[dict[str, Any]]) -> Iterator[RetrievalSummary]:
    for key, last in rows[-1].items():
        if "_to_" in key:
            yield RetrievalSummary(name, key, rows[0][key]["recall@1"], last["recall@1"])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
