"""Pixels of 8 bits, normalized where the model is: what the processor itself gives, or a reason why not."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mmtrain.encoding.load import load_processor
from mmtrain.encoding.raw_pixels import Normalization, find_normalization
from mmtrain.model import vision
from mmtrain.model.load import load_model


def images() -> list[list[PIL.Image.Image]]:
    noise = np.random.default_rng(5)
    sizes = ((300, 90), (64, 64))
    return [[PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8))] for w, h in sizes]


@pytest.mark.parametrize(("kind", "shape"), [("qwen2_5_vl", (-1,)), ("llava", (3, 1, 1))])
def test_normalized_pixels_are_those_of_the_processor(
    kind: str, shape: tuple[int, ...], model_dirs: dict[str, Path]
) -> None:
    processor = load_processor(str(model_dirs[kind]), tried=True)
    normalize = find_normalization(processor)
    assert isinstance(normalize, Normalization)
    assert normalize.mean.reshape(shape).shape == normalize.mean.shape
    expected, ids = processor.image_inputs(images())
    raw, raw_ids = processor.image_inputs(images(), raw=True)
    assert raw_ids == ids
    assert raw["pixel_values"].dtype == torch.uint8
    found = normalize(raw["pixel_values"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected["pixel_values"], rtol=0, atol=2e-6)
    assert raw["pixel_values"].nbytes * 4 == expected["pixel_values"].nbytes


def test_what_is_done_after_normalization_is_found_out(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(str(model_dirs["llava"]), tried=True)
    assert processor.images is not None
    own = processor.images.inputs

    def padded(samples: Any, ids: Any = None, raw: bool = False) -> Any:
        inputs, laid_out = own(samples, ids, raw)
        inputs["pixel_values"][..., -1, :] = 0
        return inputs, laid_out

    monkeypatch.setattr(processor.images, "inputs", padded)
    assert find_normalization(processor) == "it does more with an image than to normalize its colours last"


def test_where_weights_are_sharded_the_slower_attention_is_reported(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(str(model_dirs["qwen2_5_vl"]), tried=True)
    model = load_model(str(model_dirs["qwen2_5_vl"]), "float32", processor)
    monkeypatch.setattr(vision, "has_varlen", lambda device: True)
    monkeypatch.setattr(vision, "_normalization", lambda *_: None)
    said: list[str] = []
    vision.prepare_vision(model, processor, torch.device("cuda"), said.append)
    assert said == ["vision: one attention kernel a layer is not tried, because the weights are sharded"]
