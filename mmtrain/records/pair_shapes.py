"""The shapes of records of pairs: how each is recognised, and the query, positives and negatives in it.

A shape is a row of `PAIR_SHAPES` and one function. Each item comes out as a record with `messages`, `images` and
`system`, which is read as the records of conversations are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmtrain.records.chat import SampleError
from mmtrain.records.record_keys import IMAGE_KEYS, Record, refuse_keys, unknown_keys
from mmtrain.records.shapes import as_list
from mmtrain.safe_text import shown


class Items(NamedTuple):
    """The items of a pair, each as a record."""

    query: Record
    positives: list[Record]
    negatives: list[Record]


@dataclass(frozen=True, slots=True)
class PairShape:
    needs: tuple[str, ...]
    """The keys that every record of it has."""
    items: Callable[[Record], Items]
    also: tuple[str, ...] = ()
    """Other keys that it understands."""
    image_mark: str | None = None
    """The mark that its texts have for an image, if it is none of those that are recognised."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.needs, *self.also)


def _record(text: Any, images: Any = None, instruction: Any = None) -> Record:
    content = "" if text is None else text
    return {"messages": [{"role": "user", "content": content}], "images": images, "system": instruction}


def _listed(value: Any) -> list[Any]:
    """Several items, or one alone. A table has a list as JSON text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return as_list(value, "items")
        except SampleError:  # a text that begins with a bracket
            return [value]
    return value if isinstance(value, list) else [] if value in (None, "", b"") else [value]


_ITEM_KEYS = {"text", "image", "images", "instruction"}


def _item(value: Any) -> Record:
    """A text, an object with `text`, `image` or `images` and `instruction`, or an image as a table stores it."""
    if not isinstance(value, dict):
        return _record(value)
    if value.keys() <= IMAGE_KEYS:
        return _record(None, [value])
    refuse_keys(unknown_keys(value, _ITEM_KEYS))
    if value.get("image") is not None and value.get("images") is not None:
        raise SampleError("an item has both 'image' and 'images': keep one")
    images = value.get("image") if value.get("images") is None else value["images"]
    return _record(value.get("text"), images, value.get("instruction"))


def _image_text(image: str, text: str) -> Callable[[Record], Items]:
    return lambda record: Items(_record(None, record[image]), [_record(one) for one in _listed(record[text])], [])


def _query(query: str, positive: str, negative: str) -> Callable[[Record], Items]:
    """The `instruction` of the record is the query's."""

    def items(record: Record) -> Items:
        found = _item(record[query])
        if record.get("instruction") is not None:
            if found["system"] is not None:
                raise SampleError("both the record and its query have an 'instruction': keep one")
            found["system"] = record["instruction"]
        positives, negatives = _listed(record[positive]), _listed(record.get(negative))
        return Items(found, [_item(one) for one in positives], [_item(one) for one in negatives])

    return items


def _ms_swift(record: Record) -> Items:
    """`positive_messages` and `positive_images` have one list for each item, and the negatives as well."""
    query = {"messages": record["messages"], "images": record.get("images")}
    return Items(query, _conversations(record, "positive"), _conversations(record, "negative"))


def _conversations(record: Record, side: str) -> list[Record]:
    messages = as_list(record.get(f"{side}_messages") or [], f"{side}_messages")
    images = as_list(record.get(f"{side}_images") or [[]] * len(messages), f"{side}_images")
    if len(images) != len(messages):
        raise SampleError(
            f"{len(messages)} items in {shown(f'{side}_messages')} but {len(images)} in {shown(f'{side}_images')}"
        )
    return [{"messages": one, "images": own} for one, own in zip(messages, images, strict=True)]


def _vlm2vec(record: Record) -> Items:
    query = _record(record.get("qry"), record.get("qry_image_path"))
    return Items(query, _columns(record, "pos_text", "pos_image_path"), _columns(record, "neg_text", "neg_image_path"))


def _vlm2vec_eval(record: Record) -> Items:
    """The first target matches the query, the others do not."""
    targets = _columns(record, "tgt_text", "tgt_img_path")
    return Items(_record(record.get("qry_text"), record.get("qry_img_path")), targets[:1], targets[1:])


def _columns(record: Record, text_key: str, image_key: str) -> list[Record]:
    """The items of a column of texts and one of images, each one value or a list; an empty text is none."""
    texts, images = record.get(text_key), record.get(image_key)
    if not isinstance(texts, list) and not isinstance(images, list):
        return [_record(texts, images)] if texts or images else []
    num_items = len(texts if isinstance(texts, list) else images if isinstance(images, list) else [])
    texts, images = (value if isinstance(value, list) else [value] * num_items for value in (texts, images))
    if len(texts) != len(images):
        raise SampleError(f"{len(texts)} texts in {shown(text_key)} but {len(images)} images in {shown(image_key)}")
    return [_record(text, image) for text, image in zip(texts, images, strict=True)]


_DOCUMENTS = ("neg_doc", "instruction")
_SWIFT = ("images", "positive_images", "negative_messages", "negative_images")
_TRAIN = ("qry_image_path", "pos_image_path", "neg_text", "neg_image_path")
_VLM2VEC_MARK = "<|image_1|>"
PAIR_SHAPES = (
    PairShape(("messages", "positive_messages"), _ms_swift, _SWIFT),
    PairShape(("query", "pos_doc"), _query("query", "pos_doc", "neg_doc"), _DOCUMENTS),
    PairShape(("question", "pos_doc"), _query("question", "pos_doc", "neg_doc"), _DOCUMENTS),
    PairShape(("query", "positive"), _query("query", "positive", "negatives"), ("negatives", "instruction")),
    PairShape(("qry", "pos_text"), _vlm2vec, _TRAIN, _VLM2VEC_MARK),
    PairShape(("qry_text", "tgt_text"), _vlm2vec_eval, ("qry_img_path", "tgt_img_path"), _VLM2VEC_MARK),
    *(
        PairShape((image, text), _image_text(image, text))
        for image in ("image", "images")
        for text in ("text", "caption")
    ),
)


def recognise_pair(record: Record) -> PairShape:
    """The shape of a record, by its keys; a key with null is as one that is not there. Raises SampleError."""
    for shape in PAIR_SHAPES:
        if all(record.get(key) is not None for key in shape.needs):
            return shape
    keys = ", ".join(shown(key, 20) for key in list(record)[:6])
    raise SampleError(
        f"no known format of pairs: found {keys or 'no keys'}, expected 'image' and 'text', 'query' and 'positive' or "
        "the like: see docs/contrastive.md, or map the columns with `fields` of the source"
    )
