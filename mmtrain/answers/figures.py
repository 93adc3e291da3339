"""The figures of `eval answers`: every number of the report, as plain data."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmtrain.answers.breakdown import by_field, by_reference
from mmtrain.answers.judged import JUDGED, Estimate, JudgedAnswers
from mmtrain.answers.metrics import METRICS
from mmtrain.answers.normalize import as_written
from mmtrain.answers.scored_questions import ScoredQuestion
from mmtrain.answers.text_metrics import chrf
from mmtrain.generate.replies import Reply
from mmtrain.scoring.scores import Floats

OTHERS = ("blind", "swapped", "no_images", "base")
"""What the model's answers are compared with, where there are such answers."""
_NUM_QUESTIONS, _NUM_EXAMPLES = 20, 20
_RIGHT = 0.5
"""A score from which on an answer counts as right among the examples."""


def figures(
    questions: Sequence[ScoredQuestion],
    places: Sequence[str],
    replies: Mapping[str, Mapping[int, Reply]],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    """`replies[kind][i]` is the reply to question `i`: of the kind `model` to all, of the others in `OTHERS` to some.

    `places`: the file and line of each question; `reasons`: why each source has its metric. Scores are means over
    answers; `intervals` are 95 % bootstrap intervals over samples, those of `minus_…` of paired differences.
    """
    answers = {kind: {i: reply.text for i, reply in found.items()} for kind, found in replies.items()}
    judged = JudgedAnswers(questions, answers)
    others = [kind for kind in OTHERS if kind in judged.scores]
    scores = {kind: _by_metric(judged, judged.mean, kind) for kind in ("model", *others)}
    gain = judged.gain("blind", JUDGED)
    assert gain is not None  # every question has an answer of the model and a blind one
    return {
        "num_samples": len({question.sample for question in questions}),
        "num_answers": len(questions),
        "metrics": _means(scores["model"]),
        **{kind: _means(scores[kind]) if kind in others else None for kind in OTHERS},
        "beats_blind": gain.interval[0] > 0,
        "verdict": verdict(gain),
        "intervals": {
            "metrics": _intervals(scores["model"]),
            **{kind: _intervals(scores[kind]) for kind in others},
            **{f"minus_{kind}": _intervals(_by_metric(judged, judged.gain, kind)) for kind in others},
        },
        "sources": {name: _source(judged, name, reason) for name, reason in reasons.items()},
        "questions": _questions(judged),
        "references": by_reference(judged),
        "fields": by_field(judged),
        "num_incomplete": sum(not reply.is_complete for reply in replies["model"].values()),
        "worst": [_example(judged, places, replies, i) for i in _worst(judged)],
        "surprising": [_example(judged, places, replies, i) for i in _surprising(judged, replies["model"])],
    }


def verdict(gain: Estimate) -> str:
    """In words, what the gain over the best blind answers says."""
    mean, (low, high) = gain
    more = f"{100 * mean:+.1f} points, 95 % {100 * low:+.1f} to {100 * high:+.1f}"
    if low > 0:
        return f"beats blind guessing ({more})"
    why = "blind guessing is better" if high < 0 else "the difference may be chance" if mean > 0 else "no better"
    return f"does not beat blind guessing ({more}: {why})"


def _by_metric(judged: JudgedAnswers, measure: Callable[[str, str], Estimate | None], kind: str) -> dict[str, Estimate]:
    """What `measure` gives for a kind of answers by each metric that there is."""
    found = {name: measure(kind, name) for name in (*judged.metrics, JUDGED)}
    return {name: one for name, one in found.items() if one is not None}


def _means(found: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: one.mean for name, one in found.items()}


def _intervals(found: Mapping[str, Estimate]) -> dict[str, list[float]]:
    return {name: one.interval for name, one in found.items()}


def _source(judged: JudgedAnswers, name: str, reason: str) -> dict[str, Any]:
    of = judged.in_source(name)
    metric = next(question.metric for question in judged.questions if question.source == name)
    kinds = ("model", *(kind for kind in OTHERS if kind in judged.scores))
    found = {kind: one for kind in kinds if (one := judged.mean(kind, metric, of)) is not None}
    gain = judged.gain("blind", metric, of)
    assert gain is not None
    return {
        "metric": metric,
        "reason": reason,
        "num_answers": int(of.sum()),
        "num_of_other_form": _num_of_other_form(judged, name, metric),
        "means": _means(found),
        "intervals": _intervals(found),
        "beats_blind": gain.interval[0] > 0,
        "verdict": verdict(gain),
    }


def _num_of_other_form(judged: JudgedAnswers, name: str, metric: str) -> int:
    """How many of the model's answers are not of the form that the metric compares, and so count as wrong."""
    is_of_form = METRICS[metric].is_of_form
    own = [answer for i, answer in judged.answers["model"].items() if judged.questions[i].source == name]
    return 0 if is_of_form is None else sum(not is_of_form(answer) for answer in own)


def _questions(judged: JudgedAnswers) -> list[dict[str, Any]]:
    """The questions that are asked most often, at least twice."""
    counts = Counter((question.source, as_written(question.text)) for question in judged.questions)
    rows = []
    for (source, text), count in counts.most_common(_NUM_QUESTIONS):
        if count < 2:
            break
        of: Floats = judged.asks(source, text)
        model, blind = judged.mean("model", JUDGED, of), judged.mean("blind", JUDGED, of)
        assert model is not None
        assert blind is not None
        rows.append(
            {
                "source": source,
                "question": text,
                "num_answers": count,
                "model": model.mean,
                "blind": blind.mean,
                "blind_answer": judged.blind[int(np.flatnonzero(of)[0])],
            }
        )
    return rows


def _worst(judged: JudgedAnswers) -> list[int]:
    """The questions with the lowest scores; of equal ones those whose answer is the least like its reference."""
    scores, answers = judged.scores["model"][JUDGED], judged.answers["model"]
    wrong = [i for i in range(len(scores)) if scores[i] < 1]
    return sorted(wrong, key=lambda i: (scores[i], chrf(answers[i], judged.questions[i].reference)))[:_NUM_EXAMPLES]


def _surprising(judged: JudgedAnswers, replies: Mapping[int, Reply]) -> list[int]:
    """The wrong answers that the model was most sure of."""
    scores = judged.scores["model"][JUDGED]
    sure = {i: reply.log_probability for i, reply in replies.items() if reply.log_probability is not None}
    wrong = [i for i in sure if scores[i] < _RIGHT]
    return sorted(wrong, key=lambda i: -sure[i])[:_NUM_EXAMPLES]


def _example(
    judged: JudgedAnswers, places: Sequence[str], replies: Mapping[str, Mapping[int, Reply]], i: int
) -> dict[str, Any]:
    question, reply = judged.questions[i], replies["model"][i]
    base = replies.get("base", {}).get(i)
    probability = None if reply.log_probability is None else float(np.exp(reply.log_probability))
    return {
        "index": i,
        "sample": question.sample,
        "place": places[i],
        "question": question.text,
        "reference": question.reference,
        "answer": reply.text,
        "blind_answer": judged.blind[i],
        "base_answer": None if base is None else base.text,
        "score": float(judged.scores["model"][JUDGED][i]),
        "probability": probability,
    }
