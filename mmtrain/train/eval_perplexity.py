"""Scores the reference replies of one evaluation set during a run."""

from typing import Any

from mmtrain.config import Config
from mmtrain.progress import Progress
from mmtrain.runtime.shard import WithFiller
from mmtrain.scoring.statistics import perplexity_text, summary
from mmtrain.train.eval_sets import EvalSet
from mmtrain.train.step import Learner


class PerplexityEvaluation:
    """How likely the reference replies of `eval_set` are."""

    kind = "eval"

    def __init__(self, config: Config, eval_set: EvalSet, learner: Learner, progress: Progress) -> None:
        self.name, self.every = eval_set.name, config.run.eval_every
        self._scorer, self._learner, self._progress = eval_set.scorer, learner, progress
        self._microbatch_tokens = config.run.microbatch_tokens
        self._filled = WithFiller(eval_set.samples, eval_set.checked) if learner.sharded else None

    def row(self, step: int) -> dict[str, Any] | None:
        """The figures; None where a signal asked to stop meanwhile."""
        scores = self._scorer.score(self._learner, self._microbatch_tokens, self._progress, self._filled)
        return None if scores is None else summary(scores)

    def line(self, row: dict[str, Any]) -> str:
        """What is printed."""
        return f"perplexity {perplexity_text(row['perplexity'])}, token accuracy {row['token_accuracy']:.1%}"
