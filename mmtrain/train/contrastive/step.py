"""The gradients of one step of pairs, in two passes: law 1 for a loss that compares all items of a step.

First every item is embedded. All processes then have all embeddings, and the gradient of the loss with respect to each,
which depends on no cut. A second pass computes the gradients of the weights, micro-batch by micro-batch ("GradCache",
Gao et al. 2021), except where the graph of the first pass was kept. Dropout drops the same in both.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.contrastive.embedder import Embedder, EncodedItem, Kind
from mmtrain.contrastive.loss import LossGradients, LossSettings, contrastive_loss
from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.dataset.ahead import in_order
from mmtrain.dataset.batch import Batch
from mmtrain.model.dropout import DropoutContext
from mmtrain.model.tune import ComponentReport
from mmtrain.runtime.device import microbatch_faults
from mmtrain.runtime.processes import Runtime
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.contrastive.cuts import ItemBatch, Microbatch, PairCut, PairCuts
from mmtrain.train.contrastive.embedding_cache import EmbeddingCache
from mmtrain.train.contrastive.graphs import GraphMemory
from mmtrain.train.gradients import accumulate_tree, sum_running
from mmtrain.train.lost_gradients import LostGradients, backward

LoadedItems = tuple[tuple[ItemBatch, Batch], ...]
"""A micro-batch with its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveLearner:
    """An embedder that is trained, its optimizer, and how its steps are computed."""

    embedder: Embedder
    samples: PairSamples
    cuts: PairCuts
    loss: LossSettings
    temperature_max: float
    runtime: Runtime
    optimizer: torch.optim.Optimizer
    dropout: DropoutContext
    lost_gradients: LostGradients
    component_reports: list[ComponentReport]
    graph_memory: GraphMemory
    cache: EmbeddingCache
    exact: bool
    """Micro-batches are summed in a tree that does not depend on the number of processes."""
    sharded: bool = False

    @property
    def model(self) -> Any:
        return self.embedder.model

    @property
    def items(self) -> Sequence[EncodedItem]:
        return self.samples.items

    def of(self, step: int) -> PairCut:
        """The cut of a step, counted from 1."""
        return self.cuts.of(step)

    def batches(self, first: int, last: int) -> Iterator[LoadedItems]:
        """The tensors of this process's micro-batches of the steps `first` to `last`, made ahead."""
        return in_order(self.load, self.cuts.microbatches(first, last), _num_bytes)

    def load(self, microbatch: Microbatch) -> LoadedItems:
        """Items whose embeddings are cached are left out."""
        needed = [ItemBatch(one.kind, tuple(n for n in one.numbers if n not in self.cache)) for one in microbatch]
        return tuple((one, self.tensors(one)) for one in needed if one.numbers)

    def tensors(self, batch: ItemBatch) -> Batch:
        return self.embedder.batch(self.samples.loaded(batch.numbers))

    def embed(self, inputs: Batch, kind: Kind) -> tuple[Tensor, Tensor | None]:
        """(num_items, width) without a graph, and with it where it is kept."""

        def compute() -> Tensor:
            return self.embedder.embed(inputs, kind)

        if not self.embedder.is_frozen(kind):
            return self.graph_memory.run(compute)
        with torch.no_grad():
            return compute(), None

    def accumulate(self, batches: Iterable[LoadedItems | None], count: float, step: int) -> tuple[Tensor, int | None]:
        return accumulate_gradients(self, batches, step)

    def updated(self) -> None:
        """After an update of the weights."""
        self.embedder.scale.limit(self.temperature_max)


def _num_bytes(loaded: LoadedItems) -> int:
    return sum(batch.num_bytes for _, batch in loaded)


@dataclass(slots=True)
class _Embedded:
    """A batch after the first pass."""

    batch: ItemBatch
    inputs: Batch | None
    """None where it is loaded again for the second pass: pixels take much memory."""
    values: Tensor
    """(num_items, width)"""
    graph: Tensor | None
    """The same with its graph, where that was kept."""


def accumulate_gradients(
    learner: ContrastiveLearner, batches: Iterable[LoadedItems | None], step: int
) -> tuple[Tensor, int | None]:
    """Put the gradients of the step's loss into the parameters, over all micro-batches (None: an empty one) and all
    processes.

    Gives the loss, () float64, and the signal that asked all processes to stop.
    """
    runtime, cut = learner.runtime, learner.cuts.of(step)
    learner.graph_memory.begin()
    first = [[] if loaded is None else _first_pass(learner, loaded, step) for loaded in batches]
    runtime.activity.set("gradients")
    found, gradients = _loss(learner, cut, [one for each in first for one in each])
    parameters = _of_weights(learner)

    def second(embedded: list[_Embedded]) -> None:
        for one in embedded:
            _second_pass(learner, one, gradients[cut.rows(one.batch.numbers)], step)

    if learner.exact:
        accumulate_tree(parameters, first, second, runtime)
    else:
        for each in first:
            second(each)
        runtime.activity.set("gradients")
        sum_running(parameters, runtime)
    learner.embedder.scale.put_gradient(found.scale)
    learner.embedder.bias.put_gradient(found.bias)
    return found.loss, runtime.agreed_stop_signal()


def _first_pass(learner: ContrastiveLearner, loaded: LoadedItems, step: int) -> list[_Embedded]:
    learner.runtime.activity.set("forward")
    found = []
    for batch, inputs in loaded:
        is_frozen = learner.embedder.is_frozen(batch.kind)
        with learner.dropout.at(step, inputs), microbatch_faults(f"step {step}", inputs):
            values, graph = learner.embed(inputs, batch.kind)
        again = not is_frozen and not inputs.has_images
        found.append(_Embedded(batch, inputs if again or graph is not None else None, values, graph))
    return found


def _second_pass(learner: ContrastiveLearner, one: _Embedded, gradient: Tensor, step: int) -> None:
    """Add the gradients of a batch, whose embeddings have `gradient` (num_items, width), to the parameters'."""
    kind = one.batch.kind
    if learner.embedder.is_frozen(kind):
        return
    learner.runtime.activity.set("backward")
    inputs = learner.tensors(one.batch) if one.inputs is None else one.inputs
    with learner.dropout.at(step, inputs), microbatch_faults(f"step {step}", inputs):
        values = learner.embedder.embed(inputs, kind) if one.graph is None else one.graph
        backward((values * gradient).sum(), step)
        one.graph = None
        learner.lost_gradients.check(step, inputs.has_images, lambda: learner.embedder.embed(inputs, kind))


def _loss(learner: ContrastiveLearner, cut: PairCut, embedded: Sequence[_Embedded]) -> tuple[LossGradients, Tensor]:
    """The loss of the step, and its gradient with respect to each of its items, (num_items, width)."""
    embedder, runtime, relation = learner.embedder, learner.runtime, cut.relation
    dtype = embedded[0].values.dtype if embedded else torch.float32
    own = torch.zeros(len(cut.items), embedder.width, dtype=dtype, device=runtime.device)
    for one in embedded:
        own[torch.from_numpy(cut.rows(one.batch.numbers)).to(own.device)] = one.values
    values = learner.cache.complete(cut.items, runtime.sum(own), learner.items)
    queries, documents = (
        torch.from_numpy(cut.rows(numbers)).to(own.device)
        for numbers in (relation.queries.tolist(), relation.documents.tolist())
    )
    scale, bias = embedder.scale.value, embedder.bias.value
    found = contrastive_loss(values[queries], values[documents], relation, learner.loss, scale, bias)
    gradients = torch.zeros_like(values)
    gradients[queries] = found.queries
    gradients.index_add_(0, documents, found.documents)
    return found, gradients


def _of_weights(learner: ContrastiveLearner) -> list[nn.Parameter]:
    """The trainable parameters of which every process has only its own items' gradients."""
    numbers = {id(one.parameter) for one in (learner.embedder.scale, learner.embedder.bias)}
    return [value for value in trainable_parameters(learner.model).values() if id(value) not in numbers]
