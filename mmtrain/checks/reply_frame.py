"""What a chat template writes around the text of a reply, found by rendering stand-ins for the text."""

from dataclasses import dataclass

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Image, Message, Messages

Form = tuple[tuple[str, tuple[str, ...]], ...]
"""The role of each turn, and the kinds of its content parts."""


@dataclass(frozen=True, slots=True)
class ReplyFrame:
    """What the template writes around the text of a reply: before, between and after its content parts.

    `end`: the special tokens right after the text, up to the one that stops generation, or only the first if none does;
    empty if the template has no end token. `other_end`: the template writes another token there if turns follow.
    """

    around: tuple[str, ...]
    end: tuple[int, ...]
    other_end: bool


def form_of(messages: tuple[Message, ...]) -> Form:
    return tuple(
        (message.role, tuple("image" if isinstance(part, Image) else "text" for part in message.parts))
        for message in messages
    )


def reply_frame(processor: ChatProcessor, form: Form, turn: int) -> ReplyFrame:
    """What the template writes around the reply of `turn`, in a conversation of this form."""
    messages: Messages = []
    for number, (role, kinds) in enumerate(form):
        texts = (f"Yv{number}v{i}vY" for i in range(len(kinds)))
        content = [{"type": kind, "text": text} for kind, text in zip(kinds, texts, strict=True)]
        messages.append({"role": role, "content": content})
    prompt = processor.template.render(messages[:turn], add_generation_prompt=True)
    whole, alone = processor.template.render(messages), processor.template.render(messages[: turn + 1])
    is_continued = whole.startswith(prompt)
    rest = whole[len(prompt) :] if is_continued else whole
    around = []
    for part in messages[turn]["content"]:
        before, _, rest = rest.partition(part["text"])
        _, _, alone = alone.partition(part["text"])
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


def _special_run(processor: ChatProcessor, text: str) -> list[str]:
    """The special tokens at the start of `text`, up to the one that stops generation; only the first if none does."""
    run = list[str]()
    while match := processor.tokenizer.traits.special_tokens.match(text, sum(map(len, run))):
        run.append(match.group())
        if processor.tokenizer.id_of(run[-1]) in processor.tokenizer.traits.eos_ids:
            return run
    return run[:1]
