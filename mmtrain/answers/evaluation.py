"""The questions of a config's evaluation sources, and a model's replies to them, with their images and with others."""

from collections.abc import Sequence

from mmtrain.answers.asked import check_forms, choose_metrics
from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.dataset.batch import Samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.generate.prompts import prompts_of
from mmtrain.generate.questions import Question, questions_of
from mmtrain.generate.replies import Generator, Reply, batched
from mmtrain.generate.sampling import Sampling
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError
from mmtrain.scoring.changed_images import Change
from mmtrain.scoring.eval_samples import EvalSamples

Replies = dict[int, Reply]
"""By the position of the question."""
_LEAST_NEW_TOKENS, _MOST_NEW_TOKENS = 16, 1024


class AnswerEvaluation:
    """The questions of `sources`, each trained reply being the reference of one."""

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
        self.samples, self.dropped = own.samples, own.dropped
        records = own.samples.records
        self._questions: list[Question] = []
        for index in own.indices.tolist():
            conversation = records.conversation(index)
            self._questions += questions_of(conversation, index, own.encoder.trained_turns(conversation.messages))
        of_source = [own.names[records.source(question.sample)] for question in self._questions]
        metrics = {source.title: metric or source.metric for source in sources}
        self.questions, self.reasons = choose_metrics(self._questions, of_source, metrics)
        self.places = [str(self.samples.place(question.sample)) for question in self._questions]
        check_forms(self.questions, self.places)
        longest = max(int(own.checked.num_supervised[question.sample]) for question in self._questions)
        self.max_new_tokens = min(max(2 * longest, _LEAST_NEW_TOKENS), _MOST_NEW_TOKENS)
        """Twice what the longest reference needs: a longer answer is wrong however it goes on."""

    def replies(self, generator: Generator, name: str, batch_size: int, max_new_tokens: int) -> Replies:
        """The greedy reply to every question; `name` is shown while they are generated."""
        every = range(len(self._questions))
        return self._ask(generator, self.samples, every, name, batch_size, max_new_tokens)

    def replies_with_changed_images(
        self, generator: Generator, change: Change, name: str, batch_size: int, max_new_tokens: int
    ) -> Replies:
        """The same for the questions of samples with images, which are swapped, grey or left out; none where no sample
        can be changed so."""
        changed, indices, _ = self._eval_samples.changed(change)
        there = set(indices.tolist())
        numbers = [i for i, question in enumerate(self._questions) if question.sample in there]
        return self._ask(generator, changed, numbers, name, batch_size, max_new_tokens)

    def _ask(
        self,
        generator: Generator,
        samples: Samples,
        numbers: Sequence[int],
        name: str,
        batch_size: int,
        max_new_tokens: int,
    ) -> Replies:
        found: Replies = {}
        with self._progress.task(name, len(numbers)) as task:
            for positions in batched(len(numbers), batch_size):
                batch = [numbers[position] for position in positions]
                asked = [self._questions[i] for i in batch]
                prompts = [prompts_of(samples.encoded(question.sample))[question.prompt] for question in asked]
                try:
                    replies = generator.replies(prompts, Sampling(max_new_tokens))
                except SampleError as error:
                    raise UserError(f"{self.places[batch[0]]} and the samples after it: {error}") from None
                found |= dict(zip(batch, replies, strict=True))
                task.advance(len(batch))
        return found
