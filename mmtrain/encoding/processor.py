"""The model's own tokenizer, chat template and image processor behind one small face.

Nothing here knows a family of models: placeholders, their counts and the structural tokens around them come from
running the family's own processor.
"""

import copy
import functools
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from mmtrain.encoding.directory import DirectoryParts
from mmtrain.encoding.fast_template import chat_template, renderer, text_encoder, without_padding
from mmtrain.errors import UserError
from mmtrain.records.chat import Messages, SampleError
from mmtrain.safe_text import one_line, shown

_PROBE_SIZE = (64, 64)
TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_ANCHORS = ("", "\n", ":", "a")


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """What stands in the token stream for one picture: placeholders, and any structural tokens among them."""

    ids: tuple[int, ...]
    num_placeholders: int
    used_size: tuple[int, int]
    """(width, height) of the pixels that the vision encoder sees; of one tile where the family makes several."""
    grid: tuple[int, int] | None
    """(columns, rows) in which the placeholders cover the picture, None where they do not."""


class ChatProcessor:
    """Renders conversations, turns text into ids and pictures into tensors, as inference does.

    `image_token` is None for a model that takes no pictures. `prefix_ids` are what the tokenizer puts before any text
    (such as BOS) and the template does not. `special_tokens` matches every token that text must never become,
    `parting_tokens` those of them that take nothing of the text around them.
    """

    def __init__(self, parts: DirectoryParts) -> None:
        tokenizer = self.tokenizer = without_padding(parts.tokenizer)
        self.family: Any | None = parts.processor
        """The family's own processor, None for a model that takes no images."""
        self.image_token: str | None = None if self.family is None else self.family.image_token
        self.image_token_id = parts.image_token_id
        self.eos_ids = parts.eos_ids | ({tokenizer.eos_token_id} - {None})
        # `split_special_tokens` is a state of the tokenizer, which threads share: each of the two keeps one state
        self._literal_tokenizer = copy.deepcopy(tokenizer)
        self._encoders = [text_encoder(tokenizer, literal=False), text_encoder(self._literal_tokenizer, literal=True)]
        self._image_processor: Any = getattr(self.family, "image_processor", None)
        self.template: str | None = chat_template(tokenizer, self.family)
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        self.placeholder = self._added.get(self.image_token_id if self.image_token_id is not None else -1)
        """The token that an image's features take the place of; its mark in a template's text can be another."""
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        specials += [self._added[id_] for id_ in self.eos_ids if id_ in self._added]
        specials += [] if self.image_token is None else [self.image_token]
        self.special_tokens = _any_of(specials)
        parting = [t for t in tokenizer.added_tokens_decoder.values() if not (t.lstrip or t.rstrip or t.single_word)]
        self.parting_tokens = _any_of({token.content for token in parting}.intersection(specials))
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self._render = renderer(tokenizer, self.template)
        self._text_roles = frozenset[str]()
        self._anchors = self._find_anchors()
        # some special tokens swallow the white space behind them
        self._swallowing = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._special_ids = {id_ for id_, token in self._added.items() if self.special_tokens.fullmatch(token)}
        self._head = functools.cache(self._encode)
        self.prefix_ids = self._find_prefix() if self.family is not None else []
        self._separator = self._find_separator()
        self._image_text = ("", "")
        """What the processor writes before and after an image's span that is ordinary text, such as newlines."""
        self.image_tokens = functools.lru_cache(maxsize=65536)(self._image_tokens)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text that the model's template makes, with what the processor writes around an image's span.

        Raises SampleError where the template refuses.
        """
        try:
            text = self._render(self.as_wanted(messages), add_generation_prompt)
        except Exception as error:  # a template can raise anything; its message is for the user
            raise SampleError(f"the model's chat template refuses the conversation: {one_line(error)}") from None
        before, after = self._image_text
        if self.image_token is None or not (before or after):
            return text
        return text.replace(self.image_token, before + self.image_token + after)

    def as_wanted(self, messages: Messages) -> Messages:
        """`messages`, whose content is a list of parts, in the form that the template takes."""
        return [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])}
            if message["role"] in self._text_roles
            else message
            for message in messages
        ]

    def encode(
        self, text: str, after: int | None, literal: bool = False, known: Mapping[str, list[int]] | None = None
    ) -> list[int]:
        """Ids of `text` as they are in the middle of a longer text, behind the token `after` (None: at the start).

        `literal`: special tokens in the text are ordinary characters. Tokenizers that put a space before whatever
        they are given (SentencePiece) get something to begin with that is taken off again. `known` is what
        `encode_batch` gave of texts among which this one may be.
        """
        if not text:
            return []
        _, ids = self._behind_anchor(text, after, literal, known or {})
        if literal and len(text) > 1 and not self._special_ids.isdisjoint(ids):
            # an ordinary piece of the vocabulary that is a special token too: take it apart
            return self.encode(text[0], after, True) + self.encode(text[1:], ids[0], True)
        return ids

    def encode_batch(self, texts: Collection[str]) -> dict[str, list[int]]:
        """The ids of each text as `encode` looks for them first, in half the time; none without a native part."""
        native = getattr(self.tokenizer, "backend_tokenizer", None)
        if native is None:
            return {}
        anchored = [self._anchors[0] + text for text in texts]
        found = native.encode_batch_fast(anchored, add_special_tokens=False)
        return {text: one.ids for text, one in zip(anchored, found, strict=True)}

    def token_places(self, text: str, after: int | None) -> list[int]:
        """The last character of `text` that each of the ids of `encode(text, after)` stands for.

        The last, because a token that takes the space before a word belongs to the word.
        """
        anchor, ids = self._behind_anchor(text, after, False, {})
        made = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        places = [max(0, start, end - 1) - len(anchor) for start, end in made["offset_mapping"]]
        return places[len(places) - len(ids) :]

    def _behind_anchor(
        self, text: str, after: int | None, literal: bool, known: Mapping[str, list[int]]
    ) -> tuple[str, list[int]]:
        """An anchor that leaves `text` as it would be in the middle, and the ids of `text` behind it."""
        if after is None:
            anchors = [""]
        elif after in self._added and not literal and (after in self._swallowing or self._anchors[0]):
            anchors = [self._added[after]]
        else:
            anchors = self._anchors
        for anchor in anchors:
            head, ids = self._head(anchor, literal), known.get(anchor + text) or self._encode(anchor + text, literal)
            if ids[: len(head)] == head:
                return anchor, ids[len(head) :]
        raise SampleError(f"the tokenizer joins {shown(text)} with whatever stands before it")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._added

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def image_inputs(self, pictures: Sequence[PIL.Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """The tensors the model takes for `pictures`, and the ids of their spans, one after the other."""
        inputs, spans = self._image_inputs(pictures)
        return inputs, [id_ for span in spans for id_ in span[self._span_of(span)]]

    def _image_inputs(self, pictures: Sequence[PIL.Image.Image]) -> tuple[dict[str, Any], list[list[int]]]:
        """The tensors, and all the ids that the processor writes for each image, ordinary text included."""
        if self.family is None or self.image_token is None:
            raise SampleError("this model takes no images")
        separator = self._added.get(self._separator, "") if self._separator is not None else ""
        made = self.family(
            text=[separator + (self.image_token + separator) * len(pictures)],
            images=[list(pictures)],
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids: list[int] = made["input_ids"][0].tolist()
        inputs = {key: value for key, value in made.items() if key not in TEXT_KEYS}
        if self._separator is None:
            return inputs, [ids]
        cuts = [i for i, id_ in enumerate(ids) if id_ == self._separator]
        if len(cuts) != len(pictures) + 1:
            raise SampleError("the model's processor changes the special tokens around an image")
        return inputs, [ids[start + 1 : end] for start, end in itertools.pairwise(cuts)]

    def _span_of(self, ids: Sequence[int]) -> slice:
        """Where an image's span lies in what the processor writes for it: from the first to the last placeholder or
        structural token. The rest is ordinary text, which the tokenizer may join with its neighbours."""
        own = [i for i, id_ in enumerate(ids) if id_ == self.image_token_id or self._added.get(id_, "").strip()]
        return slice(own[0], own[-1] + 1) if own else slice(0, len(ids))

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the colours (0 to 1) by which pixels are normalised."""
        return self._image_processor.image_mean, self._image_processor.image_std

    def _image_tokens(self, size: tuple[int, int]) -> ImageTokens:
        """The span of an image of `size` (width, height), from the family's processor run on a blank one."""
        inputs, ids = self._blank(size)
        span = self._span_of(ids)
        if self._text_around(ids) != self._image_text:
            raise SampleError(f"the model's processor writes other text around an image of {size[0]}x{size[1]}")
        count = ids.count(self.image_token_id or -1)
        used_size, grid = self._used(inputs, count, size)
        return ImageTokens(tuple(ids[span]), count, used_size, grid)

    def _blank(self, size: tuple[int, int]) -> tuple[dict[str, Any], list[int]]:
        """What the processor makes of a blank image: the tensors and all the ids that it writes for it."""
        try:
            inputs, (ids,) = self._image_inputs([PIL.Image.new("RGB", size)])
        except SampleError:
            raise
        except Exception as error:  # such as an aspect ratio that the family refuses
            raise SampleError(
                f"the model's image processor refuses an image of {size[0]}x{size[1]}: {one_line(error)}"
            ) from None
        return inputs, ids

    def _text_around(self, ids: Sequence[int]) -> tuple[str, str]:
        """The ordinary text before and after the span in `ids`."""
        span = self._span_of(ids)
        return self.decode(ids[: span.start]), self.decode(ids[span.stop :])

    def _used(
        self, inputs: dict[str, Any], count: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size of the pixels used, and the grid of the placeholders over them; `size` where no tensor shows it."""
        for key, value in inputs.items():
            if key.endswith("_thw"):  # patches in time, height and width
                _, rows, columns = (int(number) for number in value[0])
                patch, merge = int(self._image_processor.patch_size), math.isqrt(rows * columns // count)
                return (columns * patch, rows * patch), (columns // merge, rows // merge)
        shapes = [tuple(value.shape) for key, value in inputs.items() if key.startswith("pixel_values")]
        if not shapes or len(shapes[0]) < 4:  # patches without a place
            return size, None
        height, width = shapes[0][-2:]
        side = math.isqrt(count)
        return (width, height), (side, side) if side * side == count and width == height else None

    def _encode(self, text: str, literal: bool = False) -> list[int]:
        ids: list[int] = self._encoders[literal](text)
        return ids

    def _find_anchors(self) -> list[str]:
        """Texts, shortest first, behind which encoding goes on as it would have in one piece."""
        found = []
        texts = ("word", " word", "Word 12")
        for anchor in _ANCHORS:
            head = self._encode(anchor)
            if all(
                self._encode("so:\n" + anchor) + self._encode(anchor + text)[len(head) :]
                == self._encode("so:\n" + anchor + text)
                for text in texts
            ):
                found.append(anchor)
        if found:
            return found
        raise UserError("the tokenizer cannot encode a text in pieces: it is not supported")

    def _find_prefix(self) -> list[int]:
        bare = self._encode("word")
        whole: list[int] = self.tokenizer.encode("word", add_special_tokens=True)
        prefix = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
        return prefix or whole[: whole.index(bare[0])]

    def _find_separator(self) -> int | None:
        """A special token that takes nothing of the text around it, to tell images apart in the processor's output."""
        tokens = self.tokenizer.added_tokens_decoder
        parting = [id_ for id_, t in tokens.items() if t.special and self.parting_tokens.fullmatch(t.content)]
        candidates = [id_ for id_ in parting if tokens[id_].content != self.image_token and id_ != self.image_token_id]
        preferred = [id_ for id_ in candidates if id_ in self.eos_ids] or candidates
        return preferred[0] if preferred else None

    def check(self) -> None:
        """Raise UserError where the directory's template or processor would teach nonsense."""
        self._text_roles = self._find_text_roles()
        if self.image_token is None:
            return
        seen = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}])
        if seen.count(self.image_token) != 1:
            raise UserError(f"the chat template writes no placeholder {shown(self.image_token)} for an image")
        self._image_text = self._text_around(self._blank(_PROBE_SIZE)[1])
        if not self.image_tokens(_PROBE_SIZE).num_placeholders:
            raise UserError(f"the image processor lays out no placeholder {shown(self.image_token)}")

    def _find_text_roles(self) -> frozenset[str]:
        """The roles whose content the template takes as a string: a list of parts is dropped there, or printed as data.

        The probe's parts carry a key that no template knows: where its value is in the text, the part was printed.
        """
        if not self.template:
            raise UserError(
                "the model directory has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            )
        failures = []
        for roles in ((), ("assistant",), ("user",), ("user", "assistant")):
            self._text_roles = frozenset(roles)
            try:
                text = self.render([_probe_turn("user"), _probe_turn("assistant")])
            except SampleError as error:
                failures.append(str(error))
                continue
            if _shows(text, "user") and _shows(text, "assistant"):
                return self._with_system()
        raise UserError(f"the chat template does not show a user's words: {'; '.join(failures) or 'they are dropped'}")

    def _with_system(self) -> frozenset[str]:
        """The roles found, and the system's where it is one of them. A template may refuse or drop it altogether."""
        others = self._text_roles
        for roles in (others, others | {"system"}):
            self._text_roles = roles
            try:
                text = self.render([_probe_turn("system"), _probe_turn("user")])
            except SampleError:
                continue
            if _shows(text, "system"):
                return roles
        return others


_UNKNOWN = "Zq-unknown-qZ"


def _probe_words(role: str) -> str:
    return f"Zq-{role}-qZ"


def _shows(text: str, role: str) -> bool:
    return text.count(_probe_words(role)) == 1 and _UNKNOWN not in text


def _probe_turn(role: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": _probe_words(role), "unknown_key": _UNKNOWN}]}


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing where there is none."""
    return re.compile("|".join(sorted(map(re.escape, set(texts)), key=len, reverse=True)) or r"(?!)")
