"""Batches of questions for a model whose weights are sharded over processes."""

from mmtrain.answers.question_set import QuestionSet
from mmtrain.generate.replies import Generator


class FilledBatches:
    """Every process must run the same modules as often: a batch without a question, or without an image where other
    questions have one, gets one more question, whose reply is not used."""

    def __init__(self, questions: QuestionSet, generator: Generator) -> None:
        num_tokens, self._has_images, room = [], [], generator.max_positions
        for number in range(len(questions.questions)):
            (prompt,) = questions.prompts([number])
            num_tokens.append(prompt.num_tokens)
            self._has_images.append(bool(prompt.images))
            room = min(room, generator.room_after([prompt]))
        self._images_needed = any(self._has_images)
        candidates = [i for i, has_images in enumerate(self._has_images) if has_images or not self._images_needed]
        self._filler = min(candidates, key=lambda number: num_tokens[number])
        self.max_new_tokens = min(questions.max_new_tokens, room)
        """The same for all batches."""

    def fill(self, batch: list[int]) -> list[int]:
        """`batch`, and a question after it where one is needed."""
        enough = any(self._has_images[number] for number in batch) if self._images_needed else bool(batch)
        return batch if enough else [*batch, self._filler]
