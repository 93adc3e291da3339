"""Scores of a model on a set of samples, by the encoding, the batches and the cross-entropy of training."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch, Samples
from mmtrain.dataset.microbatches import cut_step
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.encode import Encoder
from mmtrain.progress import Progress
from mmtrain.runtime.device import microbatch_faults, wide
from mmtrain.runtime.shard import WithFiller
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.scoring.scores import Floats, Ints, Scores


class Scorer:
    """Scores the answers of the samples `indices` (sorted), whose lengths in tokens are known.

    `changed`: the same samples with other images, where a model is to be given those.
    """

    def __init__(
        self,
        samples: StoredSamples,
        encoder: Encoder,
        indices: Indices,
        lengths: list[int],
        changed: Samples | None = None,
    ) -> None:
        self._indices = indices
        self._lengths = lengths
        self._inputs: Samples = changed if changed is not None else samples
        rows: list[tuple[int, int, int, bool, int]] = []
        weights: list[float] = []
        self._first: dict[int, int] = {}
        for index in indices.tolist():
            conversation = samples.records.conversation(index)
            self._first[index] = len(rows)
            for answer, turn in enumerate(encoder.trained_turns(conversation.messages), start=1):
                size = len(conversation.messages[turn].text.encode())
                weights.append(conversation.messages[turn].weight)
                rows.append((index, samples.records.source(index), answer, bool(conversation.images), size))
        self._rows = np.array(rows, np.int64).reshape(-1, 5)
        self._weights = np.array(weights, np.float64)

    def score(
        self, loaded: LoadedModel, microbatch_tokens: int, progress: Progress, filled: WithFiller | None = None
    ) -> Scores | None:
        """Every answer's scores, each computed by one process and known to all; None where a signal asked to stop.

        `filled`: the samples where weights are sharded over the processes.
        """

        def of_tokens(batch: Batch) -> Tensor:
            nll, right = loaded.nll(batch)
            return torch.stack([wide(nll), torch.ones_like(wide(nll)), wide(right)], dim=1)

        sums = self.sums(loaded, microbatch_tokens, progress, 3, of_tokens, filled)
        if sums is None:
            return None
        sample, source, answer, has_image, num_bytes = self._rows.T
        counts = sums.round().astype(np.int64)
        return Scores(
            sample, source, answer, has_image > 0, sums[:, 0], counts[:, 1], counts[:, 2], num_bytes, self._weights
        )

    @property
    def sample(self) -> Ints:
        """(num_answers,) the sample index of each answer."""
        return self._rows[:, 0]

    @torch.no_grad()
    def sums(
        self,
        loaded: LoadedModel,
        microbatch_tokens: int,
        progress: Progress,
        num_columns: int,
        of_tokens: Callable[[Batch], Tensor],
        filled: WithFiller | None = None,
    ) -> Floats | None:
        """(num_answers, num_columns) the sums over each answer's tokens of what `of_tokens` gives for a batch,
        (num_supervised, num_columns). Each is computed by one process and known to all; None where a signal asked to
        stop. `loaded` decides how batches are made."""
        runtime = loaded.runtime
        own = self._own_microbatches(loaded, microbatch_tokens)
        own = [indices for indices in own if indices] if filled is None else [filled.fill(indices) for indices in own]
        sums = np.zeros((len(self._rows), num_columns))
        with progress.task("scoring", len(own)) as task:
            for batch in loaded.batches(self._inputs if filled is None else filled, own):
                with microbatch_faults("evaluation", batch):
                    values = of_tokens(batch)
                np.add.at(sums, self._answers(batch), values.cpu().numpy())
                task.advance()
                if runtime.should_break(together=filled is not None):
                    break
        total, stop_signal = runtime.agree(torch.from_numpy(sums).flatten())
        return None if stop_signal is not None else total.numpy().reshape(sums.shape)

    def _own_microbatches(self, loaded: LoadedModel, microbatch_tokens: int) -> list[Sequence[int]]:
        """The sample indices of each micro-batch of this process, some perhaps empty; every process has as many."""
        index, num_processes = loaded.runtime.index, loaded.runtime.num_processes
        limit = 1 if loaded.alone else microbatch_tokens
        cuts = cut_step(self._lengths, limit, loaded.packing, num_processes)
        share = len(cuts) // num_processes
        return [self._indices[cut].tolist() for cut in cuts[index * share : (index + 1) * share]]

    def _answers(self, batch: Batch) -> Indices:
        """(num_supervised,) the row of the answer that each supervised token of the batch belongs to.

        An answer is a run of supervised tokens: between two of them the template always writes something.
        """
        rows = []
        for segment in batch.segments:
            span = slice(segment.start, segment.start + segment.length)
            supervised = batch.supervised[segment.row, span].numpy()
            if not supervised.any():  # a sample without weight
                continue
            begins = supervised & ~np.concatenate([[False], supervised[:-1]])
            rows.append(self._first[segment.sample] + begins.cumsum()[supervised] - 1)
        return np.concatenate(rows) if rows else np.zeros(0, np.int64)
