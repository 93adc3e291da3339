"""The contrastive objective: the embeddings of pairs."""

from collections.abc import Iterator
from functools import cached_property

from rich.table import Table

from mmtrain.config import Config
from mmtrain.contrastive.load import load_embedder
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.contrastive.evaluations import RetrievalDuringRun
from mmtrain.train.contrastive.export import export
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.evaluations import RunEvaluation
from mmtrain.train.report import bits_lines, component_lines, image_cache_lines, weights_line


class ContrastiveObjective:
    """The data of a config, read and checked. Its model is loaded first: it decides how items are encoded."""

    def __init__(self, config: Config, runtime: Runtime, progress: Progress) -> None:
        self._config, self._runtime, self._progress = config, runtime, progress
        self._embedder = load_embedder(config, runtime, progress)
        self.data = PairDataset(config, self._embedder, progress)

    @cached_property
    def learner(self) -> ContrastiveLearner:
        return make_contrastive_learner(self._config, self._embedder, self.data, self._runtime, self._progress)

    def write_facts(self) -> None:
        """There are none: lengths of pairs are no lengths of samples."""

    def steps(self) -> ContrastiveLearner:
        return self.learner

    def evaluations(self) -> list[RunEvaluation]:
        return [RetrievalDuringRun(self._config, name, one, self.learner) for name, one in self.data.eval.items()]

    def report(self) -> Iterator[str | Table]:
        learner = self.learner
        yield from component_lines(learner.component_reports)
        yield self.data.summary()
        yield from self.data.notes()
        yield weights_line(learner)
        yield from bits_lines(self._config, learner)
        if kinds := sorted(learner.cache.kinds):
            size = self._config.run.image_cache.memory_gib
            yield f"embeddings of {' and '.join(kinds)} items: cached, {size:g} GiB in memory"
        yield from image_cache_lines(self._config, learner.embedder.caches_images)
        yield self._embedder.description

    def export(self, name: str | None = None, step: int | None = None) -> str:
        return export(self.learner, self._config, self.data, name, step)
