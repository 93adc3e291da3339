"""Retrieval on an evaluation set during a run."""

from typing import Any

from mmtrain.config import Config
from mmtrain.retrieval.evaluation import Embeddings, RetrievalEvaluation
from mmtrain.train.contrastive.step import ContrastiveLearner

_LEFT_OUT = {"most_confused", "base", "minus_base"}


class RetrievalDuringRun:
    """One set, searched. Each process embeds some of the items; the first one ranks them for all, and all decide by its
    figures."""

    kind = "retrieval"

    def __init__(self, config: Config, name: str, one: RetrievalEvaluation, learner: ContrastiveLearner) -> None:
        self.name, self.every = name, config.run.eval_every
        self._set, self._learner = one, learner

    def row(self, step: int) -> dict[str, Any] | None:
        """The figures of each way to search; None where a signal asked to stop."""
        runtime = self._learner.runtime
        embeddings = self._set.embed_together(self._learner.embedder, runtime)
        if embeddings is None:
            return None
        key = f"retrieval {self.name} {step}"
        found: dict[str, Any] = runtime.from_first(key, lambda: self._figures(embeddings))
        return found

    def _figures(self, embeddings: Embeddings) -> dict[str, Any]:
        found = self._set.figures(embeddings)
        ways = {way: found[way] for way in self._set.way_names}
        return {way: {k: v for k, v in own.items() if k not in _LEFT_OUT} for way, own in ways.items()}

    def line(self, row: dict[str, Any]) -> str:
        """What is printed."""
        return ", ".join(f"{way} recall@1 {own['recall@1']:.1%}" for way, own in row.items())
