"""Products with frozen weights, against float64; which of them go to which library."""

import pytest
import torch
from torch import Tensor

from mmtrain.model.kernels import products
from mmtrain.model.kernels.products import ROW_MULTIPLE, WeightProduct, product
from support.builders import Operators

ROWS = [0, 1, ROW_MULTIPLE - 1, ROW_MULTIPLE, 3 * ROW_MULTIPLE, 3 * ROW_MULTIPLE + 5]


def tensors(rows: int, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(24, 40).to(dtype).t() if transposed else torch.randn(40, 24).to(dtype)
    return torch.randn(rows, 24).to(dtype), weight, torch.randn(40).to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_float64(
    rows: int, transposed: bool, with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = tensors(rows, dtype, transposed)
    x.requires_grad_()
    found = WeightProduct.apply(x, weight, bias if with_bias else None)  # type: ignore[no-untyped-call]
    outer = torch.randn(40, rows).to(dtype).t()  # as the gradient of something transposed arrives
    (gradient,) = torch.autograd.grad(found, x, outer)

    expected = x.detach().double() @ weight.double().t() + (bias.double() if with_bias else 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # measured: 4e-6, and a unit in bfloat16's last place
    assert found.dtype == gradient.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(gradient.double(), outer.double() @ weight.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(products._ONEDNN is None, reason="this torch has no such operator")
def test_few_numbers_of_rows_go_to_the_library_that_keeps_a_program_for_each() -> None:
    kept = []
    for rows in range(101):
        x, weight, bias = tensors(rows, torch.float32, transposed=False)
        with Operators() as called:
            product(x, weight, bias)
        kept += [rows] * ("mkldnn._linear_pointwise.default" in called.names)
    assert kept == [32, 64, 96]


@pytest.mark.skipif(products._ONEDNN is None, reason="this torch has no such operator")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_with_gaps_between_its_rows_stays_away_from_it(transposed: bool) -> None:
    x, weight, bias = tensors(ROW_MULTIPLE, torch.float32, transposed)
    with Operators() as called:
        found = product(x, weight.repeat(2, 2)[:40, :24], bias)
    assert "mkldnn._linear_pointwise.default" not in called.names
    assert torch.allclose(found, product(x, weight, bias), atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_without_that_library_the_products_are_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = tensors(rows, torch.float32, transposed=False)
    found = product(x, weight, bias)
    monkeypatch.setattr(products, "_ONEDNN", None)
    assert torch.allclose(found, product(x, weight, bias), atol=1e-5)
