"""Prompts with the very ids of training: an encoded sample up to where a trained reply begins."""

import itertools
from dataclasses import replace

import numpy as np

from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.images import FoundImage, Roots
from mmtrain.records.chat import Conversation, Image, Message, Part, SampleError, Text


def prompts_of(encoded: Encoded) -> list[Encoded]:
    """For each trained reply of a sample what the model gets before it, the images up to there included.

    Replies are runs of supervised tokens: between two of them the template always writes something.
    """
    flags = [False, *encoded.supervised.tolist()]
    starts = [at for at, (before, here) in enumerate(itertools.pairwise(flags)) if here and not before]
    return [_up_to(encoded, start) for start in starts]


def prompts_for_all(encoder: Encoder, conversation: Conversation, roots: Roots) -> list[Encoded]:
    """The same for each trained reply of a conversation. `roots`: where the images are.

    Raises SampleError where it cannot be encoded.
    """
    sequences = (encoder.encode(one, roots) for _, one in encoder.sequences(conversation))
    return [prompt for encoded in sequences for prompt in prompts_of(encoded)]


def prompt_for(encoder: Encoder, conversation: Conversation, roots: Roots) -> Encoded:
    """The prompt for a reply to `conversation`, which ends with a turn of the user or of a tool.

    It is encoded with a reply in the reply's place, as training encodes it: nothing before a reply depends on its text.
    `roots`: where the images are. Raises SampleError where it cannot be encoded.
    """
    if not is_asked(conversation):
        raise SampleError("the conversation does not end with a turn of the user: there is nothing to reply to")
    return prompts_of(encoder.encode(_replied(encoder, conversation), roots))[-1]


def is_asked(conversation: Conversation) -> bool:
    """Whether the conversation ends with a turn that is to be replied to, by the user or a tool."""
    return bool(conversation.messages) and conversation.messages[-1].role in ("user", "tool")


def trained_end(encoder: Encoder) -> int | None:
    """The token by which a trained reply ends; None where none is trained on.

    Found on a sample: templates end replies by tokens that the model's generation config may not name.
    """
    image = FoundImage("blank", b"", (64, 64))
    parts: tuple[Part, ...] = (Image(image.name), Text("x")) if encoder.processor.needs_image else (Text("x"),)
    conversation = _replied(encoder, Conversation((Message("user", parts),)))
    encoded = encoder.encode_with(conversation, [image] * len(conversation.images))
    last = int(encoded.ids[np.flatnonzero(encoded.supervised)[-1]])
    return last if encoder.processor.tokenizer.is_special(last) else None


def _replied(encoder: Encoder, asked: Conversation) -> Conversation:
    """The sequence in which a reply to a conversation is trained on: with reasoning where their prompt begins it."""
    reply = Message("assistant", (Text(encoder.processor.template.reply("x")),))
    _, last = encoder.sequences(replace(asked, messages=(*asked.messages, reply)))[-1]
    return last


def _up_to(encoded: Encoded, start: int) -> Encoded:
    images = tuple(span for span in encoded.images if span.start < start)
    return Encoded(encoded.ids[:start], encoded.supervised[:start], images)
