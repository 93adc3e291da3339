"""A packed row is attended to sample by sample: against a dense mask, with and without a sliding window."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmtrain.dataset.batch import Batch, Segment
from mmtrain.model import attention
from mmtrain.model.attention import NAME, PackedRow, fits_varlen, install_attention
from support.builders import MAKERS

LENGTHS = (5, 1, 9, 3)


MODULE = SimpleNamespace(is_causal=True)


def row_of(lengths: tuple[int, ...]) -> PackedRow:
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    segments = tuple(
        Segment(n, 0, start, length, 0, 0) for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    return PackedRow.of(Batch(ids, ids.bool(), segments, True, {}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("length", "lengths", "ends"), [(18, (5, 1, 9, 3), [0, 5, 6, 15, 18]), (20, (5, 1, 9, 3, 2), [0, 5, 6, 15, 18, 20])]
)
def test_the_borders_of_a_row_are_those_of_its_samples_and_of_what_fills_it_up(
    length: int, lengths: tuple[int, ...], ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = tuple(
        Segment(n, 0, start, size, 0, 0) for n, (start, size) in enumerate(zip(ends, LENGTHS, strict=False))
    )
    ids = torch.zeros(1, length, dtype=torch.long)
    batch = Batch(ids, ids.bool(), segments, True, {})
    row = PackedRow.of(batch, torch.device("cpu"))
    assert (row.lengths, row.ends, row.predicting) == (lengths, None, None)
    monkeypatch.setattr(attention, "has_varlen", lambda device: True)
    row = PackedRow.of(batch, torch.device("cpu"))
    assert row.lengths == lengths
    assert row.ends is not None
    assert (row.ends.tolist(), row.ends.dtype) == (ends, torch.int32)


def attend(row: PackedRow | None, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    """What the attention gives without a mask, as for a packed row."""
    out: Tensor = attention._attention(MODULE, query, key, value, None, packed_row=row, **others)[0]
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 8, 9, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_within_samples_is_that_of_a_dense_mask(window: int | None, key_heads: int) -> None:
    length = sum(LENGTHS)
    torch.manual_seed(0)
    query = torch.randn(1, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(1, key_heads, length, 8, requires_grad=True) for _ in range(2))
    found = attend(row_of(LENGTHS), query, key, value, scaling=0.3, sliding_window=window)

    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    back = torch.arange(length)[:, None] - torch.arange(length)
    mask = (sample[:, None] == sample) & (back >= 0) & (back < (window or length))
    keys, values = (tensor.repeat_interleave(4 // key_heads, 1) for tensor in (key, value))
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_the_kernel_for_rows_of_samples_gets_only_what_it_takes() -> None:
    """The rules of torch.nn.attention.varlen: half precision, one type, one width up to 256 that is a multiple of 8."""

    def fits(types: str = "bbb", widths: tuple[int, int] = (64, 64)) -> bool:
        dtypes = [{"b": torch.bfloat16, "h": torch.float16, "f": torch.float32}[letter] for letter in types]
        sizes = (widths[0], widths[0], widths[1])
        query, key, value = (torch.zeros(1, 2, 5, n, dtype=d) for n, d in zip(sizes, dtypes, strict=True))
        return fits_varlen(query, key, value)

    assert fits("bbb")
    assert fits("hhh")
    assert fits(widths=(8, 8))
    assert fits(widths=(256, 256))
    assert not any(fits(types) for types in ("fff", "ffb", "bbf", "bfb", "fbb", "bbh"))
    assert not any(fits(widths=(width, width)) for width in (257, 264, 4, 12, 60))
    assert not fits(widths=(192, 128))
    assert not fits(widths=(128, 192))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_have_no_such_kernel(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.has_varlen(torch.device("cuda", 0)) is expected
    assert not attention.has_varlen(torch.device("cpu"))
    monkeypatch.setattr(attention, "planned_kernels", lambda: "cuda")
    assert attention.has_varlen(torch.device("cpu"))


@pytest.mark.parametrize("has_flag", [True, False])
def test_a_kernel_that_knows_no_groups_is_given_no_flag(has_flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def kernel(query: Tensor, *others: Any, **options: Any) -> Tensor:
        given.append(options)
        return query

    monkeypatch.setattr(attention, "_HAS_GQA_FLAG", has_flag)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    row = torch.zeros(5, 4, 8)
    attention.varlen(row, row[:, :2], row[:, :2], torch.tensor([0, 5]), 5, 0.3)
    assert given == [{"scale": 0.3, "window_size": (-1, -1)} | ({"enable_gqa": True} if has_flag else {})]


class Varlen:
    """Stands for torch's kernel: sees a token and so many before it as the window's first number says, -1 for all."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        self.dtypes += [query.dtype, key.dtype, value.dtype]
        assert scale is not None
        assert enable_gqa == (query.shape[1] != key.shape[1])
        ends = query_ends.tolist()
        assert key_ends.tolist() == ends
        assert query_ends.dtype == torch.int32
        assert longest_query == longest_key == max(b - a for a, b in itertools.pairwise(ends))
        each, at = query.shape[1] // key.shape[1], torch.arange(ends[-1])
        sample = torch.bucketize(at, torch.tensor(ends[1:]), right=True)
        back = at[:, None] - at
        left, right = window_size
        seen = (sample[:, None] == sample) & (back >= -right) & ((back <= left) | (left < 0))
        q, k, v = (
            t.float().transpose(0, 1) for t in (query, key.repeat_interleave(each, 1), value.repeat_interleave(each, 1))
        )
        logits = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def with_ends() -> PackedRow:
    return PackedRow(LENGTHS, torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_gets_samples_and_window(
    window: int | None, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8).bfloat16()
    key, value = (torch.randn(1, key_heads, sum(LENGTHS), 8).bfloat16() for _ in range(2))
    monkeypatch.setattr(attention, "varlen_attn", kernel := Varlen())
    found = attend(with_ends(), query, key, value, scaling=0.3, sliding_window=window)
    assert kernel.dtypes
    wide = (tensor.float() for tensor in (query, key, value))
    expected = attend(row_of(LENGTHS), *wide, scaling=0.3, sliding_window=window)
    assert found.shape == expected.shape
    assert torch.allclose(found.float(), expected, atol=0.02)  # a token more or less in the window: 0.3 and more


def test_what_the_kernel_does_not_take_goes_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(attention, "varlen_attn", refuse)
    monkeypatch.setattr(attention, "_in_blocks", lambda query, value: False)  # as on a GPU
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    assert torch.equal(attend(with_ends(), query, key, value), attend(row_of(LENGTHS), query, key, value))


def test_under_autocast_the_kernel_gets_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 embeddings make queries and keys float32 and leave the values bfloat16."""
    monkeypatch.setattr(attention, "varlen_attn", kernel := Varlen())
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(with_ends(), query, key, value.bfloat16(), scaling=0.3)
    assert set(kernel.dtypes) == {torch.bfloat16}
    assert found.dtype == torch.bfloat16


def test_what_is_no_packed_row_goes_through_the_models_own_attention() -> None:
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    found = attend(None, query, key, value)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    masked, weights = attention._attention(MODULE, query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(masked, expected, atol=1e-6)
    assert weights is None


def test_without_a_scaling_of_its_own_a_row_is_scaled_by_the_root_of_the_width() -> None:
    query, key, value = (torch.randn(1, 4, 6, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.allclose(attend(row_of((6,)), query, key, value), expected, atol=1e-6)


def test_a_packed_row_has_no_mask_and_padded_rows_have_that_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_mask", lambda *args, **kwargs: (args, kwargs))
    assert attention._mask(3, attention_mask=None, q_length=2) is None
    mask: Any = torch.ones(2, 3)
    assert attention._mask(3, attention_mask=mask, q_length=2) == ((3,), {"attention_mask": mask, "q_length": 2})


def test_a_row_of_another_length_than_its_batch_is_refused() -> None:
    query = torch.randn(1, 4, sum(LENGTHS) + 1, 8)
    with pytest.raises(RuntimeError, match=r"^19 tokens in a row whose samples have 18$"):
        attend(row_of(LENGTHS), query, query, query)


def test_it_is_put_into_the_language_model_and_not_into_what_is_saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MAKERS["qwen2_5_vl"](tmp_path_factory.mktemp("model")))
    assert install_attention(model)
    assert install_attention(model)
    assert model.get_decoder().config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation != NAME
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    assert NAME not in (saved / "config.json").read_text()


def with_decoder(decoder: Any) -> Any:
    return SimpleNamespace(get_decoder=lambda: decoder, get_output_embeddings=lambda: None)


@pytest.mark.parametrize(
    "layers", [{}, {"layer_types": None}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_attention_with_a_sliding_window_or_without_is_replaced(layers: dict[str, Any]) -> None:
    chosen: list[str] = []
    config = SimpleNamespace(_attn_implementation="sdpa", **layers)
    decoder = SimpleNamespace(config=config, set_attn_implementation=chosen.append)
    assert install_attention(with_decoder(decoder))
    assert chosen == [NAME]


def test_attention_of_other_kinds_is_left_alone() -> None:
    for config in (
        SimpleNamespace(_attn_implementation="eager", layer_types=None),
        SimpleNamespace(_attn_implementation="sdpa", layer_types=["full_attention", "chunked_attention"]),
    ):
        assert not install_attention(with_decoder(SimpleNamespace(config=config)))


@pytest.mark.parametrize("window", [None, 3])
def test_key_heads_are_repeated_where_a_sample_is_computed_alone(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA torch would choose its plain formula in float32, which stores all probabilities."""
    query, key, value = (torch.randn(1, heads, 5, 16) for heads in (4, 2, 2))
    computed, shapes = F.scaled_dot_product_attention, list[tuple[int, ...]]()

    def seen(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shapes.extend((key.shape, value.shape))
        assert "enable_gqa" not in options
        return computed(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    found = attention._causal(query, key, value, None, window)
    assert shapes == [query.shape] * 2
    mask = torch.ones(5, 5).tril() * (1 if window is None else torch.ones(5, 5).triu(1 - window))
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(mask == 0, -torch.inf)
    assert torch.allclose(found, scores.softmax(-1) @ value.repeat_interleave(2, 1), atol=1e-6)
