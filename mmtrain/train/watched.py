"""Figures of evaluations by name, the best one so far, and whether a run has stopped improving.

Everything follows from the rows of metrics.jsonl up to a step, so a run that was killed and resumed decides the same.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.answers.judged import ALWAYS, JUDGED
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.safe_text import shown
from mmtrain.train.eval_sets import EvalSet

Row = dict[str, Any]
_LOWER_IS_BETTER = ("perplexity", "nll")
_EVAL_FIGURES = (*_LOWER_IS_BETTER, "token_accuracy")
_WEIGHTS = {"eval": "num_supervised", "answers": "num_answers"}
_MAX_NLL = 700.0
"""Nats: exp of more than about 709 is no double."""


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
    supervised tokens or answers; None where a row lacks it."""
    kind, source, key = _split(name)
    own = [row for row in rows if kind in row and source in ("", row[kind])]
    of_row = "nll" if key == "perplexity" else key
    values = [(row["metrics"] if kind == "answers" else row).get(of_row) for row in own]
    if not own or None in values:
        return None
    weights = [row[_WEIGHTS[kind]] for row in own]
    mean = float(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return math.exp(min(mean, _MAX_NLL)) if key == "perplexity" else mean


def _split(name: str) -> tuple[str, str, str]:
    """The kind of evaluation, the name of the source (empty for all of them), and the figure."""
    kind, _, rest = name.partition("/")
    source, _, key = rest.rpartition("/")
    return kind, source, key


def check_watched(config: Config, eval_sets: Sequence[EvalSet]) -> None:
    """Raises UserError where a metric that the run is to watch is none of its evaluations'."""
    early, possible = config.train.early_stopping, _names(eval_sets)
    watched = {
        "run.keep_best": config.run.keep_best,
        "train.early_stopping.metric": None if early is None else early.metric,
    }
    faults = []
    for key, name in watched.items():
        if name is not None and name not in possible:
            expected = f"expected one of {', '.join(possible)}" if possible else "there is nothing to evaluate"
            why = "" if name.startswith("eval/") or config.run.eval_answers else " (answers need run.eval_answers)"
            faults.append(f"{key}: {shown(name)}: {expected}{why}")
    if faults:
        raise UserError(faults)


def _names(eval_sets: Sequence[EvalSet]) -> list[str]:
    """Of all figures of the run's evaluations. Of all sources together there are those that each of them has."""
    by_kind = {"eval": [(one.name, list(_EVAL_FIGURES)) for one in eval_sets], "answers": []}
    by_kind["answers"] = [(one.name, _metrics(one)) for one in eval_sets if one.questions is not None]
    found = []
    for kind, sets in by_kind.items():
        common = [key for key in sets[0][1] if all(key in keys for _, keys in sets)] if sets else []
        found += [f"{kind}/{key}" for key in common]
        found += [f"{kind}/{name}/{key}" for name, keys in sets for key in keys]
    return found


def _metrics(eval_set: EvalSet) -> list[str]:
    assert eval_set.questions is not None
    own = eval_set.questions.questions[0].metric
    return [*ALWAYS, *(() if own in ALWAYS else (own,)), JUDGED]
