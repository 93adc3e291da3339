"""What a forward reads of its image features is found out; where it cannot be put together, nothing is kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mmtrain.config.schema import Config
from mmtrain.dataset.image_inputs import ImageInputs
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.image_cache.features import ImageFeatures, find_fields
from mmtrain.model.image_cache.store import FeatureStore
from mmtrain.model.load import load_model
from mmtrain.model.transfer import PinnedMemory
from mmtrain.model.vision import VisionInputs
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.image_cache import input_maker

IMAGE = 5
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 32, "intermediate_size": 48}


class Processor:
    """As much of a family's processor as features need: random pixels that follow from the image's size."""

    image_token_id = IMAGE
    images = SimpleNamespace(traits=SimpleNamespace(by_sample=False))
    lays_out_together = True

    def __init__(self, lay_out: Callable[[Sequence[tuple[int, int]]], tuple[dict[str, Tensor], list[int]]]) -> None:
        self._lay_out = lay_out

    def image_inputs(self, samples: Sequence[Sequence[PIL.Image.Image]]) -> tuple[dict[str, Tensor], list[int]]:
        return self._lay_out([image.size for images in samples for image in images])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_layers_of_features() -> tuple[Any, Any]:
    """Qwen3-VL: features of several layers go into the language model."""

    def lay_out(sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, Tensor], list[int]]:
        grids = [(1, height // 28 * 2, width // 28 * 2) for width, height in sizes]
        pixels = [noise(rows, rows * columns, 3 * 2 * 14 * 14) for _, rows, columns in grids]
        ids = [i for _, rows, columns in grids for i in [7] + [IMAGE] * (rows * columns // 4) + [8]]
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}, ids

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision: dict[str, Any] = {**VISION, "depth": 3, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=7,
        vision_end_token_id=8,
        video_token_id=9,
    )
    return Qwen3VLForConditionalGeneration(config), Processor(lay_out)


def with_tiles() -> tuple[Any, Any]:
    """Idefics3: an image is several tiles, all in one row of a batch."""

    def lay_out(sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, Tensor], list[int]]:
        tiles = [noise(width, 2 if width > 100 else 1, 3, 28, 28) for width, _ in sizes]
        pixels = torch.cat(tiles)[None]
        mask = torch.ones(*pixels.shape[:2], 28, 28, dtype=torch.long)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}, ([7] + [IMAGE] * 4) * pixels.shape[1]

    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    text = {**TEXT, "model_type": "llama", "pad_token_id": 0}
    config = Idefics3Config(image_token_id=IMAGE, text_config=text, vision_config=vision, scale_factor=2)
    return Idefics3ForConditionalGeneration(config), Processor(lay_out)


@torch.no_grad()
def prepared(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.copy_(noise(parameter.numel(), *parameter.shape) * parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "names"),
    [(with_layers_of_features, {"pooler_output", "deepstack_features"}), (with_tiles, {"pooler_output"})],
)
def test_logits_from_kept_features_are_those_from_pixels(make: Callable[[], tuple[Any, Any]], names: set[str]) -> None:
    model, processor = make()
    prepared(model)
    fields = find_fields(model, processor)
    assert not isinstance(fields, str)
    assert fields.joinings.keys() == names
    sizes = [(140, 84), (56, 112), (90, 56)]
    blank = [PIL.Image.new("RGB", size) for size in sizes]
    pixels, ids = processor.image_inputs([blank])
    alone = [
        ImageInputs(str(number), own.count(IMAGE), inputs, None)
        for number, image in enumerate(blank)
        for inputs, own in [processor.image_inputs([[image]])]
    ]
    common: dict[str, Any] = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    if "image_grid_thw" in pixels:
        common["mm_token_type_ids"] = (common["input_ids"] == IMAGE).long()
    expected = model(**common, **pixels).logits
    features = ImageFeatures(model, FeatureStore(1e6), fields)
    for _ in range(2):  # computed, and kept
        found = model(**common, **features.of(alone)).logits
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    swapped = model(**common, **features.of(alone[::-1])).logits
    assert (swapped - expected).norm() > 1e-2 * expected.norm()


def qwen(model_dirs: dict[str, Path]) -> tuple[Any, ChatProcessor]:
    processor = load_processor(str(model_dirs["qwen2_5_vl"]))
    model = load_model(str(model_dirs["qwen2_5_vl"]), "float32", processor).requires_grad_(False)
    assert not isinstance(find_fields(model, processor), str)
    return model, processor


def test_features_that_depend_on_the_other_images_are_not_kept(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = qwen(model_dirs)
    inner = model.base_model
    make = inner.get_image_features

    def mixed(*args: Any, **kwargs: Any) -> Any:
        output = make(*args, **kwargs)
        mean = torch.cat(tuple(output.pooler_output)).mean(0)
        output.pooler_output = tuple(one - mean for one in output.pooler_output)
        return output

    monkeypatch.setattr(inner, "get_image_features", mixed)
    assert find_fields(model, processor) == "cached features give the language model other inputs than pixels"


def test_a_trial_that_fails_says_why(model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = qwen(model_dirs)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(model.base_model, "get_image_features", broken)
    assert find_fields(model, processor) == "its trial failed with RuntimeError: no such thing"


def test_features_that_depend_on_a_trainable_weight_are_not_cached(model_dirs: dict[str, Path]) -> None:
    """Such as LLaVA-NeXT's newline between rows, which stands outside tower and projector."""
    model, processor = qwen(model_dirs)
    weight = next(p for name, p in model.named_parameters() if "merger" in name)
    weight.requires_grad_(True)
    assert find_fields(model, processor) == "the features depend on trainable weights"


def test_a_forward_that_takes_no_features_gets_none(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = qwen(model_dirs)
    monkeypatch.setattr(model, "forward", lambda input_ids=None, pixel_values=None: None)
    assert find_fields(model, processor) == "models of this family do not take cached features"
    text = load_processor(str(model_dirs["text"]))
    assert find_fields(load_model(str(model_dirs["text"]), "float32", text), text) == "this model takes no images"


def test_a_model_without_cached_features_is_named_in_one_line_and_a_text_model_in_none(
    model_dirs: dict[str, Path], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("qwen2_5_vl")
    model, processor = qwen(model_dirs)
    monkeypatch.setattr(model, "forward", lambda input_ids=None, pixel_values=None: None)
    said: list[str] = []
    runtime, store = Runtime("float32"), FeatureStore(1e6)
    vision = VisionInputs(model)
    assert input_maker(model, processor, config, runtime, store, vision, said.append).features is None
    assert said == ["image cache: off, models of this family do not take cached features"]
    text = load_processor(str(model_dirs["text"]))
    without_images = load_model(str(model_dirs["text"]), "float32", text)
    assert input_maker(without_images, text, config, runtime, store, vision, said.append).features is None
    assert len(said) == 1


@pytest.mark.parametrize("room", [1e6, 0.0])
def test_missing_images_go_through_the_tower_at_once(
    room: float, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = qwen(model_dirs)
    fields = find_fields(model, processor)
    assert not isinstance(fields, str)
    assert fields.can_be_split
    noise = np.random.default_rng(1)
    images = []
    for number, (height, width) in enumerate([(84, 140), (112, 56), (56, 56), (84, 140)]):
        pixels = PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        inputs, ids = processor.image_inputs([[pixels]])
        images.append(ImageInputs(str(number), ids.count(processor.image_token_id or -1), inputs, None))
    images.insert(1, images[3])  # an image that comes twice
    one_by_one = ImageFeatures(model, FeatureStore(1e6), fields)
    (expected,) = one_by_one.of(images)["mm_encoder_outputs"].values()
    calls: list[int] = []
    model.get_encoder(modality="image").register_forward_hook(lambda *_: calls.append(1))
    store = FeatureStore(room)
    together = ImageFeatures(model, store, fields, together=True)
    together.of(images[:1])  # one is stored where there is room
    copied: list[Tensor] = []

    def empty_like(value: Tensor, **_: Any) -> Tensor:
        copied.append(value)
        return value.clone()

    monkeypatch.setattr(torch, "empty_like", empty_like)
    (found,) = together.of(images)["mm_encoder_outputs"].values()
    assert len(calls) == 2
    assert len(copied) == (3 if room else 0)  # nothing is copied for a store that is full
    assert len(found.pooler_output) == len(images)
    for own, other in zip(found.pooler_output, expected.pooler_output, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-6)
    assert all((store.find(image.key) is not None) == bool(room) for image in images)


def test_tiles_that_are_padded_to_the_most_of_a_batch_go_one_by_one() -> None:
    model, processor = with_tiles()
    fields = find_fields(prepared(model), processor)
    assert not isinstance(fields, str)
    assert not fields.can_be_split


def test_pinned_memory_holds_every_copy_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(PinnedMemory, "_BLOCK", 1000)
    memory = PinnedMemory()
    sizes = [(3, 5), (7,), (60, 4), (1,), (400,), (2, 2)]
    types = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.int64]
    values = [(noise(n, *size) * 100).to(dtype) for n, (size, dtype) in enumerate(zip(sizes, types, strict=True))]
    copies = [memory.copy_of(value) for value in values]
    assert all(map(torch.equal, copies, values))
    assert all(one.data_ptr() % 64 == copies[0].data_ptr() % 64 for one in copies[:2])
    for copy in copies:
        copy.zero_()
        assert sum(not other.any() for other in copies) == 1
        copy.fill_(1)
