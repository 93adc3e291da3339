"""A batch as the keyword arguments of a model's forward: positions, masks and the pictures' tensors."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mmtrain.dataset.batch import Batch, Segment
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.attention import KEYWORD, PackedRow, install_attention
from mmtrain.model.image_cache.features import PictureFeatures
from mmtrain.model.image_cache.store import FeatureStore


class InputMaker:
    """Makes the arguments that one model takes.

    `features`: where a batch's pictures come one by one, what is put in the place of their pixels.
    """

    def __init__(self, model: Any, processor: ChatProcessor, features: PictureFeatures | None = None) -> None:
        self.features = features
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._model = model
        self._get_rope_index = getattr(model.base_model, "get_rope_index", None)
        self.attends_by_sample = install_attention(model)
        """Whether the attention is ours, which attends to one sample of a packed row at a time."""
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._image_token_id, self._grid_key = processor.image_token_id, processor.grid_key

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The arguments for `batch`, on the model's device. They are made on the CPU: a look at a value on the device
        would wait for all that it still has to do.

        Packed rows go without an attention mask: the restarts of the positions part the samples, and only with
        `use_cache` off (left at its default, the samples of a row see each other without a word).
        """
        device = self._model.device
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False, **batch.image_inputs}
        inputs["position_ids"] = self._positions(batch)
        if not batch.packed:
            inputs["attention_mask"] = _padding_mask(batch)
        elif self.attends_by_sample:
            inputs[KEYWORD] = PackedRow.of(batch, device)
        types = self._token_types(batch.input_ids)
        inputs |= {key: types for key in ("mm_token_type_ids", "token_type_ids") if key in self._takes}
        inputs = {key: on_device(v, device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        if self.features is not None and batch.images:
            inputs |= self.features.of(batch.images)
        return inputs

    @property
    def store(self) -> FeatureStore | None:
        """Where loaders look for features."""
        return None if self.features is None else self.features.store

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """(rows, length) 1 at a picture's placeholders, 0 elsewhere."""
        if self._image_token_id is None:
            return torch.zeros_like(input_ids)
        return (input_ids == self._image_token_id).long()

    def _positions(self, batch: Batch) -> Tensor:
        """(rows, length), or (4, rows, length) for a model with M-RoPE: text positions first, then its three."""
        rows, length = batch.input_ids.shape
        depth = 1 if self._get_rope_index is None else 4
        positions = torch.zeros(depth, rows, length, dtype=torch.long, device=batch.input_ids.device)
        for segment in batch.segments:
            span = slice(segment.start, segment.start + segment.length)
            positions[0, segment.row, span] = torch.arange(segment.length, device=positions.device)
            if self._get_rope_index is not None:
                positions[1:, segment.row, span] = self._rope_positions(batch, segment, span)
        return positions[0] if depth == 1 else positions

    def _rope_positions(self, batch: Batch, segment: Segment, span: slice) -> Tensor:
        """(3, length) the model's own positions of one sample."""
        assert self._get_rope_index is not None
        ids = batch.input_ids[segment.row : segment.row + 1, span]
        images = slice(segment.first_image, segment.first_image + segment.num_images)
        grids = {key: value[images] for key, value in batch.image_inputs.items() if key == self._grid_key}
        if not segment.num_images:
            return torch.arange(segment.length, device=ids.device).expand(3, -1)
        positions: Tensor = self._get_rope_index(input_ids=ids, mm_token_type_ids=self._token_types(ids), **grids)[0]
        return positions[:, 0]


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """`value`, of the CPU, there; without waiting for what the device does meanwhile."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _padding_mask(batch: Batch) -> Tensor:
    """(rows, length) 1 where there is a token of a sample, 0 at padding."""
    mask = torch.zeros_like(batch.input_ids)
    for segment in batch.segments:
        mask[segment.row, segment.start : segment.start + segment.length] = 1
    return mask
