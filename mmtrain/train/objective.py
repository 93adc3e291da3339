"""What the run, the loop and checkpoints need of an objective. They do not know which one is trained."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor

from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.dataset.plan import Indices, Plan
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.stream import Stream
from mmtrain.model.tune import ComponentReport
from mmtrain.runtime.processes import Runtime
from mmtrain.train.evaluations import RunEvaluation


class Trained(Protocol):
    """A model that is trained, its optimizer, and how the gradients of a step are computed."""

    @property
    def model(self) -> Any: ...

    @property
    def runtime(self) -> Runtime: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def component_reports(self) -> list[ComponentReport]:
        """What is trainable of each component."""

    @property
    def exact(self) -> bool:
        """Micro-batches are summed in a tree that does not depend on the number of processes."""

    @property
    def sharded(self) -> bool:
        """Weights are sharded over the processes."""

    def accumulate(self, batches: Iterable[Any], count: float, step: int) -> tuple[Tensor, int | None]:
        """Put the gradients of the step's loss into the parameters; `count` is what the loss is divided by.

        Gives the loss, () float64, and the signal that asked all processes to stop.
        """

    def updated(self) -> None:
        """After each update of the weights."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One step: its samples, and the micro-batches, some perhaps empty, that this process computes."""

    samples: tuple[int, ...]
    own: tuple[tuple[Any, ...], ...]
    count: float
    """What the loss is divided by: the sum of the weights of its supervised tokens, or its pairs."""
    figures: dict[str, int]
    """The step's sizes in its row of metrics.jsonl; one of them is `num_tokens`."""
    operations: float
    """What it must compute, over all processes: a multiplication and an addition are two."""


class Steps(Protocol):
    """The steps of a run."""

    @property
    def of(self) -> Callable[[int], Cut]:
        """The cut of a step, counted from 1."""

    def batches(self, first: int, last: int) -> Iterator[Any]:
        """The batches of this process's micro-batches that are not empty, of the steps `first` to `last`."""


class RunData(Protocol):
    """What a run is trained on, checked."""

    @property
    def train(self) -> StoredSamples | PairSamples:
        """The training samples by index."""

    @property
    def stream(self) -> Stream | None:
        """What reads the training samples as the run goes; None where all of them are known before it begins."""

    @property
    def plan(self) -> Plan: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def used(self) -> Indices:
        """The indices of the training samples that are used."""

    @property
    def image_files(self) -> frozenset[Path]: ...

    @property
    def eval_files(self) -> list[tuple[list[Path], list[Path]]]:
        """For each evaluation set its files of records, and its image files."""

    @property
    def template(self) -> str | None:
        """The source of the chat template, if there is one."""

    def dropped_rows(self) -> list[dict[str, Any]]: ...


class TrainingObjective(Protocol):
    """An objective over the data of one config."""

    @property
    def data(self) -> RunData: ...

    @property
    def learner(self) -> Trained:
        """The model with its trainable parameters, and how it is computed: loaded when it is first asked for."""

    def write_facts(self) -> None:
        """Write what was found about data and model into the directory of the run, for reports."""

    def steps(self) -> Steps: ...

    def evaluations(self) -> list[RunEvaluation]: ...

    def report(self) -> Iterator[str | Table]:
        """What is printed before the first step."""

    def export(self, name: str | None = None, step: int | None = None) -> str:
        """Save what was trained as the folder `name`, by default `adapter/` or `model/`, and load it back; gives a line
        that says what was found. `step`: after which the weights are these; None: the last."""
