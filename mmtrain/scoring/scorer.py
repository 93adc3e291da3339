"""Scores of a model on a set of samples, by the encoding, the batches and the cross-entropy of training."""

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mmtrain.dataset.batch import Batch, Loader, Samples
from mmtrain.dataset.microbatches import cut_step
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.encode import Encoder
from mmtrain.model.head import HeadKind
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.loss import supervised_nll
from mmtrain.model.root import Root
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.shard import Filled
from mmtrain.scoring.scores import Scores


class Scorer:
    """Scores answers of the samples `numbers` (sorted), whose lengths in tokens are known.

    `shown` gives the samples as the model gets them, `samples` what they are: they differ where images are changed.
    """

    def __init__(
        self,
        samples: StoredSamples,
        encoder: Encoder,
        numbers: Indices,
        lengths: list[int],
        shown: Samples | None = None,
    ) -> None:
        self._numbers = numbers
        self._lengths = lengths
        self._shown: Samples = shown if shown is not None else samples
        self._processor = encoder.processor
        rows: list[tuple[int, int, int, bool, int]] = []
        self._first: dict[int, int] = {}
        for number in numbers.tolist():
            conversation = samples.records.conversation(number)
            self._first[number] = len(rows)
            for answer, turn in enumerate(encoder.trained_turns(conversation.messages), start=1):
                size = len(conversation.messages[turn].text.encode())
                rows.append((number, samples.records.source(number), answer, bool(conversation.images), size))
        self._rows = np.array(rows, np.int64).reshape(-1, 5)

    @torch.no_grad()
    def score(
        self,
        root: Root,
        head_kind: HeadKind,
        make_inputs: InputMaker,
        runtime: Runtime,
        microbatch_tokens: int,
        packing: bool,
        filled: Filled | None = None,
        console: Console | None = None,
    ) -> Scores | None:
        """Every answer's scores, each computed by one process and known to all; None where a signal asked to stop.

        `filled`: the samples where weights are spread over the processes. `console` shows the progress.
        """
        limit = microbatch_tokens if self._processor.lays_out_together else 1
        cuts = cut_step(self._lengths, limit, packing, runtime.num_processes)
        share = len(cuts) // runtime.num_processes
        own = [self._numbers[cut].tolist() for cut in cuts[runtime.index * share : (runtime.index + 1) * share]]
        own = [cut for cut in own if cut] if filled is None else [filled.fill(cut) for cut in own]
        sums = np.zeros((len(self._rows), 3))
        samples = self._shown if filled is None else filled
        batches = Loader(samples, self._processor, packing, make_inputs.store, ROW_MULTIPLE).batches(own)
        quiet = console is None or not console.is_terminal
        for batch in track(batches, "scoring", len(own), console=console, transient=True, disable=quiet):
            with runtime.autocast():
                nll, right = root(supervised_nll, head_kind, make_inputs(batch), batch)
            rows = self._answers(batch)
            for column, values in enumerate((nll.double(), torch.ones_like(nll), right)):
                np.add.at(sums[:, column], rows, values.cpu().numpy())
            runtime.activity.tick()
            if runtime.should_break(together=filled is not None):
                break
        total, asked = runtime.agree(torch.from_numpy(sums).flatten())
        if asked is not None:
            return None
        sums = total.numpy().reshape(sums.shape)
        sample, source, answer, has_image, num_bytes = self._rows.T
        counts = sums.round().astype(np.int64)
        return Scores(sample, source, answer, has_image > 0, sums[:, 0], counts[:, 1], counts[:, 2], num_bytes)

    def _answers(self, batch: Batch) -> Indices:
        """(num_supervised,) the row of the answer that each learned token of the batch belongs to.

        An answer is a run of learned tokens: between two of them the template always writes something.
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
