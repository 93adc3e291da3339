"""A batch as the keyword arguments of a model's forward: positions, masks and the image tensors."""

import inspect
from typing import Any

import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch, Segment
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.attention import KEYWORD, PackedRow, install_attention
from mmtrain.model.components import base_model
from mmtrain.model.image_cache.features import ImageFeatures
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.model.transfer import all_on_device
from mmtrain.model.vision import VisionInputs

_READY_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Stands for the mask of a packed row, which needs none. A mask of four dimensions is ready for transformers; without
one it looks in the positions for where samples begin, and the host waits for the device in every micro-batch."""


class InputMaker:
    """Makes the arguments of one model's forward.

    `features` replaces the pixels of a batch whose images are given one by one; `vision` places the others.
    """

    def __init__(
        self,
        model: Any,
        processor: ChatProcessor,
        features: ImageFeatures | None = None,
        vision: VisionInputs | None = None,
    ) -> None:
        self.features = features
        model = base_model(model)
        self._model = model
        self._vision = vision or VisionInputs(model)
        self._get_rope_index = getattr(model.base_model, "get_rope_index", None)
        self._num_axes = 0 if self._get_rope_index is None else _num_axes(model.config)
        self.attends_by_sample = install_attention(model)
        """Whether the model uses mmtrain's attention, which keeps the samples of a packed row apart."""
        self._type_keys = processor.type_keys & inspect.signature(model.forward).parameters.keys()
        self._image_token_id, self._grid_key = processor.image_token_id, processor.grid_key
        self._marks_replies = processor.marks_replies

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The arguments for `batch`, on the model's device. They are made on the CPU, because reading a value on the
        device would wait for all its pending work.

        Packed rows have no attention mask: samples are separated where the positions restart. This needs `use_cache`
        off; with the default, the samples of a row silently attend to each other.
        """
        device = self._model.device
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        inputs["position_ids"] = self._positions(batch)
        if not batch.packed:
            inputs["attention_mask"] = batch.padding_mask()
        elif self.attends_by_sample:
            inputs[KEYWORD] = PackedRow.of(batch, device)
            inputs["attention_mask"] = _READY_MASK
        types = _reply_types(batch) if self._marks_replies else self._token_types(batch.input_ids)
        inputs |= dict.fromkeys(self._type_keys, types)
        inputs = all_on_device(inputs, device) | self._vision(batch.image_inputs)
        if self.features is not None and batch.images:
            inputs |= self.features.of(batch.images)
        return inputs

    @property
    def store(self) -> FeatureStore | None:
        """The image cache, if there is one."""
        return None if self.features is None else self.features.store

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """(rows, length) 1 at image placeholders, 0 elsewhere."""
        if self._image_token_id is None:
            return torch.zeros_like(input_ids)
        return (input_ids == self._image_token_id).long()

    def _positions(self, batch: Batch) -> Tensor:
        """(rows, length), or for a model with M-RoPE the positions of its axes, (axes, rows, length). In a packed row
        text positions come before them: they show where samples begin."""
        rows, length = batch.input_ids.shape
        depth = 1 + self._num_axes
        positions = torch.zeros(depth, rows, length, dtype=torch.long, device=batch.input_ids.device)
        for segment in batch.segments:
            span = slice(segment.start, segment.start + segment.length)
            positions[0, segment.row, span] = torch.arange(segment.length, device=positions.device)
            if self._get_rope_index is not None:
                positions[1:, segment.row, span] = self._rope_positions(batch, segment, span)
        if depth == 1:
            return positions[0]
        return positions if batch.packed else positions[1:]

    def _rope_positions(self, batch: Batch, segment: Segment, span: slice) -> Tensor:
        """(axes, length) the M-RoPE positions of one sample, computed by the model."""
        assert self._get_rope_index is not None
        ids = batch.input_ids[segment.row : segment.row + 1, span]
        images = slice(segment.first_image, segment.first_image + segment.num_images)
        grids = {key: value[images] for key, value in batch.image_inputs.items() if key == self._grid_key}
        if not segment.num_images:
            return torch.arange(segment.length, device=ids.device).expand(self._num_axes, -1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **grids}
        given["mm_token_type_ids"] = self._token_types(ids)
        taken = inspect.signature(self._get_rope_index).parameters
        positions: Tensor = self._get_rope_index(**{key: value for key, value in given.items() if key in taken})[0]
        return positions[:, 0]


def _reply_types(batch: Batch) -> Tensor:
    """(rows, length) 0 in the prompts of replies and 1 from where a reply begins, also in padding. A model that attends
    in both directions in a prompt takes one reply a sample."""
    types = torch.ones_like(batch.input_ids)
    for segment in batch.segments:
        supervised = batch.supervised[segment.row, segment.start : segment.start + segment.length]
        length = int(supervised.int().argmax()) if supervised.any() else segment.length
        types[segment.row, segment.start : segment.start + length] = 0
    return types


def _num_axes(config: Any) -> int:
    """The axes of a model's M-RoPE: as many as its rotary dimensions are divided into, or time, height and width."""
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return len(settings.get("mrope_section") or (0, 0, 0))
