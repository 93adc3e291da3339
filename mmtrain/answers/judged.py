"""Answers of several kinds to the same questions (the model's, blind ones, those with other images) as scores."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmtrain.answers.blind import best_blind_answers
from mmtrain.answers.metrics import METRICS
from mmtrain.answers.normalize import as_written
from mmtrain.answers.scored_questions import ScoredQuestion
from mmtrain.records.reasoning import reply_of
from mmtrain.scoring.scores import Floats, Ints
from mmtrain.scoring.statistics import mean_by_sample

ALWAYS = ("exact_match", "vqa_match")
"""Metrics that are reported for every source."""
JUDGED = "judged"
"""Each answer's score by the metric of its own source: what decides whether a model beats blind guessing."""


class Estimate(NamedTuple):
    mean: float
    interval: list[float]
    """95 %: [low, high]."""


class JudgedAnswers:
    """The scores of answers to `questions`, by kind; a question without an answer of a kind has no score (NaN)."""

    def __init__(self, questions: Sequence[ScoredQuestion], answers: Mapping[str, Mapping[int, str]]) -> None:
        """`answers[kind][i]` answers question `i`. The best blind answers are added as the kind `blind`."""
        self.questions, self.answers = questions, answers
        self._samples: Ints = np.array([question.sample for question in questions], np.int64)
        own = {question.metric for question in questions}
        self.metrics = [name for name in METRICS if name in ALWAYS or name in own]
        self.scores: dict[str, dict[str, Floats]] = {
            kind: {name: self._scores(name, found) for name in self.metrics} for kind, found in answers.items()
        }
        blind = {name: self._blind_answers(name) for name in self.metrics}
        self.scores["blind"] = {name: self._scores(name, found) for name, found in blind.items()}
        self.blind = {i: blind[question.metric][i] for i, question in enumerate(questions)}
        """The best blind answer to each question, by the metric of its source."""
        for scores in self.scores.values():
            each = [scores[question.metric][i] for i, question in enumerate(questions)]
            scores[JUDGED] = np.array(each, np.float64)

    def _questions_of(self, metric: str) -> list[int]:
        return [i for i, question in enumerate(self.questions) if metric in (*ALWAYS, question.metric)]

    def _scores(self, metric: str, answers: Mapping[int, str]) -> Floats:
        found = np.full(len(self.questions), np.nan)
        score = METRICS[metric].score
        for i in self._questions_of(metric):
            if i in answers:
                found[i] = score(reply_of(answers[i]), self.questions[i].reference)
        return found

    def _blind_answers(self, metric: str) -> dict[int, str]:
        indices = self._questions_of(metric)
        asked = [(self.questions[i].source, as_written(self.questions[i].text)) for i in indices]
        references = [self.questions[i].reference for i in indices]
        return dict(zip(indices, best_blind_answers(asked, references, METRICS[metric].score), strict=True))

    def mean(self, kind: str, metric: str, of: Floats | None = None) -> Estimate | None:
        """The mean score of the answers of a kind, and its 95 % interval; None where there is none. `of`: 1 for the
        questions to take, by default all."""
        return self._mean(self.scores[kind][metric], of)

    def gain(self, kind: str, metric: str, of: Floats | None = None) -> Estimate | None:
        """How much better the model's answers are than those of a kind, over the questions that have both, and the
        paired 95 % interval."""
        return self._mean(self.scores["model"][metric] - self.scores[kind][metric], of)

    def _mean(self, values: Floats, of: Floats | None) -> Estimate | None:
        there = ~np.isnan(values) if of is None else ~np.isnan(values) & (of > 0)
        if not there.any():
            return None
        mean, interval = mean_by_sample(self._samples[there], values[there])
        return Estimate(mean, list(interval))

    def in_source(self, name: str) -> Floats:
        """1 for the questions of a source, else 0."""
        return np.array([question.source == name for question in self.questions], np.float64)

    def asks(self, source: str, text: str) -> Floats:
        """1 for the questions with this text, else 0."""
        asked = [question.source == source and as_written(question.text) == text for question in self.questions]
        return np.array(asked, np.float64)
