"""The prompts of a file of records, in order: one for each trained reply, and one for a last turn of the user."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.config.data_section import Source
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.errors import UserError
from mmtrain.generate.prompts import is_asked, prompt_for, prompts_for_all
from mmtrain.records.chat import Conversation, SampleError, refused_at
from mmtrain.records.record_set import RecordSet


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and where it stands."""

    sample: int
    """The index of its sample."""
    turn: int
    """The position of the reply among the turns of the conversation."""
    prompt: int
    """The position of its prompt among those of its sample."""
    text: str
    """The last turn of the user before the reply."""
    reference: str | None
    """The reply in the data; None where the conversation ends with the question."""


def questions_of(conversation: Conversation, sample: int, turns: Sequence[int]) -> list[Question]:
    """The questions that the turns `turns` of the conversation reply to."""
    messages = conversation.messages
    found = []
    for prompt, turn in enumerate(turns):
        asked = next((message.text for message in reversed(messages[:turn]) if message.role == "user"), "")
        reference = messages[turn].text if turn < len(messages) else None
        found.append(Question(sample, turn, prompt, asked, reference))
    return found


class Questions:
    """The questions of data files. Their prompts are encoded when they are asked for, not kept."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, drops_reasoning: bool = False) -> None:
        """`drops_reasoning`: replies are read without it. Raises UserError with every record that cannot be asked."""
        self._records, self._encoder = RecordSet(sources, drops_reasoning=drops_reasoning), encoder
        self.questions: list[Question] = []
        faults = []
        for sample in range(len(self._records)):
            try:
                conversation = self._records.conversation(sample)
                turns = self._turns(conversation)
                self._prompts(sample)
            except SampleError as error:
                faults.append(f"{self._records.place(sample)}: {error}")
                continue
            self.questions += questions_of(conversation, sample, turns)
        if faults:
            raise UserError(faults)
        if not self.questions:
            raise UserError("--data: there are no questions in it")

    def __len__(self) -> int:
        return len(self.questions)

    def place(self, number: int) -> str:
        """The file and line of question `number`."""
        return str(self._records.place(self.questions[number].sample))

    def prompt(self, number: int) -> Encoded:
        """Raises UserError naming the place where the record or an image has changed meanwhile."""
        question = self.questions[number]
        with refused_at(self.place(number)):
            return self._prompts(question.sample)[question.prompt]

    def _turns(self, conversation: Conversation) -> list[int]:
        messages = conversation.messages
        if is_asked(conversation):
            return [len(messages)]
        return self._encoder.trained_turns(messages)

    def _prompts(self, sample: int) -> list[Encoded]:
        conversation, roots = self._records.conversation(sample), self._records.roots(sample)
        if is_asked(conversation):
            return [prompt_for(self._encoder, conversation, roots)]
        return prompts_for_all(self._encoder, conversation, roots)
