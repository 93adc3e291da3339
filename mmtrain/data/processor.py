"""The model's own tokenizer, chat template and image processor behind one small face.

Nothing here knows a family of models: placeholders, their counts and the structural tokens around them come from
running the family's own processor.
"""

import copy
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mmtrain.data.chat import SampleError
from mmtrain.data.direct import Messages, renderer, text_encoder
from mmtrain.errors import UserError
from mmtrain.foreign_text import shown

_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_ORDINARY_TEXT = ("The quick brown fox jumps over the lazy dog.", "What is 12 + 30? It is 42!")
_FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}"
"""Put before a template that prints today's date: a run must not depend on the day it was started."""
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

    def __init__(
        self, tokenizer: Any, processor: Any | None, eos_ids: frozenset[int], image_token_id: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token: str | None = None if processor is None else processor.image_token
        self.image_token_id = image_token_id
        self.eos_ids = eos_ids | ({tokenizer.eos_token_id} - {None})
        # `split_special_tokens` is a state of the tokenizer, which threads share: each of the two keeps one state
        self._literal_tokenizer = copy.deepcopy(tokenizer)
        self._encoders = [text_encoder(tokenizer, literal=False), text_encoder(self._literal_tokenizer, literal=True)]
        self._processor = processor
        self._image_processor: Any = getattr(processor, "image_processor", None)
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if template and "strftime_now" in template:
            template = _FIXED_DATE + template
        self.template: str | None = template
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        specials += [self._added[id_] for id_ in self.eos_ids if id_ in self._added]
        specials += [] if self.image_token is None else [self.image_token]
        self.special_tokens = _any_of(specials)
        parting = [t for t in tokenizer.added_tokens_decoder.values() if not (t.lstrip or t.rstrip or t.single_word)]
        self.parting_tokens = _any_of({token.content for token in parting}.intersection(specials))
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self._render = renderer(tokenizer, template)
        self._parts_wanted = True
        self._anchors = self._find_anchors()
        # some special tokens swallow the white space behind them
        self._swallowing = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.rstrip}
        self._special_ids = {id_ for id_, token in self._added.items() if self.special_tokens.fullmatch(token)}
        self._head = functools.cache(self._encode)
        self.prefix_ids = self._find_prefix() if processor is not None else []
        self.image_tokens = functools.lru_cache(maxsize=65536)(self._image_tokens)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text that the model's template makes. Raises SampleError where the template refuses."""
        if not self._parts_wanted:
            messages = [
                {**message, "content": "".join(part.get("text", "") for part in message["content"])}
                for message in messages
            ]
        try:
            return self._render(messages, add_generation_prompt)
        except Exception as error:  # a template can raise anything; its message is for the user
            raise SampleError(f"the model's chat template refuses the conversation: {error}") from None

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
        """The tensors the model takes for `pictures`, and the ids the processor lays out for all of them in a row."""
        if self._processor is None or self.image_token is None:
            raise SampleError("this model takes no pictures")
        made = self._processor(
            text=[self.image_token * len(pictures)],
            images=[list(pictures)],
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids: list[int] = made["input_ids"][0].tolist()
        return {key: value for key, value in made.items() if key not in _TEXT_KEYS}, ids

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the colours (0 to 1) by which pixels are normalised."""
        return self._image_processor.image_mean, self._image_processor.image_std

    def _image_tokens(self, size: tuple[int, int]) -> ImageTokens:
        """The span of a picture of `size` (width, height), from the family's processor run on a blank one."""
        try:
            inputs, ids = self.image_inputs([PIL.Image.new("RGB", size)])
        except SampleError:
            raise
        except Exception as error:  # such as an aspect ratio that the family refuses
            raise SampleError(
                f"the model's image processor refuses a picture of {size[0]}x{size[1]}: {error}"
            ) from None
        count = ids.count(self.image_token_id or -1)
        used_size, grid = self._used(inputs, count)
        return ImageTokens(tuple(ids), count, used_size, grid)

    def _used(self, inputs: dict[str, Any], count: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size of the pixels used, and the grid of the placeholders over them."""
        for key, value in inputs.items():
            if key.endswith("_thw"):  # patches in time, height and width
                _, rows, columns = (int(number) for number in value[0])
                patch, merge = int(self._image_processor.patch_size), math.isqrt(rows * columns // count)
                return (columns * patch, rows * patch), (columns // merge, rows // merge)
        height, width = inputs["pixel_values"].shape[-2:]
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

    def check(self) -> None:
        """Raise UserError where the directory's tokenizer or template would teach nonsense."""
        for text in _ORDINARY_TEXT:
            back = self.tokenizer.decode(self._encode(text), skip_special_tokens=True)
            if "".join(back.split()) != "".join(text.split()):
                raise UserError(
                    f"the tokenizer does not give back ordinary text: {shown(text)} came back as {shown(back)}"
                )
        self._parts_wanted = self._wants_parts()
        if self.image_token is not None:
            seen = self.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}])
            if seen.count(self.image_token) != 1:
                raise UserError(f"the chat template writes no placeholder {shown(self.image_token)} for a picture")
            if not self.image_tokens((64, 64)).num_placeholders:
                raise UserError(f"the image processor lays out no placeholder {shown(self.image_token)}")

    def _wants_parts(self) -> bool:
        """Whether the template takes content as a list of parts; the wrong form is often dropped in silence."""
        if not self.template:
            raise UserError(
                "the model directory has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            )
        failures = []
        for parts_wanted in (True, False):
            self._parts_wanted = parts_wanted
            try:
                text = self.render([{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
            except SampleError as error:
                failures.append(str(error))
                continue
            if text.count("probe") == 1 and "'type'" not in text:
                return parts_wanted
        raise UserError(f"the chat template does not show a user's words: {'; '.join(failures) or 'they are dropped'}")


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing where there is none."""
    return re.compile("|".join(sorted(map(re.escape, set(texts)), key=len, reverse=True)) or r"(?!)")


def model_directory(path: str) -> Path:
    """The directory that `path` is, or that the hub id `path` has in the local cache. Raises UserError."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: not in the local hub cache, and nothing is fetched: run `hf download {path}`"
        ) from None


def load_processor(path: str) -> ChatProcessor:
    """The processor in a model directory or the local hub cache, checked. Raises UserError, naming `path`."""
    directory = model_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        processor = _family_processor(path, config, tokenizer) if takes_images else None
    except Exception as error:  # a broken directory makes transformers raise anything
        raise UserError(f"{path}: the processor cannot be loaded: {_first_line(error)}") from None
    try:
        made = ChatProcessor(tokenizer, processor, _eos_ids(directory, config), getattr(config, "image_token_id", None))
        made.check()
    except (UserError, SampleError) as error:
        raise UserError(f"{path}: {error}") from None
    return made


def _family_processor(path: str, config: Any, tokenizer: Any) -> Any:
    """The family's processor from its tokenizer and image processor alone.

    Loading the whole raises where torchvision is absent (its video part needs it), and pixels must not depend on
    what is installed: the image processor is always Pillow's.
    """
    parts = {
        "tokenizer": tokenizer,
        "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True),
    }
    family = PROCESSOR_MAPPING[type(config)]

    class ImageTextProcessor(family):  # type: ignore[misc, valid-type]
        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [parts.get(name) for name in cls.get_attributes()]

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    return ImageTextProcessor.from_pretrained(path, local_files_only=True)


def _eos_ids(directory: Path, config: Any) -> frozenset[int]:
    """Every id that ends generation, from generation_config.json where there is one."""
    if (directory / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(directory)
    ids = getattr(config, "eos_token_id", None)
    return frozenset(ids if isinstance(ids, list) else [ids]) - {None}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
