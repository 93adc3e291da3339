"""Prompts with the very ids of training: an encoded sample up to where a trained reply begins."""

import itertools
from pathlib import Path

import numpy as np

from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.images import FoundImage
from mmtrain.records.chat import Conversation, Image, Message, Part, SampleError, Text


def prompts_of(encoded: Encoded) -> list[Encoded]:
    """For each trained reply of a sample what the model gets before it, the images up to there included.

    Replies are runs of supervised tokens: between two of them the template always writes something.
    """
    flags = [False, *encoded.supervised.tolist()]
    starts = [at for at, (before, here) in enumerate(itertools.pairwise(flags)) if here and not before]
    return [_up_to(encoded, start) for start in starts]


def prompts_for_all(encoder: Encoder, conversation: Conversation, root: Path) -> list[Encoded]:
    """The same for each trained reply of a conversation, whose images are in the folder `root`.

    Raises SampleError where it cannot be encoded.
    """
    sequences = (encoder.encode(one, root) for _, one in encoder.sequences(conversation))
    return [prompt for encoded in sequences for prompt in prompts_of(encoded)]


def prompt_for(encoder: Encoder, conversation: Conversation, root: Path) -> Encoded:
    """The prompt for a reply to `conversation`, which ends with a user's turn.

    It is encoded with a reply in the reply's place, as training encodes it: nothing before a reply depends on its text.
    `root` is the folder of the images. Raises SampleError where it cannot be encoded.
    """
    if not conversation.messages or conversation.messages[-1].role != "user":
        raise SampleError("the conversation does not end with a turn of the user: there is nothing to reply to")
    return prompts_of(encoder.encode(_replied(encoder, conversation.messages), root))[-1]


def trained_end(encoder: Encoder) -> int | None:
    """The token by which a trained reply ends; None where training teaches none.

    Found on a sample: templates end replies by tokens that the model's generation config may not name.
    """
    image = FoundImage("blank", b"", (64, 64))
    parts: tuple[Part, ...] = (Image(image.name), Text("x")) if encoder.processor.needs_image else (Text("x"),)
    conversation = _replied(encoder, (Message("user", parts),))
    encoded = encoder.encode_with(conversation, [image] * len(conversation.images))
    last = int(encoded.ids[np.flatnonzero(encoded.supervised)[-1]])
    return last if encoder.processor.tokenizer.is_special(last) else None


def _replied(encoder: Encoder, messages: tuple[Message, ...]) -> Conversation:
    """The sequence in which a reply to the messages is trained on: with reasoning where their prompt begins it."""
    reply = Message("assistant", (Text(encoder.processor.template.reply("x")),))
    _, last = encoder.sequences(Conversation((*messages, reply)))[-1]
    return last


def _up_to(encoded: Encoded, start: int) -> Encoded:
    images = tuple(span for span in encoded.images if span.start < start)
    return Encoded(encoded.ids[:start], encoded.supervised[:start], images)
