"""The questions of a config's evaluation sources, and a model's replies to them, with their images and with others."""

from collections.abc import Sequence

from mmtrain.answers.question_set import QuestionSet, Replies
from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.dataset.batch import Samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.generate.over_processes import known_to_all
from mmtrain.generate.replies import Generator, batched
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.changed_images import Change
from mmtrain.scoring.eval_samples import EvalSamples

_WAYS: tuple[tuple[str, str, Change | None], ...] = (
    ("model", "answers", None),
    ("swapped", "answers with swapped images", "swapped"),
    ("no_images", "answers without images", "none"),
)
"""Each kind of replies, its name while they are generated, and what happens to the images."""


class AnswerEvaluation(QuestionSet):
    """All questions of `sources`."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[EvalSource],
        processor: ChatProcessor,
        progress: Progress,
        metric: str | None = None,
    ) -> None:
        """`metric`: of all sources, whatever the config says. Raises UserError where a sample cannot be used, or a
        reference is not of the form that the metric of its source compares."""
        self._progress = progress
        own = EvalSamples.of(config, sources, processor, progress)
        self._eval_samples = own
        self.dropped = own.dropped
        metrics = {source.title: metric or source.metric for source in sources}
        super().__init__(own.samples, own.checked, own.encoder, own.indices.tolist(), own.names, metrics)

    def ask_in_all_ways(
        self, generator: Generator, runtime: Runtime, batch_size: int, max_new_tokens: int | None
    ) -> dict[str, Replies]:
        """By kind: the model's, and its with the images of others and without images, where there are such."""
        found = {
            kind: self.ask(generator, runtime, name, batch_size, max_new_tokens, change) for kind, name, change in _WAYS
        }
        return {kind: replies for kind, replies in found.items() if replies}

    def ask(
        self,
        generator: Generator,
        runtime: Runtime,
        name: str,
        batch_size: int,
        max_new_tokens: int | None,
        change: Change | None = None,
    ) -> Replies:
        """The greedy reply to every question; `name` is shown while they are generated. With `change` to the questions
        of samples with images, which are swapped, grey or left out; none where no sample can be changed so.

        Each process asks some batches, which are the same on any number of processes.
        """
        samples: Samples = self.samples
        numbers: Sequence[int] = range(len(self.questions))
        if change is not None:
            samples, indices, _ = self._eval_samples.changed(change)
            there = set(indices.tolist())
            numbers = [i for i, question in enumerate(self.questions) if question.sample in there]
        own: Replies = {}
        batches = list(batched(len(numbers), batch_size))[runtime.index :: runtime.num_processes]
        with self._progress.task(name, len(batches)) as task:
            for positions in batches:
                batch = [numbers[position] for position in positions]
                own |= dict(zip(positions, self.replies(generator, batch, max_new_tokens, samples), strict=True))
                task.advance()
        longest = max_new_tokens or self.max_new_tokens
        found, _ = known_to_all(own, len(numbers), longest, generator, runtime)
        return {numbers[position]: reply for position, reply in found.items()}
