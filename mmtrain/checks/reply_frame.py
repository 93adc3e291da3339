"""What a chat template writes around the text of a reply, found by rendering stand-ins for the text."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from mmtrain.encoding.messages import as_messages, as_tools
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, Image, Message, Part, Text


@dataclass(frozen=True, slots=True)
class ReplyFrame:
    """What the template writes around the text of a reply: before, between and after its texts, where it
    has no calls.

    `end`: the special tokens right after the text, up to the one that stops generation, or only the first if none does;
    empty if the template has no end token. `other_end`: the template writes another token there if turns follow.
    """

    around: tuple[str, ...]
    end: tuple[int, ...]
    other_end: bool


FormKey = tuple[Hashable, ...]


def form_key(conversation: Conversation) -> FormKey:
    """What `form_of` depends on, made faster."""
    turns = [
        (one.role, tuple(map(type, one.parts)), bool(one.reasoning), one.calls, one.name, one.call_id)
        for one in conversation.messages
    ]
    return conversation.tools, *turns


def form_of(conversation: Conversation) -> Conversation:
    """The conversation with stand-ins for its texts: all that a frame depends on."""
    messages = tuple(_stand_in(number, message) for number, message in enumerate(conversation.messages))
    return Conversation(messages, tools=conversation.tools)


def _stand_in(number: int, message: Message) -> Message:
    parts: tuple[Part, ...] = tuple(
        Image("") if isinstance(part, Image) else Text(f"Yv{number}v{i}vY") for i, part in enumerate(message.parts)
    )
    return replace(message, parts=parts, train=True, reasoning=f"Yv{number}vRvY" if message.reasoning else "")


def texts_of(message: Message) -> list[str]:
    """The reasoning of a turn, if it has some, and the texts of its content."""
    texts = [part.text for part in message.parts if isinstance(part, Text)]
    return [message.reasoning, *texts] if message.reasoning else texts


def reply_frame(processor: ChatProcessor, form: Conversation, turn: int) -> ReplyFrame:
    """What the template writes around the reply of `turn`, in a conversation of this form."""
    messages, tools = as_messages(form.messages), as_tools(form)
    prompt = processor.template.render(messages[:turn], add_generation_prompt=True, tools=tools)
    whole = processor.template.render(messages, tools=tools)
    alone = processor.template.render(messages[: turn + 1], tools=tools)
    if form.messages[turn].calls:
        last = without_end(processor, alone[len(prompt) :])[1]
        return ReplyFrame((), (processor.tokenizer.id_of(last),) if last else (), False)
    is_continued = whole.startswith(prompt)
    rest = whole[len(prompt) :] if is_continued else whole
    around = []
    for text in texts_of(form.messages[turn]):
        before, _, rest = rest.partition(text)
        _, _, alone = alone.partition(text)
        around.append(before)
    if not is_continued:  # the reply follows the prompt without what the template writes before it in the whole
        around[0] = ""
    to_id = processor.tokenizer.id_of
    end, other_end = _special_run(processor, alone.lstrip()), False
    if not end or not rest.lstrip().startswith("".join(end)):
        own = _special_run(processor, rest)
        stops = bool(own) and to_id(own[-1]) in processor.tokenizer.traits.eos_ids
        end, other_end = own if stops else [], bool(end and own) and not stops
    return ReplyFrame((*around, rest), tuple(map(to_id, end)), other_end)


def without_end(processor: ChatProcessor, reply: str) -> tuple[str, str]:
    """A reply and the special token that it ends with, empty if there is none."""
    reply = reply.rstrip()
    ends = [match for match in processor.tokenizer.traits.special_tokens.finditer(reply) if match.end() == len(reply)]
    return (reply[: ends[0].start()], ends[0].group()) if ends else (reply, "")


def _special_run(processor: ChatProcessor, text: str) -> list[str]:
    """The special tokens at the start of `text`, up to the one that stops generation; only the first if none does."""
    run = list[str]()
    while match := processor.tokenizer.traits.special_tokens.match(text, sum(map(len, run))):
        run.append(match.group())
        if processor.tokenizer.id_of(run[-1]) in processor.tokenizer.traits.eos_ids:
            return run
    return run[:1]
