"""The objective of chats: the cross-entropy of the supervised tokens of conversations."""

from collections.abc import Iterator
from functools import cached_property

from rich.table import Table

from mmtrain.config import Config
from mmtrain.encoding.load import processor_of
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.chat_evaluations import make_evaluations
from mmtrain.train.checkpointing import decide_checkpointing
from mmtrain.train.dataset import Dataset
from mmtrain.train.evaluations import RunEvaluation
from mmtrain.train.export import export
from mmtrain.train.facts import write_facts
from mmtrain.train.learner import make_learner
from mmtrain.train.report import start_report
from mmtrain.train.step import Learner
from mmtrain.train.step_cuts import StepCuts


class ChatObjective:
    """The data of a config, read and checked; the model is loaded later."""

    def __init__(self, config: Config, runtime: Runtime, progress: Progress) -> None:
        self._config, self._runtime, self._progress = config, runtime, progress
        self._processor = processor_of(config.model)
        self.data = Dataset(config, self._processor, progress)

    @cached_property
    def learner(self) -> Learner:
        processor, runtime, progress = self._processor, self._runtime, self._progress
        config = decide_checkpointing(self._config, self.data, processor, runtime, progress)
        return make_learner(config, processor, runtime, progress)

    def write_facts(self) -> None:
        write_facts(self._config, self.data, self.learner)

    def steps(self) -> StepCuts:
        return StepCuts(self.data, self.learner, self._config.run, self.data.stream)

    def evaluations(self) -> list[RunEvaluation]:
        return make_evaluations(self._config, self.data, self.learner, self._progress)

    def report(self) -> Iterator[str | Table]:
        return start_report(self._config, self.data, self.learner)

    def export(self, name: str | None = None, step: int | None = None) -> str:
        return export(self.learner, self._config, self.data, name, step)
