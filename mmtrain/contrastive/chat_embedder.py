"""Vision-language models as embedders: an item is a prompt, and its embedding comes from the last hidden states."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmtrain.contrastive.embedder import EncodedItem, Kind, Limit, SentenceModules
from mmtrain.contrastive.scale import Multiplier, constant
from mmtrain.dataset.batch import Batch, make_batch
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.images import Roots
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.attention import KEYWORD
from mmtrain.model.family import Family
from mmtrain.model.head import hidden_states
from mmtrain.model.inputs import InputMaker
from mmtrain.model.vision import prepare_vision
from mmtrain.records.chat import Conversation, Message, SampleError, Text
from mmtrain.records.pairs import Item
from mmtrain.scoring.packing import RowChoice

_STAND_IN = Message("assistant", (Text("x"),))
_KIND: Kind = "prompt"


class ChatEmbedder:
    """A model of chats. An item's prompt ends where a reply would begin: with the ids that inference gives it."""

    kinds: tuple[Kind, ...] = (_KIND,)
    symmetric = False
    """Only queries choose among documents: mostly the two are of different kinds."""

    def __init__(
        self,
        model: Any,
        processor: ChatProcessor,
        family: Family,
        rows: RowChoice,
        pooling: Literal["last", "mean"],
        limit: Limit,
        autocast: Callable[[], AbstractContextManager[Any]],
        say: Callable[[str], None],
    ) -> None:
        """`limit` gives the model's own limit, or `max_length` where that is lower. `say` is given the lines of what is
        slower than it could be on a GPU."""
        self.model, self.processor, self.family = model, processor, family
        self.components = family.components
        self.packing, self.alone = rows.packing, rows.alone
        with autocast():
            self.vision = prepare_vision(model, processor, model.device, say)
        self._leaves_out_rows = False
        self._encoder, self.make_inputs = Encoder(processor), InputMaker(model, processor, None, self.vision)
        self.template = processor.template.source
        self._pooling, self._autocast = pooling, autocast
        self.limit = limit
        self.scale: Multiplier = constant(1.0)
        self.bias: Multiplier = constant(0.0)
        products = family.products(model)
        self._token_cost = products["language"]
        self._image_token_cost = family.patches_per_token * products["vision"] + products["projector"]
        (tried,) = self.encode([(Item("a"), Path())])
        if isinstance(tried, SampleError):
            raise tried
        with torch.no_grad():
            self.width = self.embed(make_batch([0], [tried.encoded], processor, rows.packing), _KIND).shape[1]

    @property
    def description(self) -> str:
        """How items are embedded, in one line."""
        how = "the last token" if self._pooling == "last" else "the mean of all tokens"
        return f"embeddings of {self.width} values, from {how} of a prompt; scale {float(self.scale.value):.4g}"

    def encode(self, items: Sequence[tuple[Item, Roots]]) -> list[EncodedItem | SampleError]:
        chats = [(Conversation((*item.conversation().messages, _STAND_IN)), root) for item, root in items]
        return [
            one if isinstance(one, SampleError) else self._encoded(_prompt(one))
            for one in self._encoder.encode_many(chats)
        ]

    def _encoded(self, prompt: Encoded) -> EncodedItem:
        num_placeholders = sum(span.num_placeholders for span in prompt.images)
        costs = self._token_cost * prompt.num_tokens, self._image_token_cost * num_placeholders
        return EncodedItem(_KIND, prompt, prompt.num_tokens, *costs)

    @property
    def caches_images(self) -> bool:
        return self.make_inputs.features is not None

    def batch(self, items: Sequence[EncodedItem]) -> Batch:
        seeds, encoded = [item.seed for item in items], [item.encoded for item in items]
        return make_batch(seeds, encoded, self.processor, self.packing, self.make_inputs.store)

    def leave_out_rows(self) -> None:
        self._leaves_out_rows = True

    def embed(self, batch: Batch, kind: Kind) -> Tensor:
        inputs = self.make_inputs(batch)
        is_kept = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for segment in batch.segments:
            end = segment.start + segment.length
            is_kept[segment.row, segment.start if self._pooling == "mean" else end - 1 : end] = True
        kept = is_kept[0].nonzero()[:, 0] if batch.packed else is_kept
        if KEYWORD in inputs and self._leaves_out_rows:
            inputs[KEYWORD] = dataclasses.replace(inputs[KEYWORD], predicting=kept.to(inputs["input_ids"].device))
        with self._autocast():
            hidden = hidden_states(self.model, {**inputs, "logits_to_keep": kept.to(inputs["input_ids"].device)})
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self._pooling == "last":
            return hidden
        lengths = [segment.length for segment in batch.segments]
        return torch.stack([own.mean(0) for own in torch.split(hidden, lengths)])

    @property
    def sentence_modules(self) -> SentenceModules:
        """The class there is the one that `mmtrain` trains, whose modules have the names that an adapter gives."""
        output = {"method": "forward", "method_output_name": ["hidden_states", -1]}
        kinds = ["text", "message"] if self.processor.images is None else ["text", "image", "message"]
        form = "flat" if "user" in self.processor.template.traits.text_roles else "structured"
        return SentenceModules(
            task="text-generation" if self.processor.images is None else "any-to-any",
            methods={kind: output | ({"format": form} if kind == "message" else {}) for kind in kinds},
            processing={"chat_template": {"add_generation_prompt": True}},
            pooling="lasttoken" if self._pooling == "last" else "mean",
        )

    def is_frozen(self, kind: Kind) -> bool:
        return False


def _prompt(encoded: Encoded) -> Encoded:
    """What comes before the reply."""
    start = int(np.argmax(encoded.supervised))
    return Encoded(encoded.ids[:start], encoded.supervised[:start], encoded.images)
