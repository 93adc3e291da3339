"""A pair as plain data: a query, the items that match it and items that do not. Contrastive training reads records so.

An item is a text, one or more images, or both: the images first, or where the text has a mark for each.
`records.pair_shapes` lists the shapes of records.
"""

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from mmtrain.records.chat import Conversation, Image, Message, Part, SampleError, Text
from mmtrain.records.formats import read_record
from mmtrain.records.pair_shapes import recognise_pair
from mmtrain.records.record_keys import Record, check_keys, check_no_image_is_lost, without_keys
from mmtrain.safe_text import shown


@dataclass(frozen=True, slots=True)
class Item:
    """What gets one embedding."""

    text: str | None
    images: tuple[Image, ...] = ()
    instruction: str | None = None
    """What the embedding is for: the system text of a vision-language model."""
    parts: tuple[Part, ...] = ()
    """Texts and images in order, where an image comes after a text; `text` is then all of them, one after the other."""

    def content_key(self, image_hashes: Sequence[str]) -> str:
        """The SHA-256 of the text, the instruction and `image_hashes`, the SHA-256 of each image's bytes, in order.

        Items with the same key are one item. `dataset.pair_items.item_keys` hashes the images.
        """
        if len(image_hashes) != len(self.images):
            raise ValueError(f"{len(image_hashes)} hashes for {len(self.images)} images")
        content = (self.text, self.instruction, list(image_hashes))
        order = [part.text if isinstance(part, Text) else None for part in self.parts]
        return hashlib.sha256(repr((*content, order) if order else content).encode()).hexdigest()

    def conversation(self) -> Conversation:
        """The item as what a chat template takes: the instruction as the system text, then one turn of the user."""
        parts = self.parts or (*self.images, *((Text(self.text),) if self.text else ()))
        system = (Message("system", (Text(self.instruction),)),) if self.instruction else ()
        return Conversation((*system, Message("user", parts)))


@dataclass(frozen=True, slots=True)
class Pair:
    """One sample of contrastive training."""

    query: Item
    positives: tuple[Item, ...]
    """At least one."""
    negatives: tuple[Item, ...] = ()
    group: str | None = None
    """Samples of one group are never negatives of each other."""

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.query, *self.positives, *self.negatives)


def read_pair(
    record: Any, group: str | None = None, ignored: Set[str] = frozenset(), image_mark: str | None = None
) -> Pair:
    """The pair in one parsed record.

    `group`: the key whose value is the pair's group. `ignored`: keys of records and items to ignore. `image_mark`: the
    text that stands for an image, None: recognised. Raises SampleError with the reason if the record is not a pair, or
    has a key that is neither understood nor metadata.
    """
    if not isinstance(record, dict):
        raise SampleError(f"expected an object, not {shown(record)}")
    name = _group(record, group)
    record = without_keys(record, ignored) if ignored else record
    shape = recognise_pair(record)
    understood = {*shape.keys, *({group} if group else ())}
    check_keys(record, understood, (), frozenset())
    items, mark = shape.items(record), image_mark or shape.image_mark
    if not items.positives:
        raise SampleError("there is no positive: a query needs at least one item that matches it")
    pair = Pair(
        _item(items.query, "the query", mark),
        tuple(_item(one, f"positive {number}", mark) for number, one in enumerate(items.positives, start=1)),
        tuple(_item(one, f"negative {number}", mark) for number, one in enumerate(items.negatives, start=1)),
        name,
    )
    if not any(item.images for item in pair.items):
        check_no_image_is_lost(record, understood)
    return pair


def _group(record: Record, key: str | None) -> str | None:
    if key is None:
        return None
    if key not in record:
        raise SampleError(f"the record has no key {shown(key)}, which `group` of the source names")
    value = record[key]
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise SampleError(f"{shown(key)}, which `group` of the source names, must be text or a whole number")


def _item(record: Record, what: str, image_mark: str | None) -> Item:
    """The item of a record with `messages` and `images`, as a shape gives it. `what` names it in errors."""
    try:
        conversation = read_record(record, "messages", image_mark=image_mark)
    except SampleError as error:
        raise SampleError(f"{what}: {error}") from None
    turns = [message for message in conversation.messages if message.role != "system"]
    if len(turns) != 1:
        raise SampleError(f"{what} has {len(turns)} turns: expected one turn, and a system text if there is one")
    parts, text, images = turns[0].parts, turns[0].text, conversation.images
    is_text = [isinstance(part, Text) for part in parts]
    if not text.strip() and not images:
        raise SampleError(f"{what} has neither text nor an image")
    system = "\n".join(message.text for message in conversation.messages if message.role == "system")
    return Item(text if text.strip() else None, images, system or None, () if is_text == sorted(is_text) else parts)
