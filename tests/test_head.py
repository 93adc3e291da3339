"""The head and the cross-entropy in chunks, against full logits; heads that scale or cap them are left alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmtrain.dataset.batch import Batch, Segment
from mmtrain.model import head
from mmtrain.model.attention import KEYWORD, PackedRow
from mmtrain.model.head import (
    TOKEN_BLOCK,
    VOCABULARY_BLOCK,
    FrozenHeadNLL,
    HeadKind,
    accept_positions,
    find_head_kind,
    frozen_head,
    hidden_states,
)
from mmtrain.model.loss import supervised_logits, supervised_nll
from support.builders import DECODER_SIZES as SIZES


def heads(num_tokens: int, vocabulary_size: int, with_bias: bool, size: float = 1.0) -> tuple[Any, ...]:
    """Hidden states, weight, bias and targets."""
    torch.manual_seed(0)
    hidden, weight = size * torch.randn(num_tokens, 24), torch.randn(vocabulary_size, 24)
    bias = 3.0 * torch.randn(vocabulary_size) if with_bias else None
    return hidden.requires_grad_(), weight, bias, torch.randint(0, vocabulary_size, (num_tokens,))


@pytest.mark.parametrize("num_tokens", [0, 1, TOKEN_BLOCK, 2 * TOKEN_BLOCK + 7])
@pytest.mark.parametrize("vocabulary_size", [101, VOCABULARY_BLOCK, 2 * VOCABULARY_BLOCK + 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_blocks_give_the_loss_and_the_gradient_of_full_logits(
    num_tokens: int, vocabulary_size: int, with_bias: bool
) -> None:
    hidden, weight, bias, targets = heads(num_tokens, vocabulary_size, with_bias)
    outer = torch.rand(num_tokens)
    nll, _ = FrozenHeadNLL.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad((nll * outer).sum(), hidden)

    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * outer).sum(), hidden)
    assert torch.allclose(nll.double(), expected, atol=1e-5)
    _, right = FrozenHeadNLL.apply(hidden.detach(), weight, bias, targets)  # type: ignore[no-untyped-call]
    assert torch.equal(right, logits.argmax(-1) == targets)
    assert torch.allclose(found.double(), gradient.double(), atol=1e-5)


@pytest.mark.parametrize("vocabulary_size", [101, 2 * VOCABULARY_BLOCK + 5])
def test_a_word_that_wins_by_hundreds_overflows_nothing(vocabulary_size: int) -> None:
    hidden, weight, _, targets = heads(40, vocabulary_size, False, size=50.0)
    targets[:20] = (hidden @ weight.t())[:20].argmax(-1)
    nll, _ = FrozenHeadNLL.apply(hidden, weight, None, targets)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad(nll.sum(), hidden)
    logits = hidden.double() @ weight.double().t()
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    assert expected.max() > 300
    assert torch.allclose(nll.double(), expected, rtol=1e-5, atol=1e-3)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-4


def test_the_right_word_is_found_in_any_block_and_the_first_of_equals_counts() -> None:
    weight = torch.zeros(2 * VOCABULARY_BLOCK + 5, 4)
    weight[[3, VOCABULARY_BLOCK + 3, 2 * VOCABULARY_BLOCK + 3], 0] = 1.0
    weight[VOCABULARY_BLOCK + 9, 1] = weight[2 * VOCABULARY_BLOCK + 4, 2] = 1.0
    hidden = torch.eye(4)[:3]
    for targets, expected in (
        ([3, VOCABULARY_BLOCK + 9, 2 * VOCABULARY_BLOCK + 4], True),
        ([VOCABULARY_BLOCK + 3, 9, 4], False),
    ):
        _, right = FrozenHeadNLL.apply(hidden, weight, None, torch.tensor(targets))  # type: ignore[no-untyped-call]
        assert right.tolist() == [expected] * 3


def test_in_bfloat16_only_the_products_are_rounded() -> None:
    hidden, weight, _, targets = heads(300, 2 * VOCABULARY_BLOCK + 5, False)
    low, rounded = hidden.detach().bfloat16().requires_grad_(), weight.bfloat16()
    nll, _ = FrozenHeadNLL.apply(low, rounded, None, targets)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad(nll.sum(), low)
    exact = low.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ rounded.double().t(), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert nll.dtype == torch.float32
    assert float((nll - expected).detach().abs().mean()) < 0.02  # measured: 0.0155, a logit of ten rounded to bfloat16
    assert float((found.double() - gradient).norm() / gradient.norm()) < 0.01  # measured: 0.0072


def test_in_bfloat16_the_sum_over_many_blocks_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are nearly equal: in bfloat16 their sum would lose what makes them differ."""
    monkeypatch.setattr(head, "VOCABULARY_BLOCK", 8)
    hidden, noise, _, targets = heads(50, 1000, False, size=0.1)
    low, rounded = hidden.detach().bfloat16().requires_grad_(), (2 + 0.1 * noise).bfloat16()
    nll, _ = FrozenHeadNLL.apply(low, rounded, None, targets)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad(nll.sum(), low)
    exact = low.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ rounded.double().t(), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    error = float((found.double() - gradient).norm() / gradient.norm())
    assert error < 0.03  # measured: 0.0032, and 1.2 with a sum in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odds", [3.0, 7.0, 14.0])
def test_a_token_that_is_almost_certain_still_has_the_right_gradient(dtype: torch.dtype, odds: float) -> None:
    """With a thousand words next to the target, each as likely as the others, but for their noise."""
    torch.manual_seed(0)
    weight = torch.randn(1000, 64) * 0.1
    targets = torch.arange(0, 1000, 10)
    direction = weight[targets] / weight[targets].square().sum(-1, keepdim=True)
    hidden, rounded = ((odds + 6.9) * direction).to(dtype).requires_grad_(), weight.to(dtype)
    nll, _ = FrozenHeadNLL.apply(hidden, rounded, None, targets)  # type: ignore[no-untyped-call]
    (found,) = torch.autograd.grad(nll.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ rounded.double().t(), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    tolerance = 2e-5 if dtype == torch.float32 else 0.07  # measured: 7e-6, and 0.056: logits of 20 rounded to bfloat16
    assert torch.allclose(nll.double(), expected, rtol=tolerance, atol=0)
    errors = (found.double() - gradient).norm(dim=-1) / gradient.norm(dim=-1)
    assert float(errors.max()) < tolerance


def batch_of(length: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 211, (1, length), generator=generator)
    supervised = torch.rand(1, length, generator=generator) < 0.5
    supervised[0, 0] = False
    return Batch(ids, supervised, (Segment(0, 0, 0, length, 0, 0),), True, {})


KINDS: dict[str, tuple[Any, Any, str]] = {
    "plain": (LlamaForCausalLM, LlamaConfig(**SIZES), "plain"),
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), "plain"),
    "capped": (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=0.5), "own"),
    "scaled": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25), "own"),
    "scaled 2": (Cohere2ForCausalLM, Cohere2Config(**SIZES, logit_scale=0.25), "own"),
    "divided": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0), "own"),
}
"""By name: class, config and kind of the head."""


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model_class, config, _ = KINDS[name]
    return model_class(config).eval().requires_grad_(False)


def nll_of(model: Any, batch: Batch, kind: HeadKind | None = None) -> tuple[Tensor, Tensor]:
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    return supervised_nll(model, find_head_kind(model, print) if kind is None else kind, inputs, batch)


def expected_nll(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """By full logits, and whether the target is the likeliest."""
    logits = model(input_ids=batch.input_ids).logits[0, :-1].float()
    chosen = batch.supervised[0, 1:]
    targets = batch.input_ids[0, 1:][chosen]
    return F.cross_entropy(logits[chosen], targets, reduction="none"), logits[chosen].argmax(-1) == targets


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_head_gives_the_models_own_logits(name: str) -> None:
    model, batch = model_of(name), batch_of(40)
    assert frozen_head(model) is not None
    assert find_head_kind(model, print) == KINDS[name][2]
    nll, _ = nll_of(model, batch)
    expected, right = expected_nll(model, batch)
    assert torch.allclose(nll, expected, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(nll_of(model, batch)[1], right)


def test_padded_rows_are_predicted_from_the_position_before() -> None:
    """The last position of a row predicts nothing, and not the first of the next."""
    model = model_of("plain")
    ids = torch.randint(3, 211, (3, 7), generator=torch.Generator().manual_seed(5))
    supervised = torch.tensor([[0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    segments = tuple(Segment(n, n, 0, 7, 0, 0) for n in range(3))
    nll, _ = nll_of(model, Batch(ids, supervised, segments, False, {}))
    logits = model(input_ids=ids).logits[:, :-1][supervised[:, 1:]]
    assert torch.allclose(nll, F.cross_entropy(logits, ids[supervised], reduction="none"), atol=1e-5)


def test_a_packed_row_says_where_tokens_are_predicted() -> None:
    """The last layer of the model computes no more than these."""
    model, batch, given = model_of("plain"), batch_of(20), list[Any]()
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    inputs = {"input_ids": batch.input_ids, "use_cache": False, KEYWORD: PackedRow((20,))}
    supervised_nll(model, "plain", inputs, batch)
    (kwargs,) = given
    expected = [i - 1 for i in range(20) if batch.supervised[0, i]]
    assert kwargs["logits_to_keep"].tolist() == kwargs[KEYWORD].predicting.tolist() == expected
    assert kwargs[KEYWORD].lengths == (20,)
    assert inputs[KEYWORD].predicting is None  # type: ignore[attr-defined]


def test_a_head_of_another_class_is_the_models_own() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model, batch = model_of("plain"), batch_of(20)
    model.lm_head.__class__ = Halved
    assert find_head_kind(model, print) == "own"
    assert frozen_head(model) is None
    assert torch.allclose(nll_of(model, batch)[0], expected_nll(model, batch)[0], atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_a_range_of_supervised_tokens_are_the_models_own(name: str) -> None:
    model, batch = model_of(name), batch_of(40)
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    expected = model(input_ids=batch.input_ids).logits[0, :-1][batch.supervised[0, 1:]]
    found = supervised_logits(model, find_head_kind(model, print), inputs, batch)
    for rows in (slice(0, 5), slice(5, None)):
        assert torch.allclose(found(rows), expected[rows], atol=1e-5)
    whole = supervised_logits(model.requires_grad_(), find_head_kind(model, print), inputs, batch)  # a trained head
    assert torch.allclose(whole(slice(0, 5)), expected[:5], atol=1e-5)
    half = supervised_logits(model.bfloat16(), find_head_kind(model, print), inputs, batch)(slice(0, 5))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_hidden_states_are_the_input_of_the_head(name: str) -> None:
    model, positions = model_of(name), torch.tensor([3, 7])
    ids = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(1))
    found = hidden_states(model, {"input_ids": ids, "use_cache": False, "logits_to_keep": positions})
    expected = model.model(input_ids=ids).last_hidden_state[:, positions].flatten(0, 1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert model(input_ids=ids).logits.shape == (2, 9, 211)  # the head is as it was


@pytest.mark.parametrize("name", KINDS)
def test_the_backbone_runs_once_per_micro_batch(name: str) -> None:
    model, calls = model_of(name), list[int]()
    kind = find_head_kind(model, print)
    model.base_model.register_forward_hook(lambda *args: calls.append(1))
    for num_batches in (1, 2, 3):
        nll_of(model, batch_of(20), kind)
        assert len(calls) == num_batches


def test_the_trial_of_the_head_leaves_the_model_as_it_was() -> None:
    model, batch = model_of("plain"), batch_of(20)
    before = model(input_ids=batch.input_ids).logits
    model.base_model.register_forward_hook(lambda *args: torch.rand(1) and None)  # a model that draws
    state = torch.get_rng_state()
    find_head_kind(model, print)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(input_ids=batch.input_ids).logits, before)


def test_a_model_that_does_not_run_on_one_token_gives_its_own_logits_and_says_so() -> None:
    model, batch, lines = model_of("plain"), batch_of(20), list[str]()

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            raise ValueError("images are missing:\nall of them")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    assert (kind := find_head_kind(model, lines.append)) == "own"
    assert lines == [
        "head: all logits at once, the model fails on one token: ValueError: images are missing: all of them"
    ]
    assert torch.allclose(nll_of(model, batch, kind)[0], expected_nll(model, batch)[0], atol=1e-5)


def test_logits_that_are_no_longer_those_of_the_head_are_refused() -> None:
    model = model_of("divided")
    with pytest.raises(RuntimeError, match=r"^the logits of the model are no longer .* when it was loaded$"):
        nll_of(model, batch_of(20), "plain")
    assert torch.allclose(nll_of(model, batch_of(20))[0], expected_nll(model, batch_of(20))[0], atol=1e-5)


def test_a_trained_head_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert frozen_head(model) is None
    nll_of(model, batch_of(30))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert model.lm_head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert frozen_head(model) is model.lm_head


def test_where_the_head_is_trained_the_cross_entropy_is_in_float32_and_the_likeliest_token_counts() -> None:
    """In bfloat16 the loss would be rounded to one of 128 steps between two powers of two."""
    torch.manual_seed(0)
    model, seen = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().bfloat16(), list[Tensor]()
    batch = batch_of(60)
    with torch.no_grad():
        likeliest = model(input_ids=batch.input_ids).logits[0, 40].argmax()
    batch.input_ids[0, 41], batch.supervised[0, 41] = likeliest, True
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits.detach().double()[0]))
    nll, right = nll_of(model, batch, "plain")
    (logits,) = seen
    targets = batch.input_ids[batch.supervised]
    expected = logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]
    assert nll.dtype == torch.float32
    assert torch.allclose(nll.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(right, logits.argmax(-1) == targets)
    assert 0 < int(right.sum()) < len(right)


class _AllLogits(LlamaForCausalLM):  # type: ignore[misc]
    """A model in the manner of MiniCPM-V 4.6, whose forward always gives all logits."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        inputs.pop("logits_to_keep", None)
        return super().forward(input_ids=input_ids, **inputs)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_model_that_gives_all_logits_takes_the_positions_to_keep(with_adapter: bool) -> None:
    torch.manual_seed(0)
    made: Any = _AllLogits(LlamaConfig(**SIZES))
    model: Any = made.eval()
    ids = torch.randint(0, SIZES["vocab_size"], (2, 9))
    supervised = torch.rand(2, 9) > 0.5
    assert model(input_ids=ids, logits_to_keep=supervised).logits.shape[:2] == (2, 9)
    accept_positions(model)
    assert find_head_kind(model, print) == "plain"
    if with_adapter:  # which replaces the head
        adapter = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter).eval()
    logits = model(input_ids=ids).logits
    assert logits.shape == (2, 9, SIZES["vocab_size"])
    assert torch.allclose(model(input_ids=ids, logits_to_keep=supervised).logits, logits[supervised], atol=1e-6)
    assert torch.allclose(
        model(input_ids=ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], atol=1e-6
    )
