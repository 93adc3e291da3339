"""A few conversations encoded here and by the model's own processor: where the two differ, the model is refused.

The reference is transformers' `apply_chat_template(tokenize=True)`, which is what inference feeds the model. It is
allowed to differ from ours by an end of turn that the template lacks, and by a token that straddles the border between
a prompt and its reply: inference cuts there too. A reply that the template writes in another way than inference gets it
is compared with the prompt of inference and with the end of the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import PIL.Image
from torch import Tensor

from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.image_runner import TEXT_KEYS, TYPE_KEYS
from mmtrain.encoding.images import FoundImage
from mmtrain.encoding.messages import as_messages
from mmtrain.encoding.processor import ChatProcessor, EncodingTrial
from mmtrain.errors import UserError
from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text
from mmtrain.records.reasoning import CLOSE
from mmtrain.safe_text import one_line, shown

_SIZES = ((64, 64), (150, 80))
_STRADDLE = 4
"""Tokens on each side within which a token that straddles a border can move the others."""


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    conversation: Conversation


def try_family(processor: ChatProcessor) -> EncodingTrial:
    """Raises UserError naming the first position that differs, or what the model's own processor refuses."""
    # without an end token a run can still train on replies alone (labels.end_of_turn: false)
    encoder = Encoder(processor, end_of_turn=processor.tokenizer.traits.eos_id is not None)
    trial = EncodingTrial([], [], {})
    for probe in _probes(processor):
        images = _found_images(probe.conversation)
        try:
            sequences = [one for _, one in encoder.sequences(probe.conversation)]
            encoded = [encoder.encode_with(one, images[: len(one.images)]) for one in sequences]
        except SampleError as error:  # a template may refuse a system turn or several replies: so are samples like that
            trial.refused[probe.name] = str(error)
            continue
        is_whole = [
            _compare(processor, _Probe(probe.name, conversation), made, images[: len(conversation.images)])
            for conversation, made in zip(sequences, encoded, strict=True)
        ]
        (trial.equal if is_whole == [True] else trial.alone).append(probe.name)
    if not trial.equal and not trial.alone:
        raise UserError(f"every probe conversation is refused, the first because {next(iter(trial.refused.values()))}")
    return trial


def _probes(processor: ChatProcessor) -> Iterator[_Probe]:
    question, reply = Text("What is it?"), Message("assistant", (Text(processor.template.reply("A cat.")),))
    plain = Message("user", (question,))
    first, second = (Message("user", (Image(f"probe {n}"), question)) for n in range(2))
    both = Message("user", (*first.parts, *second.parts))
    among = Message("user", (Text("This"), Image("probe 0"), Text("and what is it?\n")))
    last = Message("user", (Image("probe 1"), Text("\nAnd this?")))
    yield _Probe("no image", Conversation((plain, reply)))
    yield _Probe("no image and two replies", Conversation((plain, reply) * 2))
    if processor.images is not None:
        yield _Probe("one image", Conversation((first, reply)))
        yield _Probe("one image and two replies", Conversation((first, reply, plain, reply)))
        yield _Probe("two images", Conversation((both, reply)))
        yield _Probe("two images and two replies", Conversation((first, reply, second, reply)))
        yield _Probe("images within the text", Conversation((among, reply, last, reply)))
    yield _Probe("a system turn", Conversation((Message("system", (Text("Be brief."),)), plain, reply)))


def _found_images(conversation: Conversation) -> list[FoundImage]:
    sizes = [_SIZES[i % len(_SIZES)] for i in range(len(conversation.images))]
    return [FoundImage(image.name, b"", size) for image, size in zip(conversation.images, sizes, strict=True)]


def _gradient(size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.linear_gradient("L").resize(size).convert("RGB")


def _compare(processor: ChatProcessor, probe: _Probe, encoded: Encoded, images: Sequence[FoundImage]) -> bool:
    """Whether the ids are those of the whole conversation, not only of the prompt and then the reply.

    Raises UserError where ids or tensors are not the model's own.
    """
    name = f"a probe conversation with {probe.name}"
    pixels = [_gradient(image.size) for image in images]
    try:
        own = _own(processor, probe.conversation, pixels)
    except Exception as error:  # a family's processor can raise anything
        raise UserError(
            f"the model's own processor refuses {name}: {one_line(error)}; this family is not supported"
        ) from None
    ids, expected = encoded.ids.tolist(), own["input_ids"]
    at = _first_difference(processor, encoded, expected)
    if at is not None and not _follows_the_prompt(processor, probe.conversation, encoded, expected, pixels):
        here, there = (shown(processor.tokenizer.decode(found[max(0, at - 3) : at + 4])) for found in (ids, expected))
        raise UserError(
            f"the ids of {name} differ from the model's own apply_chat_template at position {at}: {here} here, {there} "
            "there; this family is not supported"
        )
    if images:
        _compare_tensors(processor, name, own, images)
        _compare_types(processor, name, own)
    return at is None


def _follows_the_prompt(
    processor: ChatProcessor,
    conversation: Conversation,
    encoded: Encoded,
    whole: list[int],
    images: list[PIL.Image.Image],
) -> bool:
    """Whether ours are the prompt of inference for the last turn, and then the end of `whole`, the family's own ids."""
    asked = Conversation(conversation.messages[:-1])
    prompt = _own(processor, asked, images[: len(asked.images)], add_generation_prompt=True)["input_ids"]
    ids = encoded.ids.tolist()
    if ids[: len(prompt)] != prompt:
        return False
    num_same = next((n for n, (one, two) in enumerate(zip(ids[::-1], whole[::-1], strict=False)) if one != two), 0)
    own = processor.tokenizer.decode(ids[len(prompt) : len(ids) - num_same]).strip()
    if num_same and own.endswith(CLOSE):  # the template drops reasoning even from the last reply
        return True
    num_left = len(whole) - (len(ids) - len(prompt))
    starts = range(max(0, num_left - _STRADDLE), num_left + _STRADDLE)
    return any(_first_difference(processor, encoded, prompt + whole[start:]) is None for start in starts)


def _own(
    processor: ChatProcessor, conversation: Conversation, images: list[PIL.Image.Image], **options: bool
) -> dict[str, Any]:
    """What the model's own processor, or a text model's tokenizer, makes of the conversation."""
    messages = processor.template.as_wanted(as_messages(conversation.messages))
    template = processor.template.source
    if processor.images is None:
        ids = processor.tokenizer.wrapped.apply_chat_template(
            messages, chat_template=template, return_dict=False, **options
        )
        return {"input_ids": list(ids)}
    left = iter(images)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = next(left)
    made = processor.images.processor.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    return {**made, "input_ids": made["input_ids"][0].tolist()}


def _first_difference(processor: ChatProcessor, encoded: Encoded, expected: list[int]) -> int | None:
    """The first position at which ours differ from `expected` by more than is allowed; None where there is none."""
    ids, flags = encoded.ids.tolist(), [False, *encoded.supervised.tolist(), False]
    borders = [i for i, (one, two) in enumerate(pairwise(flags)) if one != two]
    at = there = 0
    while at < len(ids) or there < len(expected):
        if ids[at : at + 1] == expected[there : there + 1]:
            at, there = at + 1, there + 1
        elif at + 1 in borders and at < len(ids) and ids[at] == processor.tokenizer.traits.eos_id:
            at += 1  # the end of a reply, which the template lacks
        else:
            step = _straddled(processor, ids[at:], expected[there:]) if _is_near(at, borders) else None
            if step is None:
                return at
            at, there = at + step[0], there + step[1]
    return None


def _is_near(at: int, borders: list[int]) -> bool:
    return any(abs(at - border) <= _STRADDLE for border in borders)


def _straddled(processor: ChatProcessor, ours: list[int], theirs: list[int]) -> tuple[int, int] | None:
    """The fewest tokens of each that spell the same text; None where a few do not."""
    decode = processor.tokenizer.decode
    for total in range(2, 2 * _STRADDLE + 1):
        for own in range(1, total):
            one, two = ours[:own], theirs[: total - own]
            if len(one) == own and len(two) == total - own and decode(one) == decode(two):
                return own, total - own
    return None


def _compare_tensors(processor: ChatProcessor, name: str, own: dict[str, Any], images: Sequence[FoundImage]) -> None:
    """What goes into the model besides ids must not depend on the text around the images."""
    own_ids = None if processor.lays_out_together else own["input_ids"]
    ours, _ = processor.image_inputs([[_gradient(image.size) for image in images]], own_ids)
    theirs = {key: value for key, value in own.items() if key not in TEXT_KEYS}
    wrong = sorted(ours.keys() ^ theirs.keys()) + [
        key for key in ours.keys() & theirs.keys() if not _equal(ours[key], theirs[key])
    ]
    if wrong:
        raise UserError(
            f"the model's processor makes another {wrong[0]!r} for {name} than for its images alone; "
            "this family is not supported"
        )


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool((one == two).all())
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two)


def _compare_types(processor: ChatProcessor, name: str, own: dict[str, Any]) -> None:
    """Where the family marks tokens by their kind, images must be exactly the placeholders."""
    for key in TYPE_KEYS:
        if key in own:
            found = [bool(value) for value in own[key][0].tolist()]
            expected = [id_ == processor.image_token_id and not processor.marks_replies for id_ in own["input_ids"]]
            if found != expected:
                raise UserError(
                    f"the model's processor marks other tokens than placeholders in {key!r} of {name}; "
                    "this family is not supported"
                )
