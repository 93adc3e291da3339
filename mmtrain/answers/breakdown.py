"""Scores by reference, which is the accuracy of each class of a classifier, and by field of JSON."""

from collections import Counter
from typing import Any

from mmtrain.answers.judged import JUDGED, JudgedAnswers
from mmtrain.answers.normalize import as_written
from mmtrain.answers.structured_metrics import json_fields
from mmtrain.records.reasoning import reply_of

_MIN_ANSWERS = 2
"""Answers to each reference, on average, from which on references are taken for classes."""
_MAX_ROWS = 1000


def by_reference(judged: JudgedAnswers) -> list[dict[str, Any]]:
    """The score of the answers to each reference of the sources whose references repeat, the most frequent first, with
    the most frequent wrong answer."""
    groups: dict[str, dict[str, list[int]]] = {}
    for i, question in enumerate(judged.questions):
        if question.metric != "json_accuracy":
            groups.setdefault(question.source, {}).setdefault(as_written(question.reference), []).append(i)
    rows = []
    for source, indices in groups.items():
        if sum(map(len, indices.values())) >= _MIN_ANSWERS * len(indices) and len(indices) > 1:
            rows += [_of_reference(judged, source, reference, own) for reference, own in indices.items()]
    return sorted(rows, key=lambda row: -int(row["num_answers"]))[:_MAX_ROWS]


def _of_reference(judged: JudgedAnswers, source: str, reference: str, indices: list[int]) -> dict[str, Any]:
    scores = judged.scores["model"][JUDGED][indices]
    answers = [as_written(reply_of(judged.answers["model"][i])) for i in indices]
    wrong = Counter(answer for answer, score in zip(answers, scores, strict=True) if score < 1).most_common(1)
    return {
        "source": source,
        "reference": reference,
        "num_answers": len(indices),
        "score": float(scores.mean()),
        "wrong_answer": wrong[0][0] if wrong else None,
        "num_wrong_answer": wrong[0][1] if wrong else 0,
    }


def by_field(judged: JudgedAnswers) -> list[dict[str, Any]]:
    """The share of the references whose field the answer has with the same value, for each field of the sources that
    are scored by `json_accuracy`, in the order of the references. The items of a list are one field, `lines.*.price`.

    `num_added`: how many times an answer has the field and its reference does not.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for i, question in enumerate(judged.questions):
        if question.metric != "json_accuracy":
            continue
        wanted, given = json_fields(question.reference), json_fields(reply_of(judged.answers["model"][i]))
        for path in [*wanted, *(path for path in given if path not in wanted)]:
            name = ".".join("*" if isinstance(step, int) else step for step in path)
            found = counts.setdefault((question.source, name), Counter())
            found["references"] += path in wanted
            found["right"] += path in wanted and path in given and bool(given[path] == wanted[path])
            found["added"] += path not in wanted
    return [
        {
            "source": source,
            "field": name,
            "num_references": found["references"],
            "score": found["right"] / found["references"] if found["references"] else None,
            "num_added": found["added"],
        }
        for (source, name), found in list(counts.items())[:_MAX_ROWS]
    ]
