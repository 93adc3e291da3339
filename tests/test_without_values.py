"""Tensors without values: shapes, what they take of memory, and what a program gets that asks for a value."""

import pytest
import torch
from torch import nn

from mmtrain.model.live_memory import LiveMemory
from mmtrain.model.without_values import NeedsValuesError, TensorWithoutValues, WithoutValues


def test_a_layer_takes_the_memory_that_it_would_and_has_no_values() -> None:
    memory = LiveMemory()
    with WithoutValues(memory):
        layer = nn.Linear(1000, 50, bias=False)
        assert isinstance(layer.weight, TensorWithoutValues)
        assert memory.num_bytes == 4 * 50_000
        out = layer(torch.ones(7, 1000))
        assert (out.shape, out.dtype, out.device.type) == ((7, 50), torch.float32, "cpu")
        torch.autograd.backward(out.sum())
        assert layer.weight.grad is not None
        assert layer.weight.grad.shape == (50, 1000)
        del out
        assert memory.num_bytes == 2 * 4 * 50_000
        assert memory.peak >= 2 * 4 * 50_000 + 4 * 7_000


def test_views_share_memory_and_writing_in_place_takes_none() -> None:
    memory = LiveMemory()
    with WithoutValues(memory):
        x = torch.zeros(100, 4)
        view = x.t()[:2].flatten(0, 0)
        same = x.add_(1).mul_(2)
        assert same is x
        assert (view.shape, memory.num_bytes) == ((2, 100), 1600)
        del x, same
        assert memory.num_bytes == 1600
        del view
        assert memory.num_bytes == 0


def test_autocast_gives_the_types_of_the_cpu() -> None:
    with WithoutValues(LiveMemory()), torch.autocast("cpu", torch.bfloat16):
        x, layer = torch.ones(2, 8), nn.Linear(8, 8)
        assert layer(x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32


def test_numbers_that_follow_from_no_weight_are_right() -> None:
    with WithoutValues(LiveMemory()):
        ids = torch.tensor([3, 1, 2])
        assert ids.cumsum(0).tolist() == [3, 4, 6]
        assert (ids > 1).nonzero().flatten().tolist() == [0, 2]
        step = torch.tensor(1.0)
        step += 1
        assert step.item() == 2.0
        table = nn.Embedding(9, 5)(ids)
        assert table[ids > 1].shape == (2, 5)


def test_a_question_about_values_is_answered_so_that_the_program_continues() -> None:
    with WithoutValues(LiveMemory()):
        x = torch.randn(3, 2)
        assert torch.equal(x, x + 1)
        assert not torch.equal(x, torch.randn(2, 3))
        assert bool((x > 5).all())
        assert x.sum().item() == 0.0
        assert x.tolist() == [[0.0, 0.0]] * 3


def test_a_shape_that_depends_on_values_is_refused() -> None:
    with WithoutValues(LiveMemory()):
        x = torch.randn(3, 2)
        with pytest.raises(NeedsValuesError, match="nonzero"):
            (x > 0).nonzero()
        with pytest.raises(NeedsValuesError, match="mask"):
            x[x > 0]
    with pytest.raises(NeedsValuesError, match="outside"):
        x + 1


def test_a_compiled_kernel_takes_memory_for_its_result_alone() -> None:
    memory = LiveMemory()
    with WithoutValues(memory) as counting:
        x = torch.ones(1000)
        memory.reset()
        out = counting.as_one_kernel(lambda value: (value * 2).exp().sum(0, keepdim=True), x)
        assert (out.shape, memory.peak - 4000) == ((1,), 4)
