"""A trainable parameter that the loss depends on and that has no gradient stops the run; an unused one does not."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.errors import FINAL_CODES, LostGradientError
from mmtrain.model.components import Components
from mmtrain.train.lost_gradients import LostGradients, missing_gradients_are_errors
from mmtrain.train.step import Learner, train_step
from support.learning import LORA, MIXED, learner_for, step_of

WITH_IMAGES, TEXT_ONLY = [0, 2], [1, 4]
"""Samples of the mixed data."""
Make = Callable[..., Config]


def without_autograd(module: Any) -> None:
    """Have `module` compute its result as in inference."""
    forward = module.forward
    module.forward = torch.no_grad()(forward)


def adapter(learner: Learner, layer: str) -> Any:
    return learner.model.get_base_model().get_submodule(layer).lora_B["default"]


def trials(learner: Learner) -> list[int]:
    """Gets an item for every forward pass of the model that takes no gradients."""
    calls: list[int] = []
    learner.root.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else calls.append(1))
    return calls


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("microbatches", ["auto", 2])  # summed as they come, and in a tree
def test_a_gradient_that_is_lost_stops_the_step(make_config: Make, microbatches: str | int) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", MIXED, kernels="off", microbatches=microbatches))
    layer = "model.language_model.layers.1.self_attn.o_proj"
    without_autograd(adapter(learner, layer))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    batches = Loader(dataset.train, dataset.encoder.processor, packing=True).batches([TEXT_ONLY, WITH_IMAGES])
    with pytest.raises(LostGradientError) as caught:
        train_step(learner, batches, 10, 7, 1.0)
    (line,) = caught.value.faults
    assert line.startswith("step 7: tune.language: ")
    assert f"{layer}.lora_" in line
    assert "has no gradient" in line
    assert caught.value.exit_code == 9
    assert caught.value.exit_code in FINAL_CODES
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


def test_it_is_found_in_vision_where_there_are_images(make_config: Make) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", {"vision": LORA}, kernels="off"))
    without_autograd(adapter(learner, "model.visual.blocks.1.attn.proj"))
    step_of(learner, dataset, [TEXT_ONLY], packing=True)
    with pytest.raises(LostGradientError, match=r"tune\.vision: .*visual\.blocks\.1\.attn\.proj"):
        step_of(learner, dataset, [WITH_IMAGES], packing=True)


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("tune", [MIXED, {"vision": LORA}], ids=["mixed", "vision alone"])
def test_what_a_step_of_text_does_not_use_has_the_gradient_zero(make_config: Make, tune: dict[str, Any]) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", tune))
    calls = trials(learner)
    _, gradients = step_of(learner, dataset, [TEXT_ONLY], packing=True)
    outside = [gradient for name, gradient in gradients.items() if "visual" in name]
    assert len(outside) > 10
    assert not any(gradient.any() for gradient in outside)
    assert len(calls) == 2
    step_of(learner, dataset, [TEXT_ONLY], packing=True)
    assert len(calls) == 2  # known from before
    _, gradients = step_of(learner, dataset, [WITH_IMAGES], packing=True)
    assert all(gradient.any() for name, gradient in gradients.items() if "visual" in name)
    assert len(calls) == 2  # every parameter has a gradient


@pytest.mark.slow("several runs")
def test_layers_that_the_model_never_uses_are_no_fault(make_config: Make) -> None:
    """LLaVA-1.5 takes the features before the last layer of its vision tower."""
    learner, dataset = learner_for(make_config("llava", {"vision": {"mode": "full"}, "language": LORA}))
    calls = trials(learner)
    for _ in range(2):
        _, gradients = step_of(learner, dataset, [WITH_IMAGES], packing=True)
        assert len(calls) == 2
    unused = {name for name, gradient in gradients.items() if not gradient.any()}
    assert unused
    assert all("layers.2." in name or "post_layernorm" in name for name in unused)


@pytest.mark.slow("several runs")
def test_the_trial_changes_no_weight_and_no_random_state(make_config: Make) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", {**MIXED, "language": {**LORA, "dropout": 0.2}}))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    calls, state = trials(learner), torch.get_rng_state()
    step_of(learner, dataset, [TEXT_ONLY], packing=True)
    assert len(calls) == 2
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_process_without_a_micro_batch_has_nothing_to_check(make_config: Make) -> None:
    learner, _ = learner_for(make_config("text", {"language": LORA}))
    train_step(learner, [None, None], 10, 1, 1.0)


@pytest.fixture
def operator() -> Iterator[Any]:
    """An operator that adds 1 and has no gradient."""
    library: Any = torch.library.Library("without_gradient", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("plus_one(Tensor x) -> Tensor")
    library.impl("plus_one", lambda x: x + 1, "CPU")
    yield torch.ops.without_gradient.plus_one
    library._destroy()


@pytest.mark.filterwarnings("default", "ignore::FutureWarning")  # the run's own filter decides, not pytest's
@missing_gradients_are_errors()
def test_an_operator_without_a_gradient_stops_the_step(make_config: Make, operator: Any) -> None:
    """Next to a residual connection every parameter still has a gradient, a wrong one."""
    learner, dataset = learner_for(make_config("text", {"language": LORA}, kernels="off"))
    mlp = learner.model.get_base_model().get_decoder().layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: operator(forward(x))
    with pytest.raises(LostGradientError, match=r"step 3: the operator 'without_gradient::plus_one' .* no gradient"):
        step_of(learner, dataset, [TEXT_ONLY], packing=True)


class Experts(nn.Module):
    """Routes all tokens to one of two experts. Called like the micro-batch it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
        self.loses_gradients = False

    def forward(self, chosen: int) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.loses_gradients):
            out: Tensor = self.experts[chosen](torch.ones(4, 3))[:, 0]
        return out


def test_an_expert_without_tokens_is_no_fault_and_one_with_tokens_is() -> None:
    model = Experts()
    check = LostGradients(model, _all_language())
    for step, chosen in enumerate((0, 1)):
        model(chosen).sum().backward()
        check.check(step, False, partial(model, chosen))
        assert (model.experts[1].weight.grad is None) == (chosen == 0)
        model.zero_grad()
    check = LostGradients(model, _all_language())
    model.loses_gradients = True
    with pytest.raises(LostGradientError, match=r"step 2: tune\.language: 'experts\.1\.(weight|bias)'"):
        check.check(2, False, lambda: model(1))


def _all_language() -> Components:
    components = Components.__new__(Components)
    components._roots = {"": "language"}
    return components
