"""Scores the evaluation sets during a run."""

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.progress import Progress
from mmtrain.runtime.shard import Filled
from mmtrain.scoring.statistics import summary
from mmtrain.train.dataset import Dataset, EvalSet
from mmtrain.train.metrics import MetricsFile
from mmtrain.train.step import Learner


class Evaluations:
    """The evaluation sets of a run, scored every `run.eval_every` steps and after the last."""

    def __init__(
        self, config: Config, dataset: Dataset, learner: Learner, metrics: MetricsFile, progress: Progress
    ) -> None:
        self._settings, self._dataset, self._learner = config.run, dataset, learner
        self._metrics, self._progress = metrics, progress

    def run(self, step: int, done: Sequence[str] = ()) -> int | None:
        """Score all sets but those `done` after `step`, if that is due; gives the signal that asked to stop meanwhile.

        A set that was interrupted is scored again when the run is resumed.
        """
        if step % self._settings.eval_every and step != self._dataset.num_steps:
            return None
        runtime = self._learner.runtime
        runtime.activity.set("evaluating", step)
        for eval_set in self._dataset.eval:
            if eval_set.name in done:
                continue
            filled = Filled(eval_set.samples, eval_set.checked) if self._learner.sharded else None
            scores = eval_set.scorer.score(self._learner, self._settings.microbatch_tokens, self._progress, filled)
            if scores is None:
                return runtime.agree(torch.zeros(0, dtype=torch.float64))[1]
            self._report(step, eval_set, summary(scores))
        return None

    def _report(self, step: int, eval_set: EvalSet, figures: dict[str, Any]) -> None:
        self._metrics.write({"step": step, "eval": eval_set.name, **figures})
        self._progress.say(
            f"step {step}  eval {eval_set.name}: perplexity {figures['perplexity']:.4f}, "
            f"token accuracy {figures['token_accuracy']:.1%}"
        )
