"""Formulas compiled into one pass, as on CUDA; here through the compiler's C++ backend."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama

from mmtrain.model.kernels import compiled, rotary
from mmtrain.model.kernels.install import install
from mmtrain.model.kernels.rowwise import (
    SILU,
    gate_up,
    gate_up_gradients,
    normalize,
    normalize_gradient,
    normalized,
    rms_norm,
)
from mmtrain.model.kernels.trial import kernel_of
from support.kernel_models import adapted, decoder_of, gradients_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a device on which formulas are compiled."""
    caches = (compiled._compiled, compiled.compile_fault, rotary._forward)

    def forget() -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for cache in caches:
            cache.cache_clear()

    monkeypatch.setattr(compiled, "gains_by_compiling", lambda device: True)
    forget()
    yield
    forget()


def num_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """As near as rounding once leaves it."""
    tolerance = 5e-6 if dtype == torch.float32 else 2**-8
    return torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow("compiles the formulas of a model with a C++ compiler")
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_formulas_are_exact_and_compiled_once(dtype: torch.dtype, compiling: None) -> None:
    assert compiled.compile_fault(torch.device("cpu")) is None
    before, first = num_compiled(), 300
    for rows in (first, 2, 77, 1000):
        x, y, gate, up, outer = (torch.randn(rows, width).to(dtype) for width in (48, 48, 80, 80, 80))
        weight = torch.rand(48).to(dtype)
        out, inverse = normalize(x, weight, 1e-5)
        again, gated = normalized(x, weight, inverse), torch.empty_like(up)
        to_x, to_pair = normalize_gradient(y, x, weight, inverse), gate_up_gradients(gate, up, outer, SILU, gated)

        exact, wide_gate, wide_up = (tensor.double().requires_grad_() for tensor in (x, gate, up))
        expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        product = wide_gate / (1 + (-wide_gate).exp()) * wide_up
        gradients = torch.autograd.grad(expected, exact, y.double())
        gradients += torch.autograd.grad(product, (wide_gate, wide_up), outer.double())
        values = (expected, expected, product, product, *gradients)
        for found, value in zip((out, again, gate_up(gate, up, SILU), gated, to_x, *to_pair), values, strict=True):
            assert found.dtype == dtype
            assert near(found, value.detach(), dtype)
        if rows == first:
            assert num_compiled() == before + 5
    assert num_compiled() == before + 5


@pytest.mark.slow("compiles the formulas of a model with a C++ compiler")
@needs_compiler
@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "glm4"])  # 1 + weight and GELU; halves; pairs rotated
def test_a_compiled_model_gives_the_gradients_of_the_plain_one(family: str, compiling: None) -> None:
    exact = gradients_of(adapted({}, fused=False, make=partial(decoder_of, family)))
    plain, model = (adapted({}, False, torch.bfloat16, partial(decoder_of, family)) for _ in range(2))
    report = install(model)
    assert (report.num_fused, report.num_rotary) == (2, 2)
    assert report.line.endswith("other modules; compiled")
    assert ", 2 rotary embeddings, " in report.line
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients_of(plain), gradients_of(model)

    def distance(gradients: dict[str, Tensor]) -> float:
        return max(float((gradients[name] - value).norm() / value.norm()) for name, value in exact.items())

    assert distance(found) < 1.5 * distance(expected)


@pytest.mark.slow("compiles the formulas of a model with a C++ compiler")
@needs_compiler
def test_a_trial_compiles_what_a_step_needs(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any length; and nothing as large as the hidden states is kept in float32."""
    monkeypatch.setattr("mmtrain.model.kernels.trial.ROW_MULTIPLE", 40)  # the tiny model's width is 32 as well
    model = adapted({}, fused=False, dtype=torch.bfloat16)
    install(model)
    compiled_by_trials = num_compiled()
    wide = []
    for length in (500, 90, 301):

        def note(tensor: Tensor, values: int = length * model.config.hidden_size) -> Tensor:
            wide.append(tensor.dtype == torch.float32 and tensor.numel() >= values)
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            ids = torch.arange(length)[None] % 61
            hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        (hidden * torch.randn_like(hidden)).sum().backward()
    assert num_compiled() == compiled_by_trials > 0
    assert wide
    assert not any(wide)


def test_where_nothing_compiles_a_line_says_why_and_nothing_else_changes(
    compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation.\nMore on it")

    monkeypatch.setattr(torch, "compile", fail)
    model = adapted({}, fused=False)
    line = install(model).line
    assert line.endswith(
        "not compiled, which is slower: RuntimeError: Cannot find a working triton installation. More on it"
    )
    found, expected = gradients_of(model), gradients_of(adapted({}, fused=True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_wrong_code_is_not_used(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda formula, **options: lambda *args: formula(*args) * 1.001)
    assert install(adapted({}, fused=False)).line.endswith("slower: compiled code gives wrong values")


def without_compiling(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """The formulas run as they are, rotary embeddings give other queries."""

    def compiled_rotary(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> tuple[Tensor, Tensor]:
            query, key = function(*args)
            return change(query), key

        return call

    monkeypatch.setattr(compiled, "compiled", lambda formula: formula)
    monkeypatch.setattr(rotary, "compiled", compiled_rotary)


ROTARY = ["llama", "qwen3", "granite", "gemma2", "phi3", "glm4", "olmo2", "cohere", "bitnet", "gpt_neox"]


@pytest.mark.parametrize("family", ROTARY)
def test_attention_of_a_family_finds_the_compiled_function(
    family: str, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    without_compiling(monkeypatch, lambda query: seen.append(query) or query)  # type: ignore[func-returns-value]
    make = partial(decoder_of, family)
    model, plain = (adapted({}, fused=False, make=make) for _ in range(2))
    assert install(model).num_rotary == 2
    seen.clear()
    found, expected = gradients_of(model), gradients_of(plain)
    assert len(seen) == 2
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_a_wrong_rotary_embedding_is_not_used(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    without_compiling(monkeypatch, lambda query: -query)
    model = adapted({}, fused=False)
    report = install(model)
    assert (report.num_rotary, report.num_fused) == (0, 2)
    assert not any(isinstance(kernel_of(module), rotary.CompiledRotary) for module in model.modules())
    assert modeling_llama.apply_rotary_pos_emb is own


def test_autocast_does_not_widen_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it would give torch's kernel a float32 copy of its input."""
    states = []
    own = F.rms_norm

    def rms(*args: Any) -> Tensor:
        states.append((torch.is_autocast_enabled("cpu"), args[0].dtype))
        return own(*args)

    monkeypatch.setattr(F, "rms_norm", rms)
    monkeypatch.setattr("mmtrain.model.kernels.rowwise._is_cached", lambda value: False)
    with torch.autocast("cpu", torch.bfloat16):
        rms_norm(torch.randn(3, 8).bfloat16(), torch.rand(8).bfloat16(), 1e-6)
    assert states == [(False, torch.bfloat16)]
