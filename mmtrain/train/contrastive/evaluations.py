"""Retrieval on the evaluation sets during a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.progress import Progress
from mmtrain.retrieval.evaluation import RetrievalEvaluation
from mmtrain.safe_text import visible
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.metrics import MetricsFile

RETRIEVAL = "retrieval"
"""The key of its rows of metrics.jsonl, whose value is the name of the set."""
_LEFT_OUT = {"most_confused", "base", "minus_base"}


class RetrievalEvaluations:
    """The evaluation sets of a run, searched every `run.eval_every` steps and after the last. Every process embeds all
    items, so none waits for another."""

    def __init__(
        self,
        config: Config,
        sets: Mapping[str, RetrievalEvaluation],
        num_steps: int,
        learner: ContrastiveLearner,
        metrics: MetricsFile,
        progress: Progress,
    ) -> None:
        self._every, self._num_steps, self._sets = config.run.eval_every, num_steps, sets
        self._learner, self._metrics, self._progress = learner, metrics, progress

    def run(self, step: int, done: Sequence[str] = ()) -> int | None:
        """Search all sets but those `done` after `step`, if that is due; gives the signal that asked to stop."""
        if (step % self._every and step != self._num_steps) or not self._sets:
            return None
        runtime = self._learner.runtime
        runtime.activity.set("evaluating", step)
        for name, one in self._sets.items():
            if name not in done:
                found = one.figures(one.embed(self._learner.embedder))
                ways = {way: figures for way, figures in found.items() if "to" in way.split("_")}
                self._report(step, name, ways)
        return runtime.agree(torch.zeros(0, dtype=torch.float64))[1]

    def _report(self, step: int, name: str, ways: Mapping[str, dict[str, Any]]) -> None:
        short = {way: {k: v for k, v in own.items() if k not in _LEFT_OUT} for way, own in ways.items()}
        self._metrics.write({"step": step, RETRIEVAL: name, **short})
        recalls = ", ".join(f"{way} recall@1 {own['recall@1']:.1%}" for way, own in ways.items())
        self._progress.say(f"step {step}  {RETRIEVAL} {visible(name)}: {recalls}")
