"""Dual encoders as embedders: a tower for texts, one for images, and what maps both to one space."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.contrastive.embedder import EncodedItem, Kind, SentenceModules, no_labels
from mmtrain.contrastive.pooled_rows import PooledRows, check_pooled, find_pooled_rows
from mmtrain.contrastive.scale import find_multipliers
from mmtrain.dataset.batch import Batch, Segment
from mmtrain.dataset.validate import LengthLimit
from mmtrain.encoding.encode import Encoded, ImageSpan
from mmtrain.encoding.images import Roots, decode, find_image
from mmtrain.encoding.tower_processor import TowerProcessor
from mmtrain.errors import UserError
from mmtrain.model.family import Family
from mmtrain.model.tower_components import TowerComponents
from mmtrain.model.transfer import all_on_device
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item
from mmtrain.safe_text import one_line

_TEXTS = ("a photo of a cat", "two red circles next to a blue one")
_VALUES_PER_TOKEN = 768
"""Values of an image's tensors that count as one token: those of a patch of 16 by 16 pixels."""
_ALIKE = {torch.float32: 1e-4}
_ALIKE_LOW = 2e-2


class Towers:
    """A dual encoder of transformers, loaded and tried. Without adapters: those are added afterwards, in place."""

    kinds: tuple[Kind, ...] = ("image", "text")
    symmetric = True
    packing = False
    alone = False
    caches_images = False
    template = None

    def __init__(
        self, model: Any, processor: TowerProcessor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Raises UserError where the model does not compute embeddings as dual encoders do."""
        self.model, self.processor = model, processor
        self._base = model  # adapters change it in place
        self.components = TowerComponents(model)
        self._autocast = autocast
        self._pads_to_limit = False
        self._pooled: dict[Kind, PooledRows] = {}
        self._image_takes = frozenset(inspect.signature(model.get_image_features).parameters)
        try:
            self._try()
        except UserError:
            raise
        except Exception as error:  # a family that embeds in another way can raise anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"the model does not embed texts and images as dual encoders do: {reason}") from None

    @torch.no_grad()
    def _try(self) -> None:
        images = self.processor.image_inputs([_noise(0), _noise(1)])
        self._image_tokens = max(1, sum(v.numel() for v in self._taken(images).values()) // 2 // _VALUES_PER_TOKEN)
        self._costs = self._tower_costs()
        self._pads_to_limit = self._depends_on_padding()
        texts = self.embed(self._text_batch(_TEXTS), "text")
        of_images = self.embed(self._images(images), "image")
        if texts.shape != of_images.shape:
            raise UserError(
                f"the model's embeddings of texts and images are of {texts.shape[1]} and "
                f"{of_images.shape[1]} values: this family is not supported"
            )
        self.width = texts.shape[1]
        cosines = F.normalize(texts, dim=1) @ F.normalize(of_images, dim=1).T
        self.scale, self.bias = find_multipliers(self.model, lambda: self._own_logits(images), cosines)
        self._check(cosines, self._own_logits(images))

    def with_model(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> "Towers":
        """What the trial of this one found, for another model of the same class."""
        made = copy.copy(self)
        made.model = made._base = model
        made._autocast, made._pooled = autocast, {}
        names = {id(value): name for name, value in self._base.named_parameters(recurse=False)}
        made.scale, made.bias = (
            own if own.parameter is None else replace(own, parameter=model.get_parameter(names[id(own.parameter)]))
            for own in (self.scale, self.bias)
        )
        return made

    @property
    def family(self) -> Family:
        return Family(self.components, "own")

    @property
    def description(self) -> str:
        """What the trial found, in one line."""
        padding = f", padded to {self.processor.max_length} tokens" if self._pads_to_limit else ""
        return (
            f"embeddings of {self.width} values; texts of up to {self.processor.max_length} tokens{padding}; "
            f"scale {float(self.scale.value):.4g}"
        )

    @property
    def word_embeddings(self) -> nn.Embedding:
        """Those of the text tower; not every family says where they are."""
        tower = self.model.get_submodule(next(iter(self.components.roots("language"))))
        return max(
            (own for own in tower.modules() if isinstance(own, nn.Embedding)), key=lambda own: own.num_embeddings
        )

    def encode(self, items: Sequence[tuple[Item, Roots]]) -> list[EncodedItem | SampleError]:
        ids = iter(self.processor.text_ids([item.text for item, _ in items if item.text is not None]))
        return [self._encode(item, roots, None if item.text is None else next(ids)) for item, roots in items]

    def _encode(self, item: Item, roots: Roots, ids: list[int] | None) -> EncodedItem | SampleError:
        if item.instruction is not None:
            return SampleError("it has an instruction, and the model, a dual encoder, takes none")
        if (ids is not None) + len(item.images) != 1:
            return SampleError("the model, a dual encoder, embeds one text or one image: expected one of them")
        if ids is not None:
            encoded = Encoded(np.array(ids, np.int32), no_labels(len(ids)), ())
            row = self.processor.max_length if self._pads_to_limit else len(ids)
            return EncodedItem("text", encoded, row, self._costs["language"] * len(ids), 0.0)
        try:
            image = find_image(item.images[0], roots)
        except SampleError as error:
            return error
        encoded = Encoded(np.zeros(0, np.int32), no_labels(0), (ImageSpan(image, 0, 0, 0),))
        return EncodedItem("image", encoded, self._image_tokens, 0.0, self._costs["vision"])

    def limit(self, max_length: int) -> LengthLimit:
        if self.processor.max_length < max_length:
            return LengthLimit(self.processor.max_length, "the text tower's longest text")
        return LengthLimit(max_length, "data.max_length")

    def batch(self, items: Sequence[EncodedItem]) -> Batch:
        seeds = [item.seed for item in items]
        if items[0].kind == "text":
            return self._texts([item.encoded.ids.tolist() for item in items], seeds)
        inputs = self.processor.image_inputs([decode(item.encoded.images[0].image) for item in items])
        return self._images(inputs, seeds)

    def leave_out_rows(self) -> None:
        """Not on a GPU, where the check of every batch would wait for the device."""
        if self.model.device.type != "cpu":
            return
        images = self._images(self.processor.image_inputs([_noise(0), _noise(1)]))
        for kind, batch in (("text", self._text_batch(_TEXTS)), ("image", images)):
            found = find_pooled_rows(self._base, batch, functools.partial(self._embed, kind=kind))
            if found is not None:
                self._pooled[kind] = found

    def embed(self, batch: Batch, kind: Kind) -> Tensor:
        if kind not in self._pooled:
            return self._embed(batch, kind)
        with self._pooled[kind].of(batch):
            return check_pooled(self._embed(batch, kind))

    def _embed(self, batch: Batch, kind: Kind) -> Tensor:
        model = self._base
        with self._autocast():
            if kind == "text":
                found = model.get_text_features(**self._text_inputs(batch))
            else:
                found = model.get_image_features(**all_on_device(batch.image_inputs, model.device))
        pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32))

    @torch.no_grad()
    def probe(self) -> Tensor:
        """The embeddings of two texts and of two random images, (4, width)."""
        images = self._images(self.processor.image_inputs([_noise(0), _noise(1)]))
        return torch.cat([self.embed(self._text_batch(_TEXTS), "text"), self.embed(images, "image")])

    @property
    def sentence_modules(self) -> SentenceModules:
        padding = {"padding": "max_length"} if self._pads_to_limit else {}
        return SentenceModules(
            task="feature-extraction",
            methods={
                kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in self.kinds
            },
            processing={"text": {"max_length": self.processor.max_length, **padding}},
            pooling=None,
        )

    def is_frozen(self, kind: Kind) -> bool:
        own = {"text": ("language", "projector"), "image": ("vision", "projector")}[kind]
        return self.components.is_frozen(self.model, own)

    def _texts(self, ids: Sequence[Sequence[int]], seeds: Sequence[int] = (0, 1)) -> Batch:
        """A row for each text. A projection sees one row for each text: it counts as one image."""
        width = self.processor.max_length if self._pads_to_limit else max(map(len, ids))
        rows = torch.full((len(ids), width), self.processor.pad_id)
        segments = []
        for row, (own, seed) in enumerate(zip(ids, seeds, strict=True)):
            start = width - len(own) if self.processor.pads_left else 0
            rows[row, start : start + len(own)] = torch.tensor(own)
            segments.append(Segment(seed, row, start, len(own), row, 1))
        return Batch(rows, torch.zeros_like(rows, dtype=torch.bool), tuple(segments), False, {})

    def _text_batch(self, texts: Sequence[str]) -> Batch:
        return self._texts(self.processor.text_ids(texts), range(len(texts)))

    def _text_inputs(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch.input_ids}
        if self.processor.has_mask:
            inputs["attention_mask"] = batch.padding_mask()
        return all_on_device(inputs, self._base.device)

    def _images(self, inputs: dict[str, Tensor], seeds: Sequence[int] = (0, 1)) -> Batch:
        segments = tuple(Segment(seed, row, 0, self._image_tokens, row, 1) for row, seed in enumerate(seeds))
        nothing = torch.zeros(len(seeds), 0, dtype=torch.long)
        return Batch(nothing, nothing.bool(), segments, False, self._taken(inputs))

    def _taken(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in inputs.items() if name in self._image_takes}

    def _tower_costs(self) -> dict[str, float]:
        """Multiplications by the weights of each tower: for one token of a text, and for one image."""
        products = self.family.products(self.model)
        return {"language": products["language"], "vision": products["vision"] * self._image_tokens}

    def _depends_on_padding(self) -> bool:
        """Whether a text's embedding changes with the padding in its row. Such families see every text padded to the
        longest they take."""
        alone = self.embed(self._text_batch(_TEXTS[:1]), "text")
        padded = self.embed(self._text_batch(_TEXTS), "text")[:1]
        return not self._is_close(padded, alone)

    def _own_logits(self, images: dict[str, Tensor]) -> Tensor:
        """(num_texts, num_images) by the model's own forward."""
        inputs = self._text_inputs(self._text_batch(_TEXTS)) | all_on_device(self._taken(images), self.model.device)
        try:
            with self._autocast():
                logits: Tensor = self.model(**inputs).logits_per_text
        except Exception as error:  # a model with other inputs can raise anything
            raise UserError(f"the model does not compare texts with images: {one_line(error)}") from None
        return logits.float()

    def _check(self, cosines: Tensor, logits: Tensor) -> None:
        expected = self.scale.value.to(cosines) * cosines + self.bias.value.to(cosines)
        if not self._is_close(logits, expected):
            raise UserError(
                "the model's similarities are not a scale times the cosine of its embeddings, plus a bias: "
                "this family is not supported"
            )

    def _is_close(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = _ALIKE.get(self.model.dtype, _ALIKE_LOW)
        return float((found - expected).norm()) <= tolerance * float(expected.norm())


def _noise(seed: int) -> PIL.Image.Image:
    """An image of random colours: blank ones can all have the same embedding."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return PIL.Image.fromarray(values).resize((256, 256))
