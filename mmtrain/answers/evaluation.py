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

    def all_replies(
        self, generator: Generator, runtime: Runtime, name: str, batch_size: int, max_new_tokens: int | None
    ) -> Replies:
        """The greedy reply to every question; `name` is shown while they are generated."""
        return self._ask(generator, runtime, self.samples, range(len(self.questions)), name, batch_size, max_new_tokens)

    def replies_with_changed_images(
        self,
        generator: Generator,
        runtime: Runtime,
        change: Change,
        name: str,
        batch_size: int,
        max_new_tokens: int | None,
    ) -> Replies:
        """The same for the questions of samples with images, which are swapped, grey or left out; none where no sample
        can be changed so."""
        changed, indices, _ = self._eval_samples.changed(change)
        there = set(indices.tolist())
        numbers = [i for i, question in enumerate(self.questions) if question.sample in there]
        return self._ask(generator, runtime, changed, numbers, name, batch_size, max_new_tokens)

    def _ask(
        self,
        generator: Generator,
        runtime: Runtime,
        samples: Samples,
        numbers: Sequence[int],
        name: str,
        batch_size: int,
        max_new_tokens: int | None,
    ) -> Replies:
        """Each process asks some batches, which are the same on any number of processes."""
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
