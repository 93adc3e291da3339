"""Figures of evaluations by name, the best one so far, and whether a run has stopped improving.

Everything follows from the rows of metrics.jsonl up to a step, so a run that was killed and resumed decides the same.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.answers.judged import ALWAYS, JUDGED
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.retrieval.figures import DIRECTIONS
from mmtrain.retrieval.metrics import NAMES
from mmtrain.safe_text import shown
from mmtrain.scoring.statistics import perplexity
from mmtrain.train.eval_sets import EvalSet

Row = dict[str, Any]
_LOWER_IS_BETTER = ("perplexity", "nll")
_EVAL_FIGURES = (*_LOWER_IS_BETTER, "token_accuracy")
_WEIGHTS = {"eval": "num_supervised", "answers": "num_answers"}
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation after a step."""

    step: int
    value: float
    last: float
    """The value of the last evaluation."""


class History:
    """The rows of a run's evaluations, in order."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = list(rows)

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def after(self, step: int) -> list[Row]:
        return [row for row in self._rows if row["step"] == step]

    def values(self, name: str) -> dict[int, float]:
        """By step, from the first step on, what `name` was; a step without it is left out."""
        steps = dict.fromkeys(row["step"] for row in self._rows if row["step"] > 0)
        found = {step: figure(self.after(step), name) for step in steps}
        return {step: value for step, value in found.items() if value is not None}

    def best(self, name: str, among: Sequence[int] | None = None, since: int = 0) -> Best | None:
        """The first of the best values of `name`. `among`: the steps before `since` that count; None: all."""
        values = self.values(name)
        allowed = {step: value for step, value in values.items() if among is None or step >= since or step in among}
        if not allowed:
            return None
        sign = 1 if name.rpartition("/")[2] in _LOWER_IS_BETTER else -1
        step = min(allowed, key=lambda one: sign * allowed[one])
        return Best(step, allowed[step], values[max(values)])

    def has_stopped_improving(self, name: str, patience: int) -> bool:
        """Whether the last `patience` evaluations after a step have brought no better value."""
        best = self.best(name)
        return best is not None and sum(step > best.step for step in self.values(name)) >= patience


def figure(rows: Sequence[Row], name: str) -> float | None:
    """What `name` was in the evaluations of one step: `eval/SOURCE/perplexity`, or without a source the mean over all
    supervised tokens, answers or searches; None where a row lacks it."""
    kind, _, rest = name.partition("/")
    source, _, key = rest.rpartition("/")
    source, way = _direction(source) if kind == "retrieval" else (source, "")
    own = [row for row in rows if kind in row and source in ("", row[kind])]
    found = [one for row in own for one in _figures_of(row, kind, way)]
    values: list[Any] = [figures.get("nll" if key == "perplexity" else key) for _, figures in found]
    if not found or None in values:
        return None
    weights = [weight for weight, _ in found]
    mean = float(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return perplexity(mean) if key == "perplexity" else mean


def _direction(source: str) -> tuple[str, str]:
    """`SOURCE/image_to_text`, either of which may be missing, as the source and the direction."""
    before, _, last = source.rpartition("/")
    return (before, last) if last in DIRECTIONS else (source, "")


def _figures_of(row: Row, kind: str, way: str) -> Iterator[tuple[int, Row]]:
    """The figures of a row, each with the number of what they are means over. `way`: of retrieval the direction, empty
    for both."""
    if kind == "retrieval":
        yield from ((row[one]["num_queries"], row[one]) for one in DIRECTIONS if one in row and way in ("", one))
    else:
        yield row[_WEIGHTS[kind]], row["metrics"] if kind == "answers" else row


def check_watched(config: Config, possible: Sequence[str]) -> None:
    """Raises UserError where a metric that the run is to watch is none of its evaluations', which are `possible`."""
    early = config.train.early_stopping
    watched = {
        "run.keep_best": config.run.keep_best,
        "train.early_stopping.metric": None if early is None else early.metric,
    }
    faults = []
    for key, name in watched.items():
        if name is not None and name not in possible:
            expected = _expected(name, possible) if possible else "there is nothing to evaluate"
            no_answers = name.startswith("answers/") and config.objective.kind == "chat" and not config.run.eval_answers
            why = " (answers need run.eval_answers)" if no_answers else ""
            faults.append(f"{key}: {shown(name)}: {expected}{why}")
    if faults:
        raise UserError(faults)


def _expected(name: str, possible: Sequence[str]) -> str:
    if len(possible) <= _MAX_LISTED:
        return f"expected one of {', '.join(possible)}"
    some = dict.fromkeys([*difflib.get_close_matches(name, possible), *possible[:3]])
    return f"expected one of {len(possible)} figures, such as {', '.join(some)}"


def chat_names(eval_sets: Sequence[EvalSet]) -> list[str]:
    """The names of all figures of the evaluations of a run over chats."""
    answers = {one.name: _metrics(one) for one in eval_sets if one.questions is not None}
    return _names("eval", {one.name: _EVAL_FIGURES for one in eval_sets}) + _names("answers", answers)


def retrieval_names(ways: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of all figures of the evaluations of a contrastive run; `ways`: the directions of each set."""
    sets = {name: [*NAMES, *(f"{way}/{key}" for way in own for key in NAMES)] for name, own in ways.items()}
    return _names("retrieval", sets)


def _names(kind: str, sets: Mapping[str, Sequence[str]]) -> list[str]:
    """`sets`: the figures of each set. Of all sets together there are those that each of them has."""
    first = next(iter(sets.values()), ())
    common = [key for key in first if all(key in keys for keys in sets.values())]
    return [f"{kind}/{key}" for key in common] + [f"{kind}/{name}/{key}" for name, own in sets.items() for key in own]


def _metrics(eval_set: EvalSet) -> list[str]:
    assert eval_set.questions is not None
    own = eval_set.questions.questions[0].metric
    return [*ALWAYS, *(() if own in ALWAYS else (own,)), JUDGED]
