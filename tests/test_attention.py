"""A packed row is attended to sample by sample: against a dense mask, with and without a sliding window."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import MAKERS
from transformers import AutoModelForImageTextToText

from mmtrain.data.batch import Batch, Segment
from mmtrain.model import attention
from mmtrain.model.attention import NAME, RowLayout, install_attention

LENGTHS = (5, 1, 9, 3)


def layout_of(lengths: tuple[int, ...]) -> RowLayout:
    layout = RowLayout()
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    segments = tuple(
        Segment(n, 0, start, length, 0, 0) for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    layout.set(Batch(ids, ids.bool(), segments, True, {}), torch.device("cpu"))
    return layout


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_within_samples_is_that_of_a_dense_mask(window: int | None, key_heads: int) -> None:
    length = sum(LENGTHS)
    torch.manual_seed(0)
    query = torch.randn(1, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(1, key_heads, length, 8, requires_grad=True) for _ in range(2))
    module = SimpleNamespace(row_layout=layout_of(LENGTHS), is_causal=True)
    found, _ = attention._attention(module, query, key, value, None, scaling=0.3, sliding_window=window)

    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    back = torch.arange(length)[:, None] - torch.arange(length)
    mask = (sample[:, None] == sample) & (back >= 0) & (back < (window or length))
    repeated = (tensor.repeat_interleave(4 // key_heads, 1) for tensor in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_what_is_no_packed_row_goes_through_the_models_own_attention() -> None:
    layout = layout_of(LENGTHS)
    layout.clear()
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    found, _ = attention._attention(SimpleNamespace(row_layout=layout, is_causal=True), query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_row_of_another_length_than_its_batch_is_refused() -> None:
    query = torch.randn(1, 4, sum(LENGTHS) + 1, 8)
    with pytest.raises(RuntimeError):
        attention._attention(SimpleNamespace(row_layout=layout_of(LENGTHS)), query, query, query, None)


def test_it_is_put_into_the_language_model_and_not_into_what_is_saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MAKERS["qwen2_5_vl"](tmp_path_factory.mktemp("model")))
    layout = install_attention(model)
    assert layout is not None
    assert install_attention(model) is layout
    assert model.get_decoder().config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation != NAME
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    assert NAME not in (saved / "config.json").read_text()


def test_attention_of_other_kinds_is_left_alone() -> None:
    for config in (
        SimpleNamespace(_attn_implementation="eager", layer_types=None),
        SimpleNamespace(_attn_implementation="sdpa", layer_types=["full_attention", "chunked_attention"]),
    ):
        assert (
            install_attention(SimpleNamespace(get_decoder=lambda config=config: SimpleNamespace(config=config))) is None
        )
