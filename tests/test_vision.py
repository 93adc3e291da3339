"""The vision tower on a GPU, with its kernel written out: one call a layer, and the same results or none of it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers.exporters import utils as exporters

from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model import attention, vision
from mmtrain.model.image_cache.features import given_to_decoder
from mmtrain.model.load import load_model
from mmtrain.model.vision import NAME, VisionInputs

CPU = torch.device("cpu")
Prepared = tuple[Any, Any, ChatProcessor]


class Kernel:
    """Stands for torch's variable-length kernel: softmax within stretches, or over the whole row where it is broken."""

    def __init__(self, broken: bool = False) -> None:
        self.num_calls, self.broken = 0, broken

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        key_ends: Tensor,
        longest: int,
        *_: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.num_calls += 1
        assert ends is key_ends
        assert ends.dtype == torch.int32
        lengths = [b - a for a, b in itertools.pairwise(ends.tolist())]
        assert longest == max(lengths)
        if self.broken:
            lengths = [sum(lengths)]
        q, k, v = (torch.split(tensor.transpose(0, 1), lengths, dim=1) for tensor in (query, key, value))
        rows = [(a @ b.mT * kwargs["scale"]).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        return torch.cat(rows, dim=1).transpose(0, 1)


@pytest.fixture
def prepared(model_dirs: dict[str, Path]) -> Callable[[str], Prepared]:
    def make(kind: str) -> Prepared:
        processor = load_processor(str(model_dirs[kind]))
        model = load_model(str(model_dirs[kind]), "float32", processor).requires_grad_(False)
        return model, model.get_encoder(modality="image"), processor

    return make


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """As if the CPU had torch's kernel, for float32."""
    found = Kernel()
    monkeypatch.setattr(attention, "varlen_attn", found)
    monkeypatch.setattr(vision, "has_varlen", lambda device: True)
    monkeypatch.setattr(vision, "fits_varlen", lambda *tensors: True)
    return found


def images(processor: ChatProcessor) -> tuple[dict[str, Tensor], list[int]]:
    noise = np.random.default_rng(1)
    sizes = [(280, 196), (84, 84), (140, 308)]
    return processor.image_inputs(
        [[PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]]
    )


@torch.no_grad()
def given(model: Any, processor: ChatProcessor, inputs: VisionInputs) -> list[Tensor]:
    made, ids = images(processor)
    return given_to_decoder(model, ids, inputs(made))


def test_one_kernel_a_layer_gives_what_stretch_by_stretch_gives(
    prepared: Callable[[str], Prepared], kernel: Kernel
) -> None:
    model, tower, processor = prepared("qwen2_5_vl")
    expected = given(model, processor, VisionInputs(model))
    said: list[str] = []
    inputs = vision.prepare_vision(model, processor, CPU, said.append)
    assert said == []
    assert tower.config._attn_implementation == NAME
    made, _ = images(processor)
    placed = inputs(made)
    assert placed["image_grid_thw"] is made["image_grid_thw"]  # stays where its values can be read
    assert {"image_cu_seqlens", "image_max_seqlen", "image_window_index", "image_cu_window_seqlens"} <= placed.keys()
    assert len(placed["image_cu_window_seqlens"]) > len(placed["image_cu_seqlens"])  # an image has several windows
    kernel.num_calls = 0
    found = given(model, processor, inputs)
    assert kernel.num_calls == tower.config.depth
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_gives_other_results_is_not_used(prepared: Callable[[str], Prepared], kernel: Kernel) -> None:
    model, tower, processor = prepared("qwen2_5_vl")
    kernel.broken = True
    said: list[str] = []
    vision.prepare_vision(model, processor, CPU, said.append)
    assert tower.config._attn_implementation == "sdpa"
    (line,) = said
    assert line.startswith("vision: attention goes image by image and window by window, because the decoder is given ")


def test_float32_goes_stretch_by_stretch(
    prepared: Callable[[str], Prepared], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tower, processor = prepared("qwen2_5_vl")
    monkeypatch.undo()
    monkeypatch.setattr(vision, "has_varlen", lambda device: True)
    said: list[str] = []
    inputs = vision.prepare_vision(model, processor, CPU, said.append)
    assert tower.config._attn_implementation == "sdpa"
    (line,) = said
    assert line.endswith("window by window, because the GPU has no kernel for its type or width of heads")
    expected = given(model, processor, VisionInputs(model))
    assert all(map(torch.equal, given(model, processor, inputs), expected))  # what is computed ahead is still used
    assert "image_window_index" in inputs(images(processor)[0])


def test_a_tower_without_stretches_stays_as_it_is(prepared: Callable[[str], Prepared], kernel: Kernel) -> None:
    model, tower, processor = prepared("llava")
    said: list[str] = []
    inputs = vision.prepare_vision(model, processor, CPU, said.append)
    assert said == []
    assert kernel.num_calls == 0
    assert tower.config._attn_implementation == "sdpa"
    made, _ = images(processor)
    assert inputs(made).keys() == made.keys()


def test_what_is_computed_ahead_wrongly_is_not_used(
    prepared: Callable[[str], Prepared], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tower, processor = prepared("qwen2_5_vl")
    right = exporters.precompute_export_inputs

    def wrong(tower: Any, inputs: dict[str, Any]) -> None:
        right(tower, inputs)
        inputs["position_ids"] = inputs["position_ids"].flip(0)

    monkeypatch.setattr(exporters, "precompute_export_inputs", wrong)
    said: list[str] = []
    inputs = vision.prepare_vision(model, processor, CPU, said.append)
    (line,) = said
    assert line.startswith("vision: what follows from the sizes of images is computed on the GPU, because the decoder ")
    assert inputs(images(processor)[0]).keys() == images(processor)[0].keys()
    assert tower.config._attn_implementation == NAME


def test_on_the_cpu_nothing_is_changed(prepared: Callable[[str], Prepared]) -> None:
    model, tower, processor = prepared("qwen2_5_vl")
    inputs = vision.prepare_vision(model, processor, CPU, pytest.fail)
    assert tower.config._attn_implementation == "sdpa"
    assert inputs(images(processor)[0]).keys() == images(processor)[0].keys()
